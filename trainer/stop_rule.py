"""Which evaluation was the best so far, and when to stop: the proxy rises long after what it stands for has fallen.

Source: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", for what happens; the rule is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.evaluate import Evaluation
from trainer.statistics import bootstrap_upper_bound

# So many evaluations in a row must be worse than the best: one may be by chance.
_FALLS = 2


@dataclass(frozen=True, kw_only=True)
class Standing:
    """An evaluation as others are compared with it: its step, the score trained on, and the gold score by prompt."""

    step: int
    proxy: float
    gold: Mapping[str, float]


class StopRule:
    """Looks at one evaluation after the other; ``reason`` says why the run should stop, once it should."""

    def __init__(
        self,
        *,
        gold: str = "",
        when_worse: bool = False,
        above_kl: float | None = None,
        below_unique: float | None = None,
    ) -> None:
        """
        Args:
            gold: name of the reward service that decides; empty: the score trained on.
            when_worse: stop when the upper 95 % bound of the paired bootstrap of gold(now) - gold(best) is below 0 in
                two evaluations in a row, and the score trained on is above what it was at the best one. Where that is
                gold itself, the bound alone decides.
            above_kl: stop when the mean KL of a response to the reference is above it, nats.
            below_unique: stop when the share of different responses is below it.
        """
        self._gold, self._when_worse = gold, when_worse
        self._above_kl, self._below_unique = above_kl, below_unique
        self.best: Standing | None = None
        self.falls = 0
        self.reason: str | None = None

    def consider(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Takes in the evaluation after ``step`` steps; returns figures for the log.

        It is the best so far where gold is higher on the prompts that both answered: then ``best.step`` is ``step``.
        """
        now = Standing(
            step=step,
            proxy=evaluation.score_mean,
            gold={
                str(sample.index): sample.scores[self._gold] if self._gold else sample.score
                for sample in evaluation.samples
            },
        )
        self._look_at(step, evaluation)
        best = self.best
        both = [] if best is None else [place for place in now.gold if place in best.gold]
        if best is None or len(both) < 2:
            self.best, self.falls = now, 0
            return {"eval/best_step": step}
        changes = [now.gold[place] - best.gold[place] for place in both]
        change, bound = sum(changes) / len(changes), bootstrap_upper_bound(changes)
        proxy_rises = not self._gold or now.proxy > best.proxy
        self.falls = self.falls + 1 if bound < 0 and proxy_rises else 0
        if self._when_worse and self.falls >= _FALLS and self.reason is None:
            of = f"reward {self._gold}" if self._gold else "the reward"
            self.reason = (
                f"{of} on held-out prompts is {change:+.3f} of what it was after step {best.step}, the best so far (by "
                f"paired bootstrap at most {bound:+.3f}, 95 %), for {self.falls} evaluations in a row"
            )
        if change > 0:
            self.best = now
        return {"eval/best_step": self.best.step if self.best else step, "eval/change_from_best": change}

    def _look_at(self, step: int, evaluation: Evaluation) -> None:
        if self.reason is not None:
            return
        kl, unique = evaluation.kl_sequence_mean, evaluation.unique_share
        if self._above_kl is not None and kl > self._above_kl:
            self.reason = f"KL to the reference is {kl:.2f} nats a response after step {step}, above {self._above_kl:g}"
        elif self._below_unique is not None and unique < self._below_unique:
            self.reason = f"{unique:.0%} of the responses differ after step {step}, below {self._below_unique:.0%}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "falls": self.falls, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is not one of this rule.
        """
        try:
            self.best = None if state["best"] is None else Standing(**state["best"])
            self.falls, self.reason = int(state["falls"]), state["reason"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the saved stop rule can't be read: {error}") from error
