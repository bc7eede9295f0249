"""What quartet.json says of a reward model, read and checked before anything heavy is loaded.

A model::

    {"kind": "reward", "append_eos": true, "truncation": "left", "max_tokens": 512,
     "heads": [{"name": "helpfulness", "weight": 0.7}, {"name": "safety", "weight": 0.3}],
     "normalisation": {"mean": 0.4, "std": 1.7, "count": 4096},
     "calibration": {"temperature": 1.3},
     "golden": {"score_std": 1.6, "items": [{"prompt": "...", "response": "...", "token_count": 40, "score": 0.2}]},
     "baseline": {"scores": [0.1, -1.2, ...]}}

An ensemble is a folder with nothing but a quartet.json, whose members are folders relative to it::

    {"kind": "reward-ensemble", "members": ["seed-0/model", "seed-1/model"]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.model_folder import METADATA_FILE, read_metadata
from services.reward.combining import Head, Statistics
from services.reward.drift import Baseline, read_baseline
from services.runtime.errors import StartError

ENSEMBLE_KIND = "reward-ensemble"
TRUNCATIONS = ("refuse", "left", "right")


@dataclass(frozen=True, kw_only=True)
class GoldenItem:
    """A response that the trainer scored, in float32. ``attributes``: raw scores of heads by name, where kept."""

    prompt: str | Sequence[Mapping[str, str]]
    response: str
    token_count: int
    score: float
    attributes: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What the model must say to be the one that was trained. ``score_std``: of its scores on held-out texts."""

    score_std: float
    items: tuple[GoldenItem, ...]


@dataclass(frozen=True, kw_only=True)
class RewardMetadata:
    """What is kept with one reward model; what is not kept is None, or empty."""

    pair: bool | None
    append_eos: bool
    truncation: str | None
    max_tokens: int | None
    heads: tuple[Head, ...]
    statistics: Statistics | None
    temperature: float
    golden: Golden | None
    baseline: Baseline | str


def ensemble_members(model: str) -> tuple[str, ...] | None:
    """Folders of the members if ``model`` is the folder of an ensemble, else None.

    Raises:
        StartError: it is one, but its members are not usable.
        ModelFolderError: its quartet.json is not valid.
    """
    folder = Path(model).expanduser()
    if "\0" in model or not (folder / METADATA_FILE).is_file():
        return None
    metadata = read_metadata(folder)
    if metadata.get("kind") != ENSEMBLE_KIND:
        return None
    members = metadata.get("members")
    where = f"{folder / METADATA_FILE}: members"
    if not isinstance(members, list) or not all(isinstance(member, str) and member for member in members):
        raise StartError(f"{where} is {members!r}, must be a list of model folders, relative to {str(folder)!r}")
    if len(members) < 2:
        raise StartError(f"{where} has {len(members)} folders, must have at least 2")
    # Before anything is loaded, and never a name for the hub.
    for member in members:
        if not (folder / member).is_dir():
            raise StartError(f"{where} names {member!r}, but there is no folder {str(folder / member)!r}")
    return tuple(str(folder / member) for member in members)


def read_reward_metadata(folder: Path) -> RewardMetadata:
    """What quartet.json in ``folder`` says; all defaults without one.

    Raises:
        StartError: a value is not usable; names the file, the field, the value and what it must be.
        ModelFolderError: the file is no JSON object.
    """
    metadata = read_metadata(folder)
    reader = _Reader(folder / METADATA_FILE, metadata)
    encoding = reader.one_of("encoding", ("pair", "concatenate"))
    return RewardMetadata(
        pair=None if encoding is None else encoding == "pair",
        append_eos=reader.flag("append_eos", True),
        truncation=reader.one_of("truncation", TRUNCATIONS),
        max_tokens=reader.positive_integer("max_tokens"),
        heads=reader.heads(),
        statistics=reader.statistics(),
        temperature=reader.temperature(),
        golden=reader.golden(),
        baseline=read_baseline(metadata, str(folder)),
    )


