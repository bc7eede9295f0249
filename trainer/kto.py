"""KTO: a policy learns from answers judged one by one, good or bad, and is held near the model that it starts from.

An answer's gain is log pi - log pi_ref. The loss wants the gains of good answers above a reference point, and those of
bad ones below it. The point is how far the policy has gone anyhow: the mean gain, over the rows of a step, of a row's
prompt with the answer to another prompt. Which one that is stays the same for the whole run, so that a reference is
asked once, before it.

Shapes: N answers.
Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization"; the answers to other prompts
as TRL's KTOTrainer has them.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quartet.fingerprint import derive_seed
from quartet.model_folder import find_model
from trainer.answers import Answers
from trainer.batching import micro_batches
from trainer.config import KtoSettings
from trainer.data import JudgedAnswer, load_judged
from trainer.dpo import open_reference
from trainer.dpo_losses import kto_loss
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import DataError
from trainer.models import load_policy, load_tokenizer, save_model
from trainer.optimisation import choose_device
from trainer.references import Reference, Sums, known_sums
from trainer.runs import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    Stage,
    fit,
    ids_digest,
    open_output,
    stage_origin,
    token_limit,
    train_and_held_out,
    write_json,
)
from trainer.scaling import prepare
from trainer.statistics import wilson_interval

WATCHED = ("loss", "label_accuracy", "reference_point", "good_reward_mean", "bad_reward_mean", "tokens_per_s")

# Within this the weights make good and bad answers count about the same; the paper's recommendation.
_BALANCED = (1.0, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer and its judgement; its prompt with the answer to another one; log-probabilities of the reference.

    Those are NaN where it is asked when they are needed.
    """

    answer: EncodedResponse
    other: EncodedResponse
    desirable: bool
    reference: float = math.nan
    reference_other: float = math.nan


def main(settings: KtoSettings) -> None:
    """Trains, evaluates before and after, and writes OUTPUT/model.

    Raises:
        QuartetError: the reference service is away or refuses.
        TrainerError: a setting, a file, a model or the service can't be used; the message says which.
    """
    checkpoint = open_output(settings.output, resume=settings.resume, decisive=settings.decisive)
    rows, held_out_rows = train_and_held_out(settings, load_judged)
    folder = find_model(settings.model)
    tokenizer = load_tokenizer(folder)
    policy = prepare(load_policy(folder, tokenizer).to(choose_device()), settings, seed=settings.seed)
    limit = token_limit(settings, policy)
    encoder = Encoder(tokenizer, max_tokens=limit, truncation=settings.truncation)
    train, held_out = (
        beside_others(part, encoder.demonstrations(part), limit, settings.seed) for part in (rows, held_out_rows)
    )
    data = _digest(train, held_out)
    origin = stage_origin("kto", settings, data)
    good = sum(row.desirable for row in train)
    sys.stdout.write(
        f"KTO of {policy.num_parameters():,} parameters on {good:,} good and {len(train) - good:,} bad answers "
        f"({sum(row.answer.truncated for row in train):,} of them cut to {limit} tokens), {len(held_out):,} held out\n"
    )
    warn_of_balance(good, len(train) - good, settings)
    answers = Answers(policy, tokenizer, settings.precision, settings.packing)
    with open_reference(settings, answers, tokenizer) as reference:
        write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
        trainer = KtoTrainer(answers, settings, reference)
        asked = [] if settings.reference_live else train
        known = known_sums(settings.output, data, reference, _sequences([*asked, *held_out]))
        train = with_reference(train, known[: 2 * len(asked)]) if asked else train
        held_out = with_reference(held_out, known[2 * len(asked) :])
        before = trainer.evaluate(held_out)
        stage = Stage(
            name="KTO",
            model=policy,
            lengths=[len(row.answer) for row in train],
            data=data,
            accumulate=lambda indices: trainer.accumulate([train[index] for index in indices]),
            evaluate=lambda: trainer.evaluate(held_out),
            watch=WATCHED,
        )
        fitted = fit(settings, stage, checkpoint)
    after = fitted.evaluation
    evaluation = {
        "held_out_rows": len(held_out),
        "reference": reference.identity,
        "before": before,
        "after": after,
    }
    if held_out:
        accuracy = wilson_interval(after["eval_label_accuracy"] * len(held_out), len(held_out))
        evaluation["label_accuracy"] = accuracy.as_json()
        sys.stdout.write(
            f"held-out answers on the side of the reference point that they were judged to be: {accuracy}\n"
            f"held-out loss {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after; "
            f"the reference point is {after['eval_reference_point']:.2f} nats\n"
        )
    write_json(settings.output / EVALUATION_FILE, evaluation)
    save_model(policy, tokenizer, settings.output / MODEL_FOLDER, origin=origin, step=fitted.step)
    from trainer.report import write_report  # Plots are slow to import.

    sys.stdout.write(f"model: {settings.output / MODEL_FOLDER}\nreport: {write_report(settings.output)}\n")


