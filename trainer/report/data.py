"""What a finished or unfinished run left in its folder, read and checked for the report.

``metrics.jsonl`` is needed. ``evaluation_before.json`` and ``evaluation_after.json`` (PPO, online DPO),
``evaluation.json`` (the supervised stages) and ``settings.json`` are used as far as they are there.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from quartet.settings import Finite, NonNegativeFloat, NonNegativeInt, PositiveInt, UnitFloat
from trainer.errors import TrainerError
from trainer.tracking import read_metrics

BEFORE_FILE = "evaluation_before.json"
AFTER_FILE = "evaluation_after.json"
SUPERVISED_FILE = "evaluation.json"
SETTINGS_FILE = "settings.json"

Kind = Literal["ppo", "online-dpo", "reward", "dpo", "kto", "sft", "run"]


class ReportError(TrainerError):
    """A run's folder can't be reported on: which file, and what is wrong with it."""


def _storable(text: str) -> str:
    """``text`` without halves of surrogate pairs, which JSON can hold and UTF-8 can't."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_Model = TypeVar("_Model", bound=BaseModel)
_Text = Annotated[str, AfterValidator(_storable)]


class Sample(BaseModel):
    """One response to one held-out prompt. ``kl`` in nats; None: it was not measured."""

    model_config = ConfigDict(frozen=True)

    prompt: _Text
    response: _Text
    score: Finite | None = None
    kl: Finite | None = None
    finished: bool | None = None


