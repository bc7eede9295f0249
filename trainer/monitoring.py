"""Watching the policy of a run on its held-out prompts: what only its own weights tell, and the alarms."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.answers import Answers, answer_tokens
from trainer.data import load_demonstrations
from trainer.distributed import is_first, led
from trainer.encoding import EncodedResponse, Encoder
from trainer.evaluate import Evaluation, PolicyFigures
from trainer.exact_kl import Distributions, distributions, evaluating
from trainer.lora import adapter_of
from trainer.models import TokenLogprobs, load_policy, padding_id
from trainer.monitor_alarms import Crossing, checked, crossings
from trainer.ppo_config import RunSettings
from trainer.rollout import Sample
from trainer.sharding import is_sharded, shard
from trainer.statistics import Interval, mean_interval_of_groups

# One file an evaluation between the first and the last, by its step.
EVALUATIONS_FOLDER = "evaluations"


class PolicyMonitor:
    """What is known of the evaluations of one run, and how its policy is looked at."""

    def __init__(
        self,
        settings: RunSettings,
        policy: Any,
        tokenizer: Any,
        *,
        max_tokens: int,
        reference: Path | None,
        before: Path,
        resumed_step: int,
    ) -> None:
        """
        Args:
            settings: of the run.
            policy: that is trained; looked at as it is at the time.
            tokenizer: its own.
            max_tokens: longest demonstration; longer ones are cut.
            reference: folder of the reference model, where it is here and KL is to be exact; of a policy with an
                adapter, the model that this is above.
            before: file of the evaluation before training, which may not be there yet.
            resumed_step: evaluations after it are forgotten, for they will be done again.

        Raises:
            DataError: a demonstration can't be used.
        """
        self._settings = settings
        self._policy = policy
        self._tokenizer = tokenizer
        self._reference = reference
        self._folder = settings.output / EVALUATIONS_FOLDER
        self._demonstrations = self._encode(max_tokens)
        self._raised: set[str] = set()
        self._past: list[tuple[int, Evaluation]] = []
        if before.exists():
            self._past.append((0, Evaluation.read(before)))
        for path in sorted(self._folder.glob("[0-9]*.json")):
            if int(path.stem) <= resumed_step:
                self._past.append((int(path.stem), Evaluation.read(path)))
            elif is_first():
                path.unlink()
        for _, past in self._past[1:]:
            self._raised |= {found.rule for found in self._crossings(past)}

    def _encode(self, max_tokens: int) -> list[EncodedResponse]:
        settings = self._settings
        if not settings.monitor_demonstrations:
            return []
        rows = load_demonstrations(settings.monitor_demonstrations)[: settings.max_monitor_demonstrations]
        return Encoder(self._tokenizer, max_tokens=max_tokens, truncation="right").demonstrations(rows)

    def observe(self, samples: Sequence[Sample]) -> PolicyFigures:
        """What the policy's own distributions say of its responses, and of the demonstrations."""
        found = self._distributions(samples)
        return PolicyFigures(
            kl=found.kl, entropy=found.entropy, demonstration_perplexity=self._demonstration_perplexity()
        )

    def _distributions(self, samples: Sequence[Sample]) -> Distributions:
        rows = [
            EncodedResponse(
                ids=np.array((*sample.prompt_ids, *sample.response_ids), dtype=np.int32),
                prompt_tokens=len(sample.prompt_ids),
                truncated=False,
            )
            for sample in samples
        ]
        reference = None
        as_reference: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if self._reference is not None and (adapter := adapter_of(self._policy)) is not None:
            # The folder holds the very model that is below the adapter.
            reference, as_reference = self._policy, adapter.switched_off
        elif self._reference is not None:
            # Here for the time of this evaluation alone: training has the memory for itself.
            with torch.random.fork_rng(devices=[]):
                reference = load_policy(self._reference, self._tokenizer)
            TokenLogprobs(reference)  # Tries its head out, which is done before a model is split.
            shard(reference, self._settings.precision, self._policy.device)
            if not is_sharded(reference):
                reference = reference.to(self._policy.device)
        return distributions(
            self._policy,
            reference,
            rows,
            temperature=self._settings.temperature,
            pad_id=padding_id(self._tokenizer),
            micro_batch_tokens=self._settings.micro_batch_tokens,
            precision=self._settings.precision,
            as_reference=as_reference,
        )

    def _demonstration_perplexity(self) -> float | None:
        rows = self._demonstrations
        if not rows:
            return None
        answers = Answers(self._policy, self._tokenizer, self._settings.precision, self._settings.packing)
        with evaluating(self._policy):
            sums_N = answers.all_sums(rows, self._settings.micro_batch_tokens)
        return math.exp(min(-float(sums_N.sum()) / sum(answer_tokens(row) for row in rows), 50.0))

    def watch(self, step: int, found: Evaluation, path: Path | None = None) -> tuple[Evaluation, dict[str, float]]:
        """Keeps an evaluation, compares it with those before, and says which alarms it raises that were not raised yet.

        Args:
            step: that it was made after; 0: before training.
            found: the evaluation.
            path: its file, where it has one of its own.

        Returns:
            The evaluation with its changes since the one that the judge liked best, and its figures for the log.
        """
        found = self._since_best(found)
        led(found.write)(path or self._folder / f"{step:06d}.json")
        self._past.append((step, found))
        figures = {f"eval/{key}": value for key, value in found.figures().items()}
        if step == 0:
            return found, figures
        broken = self._crossings(found)
        for crossing in broken:
            if crossing.rule not in self._raised:
                sys.stderr.write(f"alarm: {crossing.text(f'in the held-out evaluation at step {step:,d}')}\n")
        self._raised = {crossing.rule for crossing in broken}
        return found, figures | checked(found.figures(), self._past[0][1].figures(), self._settings)

    def _crossings(self, found: Evaluation) -> list[Crossing]:
        return crossings(found.figures(), self._past[0][1].figures(), self._settings)

    def _since_best(self, found: Evaluation) -> Evaluation:
        judged = [(step, past) for step, past in self._past if past.judge_mean is not None]
        if found.judge_mean is None or not judged:
            return found
        step, best = max(judged, key=lambda of: of[1].judge_mean or 0.0)
        earlier = {(s.index, s.prompt): s for s in best.samples if s.judge is not None}
        pairs = [
            (earlier[place], sample)
            for sample in found.samples
            if sample.judge is not None and (place := (sample.index, sample.prompt)) in earlier
        ]
        if len(pairs) < 2:
            return found
        prompts = [new.prompt for _, new in pairs]
        judge = mean_interval_of_groups([(new.judge or 0.0) - (old.judge or 0.0) for old, new in pairs], prompts)
        score = mean_interval_of_groups([new.score - old.score for old, new in pairs], prompts)
        return replace(
            found,
            best_step=step,
            judge_since_best=judge.value,
            judge_since_best_ci95=_half(judge),
            score_since_best=score.value,
            score_since_best_ci95=_half(score),
        )


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2
