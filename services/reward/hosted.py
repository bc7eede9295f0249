"""What a call is answered by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quartet.common.v1 import common_pb2
from services.reward.combining import Combination, Statistics
from services.reward.drift import Baseline
from services.reward.panel import Answers, Panel, Work
from services.reward.scorer import Encoding
from services.runtime.batcher import Batcher


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How long rows were treated when the model was trained; None where that is not kept."""

    truncation: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedReward:
    """What scores, and what belongs to it.

    ``encoding`` and ``tokenizer`` are those of all models, None where a rule scores alone. ``member_infos`` describes
    the models one by one, ``golden`` says of each what the check of its golden items found.
    """

    panel: Panel
    encoding: Encoding | None
    tokenizer: Any
    model: common_pb2.ModelInfo
    combination: Combination = field(default_factory=Combination)
    trained: Trained = field(default_factory=Trained)
    member_infos: tuple[common_pb2.ModelInfo, ...] = ()
    golden: tuple[str, ...] = ()
    baseline: Baseline | str = "no baseline scores are kept with the model"
    """Scores kept with it, or why its scores are not compared with any."""

    @property
    def normalisation(self) -> Statistics | None:
        """Statistics that a raw score is normalised with; None without any, and for an ensemble."""
        members = self.combination.members
        return members[0].statistics if len(members) == 1 else None


@dataclass(frozen=True, kw_only=True)
class HostedReward(LoadedReward):
    """It with its batcher, ready for calls. A call is answered by one of these from beginning to end."""

    batcher: Batcher[Work, Answers]

    def close(self) -> None:
        """Answers what waits, and ends the model's thread, not the rule. Blocks; nothing may be submitted any more."""
        self.batcher.close()
