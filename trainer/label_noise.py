"""Doubtful labels: which pairs the members of an ensemble disagree with, and what is done about them.

An ensemble's run writes, of each pair that it was trained on, the mean and standard deviation over members of the
difference of their scores, better answer less worse one (``disagreement.jsonl``). A later run with ``--noise-from``
turns the lowest round, leaves the next out, and softens the labels that members are least sure of.

Source: Wang et al. 2024, "Secrets of RLHF in Large Language Models Part II: Reward Modeling", section 2; here over
members that have not seen the pair, where there are such: who has learned a wrong label by heart does not doubt it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.comparisons import Comparison, Judgement
from trainer.config import RewardSettings
from trainer.errors import DataError
from trainer.files import replace_file

DISAGREEMENT_FILE = "disagreement.jsonl"
NOISE_FILE = "noise.jsonl"


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """What the members say of one annotated pair.

    ``mean`` and ``std``: of the difference of scores, better answer less worse one, in standard deviations of each
    member's scores; ``std`` is the sample's (divisor n - 1), None of one member. ``probability``: mean over members of
    theirs that the label is right. ``members``: how many are asked; ``unseen``: whether none of them trained on it.
    """

    where: str
    key: str
    label: float
    mean: float
    std: float | None
    probability: float
    members: int
    unseen: bool


def pair_key(row: Comparison, judgement: Judgement) -> str:
    """Tells an annotated pair from all others, wherever it stands."""
    texts = [row.answers[judgement.first], row.answers[judgement.second]]
    content = [row.prompt, *texts, judgement.attribute, judgement.probability]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_disagreements(folder: Path, found: Sequence[Disagreement]) -> None:
    """
    Raises:
        OutputError: it can't be written.
    """
    _write_lines(folder / DISAGREEMENT_FILE, [asdict(item) for item in found])


def read_disagreements(folder: Path) -> dict[str, Disagreement]:
    """By ``pair_key``.

    Raises:
        DataError: the folder is not the run of an ensemble.
    """
    path = folder / DISAGREEMENT_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [Disagreement(**json.loads(line)) for line in lines]
    except OSError as error:
        raise DataError(
            f"--noise-from is {str(folder)!r}: {DISAGREEMENT_FILE} can't be read ({error.strerror}); it must be the "
            "--output of a run of quartet-train reward with --members 2 or more"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not what an ensemble's run writes: {error}") from error
    return {item.key: item for item in found}


@dataclass(frozen=True, kw_only=True)
class Treated:
    """Rows after treatment, and what was done: figures, and one record a label that was touched."""

    rows: list[Comparison]
    figures: dict[str, Any]
    records: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """
        Raises:
            OutputError: it can't be written.
        """
        _write_lines(folder / NOISE_FILE, self.records)


def treat(rows: Sequence[Comparison], settings: RewardSettings) -> Treated:
    """Flips, leaves out and smooths the shares of judged pairs that ``settings`` ask for.

    Only labels that the members contradict (a mean below 0) are turned round or left out, so that there can be fewer
    than were asked for. Ties are neither.

    Raises:
        DataError: a pair was not in the ensemble's training rows; or all pairs would be left out.
    """
    assert settings.noise_from is not None
    known = read_disagreements(settings.noise_from)
    pairs = [(index, place) for index, row in enumerate(rows) for place in range(len(row.judgements))]
    opinions = {}
    for index, place in pairs:
        row = rows[index]
        opinion = known.get(pair_key(row, row.judgements[place]))
        if opinion is None:
            raise DataError(
                f"{row.where}: a pair that the ensemble of --noise-from {str(settings.noise_from)!r} did not train on: "
                "give the same --data, --seed, --held-out-fraction and --annotators as it had"
            )
        opinions[index, place] = opinion
    actions = _actions(pairs, opinions, settings, [rows[i].judgements[p].decided for i, p in pairs])
    treated: list[Comparison] = []
    records: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        judgements = []
        for place, judgement in enumerate(row.judgements):
            opinion, action = opinions[index, place], actions.get((index, place))
            after = judgement
            if action == "flipped":
                after = judgement.with_probability(1.0 - judgement.probability)
            elif action == "smoothed":
                after = judgement.with_probability(0.5 * (judgement.probability + opinion.probability))
            if action != "dropped":
                judgements.append(after)
            if action is not None:
                records.append(_record(row, judgement, after, action, opinion))
        if judgements:
            touched = any((index, place) in actions for place in range(len(row.judgements)))
            treated.append(replace(row, judgements=tuple(judgements), ranked=row.ranked and not touched))
    if not treated:
        raise DataError("--noise-drop leaves no pair to train on")
    counts = {name: sum(record["action"] == name for record in records) for name in ("flipped", "dropped", "smoothed")}
    return Treated(
        rows=treated,
        figures={
            "from": str(settings.noise_from),
            "pairs": len(pairs),
            "contradicted": sum(opinion.mean < 0 for opinion in opinions.values()),
            **counts,
        },
        records=records,
    )


_Place = tuple[int, int]


def _actions(
    pairs: Sequence[_Place],
    opinions: dict[_Place, Disagreement],
    settings: RewardSettings,
    decided: Sequence[bool],
) -> dict[_Place, str]:
    """What is done to which pair, by row and judgement."""
    contradicted = [
        pair for pair, is_decided in zip(pairs, decided, strict=True) if is_decided and opinions[pair].mean < 0
    ]
    contradicted.sort(key=lambda pair: (opinions[pair].mean, pair))
    flips, drops, smooths = (
        round(share * len(pairs)) for share in (settings.noise_flip, settings.noise_drop, settings.noise_smooth)
    )
    actions = dict.fromkeys(contradicted[:flips], "flipped")
    actions |= dict.fromkeys(contradicted[flips : flips + drops], "dropped")
    rest = [pair for pair in pairs if pair not in actions]
    rest.sort(key=lambda pair: (_sureness(opinions[pair]), pair))
    return actions | dict.fromkeys(rest[:smooths], "smoothed")


def _sureness(opinion: Disagreement) -> float:
    """How far the mean is from 0, in standard deviations over members where there are several."""
    return abs(opinion.mean) / max(opinion.std if opinion.std is not None else 1.0, 1e-9)


def _record(row: Comparison, before: Judgement, after: Judgement, action: str, opinion: Disagreement) -> dict[str, Any]:
    """Of one label that was touched; ``label``: the probability that its first answer is better, before and after."""
    same = after.first == before.first
    label_after = None if action == "dropped" else after.probability if same else 1.0 - after.probability
    return {
        "where": row.where,
        "first": before.first,
        "second": before.second,
        "attribute": before.attribute,
        "action": action,
        "mean": opinion.mean,
        "std": opinion.std,
        "members": opinion.members,
        "label_before": before.probability,
        "label_after": label_after,
    }


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    def lines() -> Iterator[str]:
        for record in records:
            yield json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"

    replace_file(path, "".join(lines()))
