"""KTO: a policy learns from answers judged one by one, good or bad, and is held near the model that it starts from.

An answer's gain is log pi - log pi_ref. The loss wants the gains of good answers above a reference point, and those of
bad ones below it. The point is how far the policy has gone anyhow: the mean gain of the answers of a step to prompts of
the step that they do not belong to. Which batch a row is in is known before training, so that a reference can be asked
about these once, too.

Shapes: N answers.
Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", and its code,
ContextualAI/HALOs, for the answers to other prompts.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quartet.model_folder import find_model
from trainer.answers import Answers
from trainer.config import KtoSettings
from trainer.data import JudgedAnswer, load_judged
from trainer.distributed import collected, led, total
from trainer.divergence import finite
from trainer.dpo import open_reference
from trainer.dpo_losses import kto_loss
from trainer.encoding import EncodedResponse, Encoder
from trainer.models import load_policy, load_tokenizer
from trainer.optimisation import choose_device
from trainer.references import Reference, known_sums
from trainer.runs import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    Stage,
    fit,
    ids_digest,
    open_output,
    planned_batches,
    rows_digest,
    stage_origin,
    token_limit,
    train_and_held_out,
    write_json,
)
from trainer.saving import save_model
from trainer.scaling import prepare, settle
from trainer.sharding import in_turn
from trainer.statistics import share_of_groups

WATCHED = ("loss", "label_accuracy", "reference_point", "good_reward_mean", "bad_reward_mean", "tokens_per_s")

# Within this the weights make good and bad answers count about the same; the paper's recommendation.
_BALANCED = (1.0, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """An answer to a prompt, and the reference's log-probability of it; NaN: it is asked when that is needed."""

    answer: EncodedResponse
    reference: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Judged(Weighed):
    """An answer that was judged good (``desirable``) or bad."""

    desirable: bool


