"""Supervised fine-tuning: next-token cross entropy on the responses of demonstrations.

Shapes: B sequences, S tokens of prompt and response.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from quartet.model_folder import find_model
from trainer.batching import micro_batches, pad_right, response_mask
from trainer.config import SftSettings
from trainer.data import load_demonstrations
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import DataError
from trainer.models import TokenLogprobs, load_policy, load_tokenizer, padding_id, save_model
from trainer.optimisation import autocast, choose_device
from trainer.runs import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    Stage,
    fit,
    open_output,
    rows_digest,
    token_limit,
    train_and_held_out,
    write_json,
)

WATCHED = ("loss", "perplexity", "tokens_per_s", "learning_rate")


def main(settings: SftSettings) -> None:
    """Trains, evaluates before and after, and writes OUTPUT/model.

    Raises:
        TrainerError: a setting, a file or a model can't be used; the message says which.
    """
    checkpoint = open_output(settings.output, resume=settings.resume, decisive=settings.decisive)
    rows, held_out_rows = train_and_held_out(settings, load_demonstrations)
    folder = find_model(settings.model)
    tokenizer = load_tokenizer(folder)
    if settings.chat_template is not None:
        tokenizer.chat_template = read_template(settings)
    policy = load_policy(folder, tokenizer).to(choose_device())
    encoder = Encoder(tokenizer, max_tokens=token_limit(settings, policy), truncation=settings.truncation)
    train, held_out = encoder.demonstrations(rows), encoder.demonstrations(held_out_rows)
    trainer = SftTrainer(policy, tokenizer, settings)
    write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
    sys.stdout.write(
        f"SFT of {policy.num_parameters():,} parameters on {len(train):,} demonstrations "
        f"({sum(row.truncated for row in train):,} of them cut to {token_limit(settings, policy)} tokens), "
        f"{len(held_out):,} held out\n"
    )
    before = trainer.evaluate(held_out)
    stage = Stage(
        name="SFT",
        model=policy,
        lengths=[len(row) for row in train],
        data=rows_digest(train, held_out),
        accumulate=lambda indices: trainer.accumulate([train[index] for index in indices]),
        evaluate=lambda: trainer.evaluate(held_out),
        watch=WATCHED,
    )
    fit(settings, stage, checkpoint)
    after = trainer.evaluate(held_out)
    write_json(settings.output / EVALUATION_FILE, {"held_out_rows": len(held_out), "before": before, "after": after})
    save_model(policy, tokenizer, settings.output / MODEL_FOLDER)
    if held_out:
        sys.stdout.write(
            f"held-out perplexity: before {before['eval_perplexity']:.2f}, after {after['eval_perplexity']:.2f} "
            f"({after['eval_tokens']:,.0f} tokens)\n"
        )
    from trainer.report import write_report  # Plots are slow to import.

    sys.stdout.write(f"model: {settings.output / MODEL_FOLDER}\nreport: {write_report(settings.output)}\n")


class SftTrainer:
    """The loss, its gradient, and its value on held-out rows."""

    def __init__(self, policy: Any, tokenizer: Any, settings: SftSettings) -> None:
        self.settings = settings
        self.device = policy.device
        self.pad_id = padding_id(tokenizer)
        self.policy = policy
        self.logprobs = TokenLogprobs(policy)

    def accumulate(self, rows: Sequence[EncodedResponse]) -> dict[str, float]:
        """Adds the gradient of the mean cross entropy over all response tokens of ``rows``, however they are cut."""
        tokens = sum(response_tokens(row) for row in rows)
        total = 0.0
        for part in micro_batches([len(row) for row in rows], self.settings.micro_batch_tokens):
            loss = -self.sum_logprobs([rows[index] for index in part]) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total, "perplexity": math.exp(min(total, 50.0)), "tokens": sum(len(row) for row in rows)}

    @torch.no_grad()
    def evaluate(self, rows: Sequence[EncodedResponse]) -> dict[str, float]:
        """Loss (nats a response token) and perplexity; empty without rows."""
        if not rows:
            return {}
        self.policy.eval()
        tokens = sum(response_tokens(row) for row in rows)
        total = 0.0
        for part in micro_batches([len(row) for row in rows], self.settings.micro_batch_tokens):
            total -= float(self.sum_logprobs([rows[index] for index in part]))
        loss = total / tokens
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 50.0)), "eval_tokens": tokens}

    def sum_logprobs(self, rows: Sequence[EncodedResponse]) -> torch.Tensor:
        """Log-probability of all response tokens together."""
        ids_BS, mask_BS = pad_right([row.ids for row in rows], self.pad_id, self.device)
        wanted_BS = response_mask(mask_BS, [row.prompt_tokens for row in rows])
        with autocast(self.device, self.settings.precision):
            logprobs_BS, _ = self.logprobs(ids_BS, mask_BS, wanted_BS)
        total: torch.Tensor = logprobs_BS.sum()
        return total


def response_tokens(row: EncodedResponse) -> int:
    """Tokens that are learned: of the response, less the very first of the sequence, which nothing predicts."""
    return len(row) - max(1, row.prompt_tokens)


def read_template(settings: SftSettings) -> str:
    """
    Raises:
        DataError: the file can't be read, or is not UTF-8 text.
    """
    try:
        return settings.chat_template.read_text(encoding="utf-8") if settings.chat_template else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        raise DataError(f"--chat-template is {str(settings.chat_template)!r}: {reason}") from error
