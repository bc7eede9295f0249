"""Models, ensembles and rules from settings to scores, against transformers in float64; and what cannot be hosted.

Shapes: H heads.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from quartet.common.v1 import common_pb2
from quartet.fingerprint import safetensors_fingerprint
from quartet.model_folder import read_metadata, write_metadata
from quartet.reward.v1 import reward_pb2
from services.reward.config import RewardSettings
from services.reward.hosted import HostedReward, Trained
from services.reward.loading import load
from services.reward.panel import Candidate
from services.reward.preparing import Cut, Prepared, prepare
from services.reward.python_scorer import Exchange, PythonScorer, load_python_scorer
from services.reward.scorer import ScorerItem
from services.reward.servicer import describe
from services.runtime.batcher import ItemError
from services.runtime.errors import StartError
from services.runtime.telemetry import ServiceMetrics

TOLERANCE = 2e-5
HEADS = [{"name": "helpfulness", "weight": 0.7}, {"name": "safety", "weight": 0.3}, {"name": "length", "weight": -0.2}]


@pytest.fixture
def hosts() -> Iterator[Callable[..., HostedReward]]:
    """hosts(model, setting=..., rule=...) loads it, with what ``scorer`` names or ``rule``; ended with the test."""
    loaded: list[HostedReward] = []
    rules: list[PythonScorer] = []

    def host(model: Path | str, *, rule: PythonScorer | None = None, **settings: Any) -> HostedReward:
        if rule is None and "scorer" in settings:
            rules.append(load_python_scorer(settings["scorer"]))
            rule = rules[-1]
        loaded.append(load(RewardSettings(model=str(model), **settings), rule, ServiceMetrics("reward")))
        return loaded[-1]

    yield host
    for hosted in loaded:
        hosted.close()
    for rule in rules:
        rule.close()


def sequences() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 300, (30,), generator=draw).tolist()
    return [[*prompt, 7, 8, 1], [*prompt, 9, 1], [5, 6], torch.randint(3, 300, (70,), generator=draw).tolist()]


@torch.inference_mode()
def direct(folder: Path) -> list[list[float]]:
    """Of each sequence alone, every head, in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    return [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in sequences()]


def combined(hosted: HostedReward, **overrides: float) -> list[Any]:
    marks = hosted.panel.score([Candidate(ScorerItem(ids)) for ids in sequences()])
    weights = hosted.combination.weights(overrides)
    return [hosted.combination.combine(found, weights) for found in marks]  # type: ignore[arg-type]


def copy(folder: Path, to: Path, **metadata: Any) -> Path:
    shutil.copytree(folder, to)
    if metadata:
        write_metadata(to, **metadata)
    return to


# Heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_every_head_is_that_of_transformers_and_the_score_their_weighted_sum(
    architecture, make_reward_model, hosts, tmp_path
):
    folder = copy(make_reward_model(seed=3, architecture=architecture, num_labels=3), tmp_path / "m", heads=HEADS)
    hosted = hosts(folder)
    expected_H = direct(folder)
    for found, heads in zip(combined(hosted), expected_H, strict=True):
        assert [name for name, _ in found.attributes] == ["helpfulness", "safety", "length"]
        assert [score for _, score in found.attributes] == pytest.approx(heads, abs=TOLERANCE)
        assert found.score == pytest.approx(0.7 * heads[0] + 0.3 * heads[1] - 0.2 * heads[2], abs=TOLERANCE)
    for found, heads in zip(combined(hosted, safety=2.0), expected_H, strict=True):
        assert found.score == pytest.approx(0.7 * heads[0] + 2 * heads[1] - 0.2 * heads[2], abs=TOLERANCE)
    if architecture == "llama":
        assert hosted.panel.members[0].hidden_states.packed  # type: ignore[attr-defined]
    told = describe(hosted)
    assert [(head.name, head.weight, head.python) for head in told.heads] == [
        (head["name"], head["weight"], False) for head in HEADS
    ]


