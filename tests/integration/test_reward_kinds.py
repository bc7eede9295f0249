"""Ensembles, Python scorers and --check, live, as a user meets them."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from quartet.client import (
    Comparison,
    ComparisonItem,
    InvalidInputError,
    ItemFailure,
    PreconditionError,
    RewardClient,
    Score,
    ScoreItem,
    Truncation,
)
from quartet.model_folder import write_metadata

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = [
    ("hello", " thanks", " no"),
    ("my phone screen is broken", " sorry we can help", " awful"),
    ("", "great", "bad"),
]
HEADS = [{"name": "helpfulness", "weight": 0.75}, {"name": "safety", "weight": 0.5}]
SCALES = [(0.25, 2.0, 1.0), (-1.0, 0.5, 1.5)]


@pytest.fixture(scope="module")
def ensemble_folder(make_reward_model, tmp_path_factory) -> Path:
    """Two members of two heads, each with statistics and a temperature of its own."""
    folder = tmp_path_factory.mktemp("ensemble")
    for i, (mean, std, temperature) in enumerate(SCALES):
        member = folder / f"seed-{i}"
        shutil.copytree(make_reward_model(seed=30 + i, num_labels=2), member)
        write_metadata(
            member,
            kind="reward",
            heads=HEADS,
            truncation="left",
            max_tokens=64,
            normalisation={"mean": mean, "std": std, "count": 100},
            calibration={"temperature": temperature},
        )
    write_metadata(folder, kind="reward-ensemble", members=["seed-0", "seed-1"])
    return folder


@pytest.fixture(scope="module")
def ensemble(start_service, ensemble_folder):
    flags = ("--ensemble-reduction", "uncertainty", "--ensemble-lambda", "0.3")
    return start_service("reward", ensemble_folder, *flags)


@torch.inference_mode()
def raw(folder: Path, tokenizer, prompt: str, response: str) -> list[float]:
    """Every head of a model in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    ids = [int(i) for text in (prompt, response) if text for i in tokenizer(text).input_ids]
    return model(input_ids=torch.tensor([[*ids, 1]])).logits[0].tolist()


def weighted(heads: list[float]) -> float:
    return sum(head["weight"] * x for head, x in zip(HEADS, heads, strict=True))  # type: ignore[misc]


async def test_an_ensemble_scores_and_compares_as_its_members_do(ensemble, ensemble_folder, tokenizer):
    folders = [ensemble_folder / f"seed-{i}" for i in range(2)]
    async with RewardClient(ensemble.address) as client:
        info = await client.get_reward_info()
        scores = await client.score(
            [ScoreItem(prompt=p, response=first) for p, first, _ in PAIRS],
            normalise=True,
            truncation=Truncation.AS_TRAINED,
        )
        compared = await client.compare([ComparisonItem(prompt=p, first=a, second=b) for p, a, b in PAIRS])
        with pytest.raises(InvalidInputError, match="names 'kindness', which there is not") as unknown:
            await client.score([ScoreItem(prompt="a", response="b")], head_weights={"kindness": 1.0})
        with pytest.raises(PreconditionError, match="host an ensemble without statistics"):
            await client.score([ScoreItem(prompt="a", response="b")], head_weights={"safety": 1.0})
    assert unknown.value.field == "head_weights"
    for (prompt, first, second), score, pair in zip(PAIRS, scores.results, compared.results, strict=True):
        assert isinstance(score, Score)
        assert isinstance(pair, Comparison)
        heads = [raw(folder, tokenizer, prompt, first) for folder in folders]
        others = [raw(folder, tokenizer, prompt, second) for folder in folders]
        members = [(weighted(x) - mean) / std for x, (mean, std, _) in zip(heads, SCALES, strict=True)]
        assert score.member_scores == pytest.approx(members, abs=1e-4)
        expected = statistics.fmean(members) - 0.3 * statistics.pvariance(members)
        assert score.score == pytest.approx(expected, abs=1e-4)
        assert score.normalised_score == score.score
        assert score.spread == pytest.approx(statistics.pstdev(members), abs=1e-4)
        for index, head in enumerate(HEADS):
            assert score.attributes[str(head["name"])] == pytest.approx(
                statistics.fmean(x[index] for x in heads), abs=1e-4
            )
        probabilities = [
            1 / (1 + math.exp(-(weighted(x) - weighted(y)) / temperature))
            for x, y, (_, _, temperature) in zip(heads, others, SCALES, strict=True)
        ]
        assert pair.member_probabilities == pytest.approx(probabilities, abs=1e-4)
        assert pair.probability == pytest.approx(statistics.fmean(probabilities), abs=1e-4)
        assert pair.first.score == pytest.approx(score.score, abs=1e-5)
    assert [(head.name, head.weight, head.python) for head in info.heads] == [
        ("helpfulness", 0.75, False),
        ("safety", 0.5, False),
    ]
    assert info.ensemble is not None
    assert (info.ensemble.reduction, info.ensemble.variance_penalty) == ("uncertainty", 0.3)
    assert [m.temperature for m in info.ensemble.members] == [1.0, 1.5]
    assert (info.trained_truncation, info.trained_max_tokens) == (Truncation.LEFT, 64)
    assert (info.normalisation, info.temperature) == (None, None)


