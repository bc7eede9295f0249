"""Direct preference optimisation: a policy learns from preferences as a reward model would, without one.

Shapes: B pairs.
Source: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model".
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quartet.model_folder import find_model
from trainer.answers import Answers, answer_tokens
from trainer.config import DpoSettings, Packing, ReferencedSettings
from trainer.data import load_preferences
from trainer.distributed import collected, led, own_parts, total
from trainer.divergence import finite
from trainer.dpo_losses import AnswerLogprobs, DpoLoss, dpo_loss
from trainer.encoding import EncodedPreference, EncodedResponse, Encoder
from trainer.lineage import Origin
from trainer.models import load_policy, load_tokenizer
from trainer.optimisation import Precision, choose_device
from trainer.packing import group_micro_batches
from trainer.references import LedReference, ModelReference, Reference, ServiceReference, Sums, known_sums
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
from trainer.sharding import GradientSync, in_turn
from trainer.statistics import Interval, share_of_groups

WATCHED = ("loss", "accuracy", "margin_mean", "chosen_logprob_mean", "rejected_logprob_mean", "tokens_per_s")


def main(settings: DpoSettings) -> None:
    """Trains, evaluates before and after, and writes OUTPUT/model.

    Raises:
        QuartetError: the reference service is away or refuses.
        TrainerError: a setting, a file, a model or the service can't be used; the message says which.
    """
    checkpoint = open_output(settings.output, resume=settings.resume, decisive=settings.decisive)
    rows, held_out_rows = train_and_held_out(settings, load_preferences)
    folder = find_model(settings.model)
    tokenizer = load_tokenizer(folder)
    policy = prepare(load_policy(folder, tokenizer).to(choose_device()), settings, seed=settings.seed)
    encoder = Encoder(tokenizer, max_tokens=token_limit(settings, policy), truncation=settings.truncation)
    train, held_out = encoder.preferences(rows), encoder.preferences(held_out_rows)
    data = rows_digest(*(_answers_of(part) for part in (train, held_out)))
    origin = stage_origin("dpo", settings, data)
    cut = sum(pair.chosen.truncated or pair.rejected.truncated for pair in train)
    sys.stdout.write(
        f"DPO of {policy.num_parameters():,} parameters on {len(train):,} pairs ({cut:,} of them cut to "
        f"{token_limit(settings, policy)} tokens), {len(held_out):,} held out\n"
    )
    where, held_out_where = ([row.where for row in part] for part in (rows, held_out_rows))
    answers = Answers(policy, tokenizer, settings.precision, settings.packing)
    with open_reference(settings, answers, tokenizer, origin) as reference:
        write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
        trainer = DpoTrainer(policy, tokenizer, settings, reference)
        settle(policy, settings, settings.precision)
        asked_of, names = ([], []) if settings.reference_live else (train, where)
        known = known_sums(
            settings.output,
            data,
            reference,
            _answers_of([*asked_of, *held_out]),
            [name for name in (*names, *held_out_where) for _ in range(2)],
        )
        cut_at = len(known) - 2 * len(held_out)
        train_pairs = with_reference(train, None if settings.reference_live else known[:cut_at])
        held_out_pairs = with_reference(held_out, known[cut_at:])

        right: list[float] = []  # Of each held-out pair, at the newest evaluation.

        def evaluate() -> dict[str, float]:
            figures, right[:] = trainer.judge(held_out_pairs)
            return finite(
                figures,
                lambda place: trainer.evaluate([held_out_pairs[place]])["eval_loss"],
                held_out_where,
                settings.output,
            )

        before = evaluate()
        stage = Stage(
            name="DPO",
            model=policy,
            data=data,
            where=where,
            accumulate=lambda indices: trainer.accumulate([train_pairs[index] for index in indices]),
            evaluate=evaluate,
            watch=WATCHED,
        )
        fitted = fit(settings, stage, checkpoint)
    after = fitted.evaluation
    accuracy = share_of_groups(right, [row.group_key for row in held_out_rows]) if held_out else None
    write_json(
        settings.output / EVALUATION_FILE,
        {
            "held_out_pairs": len(held_out),
            "reference": reference.identity,
            "before": before,
            "after": after,
            **({"accuracy": accuracy.as_json()} if accuracy else {}),
        },
    )
    save_model(policy, tokenizer, settings.output / MODEL_FOLDER, origin=origin, step=fitted.step)
    if accuracy is not None:
        report(accuracy, before, after)
    from trainer.report import write_report  # Plots are slow to import.

    sys.stdout.write(f"model: {settings.output / MODEL_FOLDER}\nreport: {led(write_report)(settings.output)}\n")


def open_reference(
    settings: ReferencedSettings, answers: Answers, tokenizer: Any, of: Origin
) -> contextlib.AbstractContextManager[Reference]:
    """The service where one is named, else the model as it is now; ``of``: what that comes from."""
    if settings.reference is None:
        assert of.parent is not None
        # Not by the path alone: another model may stand there when the run goes on.
        start = f"{settings.model}, where training starts (weights {of.parent['weights']})"
        return contextlib.nullcontext(ModelReference(answers, settings.micro_batch_tokens, start))
    connect = functools.partial(
        ServiceReference,
        settings.reference,
        tokenizer,
        security=settings.security,
        ready_timeout_s=settings.ready_timeout_s,
        call_deadline_s=settings.call_deadline_s,
    )
    return contextlib.closing(LedReference(connect))


def _answers_of(pairs: Sequence[EncodedPreference | Pair]) -> list[EncodedResponse]:
    """Chosen and rejected answers in turn."""
    return [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, and the reference's log-probability of each; NaN: it is asked when it is needed."""

    chosen: EncodedResponse
    rejected: EncodedResponse
    reference_chosen: float
    reference_rejected: float

    def __len__(self) -> int:
        """Tokens of the longer one, which is what both are padded to."""
        return max(len(self.chosen), len(self.rejected))


