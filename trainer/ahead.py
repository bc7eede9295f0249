"""Rollouts ahead of training: sampled while earlier ones are learned from, and kept in checkpoints until their turn.

Which weights sample a rollout follows from its step alone and never from how fast anybody is: that of step s is begun
when s - k steps have been learned (those of the first k + 1 steps: none), and new weights are published only when no
rollout is under way.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.rollout import Rollout, Sample

_PREFIX = "rollouts."


class RolloutsAhead:
    """The rollouts of the next steps, in their order."""

    def __init__(self, begin: Callable[[int], Future[Rollout]], *, steps: int, staleness: int) -> None:
        """
        Args:
            begin: begins the rollout of a step, counted from 0, with the weights published last.
            steps: of the run; no rollout is begun that nobody will learn from.
            staleness: k, by how many steps rollouts are ahead.
        """
        self._begin = begin
        self._steps = steps
        self._staleness = staleness
        self._under_way: Future[Rollout] | None = None
        self.waiting: deque[Rollout] = deque()

    def next(self, step: int) -> Rollout:
        """The rollout of ``step``; that of ``staleness`` steps later is begun.

        Raises:
            TrainerError, QuartetError: a rollout failed, as ``begin`` has it.
        """
        while len(self.waiting) < min(self._staleness, self._steps - step):  # At the beginning of a run alone.
            self._under_way = self._begin(step + len(self.waiting))
            self.finish()
        if step + self._staleness < self._steps:
            self._under_way = self._begin(step + self._staleness)
        if not self.waiting:
            self.finish()
        return self.waiting.popleft()

    def finish(self) -> float:
        """Waits for the rollout under way; returns the seconds it took.

        Raises:
            TrainerError, QuartetError: it failed.
        """
        start_s = time.perf_counter()
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            try:
                self.waiting.append(under_way.result())
            finally:
                under_way.cancel()  # Where Ctrl-C broke the wait.
        return time.perf_counter() - start_s

    def complete(self, step: int) -> bool:
        """Whether all is there that an unbroken run has when ``step`` steps are done: what else could be resumed?"""
        return self._under_way is None and len(self.waiting) == min(self._staleness, self._steps - step)

    def cancel(self) -> None:
        """Gives up the rollout under way."""
        if self._under_way is not None:
            self._under_way.cancel()


def pack(rollouts: Sequence[Rollout]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rollouts as JSON values and tensors, without the loss of a bit.

    Tensors: ids of prompts and responses end to end; a row of place, lengths, version and end for each sample; both
    log-probabilities of each response token; the score of each sample, and those of several reward services; the spread
    of each score, NaN where there is none.
    """
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    described = [
        {
            "failures": list(rollout.failures),
            "weights_version": rollout.weights_version,
            "weights_step": rollout.weights_step,
            "duration_s": rollout.duration_s,
            "service_work_s": rollout.service_work_s,
            "samples": len(rollout.samples),
            "where": [sample.where for sample in rollout.samples],
            "scores": list(rollout.samples[0].scores) if rollout.samples else [],
        }
        for rollout in rollouts
    ]
    facts = [(s.index, len(s.prompt_ids), len(s.response_ids), s.weights_version, int(s.finished)) for s in samples]
    columns: dict[str, npt.NDArray[Any]] = {
        "ids": np.array([token for s in samples for token in (*s.prompt_ids, *s.response_ids)], dtype=np.int32),
        "facts": np.array(facts, dtype=np.int64).reshape(-1, 5),
        "logprobs": np.array([x for s in samples for x in s.logprobs], dtype=np.float64),
        "ref_logprobs": np.array([x for s in samples for x in s.ref_logprobs], dtype=np.float64),
        "scores": np.array([x for s in samples for x in (s.score, *s.scores.values())], dtype=np.float64),
        "spreads": np.array([math.nan if s.spread is None else s.spread for s in samples], dtype=np.float64),
    }
    return described, {f"{_PREFIX}{name}": torch.from_numpy(column) for name, column in columns.items()}


def unpack(described: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """What ``pack`` was given.

    Raises:
        KeyError, ValueError: it is not whole.
    """
    names = ("ids", "facts", "logprobs", "ref_logprobs", "scores", "spreads")
    ids, facts, logprobs, ref_logprobs, scores, spreads = (iter(tensors[f"{_PREFIX}{name}"].tolist()) for name in names)

    def take(column: Any, count: int) -> tuple[Any, ...]:
        return tuple(next(column) for _ in range(count))

    rollouts = []
    for entry in described:
        samples = []
        wheres = entry.get("where", [""] * entry["samples"])
        for where, (index, prompt, response, version, finished) in zip(
            wheres, take(facts, entry["samples"]), strict=True
        ):
            samples.append(
                Sample(
                    index=index,
                    prompt_ids=take(ids, prompt),
                    response_ids=take(ids, response),
                    logprobs=take(logprobs, response),
                    ref_logprobs=take(ref_logprobs, response),
                    score=next(scores),
                    spread=None if math.isnan(spread := next(spreads)) else spread,
                    finished=bool(finished),
                    weights_version=version,
                    where=where,
                )
            )
            if entry["scores"]:
                named = dict(zip(entry["scores"], take(scores, len(entry["scores"])), strict=True))
                samples[-1] = replace(samples[-1], scores=named)
        rollouts.append(
            Rollout(
                samples=tuple(samples),
                failures=tuple(entry["failures"]),
                weights_version=entry["weights_version"],
                weights_step=entry["weights_step"],
                duration_s=entry["duration_s"],
                service_work_s=entry["service_work_s"],
            )
        )
    return rollouts
