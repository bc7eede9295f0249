"""The examples, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from trainer.data import load_demonstrations, load_preferences, load_prompts

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "imdb_twins.py"


def run(source: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--input", str(source), "--output", str(output), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def check(output: Path, twins: int) -> None:
    parts = [{row.group for row in load_preferences([str(output / name)], split_by="batch_id")} for name in PAIRS]
    assert parts[0] & parts[1] == set()
    assert len(parts[0]) + len(parts[1]) == twins
    prompts = {
        prefix: {row.prompt for row in load_prompts([str(output / f"{prefix}prompts.jsonl")])}
        for prefix in ("", "held_out_")
    }
    assert prompts[""] & prompts["held_out_"] == set()
    for prefix in prompts:
        rows = load_demonstrations([str(output / f"{prefix}sft.jsonl")])
        assert {row.prompt for row in rows} - (prompts[""] if prefix else set()) == prompts[prefix]
        assert all(len(row.prompt.split(" ")) == 4 and row.completion.startswith(" ") for row in rows)


PAIRS = ("preferences.jsonl", "held_out_preferences.jsonl")


def test_twins_are_split_by_batch_and_the_positive_one_is_chosen(tmp_path):
    source = tmp_path / "reviews.jsonl"
    rows = [
        {"Sentiment": kind, "Text": f"film number {i} is<br /> {word} from start to end", "batch_id": str(i)}
        for i in range(20)
        for kind, word in (("Negative", "bad"), ("Positive", "good"))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(source, tmp_path / "out", "--held-out", "0.25").returncode == 0
    check(tmp_path / "out", 20)
    pairs = load_preferences([str(tmp_path / "out" / name) for name in PAIRS])
    assert all(" good " in pair.chosen and " bad " in pair.rejected and "<br" not in pair.chosen for pair in pairs)
    first = load_demonstrations([str(tmp_path / "out" / "sft.jsonl")])[0]
    assert f"{first.prompt}{first.completion}".startswith("film number ")


def test_first_words_of_both_parts_are_trained_on_and_not_held_out(tmp_path):
    source = tmp_path / "reviews.jsonl"
    rows = [
        {"Sentiment": kind, "Text": f"{'this is a film' if i % 2 else f'film {i} is here'} {word}", "batch_id": str(i)}
        for i in range(20)
        for kind, word in (("Negative", "bad"), ("Positive", "good"))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(source, tmp_path / "out", "--held-out", "0.5").returncode == 0
    check(tmp_path / "out", 20)
    trained_on = [row.prompt for row in load_prompts([str(tmp_path / "out" / "prompts.jsonl")])]
    assert trained_on.count("this is a film") == 1
    alike = [row | {"Text": "this is a film"} for row in rows]
    source.write_text("".join(json.dumps(row) + "\n" for row in alike))
    done = run(source, tmp_path / "same")
    assert done.returncode == 1
    assert "every held-out prompt is also one to train on: raise --prompt-words" in done.stderr


def test_a_row_without_its_field_is_named(tmp_path):
    source = tmp_path / "reviews.jsonl"
    source.write_text('{"Sentiment": "Positive", "Text": "a"}\n')
    done = run(source, tmp_path / "out")
    assert done.returncode == 1
    assert f"{source}, line 1: field 'batch_id' is missing" in done.stderr


def test_the_real_reviews_make_1707_twins(tmp_path, data_folder):
    assert run(data_folder / "sentiment_imdb_cad_train.jsonl", tmp_path / "out").returncode == 0
    check(tmp_path / "out", 1707)