def with_reference(pairs: Sequence[EncodedPreference | Pair], sums: Sums | None) -> list[Pair]:
    """``pairs`` with the reference's ``sums`` of their chosen and rejected answers in turn; None: not asked yet."""
    known = np.full(2 * len(pairs), math.nan) if sums is None else sums
    return [
        Pair(
            chosen=pair.chosen,
            rejected=pair.rejected,
            reference_chosen=float(chosen),
            reference_rejected=float(rejected),
        )
        for pair, (chosen, rejected) in zip(pairs, known.reshape(-1, 2), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Some pairs' log-probabilities under policy and reference."""

    chosen: AnswerLogprobs
    rejected: AnswerLogprobs

    def figures(self, beta: float, kind: DpoLoss) -> dict[str, Tensor]:
        """(B,) each, by name, detached; rewards and what follows from them are of the gains that the loss compares."""
        chosen_B, rejected_B = self.chosen.gain_in(kind).detach(), self.rejected.gain_in(kind).detach()
        gap_B = chosen_B - rejected_B
        return {
            # A tie counts half.
            "accuracy": (gap_B > 0).double() + 0.5 * (gap_B == 0).double(),
            "margin_mean": beta * gap_B,
            "chosen_reward_mean": beta * chosen_B,
            "rejected_reward_mean": beta * rejected_B,
            "chosen_logprob_mean": self.chosen.policy_B.detach(),
            "rejected_logprob_mean": self.rejected.policy_B.detach(),
        }


class DpoLike(Protocol):
    """What a trainer on pairs reads of settings, whether its pairs were collected before or are sampled in the run."""

    @property
    def beta(self) -> float: ...
    @property
    def loss(self) -> str: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def sft_weight(self) -> float: ...
    @property
    def reference_live(self) -> bool: ...
    @property
    def micro_batch_tokens(self) -> int: ...
    @property
    def gradient_sync(self) -> GradientSync: ...
    @property
    def packing(self) -> Packing: ...
    @property
    def precision(self) -> Precision: ...


class DpoTrainer:
    """The loss, its gradient, and what is measured on held-out pairs."""

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        settings: DpoLike,
        reference: Reference | None,
        temperature: float = 1.0,
    ) -> None:
        """
        Args:
            policy: that is trained.
            tokenizer: its own.
            settings: of the run.
            reference: is asked at every step, where the settings say so.
            temperature: divides the logits of the policy, as it did of the reference.
        """
        self.settings = settings
        self.kind = DpoLoss(settings.loss)
        self.answers = Answers(policy, tokenizer, settings.precision, settings.packing, temperature)
        self.reference = reference

    def accumulate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Adds the gradient of the mean loss over ``pairs``, however they are cut."""
        settings = self.settings
        tokens = sum(answer_tokens(pair.chosen) for pair in pairs)
        sums: dict[str, float] = {}
        if settings.reference_live and self.reference is not None:
            pairs = with_reference(pairs, self.reference.sums(_answers_of(pairs)))
        for part, weight in in_turn(self._parts(pairs), settings.gradient_sync, self.answers.policy):
            seen = self._see([pairs[index] for index in part])
            loss = self._loss(seen) * len(part) / len(pairs)
            if settings.sft_weight:
                loss = loss - settings.sft_weight * seen.chosen.policy_B.sum() / tokens
            loss = weight * loss
            loss.backward()  # type: ignore[no-untyped-call]
            for name, values_B in seen.figures(settings.beta, self.kind).items():
                sums[name] = sums.get(name, 0.0) + weight * float(values_B.sum())
            sums["loss"] = sums.get("loss", 0.0) + float(loss.detach()) * len(pairs)
        return {name: value / len(pairs) for name, value in total(sums).items()} | {
            "tokens": sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        }

    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """``judge``'s figures alone."""
        return self.judge(pairs)[0]

    @torch.no_grad()
    def judge(self, pairs: Sequence[Pair]) -> tuple[dict[str, float], list[float]]:
        """The same figures of held-out pairs, named ``eval_...``, and mean lengths; empty without any.

        Beside them of each pair 1 where it is ranked as annotated, .5 of a tie, else 0.
        """
        if not pairs:
            return {}, []
        self.answers.policy.eval()
        sums: dict[str, float] = {}
        right: dict[int, float] = {}
        for part, weight in self._parts(pairs):
            seen = self._see([pairs[index] for index in part])
            found = seen.figures(self.settings.beta, self.kind)
            for name, values_B in found.items():
                sums[name] = sums.get(name, 0.0) + weight * float(values_B.sum())
            sums["loss"] = sums.get("loss", 0.0) + weight * float(self._loss(seen)) * len(part)
            right |= dict(zip(part, found["accuracy"].tolist(), strict=True)) if weight else {}
        right = collected(right)
        figures = {f"eval_{name}": value / len(pairs) for name, value in total(sums).items()}
        for name in ("chosen", "rejected"):
            figures[f"eval_{name}_length_mean"] = float(np.mean([answer_tokens(getattr(pair, name)) for pair in pairs]))
        return figures, [right[index] for index in range(len(pairs))]

    def _parts(self, pairs: Sequence[Pair]) -> list[tuple[list[int], float]]:
        def cut(mine: list[int]) -> list[list[int]]:
            groups = [(pairs[index].chosen.ids, pairs[index].rejected.ids) for index in mine]
            return group_micro_batches(groups, self.settings.micro_batch_tokens, packed=self.answers.packed)

        return own_parts([len(pair) for pair in pairs], cut)

    def _loss(self, seen: _Seen) -> Tensor:
        settings = self.settings
        return dpo_loss(
            seen.chosen,
            seen.rejected,
            beta=settings.beta,
            kind=self.kind,
            label_smoothing=settings.label_smoothing,
        )

    def _see(self, pairs: Sequence[Pair]) -> _Seen:
        """Chosen and rejected answers in one forward pass."""
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        chosen_B, rejected_B = self.answers.sums([*chosen, *rejected]).chunk(2)

        def beside(policy_B: Tensor, reference: list[float], answers: list[EncodedResponse]) -> AnswerLogprobs:
            return AnswerLogprobs(
                policy_B=policy_B,
                reference_B=policy_B.new_tensor(reference),
                tokens_B=policy_B.new_tensor([answer_tokens(answer) for answer in answers]),
            )

        return _Seen(
            chosen=beside(chosen_B, [pair.reference_chosen for pair in pairs], chosen),
            rejected=beside(rejected_B, [pair.reference_rejected for pair in pairs], rejected),
        )


def report(accuracy: Interval, before: dict[str, float], after: dict[str, float]) -> None:
    """Prints what became of the held-out pairs."""
    sys.stdout.write(
        f"held-out pairs ranked as annotated by the policy's implicit reward: {accuracy}\n"
        f"held-out loss {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after (a coin: {math.log(2):.4f}); "
        f"margin {after['eval_margin_mean']:.3f}\n"
        f"log-probability of chosen answers {before['eval_chosen_logprob_mean']:.2f} before, "
        f"{after['eval_chosen_logprob_mean']:.2f} after; of rejected ones {before['eval_rejected_logprob_mean']:.2f} "
        f"before, {after['eval_rejected_logprob_mean']:.2f} after\n"
    )