def test_heads_stay_float32_where_the_body_is_not(make_reward_model, hosts, tmp_path):
    folder = copy(make_reward_model(seed=3, num_labels=3), tmp_path / "m", heads=HEADS)
    rows = hosts(folder, dtype="bfloat16").panel.members[0].score([ScorerItem(ids) for ids in sequences()])
    scores = torch.tensor(rows)
    assert (scores != scores.bfloat16().float()).float().mean() > 0.8


def test_as_many_heads_must_be_named_as_the_model_has(make_reward_model, hosts, tmp_path):
    three = make_reward_model(seed=3, num_labels=3)
    with pytest.raises(StartError, match=r"num_labels is 3, must be 1; or name the heads in quartet\.json"):
        hosts(three)
    two = copy(three, tmp_path / "two", heads=HEADS[:2])
    with pytest.raises(StartError, match=r"num_labels is 3, must be as many as quartet\.json names heads \(2\)"):
        hosts(two)


# Ensembles --------------------------------------------------------------------------------------------------------


def ensemble(tmp_path: Path, *members: Path) -> Path:
    (tmp_path / "ensemble").mkdir()
    relative = [f"../{member.relative_to(tmp_path)}" for member in members]
    write_metadata(tmp_path / "ensemble", kind="reward-ensemble", members=relative)
    return tmp_path / "ensemble"


def normalised(mean: float, std: float) -> dict[str, object]:
    return {"normalisation": {"mean": mean, "std": std, "count": 100}}


def test_an_ensemble_reduces_the_normalised_scores_of_its_members_and_tells_their_spread(
    make_reward_model, hosts, tmp_path
):
    scales = [(0.5, 2.0), (-1.0, 0.25), (3.0, 8.0)]
    members = [
        copy(make_reward_model(seed=20 + i), tmp_path / f"m{i}", **normalised(*scale)) for i, scale in enumerate(scales)
    ]
    exact = zip(*(direct(member) for member in members), strict=True)
    expected = [[(x - mean) / std for (x,), (mean, std) in zip(rows, scales, strict=True)] for rows in exact]
    folder = ensemble(tmp_path, *members)
    for reduction, reduce in {
        "mean": statistics.fmean,
        "worst_case": min,
        "uncertainty": lambda row: statistics.fmean(row) - 0.25 * statistics.pvariance(row),
    }.items():
        hosted = hosts(folder, ensemble_reduction=reduction, ensemble_lambda=0.25)
        for found, row in zip(combined(hosted), expected, strict=True):
            assert found.member_scores == pytest.approx(row, abs=1e-4)
            assert found.score == pytest.approx(reduce(row), abs=2e-4)
            assert found.spread == pytest.approx(statistics.pstdev(row), abs=1e-4)
    told = describe(hosted)
    fingerprints = [safetensors_fingerprint(member) for member in members]
    assert [member.weights_fingerprint for member in told.ensemble.members] == fingerprints
    assert [(m.normalisation.mean, m.normalisation.std) for m in told.ensemble.members] == scales
    assert told.model.served_by.weights_fingerprint == hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
    assert told.model.served_by.model_id == str(folder)
    assert (told.ensemble.reduction, told.ensemble.variance_penalty) == (
        reward_pb2.ENSEMBLE_REDUCTION_UNCERTAINTY,
        0.25,
    )
    assert not told.HasField("normalisation")


def test_an_ensemble_in_another_order_is_another_one(make_reward_model, hosts, tmp_path):
    first, second = (copy(make_reward_model(seed=20 + i), tmp_path / f"m{i}") for i in range(2))
    one = hosts(ensemble(tmp_path, first, second))
    shutil.rmtree(tmp_path / "ensemble")
    other = hosts(ensemble(tmp_path, second, first))
    assert one.model.served_by.weights_fingerprint != other.model.served_by.weights_fingerprint
    assert [x.score for x in combined(one)] == pytest.approx([x.score for x in combined(other)])
    # Without statistics the members' raw scores are reduced.
    rows = zip(direct(first), direct(second), strict=True)
    assert [x.score for x in combined(one)] == pytest.approx([(a + b) / 2 for (a,), (b,) in rows], abs=TOLERANCE)


