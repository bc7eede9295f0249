"""The reward model's loss over rows of every shape, against each pair computed alone in float64; and its heads, live.

Shapes: K answers to one prompt, H heads.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from quartet.model_folder import read_metadata, write_metadata
from services.reward.config import RewardSettings as ServiceSettings
from services.reward.loading import load
from services.reward.panel import Candidate
from services.reward.scorer import ScorerItem
from services.runtime.telemetry import ServiceMetrics
from tests.conftest import WORDS
from trainer.batching import pad_right
from trainer.comparisons import Judgement, load_comparisons
from trainer.config import RewardSettings
from trainer.critic import Critic
from trainer.encoding import EncodedComparison, EncodedResponse, Encoder
from trainer.errors import CollapsedError, DataError, ModelError
from trainer.models import head_weights, load_reward_model, load_tokenizer, score_heads
from trainer.reward_evaluation import JudgedPairs, judged_pairs, pair_figures, refuse_collapsed
from trainer.reward_model import calibration_samples, read_rows
from trainer.reward_model import main as train_reward
from trainer.reward_trainer import RewardTrainer
from trainer.saving import save_model

KIND, RUDE = ("thanks please sorry help we can good great", "awful bad not no do it today close")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_each(folder: Path, *rows: dict[str, Any]) -> list[str]:
    """A file a row: those of one file have one shape."""
    return [write(folder / f"{number}.jsonl", row) for number, row in enumerate(rows)]


def settings(model: Path, data: str | list[str], output: Path, **changes: Any) -> RewardSettings:
    files = (data,) if isinstance(data, str) else tuple(data)
    values = {"model": str(model), "data": files, "output": output, "learning_rate": 1e-3, "batch_size": 16}
    return RewardSettings(**(values | {"held_out_fraction": 0.2, "baselines": False} | changes))


ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "hello", "chosen": " thanks a good day", "rejected": " no", "margin": 0.7},
    {"prompt": "my phone", "first": " bad", "second": " sorry we can help", "preference": 0.2},
    {"prompt": "refund", "first": " not today", "second": " tomorrow please", "preference": "tie"},
    {"prompt": "order", "ranking": [" great", " good", " not good", " awful"]},
    {"prompt": "screen", "answers": [" it is", " a", " the delay is great"], "ranks": [3, 1, 1]},
    {
        "prompt": "reset",
        "answers": [" check", " close the account", " open"],
        "comparisons": [{"first": 2, "second": 0, "preference": ["first", "tie"]}],
    },
)


@torch.no_grad()
def answer_scores(model: Any, row: EncodedComparison) -> list[list[float]]:
    return [model(torch.tensor([answer.ids.tolist()])).logits[0].tolist() for answer in row.answers]


def naive_loss(model: Any, rows: list[EncodedComparison], changes: dict[str, Any]) -> torch.Tensor:
    """Each answer alone in float64, each pair by itself, by the definitions."""
    e = changes.get("label_smoothing", 0.0)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        scores_K = [model(torch.tensor([answer.ids.tolist()])).logits[0, 0] for answer in row.answers]
        likelihood = changes.get("ranking_loss") == "plackett-luce" and row.ranked
        if likelihood:
            for place in range(len(scores_K)):
                total = total + torch.stack(scores_K[place:]).logsumexp(0) - scores_K[place]
        for judgement in row.judgements:
            weight = 1 / len(row.judgements)
            first, second, p = scores_K[judgement.first], scores_K[judgement.second], judgement.probability
            margin = changes.get("margin", 0.0) if judgement.margin is None else judgement.margin
            margin = 0.0 if p == 0.5 else margin
            right, wrong = -logsigmoid(first - second - margin), -logsigmoid(second - first - margin)
            if changes.get("robust"):
                # Each label's own unbiased form, in expectation over the labels.
                forms = [((1 - e) * a - e * b) / (1 - 2 * e) for a, b in ((right, wrong), (wrong, right))]
            else:
                forms = [(1 - e) * a + e * b for a, b in ((right, wrong), (wrong, right))]
            if not likelihood:
                total = total + weight * (p * forms[0] + (1 - p) * forms[1])
            total = total + weight * changes.get("centering", 0.0) * (first + second) ** 2
            total = total + weight * changes.get("score_l2", 0.0) * (first**2 + second**2) / 2
    return total / len(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"margin": 0.4},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.25, "robust": True},
        {"centering": 0.3, "score_l2": 0.2},
        {"ranking_loss": "plackett-luce", "centering": 0.1},
    ],
)
def test_gradients_are_those_of_every_pair_alone_however_rows_are_cut(changes, make_policy, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    data = write_each(tmp_path, *ROWS)
    rows = Encoder(tokenizer, max_tokens=64).comparisons(load_comparisons(data))
    naive = load_reward_model(folder, tokenizer, new_head_seed=1).double()
    loss = naive_loss(naive, rows, changes)
    loss.backward()
    scale = max(float(p.grad.abs().max()) for p in naive.parameters() if p.grad is not None)
    for micro_batch_tokens in (1, 100, 10_000):
        model = load_reward_model(folder, tokenizer, new_head_seed=1)
        own = settings(folder, data, tmp_path, micro_batch_tokens=micro_batch_tokens, **changes)
        figures = RewardTrainer(model, tokenizer, own).accumulate(rows)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert figures["tokens"] == sum(len(answer) for row in rows for answer in row.answers)
        for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
            if theirs.grad is not None:
                assert float((ours.grad.double() - theirs.grad).abs().max()) < 1e-4 * scale


def test_what_stands_in_the_padding_of_the_shorter_answer_changes_nothing(make_policy, tmp_path):
    """Historical: DeepSpeedExamples#316, the loss spanned the pads of the shorter answer."""
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, new_head_seed=1)
    data = write(tmp_path / "rows.jsonl", ROWS[0])
    row = Encoder(tokenizer, max_tokens=64).comparisons(load_comparisons([data]))[0]
    trainer = RewardTrainer(model, tokenizer, settings(folder, data, tmp_path))
    found = []
    for pad_id in (0, 1, 77):  # The end token among them: it is not where a response ends.
        trainer.pad_id = pad_id
        model.zero_grad()
        figures = trainer.accumulate([row])
        found.append((figures["loss"], model.score.weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == found[0][0]
        assert gradient.equal(found[0][1])


def test_scores_of_right_padded_answers_are_those_of_each_alone(make_policy, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, new_head_seed=1).eval()
    data = write_each(tmp_path, *ROWS)
    rows = Encoder(tokenizer, max_tokens=64).comparisons(load_comparisons(data))
    together = RewardTrainer(model, tokenizer, settings(folder, data, tmp_path)).all_scores(rows)
    for row, scores_KH in zip(rows, together, strict=True):
        assert scores_KH.shape == (len(row.answers), 1)
        assert scores_KH.tolist() == pytest.approx(np.array(answer_scores(model, row)), abs=1e-5)


def test_ties_of_scores_count_half_and_ties_of_labels_are_no_ones_mistake():
    first, second = np.array([1.0, 0.0, 2.0, 5.0]), np.array([1.0, 3.0, 0.0, 0.0])
    assert pair_figures(first, second)["eval_accuracy"] == (0.5 + 0 + 1 + 1) / 4
    with_tie = pair_figures(first, second, np.array([1.0, 0.8, 1.0, 0.5]))
    assert with_tie["eval_accuracy"] == (0.5 + 0 + 1) / 3
    # The loss and the Brier score are in expectation over the labels.
    differences, labels = first - second, np.array([1.0, 0.8, 1.0, 0.5])
    expected = [
        -label * math.log(1 / (1 + math.exp(-d))) - (1 - label) * math.log(1 / (1 + math.exp(d)))
        for d, label in zip(differences, labels, strict=True)
    ]
    assert with_tie["eval_loss"] == pytest.approx(sum(expected) / 4)


def pairs_of(first: np.ndarray, second: np.ndarray, heads: np.ndarray | None = None) -> JudgedPairs:
    count = len(first)
    return JudgedPairs(
        first_N=first,
        second_N=second,
        label_N=np.ones(count),
        groups_N=tuple(map(str, range(count))),
        longer_N=np.zeros(count),
        heads_N=np.zeros(count, dtype=np.int64) if heads is None else heads,
    )


def test_a_collapsed_model_is_refused_whatever_its_accuracy():
    scores = np.full(200, 0.3)
    assert pair_figures(scores + 1e-6, scores)["eval_accuracy"] == 1.0
    with pytest.raises(CollapsedError, match="the reward model has collapsed"):
        refuse_collapsed(pairs_of(scores + 1e-6, scores))
    refuse_collapsed(pairs_of(scores + np.linspace(-1, 1, 200), scores))
    refuse_collapsed(pairs_of(scores + 0.5, scores))  # By the same each time, but it tells them apart.


def test_a_model_that_scores_prompts_alone_and_a_head_that_does_have_collapsed():
    prompts = np.random.default_rng(0).normal(size=200)
    with pytest.raises(CollapsedError, match=r"pair differ by 0\.0e\+00 .*standard deviation is 9\.6e-01.*0\.6931"):
        refuse_collapsed(pairs_of(prompts, prompts))
    # One head of two: all pairs together are told apart well enough.
    places = np.arange(200) % 2
    first = prompts + np.where(places == 0, 1.0, 1e-5)
    with pytest.raises(CollapsedError, match="has collapsed in its head 'safety': "):
        refuse_collapsed(pairs_of(first, prompts, places), ["tone", "safety"])
    refuse_collapsed(pairs_of(prompts + 1.0, prompts, places), ["tone", "safety"])


def test_no_prompt_is_in_two_of_the_three_parts(make_policy, tmp_path):
    rows = [{"prompt": f"p{i % 60}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(300)]
    own = settings(make_policy(), write(tmp_path / "rows.jsonl", *rows), tmp_path / "run", temperature_fraction=0.25)
    found = read_rows(own)
    parts = [{row.prompt for row in part} for part in (found.train, found.temperature, found.held_out)]
    for first, second in itertools.combinations(parts, 2):
        assert not first & second
    assert [len(part) for part in (found.train, found.temperature, found.held_out)] == [180, 60, 60]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"ranking_loss": "plackett-luce"}, r"4\.jsonl, line 1: 3 answers that are not all in one order"),
        (ROWS, {"heads": ("a", "b")}, r"has no field 'attribute'.*--heads names 'a', 'b'"),
        ([ROWS[2]] * 4, {"split_by": "preference"}, "can't be split"),
        ([ROWS[2] | {"prompt": str(i)} for i in range(9)], {}, "0 held-out pairs of which one is better"),
    ],
)
def test_rows_that_cannot_be_learned_from_or_evaluated_on_are_refused(rows, changes, message, make_policy, tmp_path):
    held_out = [{"prompt": f"p{i}", **ROWS[0]} for i in range(4)]
    own = settings(make_policy(), write_each(tmp_path, *rows), tmp_path / "run", **changes)
    if changes and "split_by" not in changes:
        own = own.model_copy(update={"eval_data": (write(tmp_path / "held_out.jsonl", *held_out),)})
    with pytest.raises(DataError, match=message):
        read_rows(own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ("a=x",)}, "'a=x' must be NAME or NAME=WEIGHT"),
        ({"heads": ("a=1", "a=2")}, "'a' is named twice"),
        ({"ranking_loss": "plackett-luce", "margin": 1.0}, "--ranking-loss is plackett-luce"),
        ({"robust": True}, "--robust is set and --label-smoothing 0"),
        ({"members": 3, "calibrate_on": "none"}, "raw scores of members lie on different scales"),
        ({"member_fraction": 0.5}, "--member-fraction is 0.5 and --members 1"),
        ({"noise_flip": 0.1}, "--noise-from says which labels to doubt"),
        ({"noise_from": "runs/x"}, "--noise-from says which labels to doubt"),
        ({"noise_from": "runs/x", "noise_flip": 0.6, "noise_drop": 0.5}, "add up to 1.1: at most 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, "d.jsonl", tmp_path, **changes)


# Heads -------------------------------------------------------------------------------------------------------------


def test_a_new_head_has_one_label_and_a_head_of_two_is_refused(make_policy, make_reward_model):
    """Historical: OpenRLHF#1039, the head was loaded with transformers' default of num_labels = 2."""
    folder = make_policy(seed=5)
    model = load_reward_model(folder, load_tokenizer(folder), new_head_seed=1)
    assert (model.config.num_labels, tuple(model.score.weight.shape)) == (1, (1, 64))
    two = make_reward_model(seed=3, num_labels=2)
    with pytest.raises(ModelError, match="does not load"):
        load_reward_model(two, load_tokenizer(two))


@pytest.fixture(scope="module")
def two_tastes(tmp_path_factory) -> str:
    """Answers judged by two attributes that contradict each other: kindness, and brevity."""
    draw = random.Random(0)
    rows = []
    for i in range(160):
        kind = " " + " ".join(draw.choices(KIND.split(), k=draw.randint(5, 8)))
        rude = " " + " ".join(draw.choices(RUDE.split(), k=draw.randint(1, 3)))
        said = {"kind": ["first", "first"], "brief": "second"}
        rows.append({"prompt": " ".join(draw.choices(WORDS, k=3)) + f" {i}", "first": kind, "second": rude})
        rows[-1]["preferences"] = said if i % 3 else {"kind": "first"}
    return write(tmp_path_factory.mktemp("tastes") / "rows.jsonl", *rows)


def test_heads_learn_their_attributes_and_are_served_as_they_were_saved(make_policy, two_tastes, tmp_path, capsys):
    folder = make_policy(seed=6, scale=0.5)
    own = settings(folder, two_tastes, tmp_path / "run", heads=("kind=0.75", "brief=0.25"), epochs=3)
    train_reward(own.model_copy(update={"baselines": True}))
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for name in ("kind", "brief"):
        head = evaluation["heads"][name]
        assert head["accuracy"]["value"] >= 0.9
        assert head["baselines"]["TF-IDF logistic"]["value"] >= 0.9
        assert head["calibration"]["temperature"] > 0
    assert evaluation["heads"]["brief"]["pairs"] < evaluation["heads"]["kind"]["pairs"]
    assert "for kind" in capsys.readouterr().out
    exported = tmp_path / "run" / "model"
    metadata = read_metadata(exported)
    assert metadata["heads"] == [{"name": "kind", "weight": 0.75}, {"name": "brief", "weight": 0.25}]
    assert head_weights(exported) == {"kind": 0.75, "brief": 0.25}
    # One score is served: it has statistics and no temperature, for nobody has compared answers by it.
    assert "calibration" not in metadata
    # The service checks golden items head by head at its start, with the end token appended as in training.
    assert metadata["append_eos"] is True
    assert set(metadata["golden"]["items"][0]["attributes"]) == {"kind", "brief"}
    hosted = load(ServiceSettings(model=str(exported)), None, ServiceMetrics("reward"))
    try:
        assert hosted.golden[0].startswith("6 items as in training")
        tokenizer = load_tokenizer(exported)
        model = load_reward_model(exported, tokenizer).eval()
        rows = Encoder(tokenizer, max_tokens=128).comparisons(load_comparisons([two_tastes]))[:5]
        answers = [answer for row in rows for answer in row.answers]
        marks = hosted.panel.score([Candidate(ScorerItem(answer.ids.tolist())) for answer in answers])
        for answer, found in zip(answers, marks, strict=True):
            combined = hosted.combination.combine(found, hosted.combination.weights({}), normalise=True)
            with torch.no_grad():
                kind, brief = score_heads(model, *pad_right([answer.ids], 0, model.device))[0].tolist()
            assert dict(combined.attributes) == pytest.approx({"kind": kind, "brief": brief}, abs=1e-4)
            assert combined.score == pytest.approx(0.75 * kind + 0.25 * brief, abs=1e-4)
            scale = metadata["normalisation"]
            assert combined.normalised == pytest.approx((combined.score - scale["mean"]) / scale["std"], abs=1e-4)
        # A critic that starts from its head values answers by the same sum.
        critic = Critic.from_reward_model(exported, tokenizer, head="reward").eval()
        with torch.no_grad():
            ids_BS, mask_BS = pad_right([answers[0].ids], 0, model.device)
            value = critic(ids_BS, mask_BS)[0, -1].item()
            assert value == pytest.approx(
                float(score_heads(model, ids_BS, mask_BS)[0] @ torch.tensor([0.75, 0.25])), abs=1e-4
            )
    finally:
        hosted.close()
    with pytest.raises(ModelError, match="is a reward model with heads kind,brief, and --heads names none"):
        train_reward(settings(exported, write(tmp_path / "d.jsonl", *many_pairs()), tmp_path / "other"))


def many_pairs() -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": " thanks", "rejected": " no"} for i in range(40)]


def test_a_head_learns_from_the_rows_of_its_attribute_alone(make_policy, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, new_head_seed=1, heads=2)
    data = write_each(tmp_path, *({**row, "attribute": "b"} for row in ROWS[:5]))
    own = settings(folder, data, tmp_path, heads=("a", "b"), ranking_loss="plackett-luce")
    rows = Encoder(tokenizer, max_tokens=64).comparisons(load_comparisons(data))
    RewardTrainer(model, tokenizer, own).accumulate(rows)
    assert model.score.weight.grad[0].abs().max() == 0
    assert model.score.weight.grad[1].abs().max() > 0
    scores = [np.array([[0.0, float(k)] for k in range(len(row.answers))]) for row in rows]
    pairs = judged_pairs(rows, [""] * len(rows), scores, ["a", "b"])
    assert set(pairs.heads_N) == {1}
    assert np.abs(pairs.difference_N).min() == 1


def test_a_one_head_model_with_a_name_goes_on_from_itself(make_policy, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, new_head_seed=1, heads=1)
    save_model(model, tokenizer, tmp_path / "m", metadata={"kind": "reward"})
    write_metadata(tmp_path / "m", heads=[{"name": "taste", "weight": 2.0}])
    data = write(tmp_path / "rows.jsonl", *many_pairs())
    train_reward(settings(tmp_path / "m", data, tmp_path / "run", heads=("taste=2",)))
    assert head_weights(tmp_path / "run" / "model") == {"taste": 2.0}


def test_what_scores_are_normalised_by_is_drawn_from_all_rows_and_held_out_ones_where_they_are_enough(tmp_path):
    own = settings(tmp_path, ["d"], tmp_path / "run")

    def rows(name: int, count: int) -> list[EncodedComparison]:
        def answer(index: int, better: int) -> EncodedResponse:
            return EncodedResponse(
                ids=np.array([name, index, better], dtype=np.int32), prompt_tokens=1, truncated=False
            )

        said = (Judgement(first=1, second=0),)
        answers = [(answer(i, 0), answer(i, 1)) for i in range(count)]
        return [EncodedComparison(answers=pair, judgements=said, ranked=False) for pair in answers]

    train, encoder = rows(1, 10_000), None
    samples, of = calibration_samples(own, encoder, train, rows(2, 399))  # type: ignore[arg-type]
    places = [int(sample.ids[1]) for sample in samples]
    assert (len(places), of) == (4096, "best answers of training rows")
    assert all(sample.ids[0] == 1 and sample.ids[2] == 1 for sample in samples)
    assert len(set(places)) == 4096
    # As if by lot: a file that is sorted by anything has its beginning and its end in it alike.
    assert 4096 * 0.45 < sum(place < 5000 for place in places) < 4096 * 0.55
    again, _ = calibration_samples(own, encoder, train, [])  # type: ignore[arg-type]
    assert [sample.ids.tolist() for sample in again] == [sample.ids.tolist() for sample in samples]
    other, _ = calibration_samples(own.model_copy(update={"seed": 1}), encoder, train, [])  # type: ignore[arg-type]
    assert {int(sample.ids[1]) for sample in other} != set(places)
    samples, of = calibration_samples(own, encoder, train, rows(2, 400))  # type: ignore[arg-type]
    assert ([int(sample.ids[0]) for sample in samples], of) == ([2] * 400, "best answers of held-out rows")