class _Reader:
    """Takes values out of the file's content, refusing what they may not be."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def refuse(self, field: str, value: object, must: str) -> StartError:
        shown = repr(value)
        return StartError(f"{self.path}: {field} is {shown if len(shown) <= 200 else shown[:200] + '...'}, {must}")

    def one_of(self, field: str, values: tuple[str, ...]) -> str | None:
        value = self.content.get(field)
        if value is not None and value not in values:
            raise self.refuse(field, value, f"must be one of {', '.join(values)}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.content.get(field, default)
        if not isinstance(value, bool):
            raise self.refuse(field, value, "must be true or false")
        return value

    def positive_integer(self, field: str) -> int | None:
        value = self.content.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self.refuse(field, value, "must be a whole number of at least 1")
        return value

    def number(self, field: str, value: object, *, above: float | None = None) -> float:
        must = "must be a finite number" + ("" if above is None else f" greater than {above:g}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(field, value, must)
        if above is not None and not value > above:
            raise self.refuse(field, value, must)
        return float(value)

    def record(self, field: str, value: object, keys: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(value, dict) or any(key not in value for key in keys):
            raise self.refuse(field, value, f"must be an object with {', '.join(keys)}")
        return value

    def records(self, field: str, value: object, keys: Sequence[str]) -> list[Mapping[str, Any]]:
        if not isinstance(value, list) or not value:
            raise self.refuse(field, value, "must be a list of at least one object")
        return [self.record(f"{field}[{index}]", item, keys) for index, item in enumerate(value)]

    def heads(self) -> tuple[Head, ...]:
        kept = self.content.get("heads")
        if kept is None:
            return ()
        heads: list[Head] = []
        for index, item in enumerate(self.records("heads", kept, ("name", "weight"))):
            name = item["name"]
            if not isinstance(name, str) or not name or name in [head.name for head in heads]:
                raise self.refuse(f"heads[{index}].name", name, "must be text that no other head has")
            heads.append(Head(name=name, weight=self.number(f"heads[{index}].weight", item["weight"])))
        return tuple(heads)

    def statistics(self) -> Statistics | None:
        kept = self.content.get("normalisation")
        if kept is None:
            return None
        kept = self.record("normalisation", kept, ("mean", "std", "count"))
        count = kept["count"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise self.refuse("normalisation.count", count, "must be a whole number of at least 1")
        return Statistics(
            mean=self.number("normalisation.mean", kept["mean"]),
            std=self.number("normalisation.std", kept["std"], above=0),
            count=count,
        )

    def temperature(self) -> float:
        kept = self.content.get("calibration")
        if kept is None:
            return 1.0
        if not isinstance(kept, dict):
            raise self.refuse("calibration", kept, "must be an object")
        return self.number("calibration.temperature", kept.get("temperature", 1.0), above=0)

    def golden(self) -> Golden | None:
        kept = self.content.get("golden")
        if kept is None:
            return None
        kept = self.record("golden", kept, ("score_std", "items"))
        items = self.records("golden.items", kept["items"], ("prompt", "response", "token_count", "score"))
        return Golden(
            score_std=self.number("golden.score_std", kept["score_std"], above=0),
            items=tuple(self._golden_item(f"golden.items[{index}]", item) for index, item in enumerate(items)),
        )

    def _golden_item(self, where: str, item: Mapping[str, Any]) -> GoldenItem:
        prompt, response, count = item["prompt"], item["response"], item["token_count"]
        if isinstance(prompt, list):
            turns = self.records(f"{where}.prompt", prompt, ("role", "content"))
            if not all(isinstance(turn[key], str) for turn in turns for key in ("role", "content")):
                raise self.refuse(f"{where}.prompt", prompt, "must be text or messages with a role and content")
        elif not isinstance(prompt, str):
            raise self.refuse(f"{where}.prompt", prompt, "must be text or messages with a role and content")
        if not isinstance(response, str):
            raise self.refuse(f"{where}.response", response, "must be text")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise self.refuse(f"{where}.token_count", count, "must be a whole number of at least 1")
        attributes = item.get("attributes", {})
        if not isinstance(attributes, dict):
            raise self.refuse(f"{where}.attributes", attributes, "must be an object of numbers by head")
        return GoldenItem(
            prompt=prompt,
            response=response,
            token_count=count,
            score=self.number(f"{where}.score", item["score"]),
            attributes={name: self.number(f"{where}.attributes.{name}", x) for name, x in attributes.items()},
        )