def other_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_tokenizer, "they differ in tokenizer"),
        (other_template, "they differ in chat template"),
        (lambda folder: write_metadata(folder, append_eos=False), r"they differ in encoding \(append_eos\)"),
        (lambda folder: write_metadata(folder, heads=HEADS[:1]), "they differ in heads"),
        (lambda folder: write_metadata(folder, **normalised(0, 1)), "has no normalisation statistics and others have"),
    ],
)
def test_models_that_do_not_belong_together_are_no_ensemble(change, message, make_reward_model, hosts, tmp_path):
    first, second = (copy(make_reward_model(seed=20 + i), tmp_path / f"m{i}") for i in range(2))
    change(second)
    with pytest.raises(StartError, match=message):
        hosts(ensemble(tmp_path, first, second))


# Rules ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rules(tmp_path, monkeypatch) -> Path:
    """A module of scorers in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "loading_rules", raising=False)
    (tmp_path / "loading_rules.py").write_text(
        "def length(pairs):\n    return [len(response) for _, response in pairs]\n"
        "def parts(pairs):\n    return [{'safety': 1.0, 'brevity': -len(r)} for _, r in pairs]\n"
        "parts.weights = {'safety': 2.0, 'brevity': 0.1}\n"
    )
    return tmp_path


def scored(hosted: HostedReward, item: reward_pb2.ScoreItem) -> Any:
    prepared = prepare(hosted, item, Cut("left", 128))
    assert isinstance(prepared, Prepared)
    (marks,) = hosted.panel.score([prepared.candidate])
    return hosted.combination.combine(marks, hosted.combination.weights({}))  # type: ignore[arg-type]


def test_a_rule_beside_a_model_is_one_more_attribute_and_reads_token_ids_as_their_text(
    rules, make_reward_model, hosts, tokenizer
):
    folder = make_reward_model(seed=4)
    by_text = reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text="hello"), response_text=" thanks a lot")
    prompt, response = (list(tokenizer(text).input_ids) for text in ("hello", " thanks a lot"))
    by_ids = reward_pb2.ScoreItem(
        prompt=common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=prompt)),
        response_token_ids=common_pb2.TokenIds(ids=[*response, 1]),
    )
    alone = scored(hosts(folder), by_text)
    hosted = hosts(folder, scorer="loading_rules:length", scorer_weight=0.5)
    for item in (by_text, by_ids):
        found = scored(hosted, item)
        assert found.attributes == (("length", 13.0),)
        assert found.score == pytest.approx(alone.score + 0.5 * 13, abs=TOLERANCE)
    # What stands around text alone, a rule never sees.
    assert hosted.encoding is not None
    around = replace(hosted, encoding=replace(hosted.encoding, opening=(2,), turn_end_id=0))
    for before, after in (([2], [0]), ([2], [1]), ([], [])):
        item = reward_pb2.ScoreItem(
            prompt=common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[*before, *prompt])),
            response_token_ids=common_pb2.TokenIds(ids=[*response, *after]),
        )
        prepared = prepare(around, item, Cut("left", 128))
        assert isinstance(prepared, Prepared)
        assert prepared.candidate.exchange == Exchange("hello", " thanks a lot")
    assert hosted.model.engine.endswith("and python")
    assert [(x.name, x.weight, x.python) for x in describe(hosted).heads] == [("length", 0.5, True)]
    assert hosted.model.served_by.weights_fingerprint == safetensors_fingerprint(folder)


def test_a_rule_alone_needs_no_model_and_tells_its_weights(rules, hosts):
    hosted = hosts("", scorer="loading_rules:parts", scorer_weight=3.0)
    found = scored(hosted, reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text=""), response_text="abcd"))
    assert found.score == pytest.approx(3 * (2.0 - 0.4))
    told = describe(hosted)
    assert [(x.name, pytest.approx(x.weight), x.python) for x in told.heads] == [
        ("safety", 6.0, True),
        ("brevity", 0.3, True),
    ]
    assert (told.model.engine, told.model.served_by.model_id) == ("python", "loading_rules:parts")
    source = hashlib.sha256((rules / "loading_rules.py").read_bytes()).hexdigest()
    assert told.model.served_by.weights_fingerprint == source
    assert told.model.served_by.tokenizer_fingerprint == ""


def test_a_rule_and_a_head_of_one_name_are_refused(rules, make_reward_model, hosts, tmp_path):
    folder = copy(make_reward_model(seed=3, num_labels=3), tmp_path / "m", heads=HEADS)
    for function, name in (("parts", "safety"), ("length", "length")):
        with pytest.raises(StartError, match=f"its '{name}' is the name of a head of the model"):
            hosts(folder, scorer=f"loading_rules:{function}")


def test_models_share_a_rule_which_outlives_them_and_each_keeps_the_names_of_its_own_heads(
    make_reward_model, hosts, tmp_path
):
    rule = PythonScorer("rules:dynamic", lambda pairs: [{"safety": 0.5}] * len(pairs))
    with_heads = hosts(
        copy(make_reward_model(seed=3, num_labels=3), tmp_path / "m", heads=HEADS), rule=rule, scorer=rule.spec
    )
    without = hosts(make_reward_model(seed=4), rule=rule, scorer=rule.spec)
    item = reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text="hello"), response_text=" thanks")
    for _ in range(2):
        assert scored(without, item).attributes == (("safety", 0.5),)
        prepared = prepare(with_heads, item, Cut("left", 128))
        assert isinstance(prepared, Prepared)
        (refused,) = with_heads.panel.score([prepared.candidate])
        assert isinstance(refused, ItemError)
        assert "named a score 'safety', which is the name of a head of the model" in refused.reason
    # One that is refused, or goes, changes nothing for the other.
    named = PythonScorer("rules:safety", lambda pairs: [1.0] * len(pairs))
    serving = hosts(make_reward_model(seed=4), rule=named, scorer=named.spec)
    with pytest.raises(StartError, match="its 'safety' is the name of a head of the model"):
        hosts(tmp_path / "m", rule=named, scorer=named.spec)
    assert scored(serving, item).attributes == (("safety", 1.0),)
    with_heads.close()
    assert scored(without, item).attributes == (("safety", 0.5),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is required, or --scorer to score by a Python function alone"),
        (["--model", "a", "--scorer-weight", "2"], "--scorer-weight is 2.0, but there is no --scorer"),
        (["--model", "a", "--scorer", "b:c", "--scorer-weight", "inf"], "--scorer-weight is 'inf'"),
        (
            ["--scorer", "b:c", "--scorer-timeout-s", "76"],
            "--scorer-timeout-s is 76, must be at most a quarter of --batch-timeout-s, which is 300",
        ),
        (["--scorer", "b:c", "--scorer-timeout-s", "-1"], "--scorer-timeout-s is '-1'"),
        (["--model", "a", "--batch-timeout-s", "nan"], "--batch-timeout-s is 'nan'"),
        (["--model", "a", "--ensemble-lambda", "-1"], "--ensemble-lambda is '-1'"),
        (["--model", "a", "--ensemble-reduction", "median"], "--ensemble-reduction is 'median'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        RewardSettings.from_command_line(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--scorer", "b:c", "--scorer-timeout-s", "75"],
        ["--scorer", "b:c", "--scorer-timeout-s", "1000", "--batch-timeout-s", "0"],
        ["--scorer", "b:c", "--scorer-timeout-s", "0", "--batch-timeout-s", "1"],
        ["--model", "a", "--batch-timeout-s", "1"],  # Without a scorer its time is nobody's.
    ],
)
def test_times_that_fit_together_are_taken(arguments):
    assert RewardSettings.from_command_line(arguments).command


def test_what_is_to_be_checked_wins_over_the_model_that_a_container_is_configured_with(monkeypatch, tmp_path):
    file = tmp_path / "reward.toml"
    file.write_text('model = "b"\n')
    for arguments in (["--model", "b"], ["--config", str(file)]):
        assert RewardSettings.from_command_line(["--check", "a", *arguments]).check == "a"
    monkeypatch.setenv("QUARTET_REWARD_MODEL", "b")
    assert RewardSettings.from_command_line(["--check", "a"]).check == "a"


# Golden items -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(make_policy, tmp_path_factory) -> Path:
    """A reward model as quartet-train reward leaves it: cut on the right, some prompts chat messages."""
    return train_reward_model(make_policy(seed=6, scale=0.5), tmp_path_factory.mktemp("trained"), "right")


def train_reward_model(policy: Path, run: Path, truncation: str) -> Path:
    from trainer.config import RewardSettings as TrainingSettings
    from trainer.reward_model import main

    draw = random.Random(0)
    # A file has rows of one shape: every other prompt is chat messages, in a file of their own.
    rows: tuple[list[object], list[object]] = ([], [])
    for i in range(60):
        text = f"{' '.join(draw.choices('order refund phone router'.split(), k=3))} {i}"
        good, bad = (
            " " + " ".join(draw.choices(words.split(), k=draw.randint(2, 14)))
            for words in ("thanks please sorry", "awful bad no")
        )
        prompt: object = [{"role": "user", "content": text}] if i % 2 else text
        rows[i % 2].append({"prompt": prompt, "chosen": good, "rejected": bad})
    data = tuple(str(run / f"rows-{i}.jsonl") for i in range(2))
    for path, part in zip(data, rows, strict=True):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = {"batch_size": 16, "learning_rate": 1e-3, "max_tokens": 40, "truncation": truncation, "baselines": False}
    main(TrainingSettings(model=str(policy), data=data, output=run / "run", **settings))  # type: ignore[arg-type]
    return run / "run" / "model"


def test_text_is_encoded_here_as_in_training_whatever_begins_it_and_ends_turns(make_policy, tokenizer, hosts, tmp_path):
    """The golden items, by count of tokens and by score; cut on the left, where a pair loses more than an answer."""
    from tokenizers import processors

    own = deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", own.bos_token_id)]
    )
    own.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    policy = make_policy(seed=6, scale=0.5, with_tokenizer=False)
    own.save_pretrained(policy)
    folder = train_reward_model(policy, tmp_path, "left")
    golden = read_metadata(folder)["golden"]["items"]
    assert {type(item["prompt"]) for item in golden} == {str, list}
    assert max(item["token_count"] for item in golden) == 40 > min(item["token_count"] for item in golden)
    hosted = hosts(folder)
    assert (hosted.encoding.opening, hosted.encoding.turn_end_id) == ((own.bos_token_id,), own.pad_token_id)
    assert hosted.golden[0].startswith(f"{len(golden)} items")


def test_what_the_trainer_kept_is_what_the_service_finds(trained, hosts):
    golden = read_metadata(trained)["golden"]["items"]
    # Of all kinds: text and messages, whole and cut.
    assert {type(item["prompt"]) for item in golden} == {str, list}
    assert max(item["token_count"] for item in golden) == 40 > min(item["token_count"] for item in golden)
    hosted = hosts(trained)
    assert hosted.golden[0].startswith("6 items as in training, within ")
    assert hosted.trained == Trained(truncation="right", max_tokens=40)
    for dtype in ("bfloat16", "float16"):
        assert hosts(trained, dtype=dtype).golden[0].startswith("6 items as in training, within ")


def without_end(folder: Path) -> None:
    write_metadata(folder, append_eos=False)


def other_length(folder: Path) -> None:
    write_metadata(folder, max_tokens=41)


def other_side(folder: Path) -> None:
    write_metadata(folder, truncation="left")


def other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= 1.001
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_merges(folder: Path) -> None:
    """The tokenizer of another run: words that were one token are two."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def refusing(folder: Path) -> None:
    write_metadata(folder, truncation="refuse")


