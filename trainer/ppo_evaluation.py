"""The policy of a run against services on its held-out prompts: before, between and after the steps, and the best."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quartet import tracing
from trainer.distributed import led
from trainer.evaluate import Evaluation, difference, summarise
from trainer.files import remove_folder
from trainer.monitoring import PolicyMonitor
from trainer.ppo_config import RunSettings
from trainer.reward_services import means_by_name
from trainer.rollout import Rollout
from trainer.stop_rule import StopRule

BEFORE = "evaluation_before.json"
AFTER = "evaluation_after.json"

Ask = Callable[[], tuple[Rollout, Sequence[float | None] | None]]
"""Responses to the held-out prompts, scored, and what the judge says of each, where there is one."""


class Evaluations:
    """Those of one run, each shown to the monitor and to the stop rule."""

    def __init__(
        self,
        settings: RunSettings,
        tokenizer: Any,
        monitor: PolicyMonitor,
        stop_rule: StopRule,
        *,
        ask: Ask,
        keep: Callable[[Path], None],
    ) -> None:
        """
        Args:
            settings: of the run.
            tokenizer: of the policy.
            monitor: of the policy.
            stop_rule: told of every evaluation; it knows the best.
            ask: for responses of the present policy.
            keep: saves the present policy in a folder.
        """
        self._settings = settings
        self._tokenizer = tokenizer
        self._monitor = monitor
        self._stop_rule = stop_rule
        self._ask = ask
        self._keep = keep

    @tracing.traced("evaluate")
    def evaluate(self) -> Evaluation:
        """The present policy on the held-out prompts."""
        rollout, judged = self._ask()
        policy = self._monitor.observe(rollout.samples)
        return summarise(rollout, self._tokenizer, judged=judged, policy=policy)

    def before(self, step: int) -> dict[str, float]:
        """The SFT policy, once in a run's life; returns its figures."""
        path = self._settings.output / BEFORE
        if step > 0:
            return {}
        figures: dict[str, float] = {}
        if not path.exists():
            evaluation, figures = self._monitor.watch(0, self.evaluate(), path)
            sys.stdout.write(f"before: {evaluation.line()}\n")
            sys.stdout.flush()
        self._stop_rule.consider(0, Evaluation.read(path))
        return figures

    def between(self, step: int) -> dict[str, float]:
        """Figures and alarms for the log, at the steps that ask for them; the best model is kept."""
        every = self._settings.eval_every
        if not every or step % every or step == self._settings.steps:
            return {}
        found, figures = self._monitor.watch(step, self.evaluate())
        standing = self._stop_rule.consider(step, found)
        if self._settings.keep_best and self._is_best(step):
            self._keep(best_folder(self._settings.output, step))
        return figures | standing | means_by_name([sample.scores for sample in found.samples], "eval")

    def after(self, step: int) -> dict[str, float]:
        """The trained policy; returns its figures."""
        settings, rule = self._settings, self._stop_rule
        evaluation, figures = self._monitor.watch(step, self.evaluate(), settings.output / AFTER)
        if rule.reason is not None:
            sys.stdout.write(f"stopped after step {step} of {settings.steps}: {rule.reason}\n")
        sys.stdout.write(f"after:  {evaluation.line()}\n")
        if settings.eval_every:
            rule.consider(step, evaluation)
            if self._is_best(step):
                led(keep_only_best)(settings.output, step)  # What is exported at the end.
        return figures

    def _is_best(self, step: int) -> bool:
        return self._stop_rule.best is not None and self._stop_rule.best.step == step

    def outcome(self) -> str:
        """Lines on what training has brought, once there are evaluations before and after it."""
        before, after = (Evaluation.read(self._settings.output / name) for name in (BEFORE, AFTER))
        return (
            f"held-out reward: before {before.score}, after {after.score} (95 %), {difference(before, after)} more"
            f"{_in_deviations(before, after)}\n"
            f"KL to the reference: {after.kl_sequence_mean:.2f} nats a response\n"
            f"generation: {after.tokens_per_s:,.0f} tokens/s in the last evaluation\n"
        )

    def best_line(self, step: int) -> str:
        """Which of the evaluated models was the best, and where it is; empty where none is kept."""
        settings, best = self._settings, self._stop_rule.best
        if not (settings.eval_every and settings.keep_best and best):
            return ""
        where = {0: f"{settings.model}, as it was before", step: "the last"}
        above = f", an adapter of {settings.model}" if settings.lora_rank else ""
        folder = where.get(best.step, f"{best_folder(settings.output, best.step)}{above}")
        return f"best of the evaluated models (held-out {settings.gold or 'reward'}, step {best.step}): {folder}\n"


def best_folder(output: Path, step: int) -> Path:
    """Where the model of the best evaluation is kept."""
    return output / f"best-{step:06d}"


def keep_only_best(output: Path, step: int) -> None:
    """Removes the models of evaluations that are the best no longer."""
    for folder in output.glob("best-[0-9]*"):
        if folder != best_folder(output, step):
            remove_folder(folder)


def _in_deviations(before: Evaluation, after: Evaluation) -> str:
    """The change in standard deviations of the scores before: how far it is, whatever the scores' unit."""
    if not before.score_std > 0:
        return ""
    return f", {(after.score_mean - before.score_mean) / before.score_std:+.2f} standard deviations of before"