WeighedT = TypeVar("WeighedT", bound=Weighed)


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
    train, held_out = encode(rows, encoder), encode(held_out_rows, encoder)
    data = _digest(train, held_out)
    origin = stage_origin("kto", settings, data)
    good = sum(row.desirable for row in train)
    sys.stdout.write(
        f"KTO of {policy.num_parameters():,} parameters on {good:,} good and {len(train) - good:,} bad answers "
        f"({sum(row.answer.truncated for row in train):,} of them cut to {limit} tokens), {len(held_out):,} held out\n"
    )
    warn_of_balance(good, len(train) - good, settings)
    answers = Answers(policy, tokenizer, settings.precision, settings.packing)
    settle(policy, settings, settings.precision)
    # The batches of all steps, each with its answers to other prompts.
    others = {
        batch: mismatched([train[index] for index in batch], limit)
        for batch in map(tuple, planned_batches(settings, len(train)))
    }
    held_out_others = mismatched(held_out, limit)
    with open_reference(settings, answers, tokenizer, origin) as reference:
        write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
        asked: list[Weighed] = [*held_out, *held_out_others]
        if not settings.reference_live:
            asked += [*train, *itertools.chain(*others.values())]
        sequences = [item.answer for item in asked]
        names = [row.where for row in held_out_rows] + ["a held-out answer to another prompt"] * len(held_out_others)
        names += [row.where for row in rows] + ["an answer to another prompt"] * (len(asked) - len(names) - len(rows))
        sums = known_sums(settings.output, rows_digest(sequences), reference, sequences, names)
        known = iter(sums.tolist())
        held_out, held_out_others = with_reference(held_out, known), with_reference(held_out_others, known)
        if not settings.reference_live:
            train = with_reference(train, known)
            others = {batch: with_reference(own, known) for batch, own in others.items()}
        trainer = KtoTrainer(answers, settings, reference)

        right: list[float] = []  # Of each held-out row, at the newest evaluation.

        def evaluate() -> dict[str, float]:
            figures, right[:] = trainer.judge(held_out, held_out_others)
            return finite(
                figures,
                lambda place: trainer.evaluate([held_out[place]], [])["eval_loss"],
                [row.where for row in held_out_rows],
                settings.output,
            )

        before = evaluate()
        stage = Stage(
            name="KTO",
            model=policy,
            data=data,
            where=[row.where for row in rows],
            # A row by itself, as it is looked at where a loss is none, has no others.
            accumulate=lambda batch: trainer.accumulate(
                [train[index] for index in batch], others.get(tuple(batch), [])
            ),
            evaluate=evaluate,
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
        accuracy = share_of_groups(right, [row.group_key for row in held_out_rows])
        evaluation["label_accuracy"] = accuracy.as_json()
        sys.stdout.write(
            f"held-out answers on the side of the reference point that they were judged to be: {accuracy}\n"
            f"held-out loss {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after; "
            f"the reference point is {after['eval_reference_point']:.2f} nats\n"
        )
    write_json(settings.output / EVALUATION_FILE, evaluation)
    save_model(policy, tokenizer, settings.output / MODEL_FOLDER, origin=origin, step=fitted.step)
    from trainer.report import write_report  # Plots are slow to import.

    sys.stdout.write(f"model: {settings.output / MODEL_FOLDER}\nreport: {led(write_report)(settings.output)}\n")


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


def encode(rows: Sequence[JudgedAnswer], encoder: Encoder) -> list[Judged]:
    """The rows as token ids.

    Raises:
        DataError: as ``Encoder.demonstrations``.
    """
    return [
        Judged(answer=answer, desirable=row.desirable)
        for row, answer in zip(rows, encoder.demonstrations(rows), strict=True)
    ]


def mismatched(rows: Sequence[Judged], max_tokens: int) -> list[Weighed]:
    """Each row's prompt with the answer of another row, as far as there is one to another prompt.

    Where no prompt is that of more than half of the rows, every answer is there once.

    Args:
        rows: of one batch.
        max_tokens: of a prompt that is too long with another answer the beginning goes.
    """
    prompts = [row.answer.ids[: row.answer.prompt_tokens].tobytes() for row in rows]
    count = Counter(prompts)
    # Rows of one prompt stand together, so that as many places on as the most frequent one has there is another.
    first = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
    order = sorted(range(len(rows)), key=lambda index: (first[prompts[index]], index))
    found = []
    for place, index in enumerate(order):
        partner = order[(place + max(count.values())) % len(order)]
        if prompts[partner] == prompts[index]:
            continue
        own, other = rows[index].answer, rows[partner].answer
        ids = np.concatenate([own.ids[: own.prompt_tokens], other.ids[other.prompt_tokens :]])
        excess = max(0, len(ids) - max_tokens)
        mixed = EncodedResponse(
            ids=ids[excess:], prompt_tokens=max(0, own.prompt_tokens - excess), truncated=excess > 0
        )
        found.append(Weighed(answer=mixed))
    return found


def with_reference(items: Sequence[WeighedT], sums: Iterator[float]) -> list[WeighedT]:
    """``items`` with the reference's log-probabilities of their answers, the next ones of ``sums``."""
    return [replace(item, reference=next(sums)) for item in items]


def _digest(*parts: Sequence[Judged]) -> str:
    """Of answers and judgements."""
    return ids_digest(
        *(
            (ids for row in part for ids in ((row.answer.prompt_tokens, int(row.desirable)), row.answer.ids))
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

    def accumulate(self, rows: Sequence[Judged], others: Sequence[Weighed]) -> dict[str, float]:
        """Adds the gradient of the mean loss over ``rows``, however they are cut; the point is that of ``others``."""
        if self.settings.reference_live:
            asked = [item.answer for item in (*rows, *others)]
            sums = iter(self.reference.sums(asked).tolist())
            rows, others = with_reference(rows, sums), with_reference(others, sums)
        tokens = sum(len(item.answer) for item in (*rows, *others))
        return self._look(rows, others, learn=True)[0] | {"tokens": tokens}

    def evaluate(self, rows: Sequence[Judged], others: Sequence[Weighed]) -> dict[str, float]:
        """``judge``'s figures alone."""
        return self.judge(rows, others)[0]

    @torch.no_grad()
    def judge(self, rows: Sequence[Judged], others: Sequence[Weighed]) -> tuple[dict[str, float], list[float]]:
        """The same figures of held-out rows, named ``eval_...``; empty without any.

        Beside them of each row 1 where it is on the side that it was judged to be on, .5 at the point, else 0.
        """
        if not rows:
            return {}, []
        self.answers.policy.eval()
        figures, right = self._look(rows, others, learn=False)
        return {f"eval_{name}": value for name, value in figures.items()}, right.tolist()

    def reference_point(self, others: Sequence[Weighed]) -> float:
        """Nats: the mean gain of answers to other prompts, without dropout, and at least 0, as it is without any."""
        if not others:
            return 0.0
        policy = self.answers.policy
        was_training = policy.training
        sums = self.answers.all_sums([item.answer for item in others], self.settings.micro_batch_tokens).numpy()
        policy.train(was_training)
        # Unlike max, it lets NaN be seen.
        return float(np.maximum(0.0, np.mean(sums - np.array([item.reference for item in others]))))

    def _look(
        self, rows: Sequence[Judged], others: Sequence[Weighed], *, learn: bool
    ) -> tuple[dict[str, float], npt.NDArray[Any]]:
        """Figures, and how far each row is right."""
        settings = self.settings
        point = self.reference_point(others)
        found: dict[int, float] = {}
        loss = 0.0
        parts = self.answers.parts([row.answer for row in rows], settings.micro_batch_tokens)
        for part, weight in in_turn(parts, settings.gradient_sync, self.answers.policy):
            gain_N = self._gains([rows[index] for index in part])
            share = kto_loss(
                gain_N,
                torch.tensor([rows[index].desirable for index in part], device=gain_N.device),
                point,
                beta=settings.beta,
                desirable_weight=settings.desirable_weight,
                undesirable_weight=settings.undesirable_weight,
            ) * (weight * len(part) / len(rows))
            if learn:
                share.backward()  # type: ignore[no-untyped-call]
            found |= dict(zip(part, gain_N.tolist(), strict=True)) if weight else {}
            loss += float(share.detach())
        found, loss = collected(found), total({"loss": loss})["loss"]
        gains = np.array([found[index] for index in range(len(rows))])
        # At the point an answer is on neither side, and counts half.
        right = np.where(gains == point, 0.5, (gains > point) == np.array([row.desirable for row in rows]))
        figures = {"loss": loss, "reference_point": point, "reference_answers": len(others)}
        return figures | {"label_accuracy": float(right.mean())} | self._figures(rows, gains), right

    def _gains(self, rows: Sequence[Judged]) -> Tensor:
        """(N,) log pi - log pi_ref; only the policy's part receives a gradient."""
        sums_N = self.answers.sums([row.answer for row in rows])
        return sums_N - sums_N.new_tensor([row.reference for row in rows])

    def _figures(self, rows: Sequence[Judged], gains: npt.NDArray[Any]) -> dict[str, float]:
        """Those of good and of bad answers, as far as there are such."""
        good = np.array([row.desirable for row in rows])
        figures = {}
        logprobs = gains + np.array([row.reference for row in rows])
        for name, kind in (("good", good), ("bad", ~good)):
            if kind.any():
                figures[f"{name}_reward_mean"] = self.settings.beta * float(gains[kind].mean())
                figures[f"{name}_logprob_mean"] = float(logprobs[kind].mean())
        return figures