def unknown_head(folder: Path) -> None:
    golden = read_metadata(folder)["golden"]
    golden["items"][1]["attributes"] = {"kindness": 1.0}
    write_metadata(folder, golden=golden)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_end, r"golden item 0 had \d+ tokens in training, has \d+ here.*the end token \(append_eos\) is"),
        (other_length, r"golden item \d had 40 tokens in training, has 41 here"),
        (
            other_side,
            r"golden item \d: score was -?\d.* in training, is -?\d.* here, of the same number of tokens \(40\)",
        ),
        (other_weights, r"golden item \d: score was .* the weights are of another run than quartet\.json"),
        (other_merges, r"golden item 0 had \d+ tokens in training, has \d+ here.*the tokenizer or its chat template"),
        (other_template, r"golden item \d had \d+ tokens in training, has \d+ here"),
        (
            refusing,
            r"golden item \d is refused: prompt and response have \d+ tokens, the model was trained with at most 40",
        ),
        (unknown_head, r"golden item 1: attributes\.kindness is kept, but the model has no such head"),
    ],
)
def test_a_model_that_is_not_served_as_it_was_trained_is_refused(damage, message, trained, hosts, tmp_path):
    folder = copy(trained, tmp_path / "changed")
    damage(folder)
    threads = threading.active_count()
    with pytest.raises(StartError, match=rf"model '.*changed' is not served as it was trained: {message}"):
        hosts(folder)
    assert threading.active_count() == threads
    assert hosts(folder, golden_check="off").golden == ("6 items, not checked (--golden-check off)",)


