"""What ``bench.sentiment`` trains and judges on: film reviews, and their twins that people edited to say the opposite.

Twins are cut, at the ends of sentences that they have in common, into passages of one to three sentences. Those that
were edited are preferences (the positive one chosen), all of them are texts for SFT. Where both twins begin with the
same eight words these are a prompt: it leaves open what the review will say. People praise in fewer words than they
blame in: of the preferences that are trained on some are left out, so that length says nothing of which is which
(``balanced``); held-out ones stay as they are. Twins are in one part alone, whole:

    train      SFT, preferences of the reward model and of DPO, prompts of PPO
    judge      what the judge learns from, and nothing else
    held_out   prompts, demonstrations and preferences that figures are of
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_WORDS = 8
LEAST_WORDS, MOST_WORDS = 20, 48
"""Of a passage: shorter ones are joined with the next, longer ones left out."""
_LEAST_LAST_WORDS = 12
_BAND_WORDS = 8
"""Answers whose lengths are within so many words are about as long."""
_HELD_OUT_SHARE, _JUDGE_SHARE = 0.18, 0.26
_ENDS_SENTENCE = re.compile(r"[.!?][\"')\]]*$")

Row = dict[str, Any]
Words = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Twins:
    """A review that praises, and the same one that does not; one of the two is a person's edit of the other."""

    name: str
    positive: str
    negative: str


