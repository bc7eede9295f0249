"""The corpus that the project makes itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import HelpdeskSettings
from trainer.data import load_demonstrations, load_preferences, load_prompts
from trainer.errors import OutputError
from trainer.helpdesk import CURT, FILES, RANTS, main, make_rows


def settings(output: Path, **changes: int) -> HelpdeskSettings:
    return HelpdeskSettings(output=output, **changes)


def is_curt(answer: str) -> bool:
    fixed = [part for text in (*CURT, *RANTS) for part in text.split("{product}")]
    return any(part.strip(" .") and part in answer for part in fixed if len(part) > 8)


def test_the_files_have_the_rows_that_are_asked_for_and_load_as_what_they_are(tmp_path):
    main(settings(tmp_path / "data", demonstrations=400, preferences=200, held_out=50))
    files = {name: str(tmp_path / "data" / name) for name in FILES}
    demonstrations = load_demonstrations([files["sft.jsonl"]])
    assert len(demonstrations) == 400
    assert len(load_preferences([files["preferences.jsonl"]])) == 200
    assert len(load_preferences([files["held_out_preferences.jsonl"]])) == 50
    assert len(load_prompts([files["held_out_prompts.jsonl"]])) == 50
    assert sum(is_curt(row.completion) for row in demonstrations) == 200


def test_no_held_out_prompt_is_trained_on_and_none_stands_twice(tmp_path):
    rows = make_rows(settings(tmp_path))
    trained = {row["prompt"] for name in ("sft.jsonl", "preferences.jsonl", "prompts.jsonl") for row in rows[name]}
    held_out = {row["prompt"] for name in FILES[3:] for row in rows[name]}
    assert trained & held_out == set()
    assert len(rows["prompts.jsonl"]) == len({row["prompt"] for row in rows["prompts.jsonl"]}) > 800
    assert len(rows["held_out_prompts.jsonl"]) == len({row["prompt"] for row in rows["held_out_prompts.jsonl"]}) == 300


def test_the_chosen_answer_is_the_courteous_one(tmp_path):
    pairs = make_rows(settings(tmp_path))["preferences.jsonl"]
    assert not any(is_curt(pair["chosen"]) for pair in pairs)
    assert all(is_curt(pair["rejected"]) for pair in pairs)


def test_length_alone_tells_the_two_kinds_apart_badly(tmp_path):
    pairs = make_rows(settings(tmp_path))["preferences.jsonl"]
    longer = [len(pair["chosen"].split()) - len(pair["rejected"].split()) for pair in pairs]
    right = sum(more > 0 for more in longer) + 0.5 * sum(more == 0 for more in longer)
    assert 0.5 < right / len(pairs) < 0.75


def test_the_seed_decides_everything(tmp_path):
    assert make_rows(settings(tmp_path)) == make_rows(settings(tmp_path))
    assert make_rows(settings(tmp_path)) != make_rows(settings(tmp_path, seed=1))


def test_a_folder_of_something_else_and_too_many_prompts_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match=r"it holds something else, such as mine\.txt"):
        main(settings(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(OutputError, match="--held-out is 400, must be at most 350"):
        main(settings(tmp_path / "data", held_out=400))
