"""Supervised fine-tuning: next-token cross entropy on the responses of demonstrations, or on all turns of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from quartet.model_folder import find_model
from trainer.answers import Answers, answer_tokens
from trainer.config import SftSettings
from trainer.data import load_demonstrations
from trainer.distributed import led, total
from trainer.divergence import finite
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import DataError
from trainer.models import load_policy, load_tokenizer
from trainer.optimisation import choose_device
from trainer.runs import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    Stage,
    fit,
    open_output,
    rows_digest,
    stage_origin,
    token_limit,
    train_and_held_out,
    write_json,
)
from trainer.saving import save_model
from trainer.scaling import prepare, settle
from trainer.sharding import in_turn

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
    policy = prepare(load_policy(folder, tokenizer).to(choose_device()), settings, seed=settings.seed)
    encoder = Encoder(tokenizer, max_tokens=token_limit(settings, policy), truncation=settings.truncation)
    every_turn = settings.train_on == "all-turns"
    train, held_out = (encoder.demonstrations(part, every_turn=every_turn) for part in (rows, held_out_rows))
    if encoder.other_end_id is not None:
        _stop_at(policy.generation_config, encoder.other_end_id)
    data = rows_digest(train, held_out)
    origin = stage_origin("sft", settings, data)
    trainer = SftTrainer(policy, tokenizer, settings)
    settle(policy, settings, settings.precision)
    write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
    sys.stdout.write(
        f"SFT of {policy.num_parameters():,} parameters on {sum(len(row.learned) for row in train):,} answers in "
        f"{len(train):,} demonstrations ({sum(row.truncated for row in train):,} of them cut to "
        f"{token_limit(settings, policy)} tokens), {len(held_out):,} held out\n"
    )

    def evaluate() -> dict[str, float]:
        names = [row.where for row in held_out_rows]
        return finite(
            trainer.evaluate(held_out),
            lambda place: trainer.evaluate([held_out[place]])["eval_loss"],
            names,
            settings.output,
        )

    before = evaluate()
    stage = Stage(
        name="SFT",
        model=policy,
        data=data,
        where=[row.where for row in rows],
        accumulate=lambda indices: trainer.accumulate([train[index] for index in indices]),
        evaluate=evaluate,
        watch=WATCHED,
    )
    fitted = fit(settings, stage, checkpoint)
    after = fitted.evaluation
    write_json(settings.output / EVALUATION_FILE, {"held_out_rows": len(held_out), "before": before, "after": after})
    save_model(policy, tokenizer, settings.output / MODEL_FOLDER, origin=origin, step=fitted.step)
    if held_out:
        sys.stdout.write(
            f"held-out perplexity: before {before['eval_perplexity']:.2f}, after {after['eval_perplexity']:.2f} "
            f"({after['eval_tokens']:,.0f} tokens)\n"
        )
    from trainer.report import write_report  # Plots are slow to import.

    sys.stdout.write(f"model: {settings.output / MODEL_FOLDER}\nreport: {led(write_report)(settings.output)}\n")


class SftTrainer:
    """The loss, its gradient, and its value on held-out rows."""

    def __init__(self, policy: Any, tokenizer: Any, settings: SftSettings) -> None:
        self.settings = settings
        self.policy = policy
        self.answers = Answers(policy, tokenizer, settings.precision, settings.packing)

    def accumulate(self, rows: Sequence[EncodedResponse]) -> dict[str, float]:
        """Adds the gradient of the mean cross entropy over all response tokens of ``rows``, however they are cut."""
        tokens = sum(answer_tokens(row) for row in rows)
        found = 0.0
        parts = self.answers.parts(rows, self.settings.micro_batch_tokens)
        for part, weight in in_turn(parts, self.settings.gradient_sync, self.policy):
            loss = -weight * self.answers.sums([rows[index] for index in part]).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            found += float(loss.detach())
        mean = total({"loss": found})["loss"]
        return {"loss": mean, "perplexity": math.exp(min(mean, 50.0)), "tokens": sum(len(row) for row in rows)}

    def evaluate(self, rows: Sequence[EncodedResponse]) -> dict[str, float]:
        """Loss (nats a response token) and perplexity; empty without rows."""
        if not rows:
            return {}
        tokens = sum(answer_tokens(row) for row in rows)
        loss = -float(self.answers.all_sums(rows, self.settings.micro_batch_tokens).sum()) / tokens
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 50.0)), "eval_tokens": tokens}


def _stop_at(generation: Any, token_id: int) -> None:
    """Whoever serves the model stops at the token, too: it is written with it, in generation_config.json."""
    own = generation.eos_token_id
    known = own if isinstance(own, list) else [own]
    if token_id not in known:
        generation.eos_token_id = [*known, token_id]


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