async def test_the_exact_answer_example_scores_over_grpc(start_service, tmp_path, monkeypatch):
    rows = [{"prompt": "What is 6 x 7?", "answer": "42"}, {"prompt": "Half of 2001?", "answer": "1,000.5"}]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("QUARTET_ANSWERS", str(answers))
    monkeypatch.chdir(ROOT)
    live = start_service("reward", "", "--scorer", "examples.exact_answer:score", "--scorer-weight", "2")
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Half of 2001?"}]
    cases = [
        ("What is 6 x 7?", "6 x 7 = 42.", 2.0),
        ("What is 6 x 7?", "42? No: 43", 0.0),
        ("What is 6 x 7?", "I do not know.", 0.0),
        (question, "That is $1000.50", 2.0),
        (question, "2001/2", 2.0),
        ("Of which nothing is known?", "42", None),
    ]
    async with RewardClient(live.address) as client:
        info = await client.get_reward_info()
        reply = await client.score([ScoreItem(prompt=p, response=r) for p, r, _ in cases])  # type: ignore[arg-type]
        compared = await client.compare([ComparisonItem(prompt=question, first="1000.5", second="1000")])
        with pytest.raises(PreconditionError, match="without a tokenizer to read them: send text"):
            await client.score([ScoreItem(prompt=[5], response=[6])], tokenizer_fingerprint="0" * 64)
    for result, (_, _, expected) in zip(reply.results, cases, strict=True):
        if expected is None:
            assert isinstance(result, ItemFailure)
            assert "gave no score" in result.reason
            assert not result.retryable
        else:
            assert isinstance(result, Score)
            assert (result.score, result.attributes) == (expected, {"score": expected / 2})
    (pair,) = compared.results
    assert isinstance(pair, Comparison)
    assert pair.probability == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert info.model.engine == "python"
    assert live.stop() == 0


def check(model: Path | str, *flags: str) -> subprocess.CompletedProcess[str]:
    """As in a container, where the environment names the model that is served."""
    environment = os.environ | {"QUARTET_REWARD_MODEL": "/nowhere/model"}
    command = [sys.executable, "-m", "services.reward", "--check", str(model), "--log-level", "error", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_check_reports_what_it_verified_or_why_it_cannot_be_hosted(ensemble, ensemble_folder, tmp_path):
    # The ports are those of a service that runs: it opens none.
    port = ensemble.address.rpartition(":")[2]
    done = check(ensemble_folder, "--port", port, "--metrics-port", port)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("LlamaForSequenceClassification, " in line for line in lines) == 2
    for expected in (
        "  normalisation  mean -1, std 0.5 of 100 samples; temperature 1.5",
        "  golden         none kept with the model",
        "tokens           at most 128, at most 64 in training, truncation left",
        "end token        '<eos>' (1) closes finished responses",
        "heads            helpfulness (weight 0.75), safety (weight 0.5)",
        "ensemble         mean of normalised scores",
    ):
        assert expected in lines
    assert lines[-1] == "ok"
    assert "float32" in done.stdout
    assert "Traceback" not in done.stderr

    broken = tmp_path / "broken"
    shutil.copytree(ensemble_folder / "seed-0", broken)
    item = {"prompt": "hello", "response": " thanks", "token_count": 99, "score": 0.0}
    write_metadata(broken, golden={"score_std": 1.0, "items": [item]})
    for folder, reason in ((broken, "golden item 0 had 99 tokens in training"), (tmp_path / "no", "no such folder")):
        done = check(folder)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("quartet-reward: ")]
        assert reason in line