def read_twins(path: Path) -> list[Twins]:
    """Twins by ``batch_id``, sorted by it.

    Raises:
        ValueError: a row has no ``Sentiment``, ``Text`` or ``batch_id``, or a batch is not one review of each kind.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if missing := {"Sentiment", "Text", "batch_id"} - row.keys():
                raise ValueError(f"{path}, line {number}: field {min(missing)!r} is missing")
            texts = found[str(row["batch_id"])]
            if row["Sentiment"] in texts:
                raise ValueError(f"{path}, line {number}: batch {row['batch_id']} has two {row['Sentiment']} reviews")
            texts[row["Sentiment"]] = " ".join(row["Text"].replace("<br />", " ").split())
    for name, texts in found.items():
        if texts.keys() != {"Positive", "Negative"}:
            raise ValueError(f"{path}: batch {name} has {sorted(texts)}, must have a Positive and a Negative review")
    return [Twins(name=name, positive=t["Positive"], negative=t["Negative"]) for name, t in sorted(found.items())]


def split(twins: Sequence[Twins], seed: int) -> dict[str, list[Twins]]:
    """The three parts, by name."""
    order = list(twins)
    random.Random(seed).shuffle(order)
    held_out = round(_HELD_OUT_SHARE * len(order))
    judge = held_out + round(_JUDGE_SHARE * len(order))
    return {"held_out": order[:held_out], "judge": order[held_out:judge], "train": order[judge:]}


def passages(twins: Twins) -> list[tuple[Words, Words]]:
    """Both reviews in parts that belong together, (positive, negative), those of a usable length.

    A cut is where both have the end of a sentence, with the same word before it or after it.
    """
    positive, negative = twins.positive.split(), twins.negative.split()
    blocks = difflib.SequenceMatcher(None, positive, negative, autojunk=False).get_matching_blocks()
    same = {block.a + i: block.b + i for block in blocks for i in range(block.size)}
    parts: list[tuple[Words, Words]] = []
    p, n = 0, 0
    for i in range(1, len(positive)):
        j = same[i] if i in same else same.get(i - 1, -1) + 1
        if min(i - p, j - n) < LEAST_WORDS or not (_ends(positive[i - 1]) and _ends(negative[j - 1])):
            continue
        parts.append((positive[p:i], negative[n:j]))
        p, n = i, j
    parts.append((positive[p:], negative[n:]))
    return [part for part in parts if all(_LEAST_LAST_WORDS <= len(words) <= MOST_WORDS for words in part)]


def _ends(word: str) -> bool:
    return _ENDS_SENTENCE.search(word) is not None


def preference(positive: Words, negative: Words) -> Row | None:
    """The words that both begin with, at most ``PROMPT_WORDS``, and how each goes on; None: there is none, or no end
    of them."""
    common = next((i for i, pair in enumerate(zip(positive, negative, strict=False)) if pair[0] != pair[1]), None)
    if not common:
        return None
    prompt = min(common, PROMPT_WORDS)
    chosen, rejected = (" " + " ".join(words[prompt:]) for words in (positive, negative))
    return {"prompt": " ".join(positive[:prompt]), "chosen": chosen, "rejected": rejected}


def longer_by(pair: Row) -> int:
    """Words by which the positive answer of a preference is longer."""
    return len(pair["chosen"].split()) - len(pair["rejected"].split())


def balanced(pairs: Sequence[Row], seed: int) -> list[Row]:
    """``pairs``, in their order, without those, drawn by ``seed``, of which there are too many: of the rest, the
    positive answer is longer by so many words as often as it is shorter by them, among answers about as long."""
    strata: dict[tuple[int, int], dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    for place, pair in enumerate(pairs):
        longer, words = longer_by(pair), len(pair["chosen"].split()) + len(pair["rejected"].split())
        if longer:
            strata[abs(longer), words // (2 * _BAND_WORDS)][longer > 0].append(place)
    draw = random.Random(seed)
    left_out: set[int] = set()
    for sides in strata.values():
        fewer, more = sorted(sides.values(), key=len)
        left_out.update(draw.sample(more, len(more) - len(fewer)))
    return [pair for place, pair in enumerate(pairs) if place not in left_out]


def texts(parts: Iterable[tuple[Words, Words]]) -> list[Words]:
    """Each passage once where nothing was edited in it, else both of its forms."""
    return [words for pair in parts for words in (pair if list(pair[0]) != list(pair[1]) else pair[:1])]


def demonstration(words: Words) -> Row:
    """A passage as what its first words are followed by."""
    return {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}


def make_files(twins: Sequence[Twins], seed: int) -> dict[str, list[Row]]:
    """The rows of each file, by its name without ``.jsonl``."""
    parts = split(twins, seed)
    files: dict[str, list[Row]] = {}
    begun: set[str] = set()
    for prefix, part in (("", "train"), ("held_out_", "held_out")):
        cut = {each.name: passages(each) for each in parts[part]}
        words = [passage for found in cut.values() for passage in texts(found)]
        pairs = [
            {**row, "batch_id": name}
            for name, found in cut.items()
            for pair in found
            if (row := preference(*pair)) is not None
        ]
        # Held-out ones begin like nothing that is trained on.
        open_ = [row["prompt"] for row in pairs if len(row["prompt"].split()) == PROMPT_WORDS]
        prompts = [prompt for prompt in dict.fromkeys(open_) if prompt not in begun]
        begun |= {demonstration(passage)["prompt"] for passage in words}
        files[f"{prefix}preferences"] = balanced(pairs, seed) if part == "train" else pairs
        files[f"{prefix}prompts"] = [{"prompt": prompt} for prompt in prompts]
        files[f"{prefix}demonstrations"] = [demonstration(passage) for passage in words]
        if part == "train":  # From nothing, a model learns from the first words, too.
            files["texts"] = [{"text": " ".join(passage)} for passage in words]
    for name, part in (("judge", "judge"), ("held_out_reviews", "held_out")):
        files[name] = [
            {"text": text, "positive": positive, "batch_id": each.name}
            for each in parts[part]
            for text, positive in ((each.positive, True), (each.negative, False))
        ]
    return files


def write_files(source: Path, folder: Path, seed: int) -> None:
    """Writes them, the folder whole or not at all, and says how many rows each has."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, rows in make_files(read_twins(source), seed).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows):,} rows")
    partial.rename(folder)