def warn_of_balance(good: int, bad: int, settings: KtoSettings) -> None:
    """Says on stderr where good and bad answers count differently, and which weight would make it even."""
    weighed_good, weighed_bad = settings.desirable_weight * good, settings.undesirable_weight * bad
    if _BALANCED[0] * weighed_bad <= weighed_good <= _BALANCED[1] * weighed_bad:
        return
    advice = f"; --undesirable-weight {settings.desirable_weight * good / bad:.3g} would even it out" if bad else ""
    sys.stderr.write(
        f"warning: {good:,} good answers of weight {settings.desirable_weight:g} and {bad:,} bad ones of weight "
        f"{settings.undesirable_weight:g}: best, the former count 1 to 4/3 times as much as the latter{advice}\n"
    )


# Rows --------------------------------------------------------------------------------------------------------------


def beside_others(
    rows: Sequence[JudgedAnswer], encoded: Sequence[EncodedResponse], max_tokens: int, seed: int
) -> list[Judged]:
    """Each row beside its prompt with the answer of another row; every answer is another's once.

    Args:
        rows: as they were loaded.
        encoded: the same.
        max_tokens: of a prompt that has become too long with another answer the beginning goes.
        seed: of which answer goes to which prompt.

    Raises:
        DataError: more than half of the rows have the same prompt.
    """
    if not rows:
        return []
    prompts = [row.ids[: row.prompt_tokens].tobytes() for row in encoded]
    most = max(Counter(prompts).values())
    if 2 * most > len(rows):
        where = rows[prompts.index(Counter(prompts).most_common(1)[0][0])].where
        raise DataError(
            f"{most} of {len(rows)} rows have the prompt of {where}: KTO measures how far the policy has gone by "
            "answers to other prompts, so that at most half of the rows may share theirs; give more rows, or hold out "
            "more of them"
        )
    # Rows of one prompt stand together, so that as many places on there is always another.
    draws = {prompt: derive_seed("kto", seed, prompt.hex()) for prompt in set(prompts)}
    order = sorted(range(len(rows)), key=lambda index: (draws[prompts[index]], prompts[index], index))
    judged: dict[int, Judged] = {}
    for place, index in enumerate(order):
        own, other = encoded[index], encoded[order[(place + most) % len(order)]]
        ids = np.concatenate([own.ids[: own.prompt_tokens], other.ids[other.prompt_tokens :]])
        excess = max(0, len(ids) - max_tokens)
        mixed = EncodedResponse(
            ids=ids[excess:], prompt_tokens=max(0, own.prompt_tokens - excess), truncated=excess > 0
        )
        judged[index] = Judged(answer=own, other=mixed, desirable=rows[index].desirable)
    return [judged[index] for index in range(len(rows))]


def with_reference(rows: Sequence[Judged], sums: Sums) -> list[Judged]:
    """``rows`` with the reference's ``sums`` of their answers and of the others in turn."""
    return [
        replace(row, reference=float(own), reference_other=float(other))
        for row, (own, other) in zip(rows, sums.reshape(-1, 2), strict=True)
    ]