def test_golden_items_of_heads_are_checked_head_by_head(make_reward_model, hosts, tmp_path):
    """Two heads with weights that make their exchange invisible in the sum."""
    heads = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
    folder = copy(make_reward_model(seed=3, num_labels=2), tmp_path / "m", heads=heads)
    ids = [*hosts(folder).tokenizer("hello").input_ids, *hosts(folder).tokenizer(" thanks").input_ids, 1]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        a, b = model(input_ids=torch.tensor([ids])).logits[0].tolist()
    item = {"prompt": "hello", "response": " thanks", "token_count": len(ids), "score": (a + b) / 2}
    write_metadata(folder, golden={"score_std": 1.0, "items": [item | {"attributes": {"a": a, "b": b}}]})
    assert hosts(folder).golden[0].startswith("1 items as in training")
    write_metadata(folder, golden={"score_std": 1.0, "items": [item | {"attributes": {"a": b, "b": a}}]})
    with pytest.raises(StartError, match=r"golden item 0: attributes\.a was "):
        hosts(folder)


def test_the_members_of_an_ensemble_check_their_own(trained, hosts, tmp_path):
    first, second = copy(trained, tmp_path / "first"), copy(trained, tmp_path / "second")
    folder = ensemble(tmp_path, first, second)
    assert len(hosts(folder).golden) == 2
    other_weights(second)
    with pytest.raises(StartError, match=r"model '.*second' is not served as it was trained"):
        hosts(folder)


