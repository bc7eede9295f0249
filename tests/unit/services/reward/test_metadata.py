"""What quartet.json may say of a reward model, and each way in which it may be wrong."""

from __future__ import annotations

import json
import re

import pytest

from quartet.model_folder import write_metadata
from services.reward.combining import Head, Statistics
from services.reward.metadata import ensemble_members, read_reward_metadata
from services.runtime.errors import StartError

ITEM = {"prompt": "a", "response": "b", "token_count": 3, "score": 0.5}


def test_all_of_it_is_read_and_none_of_it_is_needed(tmp_path):
    nothing = read_reward_metadata(tmp_path)
    assert (nothing.pair, nothing.append_eos, nothing.truncation, nothing.max_tokens) == (None, True, None, None)
    assert (nothing.heads, nothing.statistics, nothing.temperature, nothing.golden) == ((), None, 1.0, None)
    messages = [{"role": "user", "content": "hi"}]
    write_metadata(
        tmp_path,
        kind="reward",
        append_eos=False,
        encoding="pair",
        truncation="right",
        max_tokens=384,
        heads=[{"name": "a", "weight": 0.7}, {"name": "b", "weight": -1}],
        normalisation={"mean": -1, "std": 2.5, "count": 7},
        calibration={"temperature": 1.5},
        golden={"score_std": 2, "items": [ITEM, ITEM | {"prompt": messages, "attributes": {"a": 1}}]},
    )
    kept = read_reward_metadata(tmp_path)
    assert (kept.pair, kept.append_eos, kept.truncation, kept.max_tokens) == (True, False, "right", 384)
    assert kept.heads == (Head(name="a", weight=0.7), Head(name="b", weight=-1.0))
    assert kept.statistics == Statistics(mean=-1.0, std=2.5, count=7)
    assert kept.temperature == 1.5
    assert kept.golden is not None
    assert kept.golden.score_std == 2.0
    assert [item.prompt for item in kept.golden.items] == ["a", messages]
    assert kept.golden.items[1].attributes == {"a": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"append_eos": "yes"}, "append_eos is 'yes', must be true or false"),
        ({"encoding": "both"}, "encoding is 'both', must be one of pair, concatenate"),
        ({"truncation": "middle"}, "truncation is 'middle', must be one of refuse, left, right"),
        ({"max_tokens": 0}, "max_tokens is 0, must be a whole number of at least 1"),
        ({"max_tokens": True}, "max_tokens is True, must be a whole number"),
        ({"heads": []}, "heads is [], must be a list of at least one object"),
        ({"heads": [{"name": "a"}]}, "heads[0] is {'name': 'a'}, must be an object with name, weight"),
        ({"heads": [{"name": "", "weight": 1}]}, "heads[0].name is '', must be text"),
        ({"heads": [{"name": "a", "weight": 1}] * 2}, "heads[1].name is 'a', must be text that no other head has"),
        ({"heads": [{"name": "a", "weight": "1"}]}, "heads[0].weight is '1', must be a finite number"),
        ({"normalisation": 3}, "normalisation is 3, must be an object with mean, std, count"),
        (
            {"normalisation": {"mean": 0, "std": 0, "count": 1}},
            "normalisation.std is 0, must be a finite number greater",
        ),
        ({"normalisation": {"mean": "0", "std": 1, "count": 1}}, "normalisation.mean is '0', must be a finite number"),
        ({"normalisation": {"mean": 0, "std": 1, "count": 0}}, "normalisation.count is 0, must be a whole number"),
        ({"calibration": [1]}, "calibration is [1], must be an object"),
        ({"calibration": {"temperature": -1}}, "calibration.temperature is -1, must be a finite number greater than 0"),
        ({"golden": {"score_std": 1, "items": []}}, "golden.items is [], must be a list of at least one object"),
        (
            {"golden": {"score_std": 0, "items": [ITEM]}},
            "golden.score_std is 0, must be a finite number greater than 0",
        ),
        ({"golden": {"score_std": 1, "items": [ITEM | {"prompt": 1}]}}, "golden.items[0].prompt is 1, must be text or"),
        (
            {"golden": {"score_std": 1, "items": [ITEM, ITEM | {"token_count": 0}]}},
            "golden.items[1].token_count is 0, must be a whole number of at least 1",
        ),
    ],
)
def test_what_is_wrong_is_said_with_file_field_value_and_bound(content, message, tmp_path):
    write_metadata(tmp_path, **content)
    with pytest.raises(StartError, match=re.escape(f"{tmp_path / 'quartet.json'}: {message}")):
        read_reward_metadata(tmp_path)


def test_numbers_that_json_has_not_are_no_statistics(tmp_path):
    (tmp_path / "quartet.json").write_text('{"normalisation": {"mean": NaN, "std": 1, "count": 1}}')
    with pytest.raises(StartError, match=r"normalisation\.mean is nan, must be a finite number"):
        read_reward_metadata(tmp_path)


def test_the_members_of_an_ensemble_are_folders_relative_to_it(tmp_path):
    ensemble = tmp_path / "ensemble"
    for name in ("ensemble/a", "b"):
        (tmp_path / name).mkdir(parents=True)
    write_metadata(ensemble, kind="reward-ensemble", members=["a", "../b"])
    assert ensemble_members(str(ensemble)) == (str(ensemble / "a"), str(ensemble / "../b"))
    assert ensemble_members(str(tmp_path)) is None
    assert ensemble_members("some-owner/some-model") is None
    write_metadata(tmp_path, kind="reward")
    assert ensemble_members(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, "members is None, must be a list of model folders"),
        (["a", 3], "members is ['a', 3], must be a list of model folders"),
        (["a"], "members has 1 folders, must have at least 2"),
        (["a", "owner/name"], "members names 'owner/name', but there is no folder"),
    ],
)
def test_an_ensemble_without_members_is_refused(members, message, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "quartet.json").write_text(json.dumps({"kind": "reward-ensemble", "members": members}))
    with pytest.raises(StartError, match=re.escape(message)):
        ensemble_members(str(tmp_path))