def _sequences(rows: Sequence[Judged]) -> list[EncodedResponse]:
    """Answers and the others in turn."""
    return [sequence for row in rows for sequence in (row.answer, row.other)]


def _digest(*parts: Sequence[Judged]) -> str:
    return ids_digest(
        *(
            (
                ids
                for row in part
                for ids in ((row.answer.prompt_tokens, int(row.desirable)), row.answer.ids, row.other.ids)
            )
            for part in parts
        )
    )


# Training ----------------------------------------------------------------------------------------------------------


class KtoTrainer:
    """The loss, its gradient, and what is measured on held-out rows."""

    def __init__(self, answers: Answers, settings: KtoSettings, reference: Reference) -> None:
        self.settings = settings
        self.answers = answers
        self.reference = reference

    def accumulate(self, rows: Sequence[Judged]) -> dict[str, float]:
        """Adds the gradient of the mean loss over ``rows``, however they are cut: the point is that of all of them."""
        if self.settings.reference_live:
            rows = with_reference(rows, self.reference.sums(_sequences(rows)))
        figures = self._look(rows, learn=True)
        return figures | {"tokens": sum(len(sequence) for sequence in _sequences(rows))}

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Judged]) -> dict[str, float]:
        """The same figures of held-out rows, named ``eval_...``; empty without any."""
        if not rows:
            return {}
        self.answers.policy.eval()
        return {f"eval_{name}": value for name, value in self._look(rows, learn=False).items()}

    def reference_point(self, rows: Sequence[Judged]) -> float:
        """Nats: the mean gain of answers to other prompts, and at least 0; without dropout."""
        policy = self.answers.policy
        was_training = policy.training
        sums = self.answers.all_sums([row.other for row in rows], self.settings.micro_batch_tokens).numpy()
        policy.train(was_training)
        return max(0.0, float(np.mean(sums - np.array([row.reference_other for row in rows]))))

    def _look(self, rows: Sequence[Judged], *, learn: bool) -> dict[str, float]:
        settings = self.settings
        point = self.reference_point(rows)
        gains, loss = np.zeros(len(rows)), 0.0
        lengths = [len(row.answer) for row in rows]
        for part in micro_batches(lengths, settings.micro_batch_tokens, packed=self.answers.packed):
            gain_N = self._gains([rows[index] for index in part])
            share = kto_loss(
                gain_N,
                torch.tensor([rows[index].desirable for index in part], device=gain_N.device),
                point,
                beta=settings.beta,
                desirable_weight=settings.desirable_weight,
                undesirable_weight=settings.undesirable_weight,
            ) * (len(part) / len(rows))
            if learn:
                share.backward()  # type: ignore[no-untyped-call]
            gains[part] = gain_N.detach().cpu().numpy()
            loss += float(share.detach())
        return {"loss": loss, "reference_point": point} | self._figures(rows, gains, point)

    def _gains(self, rows: Sequence[Judged]) -> Tensor:
        """(N,) log pi - log pi_ref; only the policy's part receives a gradient."""
        sums_N = self.answers.sums([row.answer for row in rows])
        return sums_N - sums_N.new_tensor([row.reference for row in rows])

    def _figures(self, rows: Sequence[Judged], gains: np.ndarray[Any, Any], point: float) -> dict[str, float]:
        """Those of good and of bad answers, as far as there are such."""
        good = np.array([row.desirable for row in rows])
        # At the point an answer is on neither side, and counts half.
        right = np.where(gains == point, 0.5, (gains > point) == good)
        figures = {"label_accuracy": float(right.mean())}
        logprobs = gains + np.array([row.reference for row in rows])
        for name, kind in (("good", good), ("bad", ~good)):
            if kind.any():
                figures[f"{name}_reward_mean"] = self.settings.beta * float(gains[kind].mean())
                figures[f"{name}_logprob_mean"] = float(logprobs[kind].mean())
        return figures