def test_the_scoring_fingerprint_is_of_everything_that_decides_a_score(rules, make_reward_model, hosts, tmp_path):
    def fingerprint(model: Any, **changes: Any) -> str:
        return hosts(model, **changes).model.served_by.scoring_fingerprint

    folder = copy(make_reward_model(seed=4), tmp_path / "model")
    plain = fingerprint(folder)
    found = {
        "plain": plain,
        "weights": fingerprint(copy(make_reward_model(seed=5), tmp_path / "other")),
        "rule": fingerprint(folder, scorer="loading_rules:length"),
        "rule's weight": fingerprint(folder, scorer="loading_rules:length", scorer_weight=0.5),
    }
    source = rules / "loading_rules.py"
    source.write_text(source.read_text() + "\n# Another rule, for all that is known.\n")
    found["rule's source"] = fingerprint(folder, scorer="loading_rules:length")
    write_metadata(folder, kind="reward", append_eos=False)
    found["end token"] = fingerprint(folder)
    write_metadata(folder, kind="reward", append_eos=True)
    assert fingerprint(folder) == plain
    write_metadata(folder, kind="reward", append_eos=True, calibration={"temperature": 2.0})
    assert fingerprint(folder) == plain  # Of preferences, not of scores.
    members = ensemble(tmp_path, folder, tmp_path / "other")
    found["ensemble"] = fingerprint(members)
    found["reduction"] = fingerprint(members, ensemble_reduction="uncertainty")
    found["lambda"] = fingerprint(members, ensemble_reduction="uncertainty", ensemble_lambda=0.3)
    assert len({*found.values()}) == len(found)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in found.values())
