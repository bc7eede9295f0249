"""Turns reviews with their human-flipped twins into data for SFT, a reward model and PPO.

    python examples/imdb_twins.py --input sentiment_imdb_cad_train.jsonl --output runs/imdb/data

The input (acmi-lab/counterfactually-augmented-data) holds reviews in pairs: one of a film, and the same one edited by a
person until it says the opposite. Rows have ``Sentiment``, ``Text`` and ``batch_id``; both twins share a ``batch_id``.

    sft.jsonl, held_out_sft.jsonl                  prompt: the first words of a review, completion: the rest
    preferences.jsonl, held_out_preferences.jsonl  chosen: the positive twin, rejected: the negative one
    prompts.jsonl, held_out_prompts.jsonl          first words alone

Twins often differ in their very first words, so preferences have no prompt: the reward model judges whole texts, as it
does in PPO, where prompt and response together are the text. Rows are set apart by ``batch_id``. Different reviews may
begin alike: such first words are prompts to train on, and no held-out ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="the .jsonl file of reviews")
    parser.add_argument("--output", type=Path, required=True, help="folder for the six files")
    parser.add_argument("--prompt-words", type=int, default=4, help="first words of a review that make a prompt")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the twins that is set apart")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of what is set apart")
    options = parser.parse_args()
    groups = read_groups(options.input)
    names = sorted(groups)
    random.Random(options.seed).shuffle(names)
    count = round(options.held_out * len(names))
    if not 0 < count < len(names):
        sys.exit(f"--held-out is {options.held_out}: of {len(names)} twins it sets {count} apart; both parts need some")
    options.output.mkdir(parents=True, exist_ok=True)
    trained_on: set[str] = set()
    for prefix, chosen in (("", names[count:]), ("held_out_", names[:count])):
        reviews = [row for name in chosen for row in groups[name]]
        write(options.output / f"{prefix}sft.jsonl", (continuation(r["Text"], options.prompt_words) for r in reviews))
        write(options.output / f"{prefix}preferences.jsonl", pairs(groups, chosen))
        prompts = dict.fromkeys(continuation(r["Text"], options.prompt_words)["prompt"] for r in reviews)
        new = [prompt for prompt in prompts if prompt not in trained_on]
        if not new:
            sys.exit("every held-out prompt is also one to train on: raise --prompt-words")
        write(options.output / f"{prefix}prompts.jsonl", ({"prompt": prompt} for prompt in new))
        trained_on.update(prompts)


def read_groups(path: Path) -> dict[str, list[dict[str, str]]]:
    """Reviews by batch_id."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            missing = {"Sentiment", "Text", "batch_id"} - row.keys()
            if missing:
                sys.exit(f"{path}, line {number}: field {sorted(missing)[0]!r} is missing")
            row["Text"] = " ".join(row["Text"].replace("<br />", " ").split())
            groups[str(row["batch_id"])].append(row)
    return groups


def continuation(text: str, prompt_words: int) -> dict[str, str]:
    """A review as a continuation of its first words; the blank before the rest belongs to the rest."""
    words = text.split(" ")
    return {"prompt": " ".join(words[:prompt_words]), "completion": " " + " ".join(words[prompt_words:])}


def pairs(groups: dict[str, list[dict[str, str]]], names: Iterable[str]) -> Iterable[dict[str, str]]:
    for name in names:
        by_sentiment = {row["Sentiment"]: row["Text"] for row in groups[name]}
        if by_sentiment.keys() >= {"Positive", "Negative"}:
            yield {"chosen": by_sentiment["Positive"], "rejected": by_sentiment["Negative"], "batch_id": name}


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main()
