"""Ensembles from one command to the service, and what their disagreement does to wrong labels.

Shapes: M members, N judged pairs.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from quartet.model_folder import read_metadata
from services.reward.combining import Reduction, reduce_members
from services.reward.config import RewardSettings as ServiceSettings
from services.reward.loading import load
from services.reward.panel import Candidate
from services.reward.scorer import ScorerItem
from services.runtime.telemetry import ServiceMetrics
from tests.conftest import WORDS
from trainer.comparisons import Comparison, Judgement, load_comparisons
from trainer.config import RewardSettings
from trainer.encoding import Encoder
from trainer.errors import CheckpointError, DataError, OutputError
from trainer.label_noise import Disagreement, pair_key, read_disagreements, treat, write_disagreements
from trainer.models import load_tokenizer
from trainer.reward_ensemble import REDUCTIONS, rows_of_member
from trainer.reward_model import main as train_reward
from trainer.reward_model import read_rows

KIND, RUDE = ("thanks please sorry help we can good great", "awful bad not no do it today close")
FLIPPED_SHARE = 0.2


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Kind answers are better; of the training pairs a fifth says the opposite. ``wrong``: which."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for i in range(260):
        kind, rude = (" " + " ".join(draw.choices(words.split(), k=draw.randint(3, 6))) for words in (KIND, RUDE))
        row = {"prompt": " ".join(draw.choices(WORDS, k=2)) + f" {i}", "first": kind, "second": rude}
        rows.append(row | {"preference": "first"})
    for row in draw.sample(rows[:200], round(FLIPPED_SHARE * 200)):
        row["preference"] = "second"
    return {"train": write(folder / "train.jsonl", rows[:200]), "held_out": write(folder / "eval.jsonl", rows[200:])}


def settings(model: Path, data: dict[str, str], output: Path, **changes: Any) -> RewardSettings:
    values: dict[str, Any] = {"model": str(model), "data": (data["train"],), "eval_data": (data["held_out"],)}
    values |= {"output": output, "learning_rate": 1e-3, "batch_size": 16, "epochs": 2, "baselines": False}
    return RewardSettings(**(values | changes))


@pytest.fixture(scope="module")
def base(make_policy) -> Path:
    return make_policy(seed=6, scale=0.5)


@pytest.fixture(scope="module")
def ensemble(base, data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ensemble") / "run"
    train_reward(settings(base, data, output, members=4, member_fraction=0.5, baselines=True))
    return output


@pytest.mark.parametrize("prompts", [37, 200])
@pytest.mark.parametrize(
    ("members", "fraction"), [(5, 0.6), (2, 0.9), (4, 0.9), (3, 0.5), (4, 0.1), (4, 0.5), (5, 0.99), (3, 1.0)]
)
def test_a_member_trains_on_the_share_that_was_asked_for_and_prompts_are_left_out_evenly(
    members, fraction, prompts, base, data, tmp_path
):
    own = settings(base, data, tmp_path, members=members, member_fraction=fraction)
    rows = [
        Comparison(prompt=f"p{i % prompts}", answers=("a", f"b{i}"), judgements=(Judgement(first=0, second=1),))
        for i in range(2 * prompts)
    ]
    parts = [rows_of_member(rows, own, number) for number in range(members)]
    assert [len(part) for part in parts] == [2 * round(fraction * prompts)] * members
    seen = [sum(row in part for part in parts) for row in rows]
    assert max(seen) - min(seen) <= 1
    # By the seed alone, whatever order the rows come in.
    again = rows_of_member(rows[::-1], own, 1)
    assert again[::-1] == parts[1]
    if fraction <= 1 - 1 / members:
        assert max(seen) < members
    if round(fraction * prompts) < prompts:
        other = rows_of_member(rows, own.model_copy(update={"seed": 1}), 1)
        assert other != parts[1]


def test_a_share_of_no_prompt_is_refused(base, data, tmp_path):
    rows = read_rows(settings(base, data, tmp_path)).train
    with pytest.raises(DataError, match=r"--member-fraction is 0\.001: of 180 prompts to train on that is none"):
        rows_of_member(rows, settings(base, data, tmp_path, members=2, member_fraction=0.001), 0)


def test_an_ensemble_is_one_folder_that_the_service_serves_member_by_member(ensemble, data, tmp_path):
    """Moved elsewhere first: nothing in it may point out of it."""
    folder = Path(shutil.copytree(ensemble / "model", tmp_path / "moved"))
    evaluation = json.loads((ensemble / "evaluation.json").read_text())
    assert read_metadata(folder) == {"kind": "reward-ensemble", "members": [f"member-{m}" for m in range(4)]}
    tokenizer = load_tokenizer(folder / "member-0")
    rows = load_comparisons([data["held_out"]])
    encoded = Encoder(tokenizer, max_tokens=128).comparisons(rows)
    assert (
        len(
            {
                tuple(load_file(folder / f"member-{m}" / "model.safetensors")["score.weight"][0].tolist())
                for m in range(4)
            }
        )
        == 4
    )
    for reduction in REDUCTIONS:
        own = ServiceSettings(model=str(folder), ensemble_reduction=reduction)
        hosted = load(own, None, ServiceMetrics("reward"))
        try:
            assert [told[:22] for told in hosted.golden] == ["6 items as in training"] * 4
            weights = hosted.combination.weights({})
            marks = [
                hosted.panel.score([Candidate(ScorerItem(answer.ids.tolist())) for answer in row.answers])
                for row in encoded
            ]
            found = [[hosted.combination.combine(mark, weights) for mark in both] for both in marks]
            right = [a.score > b.score for a, b in found]
            assert evaluation["reductions"][reduction]["value"] == pytest.approx(statistics.fmean(right))
            spread = statistics.fmean(x.spread for both in found for x in both)
            assert evaluation["spread_mean"] == pytest.approx(spread, rel=1e-3)
            # The probabilities that Compare gives are those that were calibrated.
            p = [statistics.fmean(hosted.combination.preferences(*both, weights)) for both in marks]
            assert evaluation["calibration"]["after"]["brier"]["value"] == pytest.approx(
                statistics.fmean((1 - x) ** 2 for x in p), rel=1e-3
            )
        finally:
            hosted.close()
    assert evaluation["baselines"]["TF-IDF logistic"]["value"] > 0.8
    assert len(evaluation["members"]) == 4


@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_reductions_are_those_of_the_service(name):
    scores_MK = np.random.default_rng(0).normal(size=(5, 7))
    expected = [reduce_members(scores_MK[:, k].tolist(), Reduction(name), 0.5) for k in range(7)]
    assert REDUCTIONS[name](scores_MK).tolist() == pytest.approx(expected)


def test_members_doubt_the_labels_that_are_wrong(ensemble, data):
    found = read_disagreements(ensemble)
    rows = load_comparisons([data["train"]])
    assert len(found) == len(rows)
    wrong = {row.where for row in rows if row.judgements[0].first == 1}
    assert len(wrong) == 40
    lowest = sorted(found.values(), key=lambda item: item.mean)[:40]
    assert sum(item.where in wrong for item in lowest) >= 36
    # Half of the members have not seen a pair, and none has the temperature's rows.
    assert {(item.members, item.unseen) for item in found.values()} == {(2, True), (4, True)}
    assert all(item.std is not None and 0 <= item.probability <= 1 for item in found.values())


def test_a_run_that_turns_doubtful_labels_round_learns_what_is_true_and_tells_what_it_did(
    ensemble, base, data, tmp_path
):
    own = settings(
        base, data, tmp_path / "run", noise_from=ensemble, noise_flip=0.15, noise_drop=0.1, noise_smooth=0.05
    )
    train_reward(own)
    records = [json.loads(line) for line in (tmp_path / "run" / "noise.jsonl").read_text().splitlines()]
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())["noise"]
    assert figures["pairs"] == 180
    assert figures["flipped"] == 27
    assert 0 < figures["dropped"] <= 18
    assert figures["smoothed"] == 9
    assert sum(figures[name] for name in ("flipped", "dropped", "smoothed")) == len(records)
    wrong = {row.where for row in load_comparisons([data["train"]]) if row.judgements[0].first == 1}
    flipped = [record for record in records if record["action"] == "flipped"]
    assert sum(record["where"] in wrong for record in flipped) >= 25
    assert all((record["label_before"], record["label_after"]) == (1.0, 0.0) for record in flipped)
    trained = read_rows(own).train
    still_wrong = sum(row.judgements[0].first == 1 for row in trained if row.judgements[0].decided)
    assert still_wrong <= 8


# Treatment, by hand


def opinions(rows: list[Comparison], means: list[float], stds: list[float | None], folder: Path) -> None:
    write_disagreements(
        folder,
        [
            Disagreement(
                where=row.where,
                key=pair_key(row, row.judgements[0]),
                label=row.judgements[0].probability,
                mean=mean,
                std=std,
                probability=0.3,
                members=3,
                unseen=True,
            )
            for row, mean, std in zip(rows, means, stds, strict=True)
        ],
    )


@pytest.fixture
def ten() -> list[Comparison]:
    said = (Judgement(first=0, second=1),)
    return [
        Comparison(prompt=f"p{i}", answers=("a", "b"), judgements=said, where=f"f, line {i}", ranked=True)
        for i in range(10)
    ]


def test_the_lowest_are_flipped_the_next_dropped_and_the_unsure_smoothed(ten, base, data, tmp_path):
    ten[9] = replace(ten[9], judgements=(Judgement(first=0, second=1, probability=0.5),))
    means = [2.0, -3.0, -1.0, 1.0, -0.2, 0.4, 0.3, 1.0, -0.1, -5.0]
    stds = [1.0, 1.0, 1.0, 9.0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0]
    opinions(ten, means, stds, tmp_path)
    own = settings(base, data, tmp_path, noise_from=tmp_path, noise_flip=0.1, noise_drop=0.2, noise_smooth=0.2)
    found = treat(ten, own)
    done = {record["where"]: record["action"] for record in found.records}
    # The tie of the lowest mean is nobody's mistake. Least sure: |mean| / std of .1 and 1/9; not .4 / .1.
    assert done == {
        "f, line 1": "flipped",
        "f, line 2": "dropped",
        "f, line 4": "dropped",
        "f, line 8": "smoothed",
        "f, line 3": "smoothed",
    }
    assert [row.where for row in found.rows] == [f"f, line {i}" for i in (0, 1, 3, 5, 6, 7, 8, 9)]
    by_place = {row.where: row for row in found.rows}
    assert by_place["f, line 1"].judgements == (Judgement(first=1, second=0),)
    assert not by_place["f, line 1"].ranked
    # The average of an annotated 1 and what the members say, .3.
    assert by_place["f, line 8"].judgements[0].probability == pytest.approx(0.65)
    assert by_place["f, line 0"] == ten[0]
    assert found.figures == {
        "from": str(tmp_path), "pairs": 10, "contradicted": 5, "flipped": 1, "dropped": 2, "smoothed": 2
    }  # fmt: skip


def test_no_label_is_turned_round_that_members_agree_with(ten, base, data, tmp_path):
    opinions(ten, [1.0] * 9 + [-1.0], [1.0] * 10, tmp_path)
    found = treat(ten, settings(base, data, tmp_path, noise_from=tmp_path, noise_flip=0.5, noise_drop=0.5))
    assert [(record["where"], record["action"]) for record in found.records] == [("f, line 9", "flipped")]


def test_labels_that_the_ensemble_never_saw_and_folders_that_are_none_are_refused(ten, base, data, tmp_path):
    own = settings(base, data, tmp_path / "run", noise_from=tmp_path, noise_flip=0.5)
    with pytest.raises(DataError, match=r"--noise-from is .*disagreement.jsonl can't be read \(No such file"):
        treat(ten, own)
    opinions(ten[:5], [1.0] * 5, [None] * 5, tmp_path)
    with pytest.raises(DataError, match=r"f, line 5: a pair that the ensemble of --noise-from .* did not train on"):
        treat(ten, own)
    (tmp_path / "disagreement.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="not what an ensemble's run writes"):
        treat(ten, own)


# Resuming


def test_a_killed_ensemble_resumes_to_the_same_bits(base, data, tmp_path):
    flags = ["--model", str(base), "--data", data["train"], "--eval-data", data["held_out"], "--members", "3"]
    flags += ["--learning-rate", "0.001", "--batch-size", "4", "--dropout", "0.1", "--save-every", "5"]
    command = [sys.executable, "-m", "trainer", "reward", *flags, "--no-baselines", "--output"]
    assert subprocess.run([*command, str(tmp_path / "whole")], capture_output=True).returncode == 0
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "member-1" / "checkpoint-000010" / "state.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "model" / "quartet.json").exists()
    first = tmp_path / "killed" / "model" / "member-0" / "model.safetensors"
    written_s = first.stat().st_mtime
    resumed = subprocess.run([*command, str(tmp_path / "killed"), "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert first.stat().st_mtime == written_s
    for member in range(3):
        ours, theirs = (
            load_file(tmp_path / name / "model" / f"member-{member}" / "model.safetensors")
            for name in ("killed", "whole")
        )
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    ours, theirs = ((tmp_path / name / "disagreement.jsonl").read_text() for name in ("killed", "whole"))
    assert ours == theirs
    own = settings(
        base, data, tmp_path / "killed", members=3, batch_size=4, dropout=0.1, epochs=1, save_every=5, resume=True
    )
    with pytest.raises(CheckpointError, match=r"member-0 was written under other settings: --learning-rate was 0.001"):
        train_reward(own.model_copy(update={"learning_rate": 2e-3}))
    with pytest.raises(OutputError, match="it already holds a run; go on with it by --resume"):
        train_reward(own.model_copy(update={"resume": False}))