class Evaluation(BaseModel):
    """A policy on ``n`` held-out prompts. ``..._ci95`` are half widths of the mean's 95 % interval; KL in nats."""

    model_config = ConfigDict(frozen=True)

    n: PositiveInt
    failed: NonNegativeInt = 0
    score_mean: Finite
    score_ci95: NonNegativeFloat | None = None
    score_std: NonNegativeFloat | None = None
    kl_sequence_mean: Finite | None = None
    kl_ci95: NonNegativeFloat | None = None
    length_mean: NonNegativeFloat | None = None
    finished_share: UnitFloat | None = None
    distinct_2: UnitFloat | None = None
    unique_share: UnitFloat | None = None
    tokens_per_s: NonNegativeFloat | None = None
    prompts: PositiveInt | None = None
    kl_exact_mean: Finite | None = None
    kl_exact_ci95: NonNegativeFloat | None = None
    entropy_mean: Finite | None = None
    length_p05: NonNegativeFloat | None = None
    length_p50: NonNegativeFloat | None = None
    length_p95: NonNegativeFloat | None = None
    length_correlation: Finite | None = None
    length_correlation_within: Finite | None = None
    distinct_1: UnitFloat | None = None
    distinct_3: UnitFloat | None = None
    self_bleu_4: UnitFloat | None = None
    repeated_4_share: UnitFloat | None = None
    spread_mean: NonNegativeFloat | None = None
    judge_mean: Finite | None = None
    judge_ci95: NonNegativeFloat | None = None
    demonstration_perplexity: NonNegativeFloat | None = None
    best_step: NonNegativeInt | None = None
    judge_since_best: Finite | None = None
    judge_since_best_ci95: NonNegativeFloat | None = None
    score_since_best: Finite | None = None
    score_since_best_ci95: NonNegativeFloat | None = None
    samples: tuple[Sample, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """Those that are known, by name."""
        return self.model_dump(exclude={"samples"}, exclude_none=True)


class Share(BaseModel):
    """A share with its 95 % interval, over ``count`` rows."""

    model_config = ConfigDict(frozen=True)

    value: UnitFloat
    low: UnitFloat
    high: UnitFloat
    count: PositiveInt


class Supervised(BaseModel):
    """What SFT (``before``, ``after``) and reward training (``accuracy``, ``baselines``) say of held-out rows."""

    model_config = ConfigDict(frozen=True, extra="allow")

    before: Mapping[str, Finite] = {}
    after: Mapping[str, Finite] = {}
    eval_loss: Finite | None = None
    accuracy: Share | None = None
    baselines: Mapping[str, Share] = {}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The responses to one held-out prompt; None: that evaluation is missing, or the sample failed in it."""

    prompt: str
    before: Sample | None
    after: Sample | None

    @property
    def change(self) -> float | None:
        """By how much the later response scores higher."""
        old, new = (sample.score if sample else None for sample in (self.before, self.after))
        return new - old if old is not None and new is not None else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the report is made of.

    ``records`` are the steps in order; ``settings`` are flattened, with dots between the levels.
    """

    name: str
    records: tuple[Mapping[str, float], ...]
    before: Evaluation | None
    after: Evaluation | None
    pairs: tuple[Pair, ...]
    supervised: Supervised | None
    settings: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """By what the run logged; "run" where that does not tell."""
        keys = set(self.figure_keys())
        if "reward/score_mean" in keys or self.before is not None or self.after is not None:
            return "online-dpo" if "chosen_logprob_mean" in keys else "ppo"
        if "label_accuracy" in keys:
            return "kto"
        if "chosen_logprob_mean" in keys:
            return "dpo"
        if keys & {"accuracy", "margin_mean", "eval_accuracy"}:
            return "reward"
        return "sft" if "loss" in keys else "run"

    def figure_keys(self) -> list[str]:
        """Every figure's key, in the order in which they first appear."""
        return list(dict.fromkeys(key for record in self.records for key in record if key != "step"))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which ``key`` was logged, and its values there."""
        points = [(int(record["step"]), record[key]) for record in self.records if key in record]
        return [step for step, _ in points], [value for _, value in points]

    def first(self, key: str) -> float | None:
        """The figure where it was first logged."""
        return next(iter(self.series(key)[1]), None)

    def last(self, key: str) -> float | None:
        """The figure where it was last logged."""
        return next(reversed(self.series(key)[1]), None)


def read_run(run_dir: Path) -> Run:
    """Reads the folder of a run.

    Raises:
        TrackingError: there is no log, or it is damaged.
        ReportError: another file is no JSON, lacks a figure, holds one that is not finite, or the two evaluations
            have no prompt in common.
    """
    records = read_metrics(run_dir)
    before, after = (_read(run_dir / name, Evaluation) for name in (BEFORE_FILE, AFTER_FILE))
    pairs = _pair(before.samples if before else (), after.samples if after else ())
    if before and after and before.samples and after.samples and not any(p.before and p.after for p in pairs):
        raise ReportError(f"{run_dir / AFTER_FILE} is of other prompts than {BEFORE_FILE}: none is in both")
    return Run(
        name=run_dir.resolve().name,
        records=tuple(records),
        before=before,
        after=after,
        pairs=pairs,
        supervised=_read(run_dir / SUPERVISED_FILE, Supervised),
        settings=dict(flat(_read_object(run_dir / SETTINGS_FILE) or {})),
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ReportError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def _read(path: Path, model: type[_Model]) -> _Model | None:
    content = _read_object(path)
    if content is None:
        return None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            raise ReportError(f"{path}: {field} is missing") from error
        reason = problem["msg"].removeprefix("Value error, ")
        raise ReportError(f"{path}: {field} is {repr(problem['input'])[:100]}: {reason}") from error


def _pair(before: Sequence[Sample], after: Sequence[Sample]) -> tuple[Pair, ...]:
    """By prompt, in the order of the evaluations: a sample that failed in one of them leaves its place there empty."""
    waiting: defaultdict[str, deque[Sample]] = defaultdict(deque)
    for sample in after:
        waiting[sample.prompt].append(sample)
    pairs = [
        Pair(prompt=old.prompt, before=old, after=waiting[old.prompt].popleft() if waiting[old.prompt] else None)
        for old in before
    ]
    left = [Pair(prompt=new.prompt, before=None, after=new) for samples in waiting.values() for new in samples]
    return (*pairs, *left)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots between the levels, and values that JSON and UTF-8 can hold."""
    for key, value in values.items():
        name = _storable(f"{prefix}{key}")
        if isinstance(value, dict) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield name, str(value)
        else:
            yield name, _storable(value) if isinstance(value, str) else value
