"""KTO: its rows, its reference point, its gradients against a naive computation, whole runs, and what is refused.

Shapes: N answers.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import WORDS
from trainer.__main__ import main
from trainer.answers import Answers
from trainer.config import KtoSettings
from trainer.data import load_judged
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import DataError
from trainer.kto import Judged, KtoTrainer, encode, mismatched, warn_of_balance, with_reference
from trainer.kto import main as train_kto
from trainer.models import load_policy, load_tokenizer
from trainer.report.data import read_run
from trainer.tracking import read_metrics

KIND, RUDE = ("thanks please sorry help we can good great", "awful bad not no do it today close")


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Kind answers are good, rude ones bad; a third of the rows are pairs, in a file of their own."""
    draw = random.Random(0)

    def words(text: str) -> str:
        return " " + " ".join(draw.choices(text.split(), k=draw.randint(2, 6)))

    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for i in range(120):
        prompt = " ".join(draw.choices(WORDS, k=3)) + f" {i}"
        if i % 3 == 0:
            pairs.append({"prompt": prompt, "chosen": words(KIND), "rejected": words(RUDE)})
        else:
            rows.append({"prompt": prompt, "completion": words(KIND if i % 2 else RUDE), "label": bool(i % 2)})
    folder = tmp_path_factory.mktemp("rows")
    return write(folder / "judged.jsonl", *rows), write(folder / "pairs.jsonl", *pairs)


def settings_of(model: Path, data: tuple[str, ...], output: Path, **changes: Any) -> KtoSettings:
    values: dict[str, Any] = {"model": str(model), "data": data, "output": output, "learning_rate": 3e-3}
    return KtoSettings(**(values | {"batch_size": 16, "held_out_fraction": 0.2, "track": ("none",)} | changes))


# Rows


def test_rows_with_labels_and_pairs_are_judged_answers(tmp_path):
    user, hello = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
    written = (
        {"prompt": "a", "completion": " b", "label": True},
        {"prompt": [user], "completion": [hello], "label": False, "rejected": None},
        {"prompt": "c", "chosen": " d", "rejected": " e", "topic": 1},
        {"instruction": "f", "completion": "g", "label": True},
    )
    sources = [write(tmp_path / f"{number}.jsonl", row) for number, row in enumerate(written)]
    rows = load_judged(sources)
    assert [(row.prompt, row.completion, row.desirable) for row in rows] == [
        ("a", " b", True),
        ([user], "Hello!", False),
        ("c", " d", True),
        ("c", " e", False),
        ([{"role": "user", "content": "f"}], "g", True),
    ]
    assert [row.where for row in rows[2:4]] == [f"{sources[2]}, line 1 (chosen)", f"{sources[2]}, line 1 (rejected)"]
    assert len({row.group_key for row in rows}) == 4
    with pytest.raises(DataError, match="line 1: field 'topic' is missing"):
        load_judged(sources, split_by="topic")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "field 'label' is missing (a judged answer needs prompt, completion and"),
        ({"prompt": "a", "completion": "b", "label": 1}, "field 'label' must be true or false, is int '1'"),
        ({"prompt": "a", "label": True}, "field 'completion' is missing"),
        ({"completion": "b", "label": True}, "field 'prompt' is missing or empty: KTO measures"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "field 'prompt' is missing or empty: KTO measures"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ({"text": "a"}, "a judged answer needs prompt, completion and label, or chosen and rejected; the row has"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_field(row, message, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b", "label": True}, row)
    with pytest.raises(SystemExit):
        main(["check", "--data", source, "--kinds", "judged"])
    assert f"{source}, line 2: {message}" in capsys.readouterr().err


# The reference point


def judged_row(prompt: list[int], answer: list[int], desirable: bool = True) -> Judged:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    answered = EncodedResponse(ids=ids, prompt_tokens=len(prompt), truncated=False)
    return Judged(answer=answered, desirable=desirable)


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [3, 1, 2], [1] * 7, [4, 4, 1, 2, 3]])
def test_every_answer_stands_once_beside_another_prompt(counts):
    rows = [
        judged_row([3, 10 + group], [100 + 10 * group + number, 1])
        for group, count in enumerate(counts)
        for number in range(count)
    ]
    random.Random(1).shuffle(rows)
    found = [item.answer for item in mismatched(rows, 100)]
    assert Counter(answer.ids[2] for answer in found) == Counter(row.answer.ids[2] for row in rows)
    assert Counter(answer.ids[1] for answer in found) == Counter(row.answer.ids[1] for row in rows)
    if set(counts) == {1}:  # As the authors have it: with the answer of the next row.
        assert [answer.ids[2] for answer in found] == [row.answer.ids[2] for row in (*rows[1:], rows[0])]
    for answer in found:
        assert (answer.ids[2] - 100) // 10 != answer.ids[1] - 10  # The prompt that it belongs to.
        assert (answer.prompt_tokens, answer.ids[0], answer.ids[3]) == (2, 3, 1)


def test_answers_that_have_only_their_own_prompt_are_left_out():
    assert mismatched([], 100) == []
    assert mismatched([judged_row([5], [6])], 100) == []
    assert mismatched([judged_row([5], [6]), judged_row([5], [7])], 100) == []
    found = mismatched([judged_row([ord(text)], [9]) for text in "abbb"], 100)
    assert sorted(chr(item.answer.ids[0]) for item in found) == ["a", "b"]


def test_of_a_prompt_that_is_too_long_with_another_answer_the_beginning_goes():
    rows = [judged_row([2, 3, 4, 5], [6]), judged_row([7], [8, 9, 10, 11])]
    first, second = (item.answer for item in mismatched(rows, 5))
    assert (first.ids.tolist(), first.prompt_tokens, first.truncated) == ([5, 8, 9, 10, 11], 1, True)
    assert (second.ids.tolist(), second.prompt_tokens, second.truncated) == ([7, 6], 1, False)


# Training


class Noisy:
    """A reference that differs from the policy, the same way at every answer."""

    identity = "noisy"

    def __init__(self, answers: Answers, shift: float) -> None:
        self.answers, self.shift = answers, shift

    def sums(self, rows: Any) -> Any:
        noise = np.array([math.sin(float(row.ids.sum())) for row in rows])
        return self.answers.all_sums(rows, 10_000).numpy() + noise + self.shift

    def of(self, items: list[Any]) -> list[Any]:
        return with_reference(items, iter(self.sums([item.answer for item in items])))


def some_rows(
    folder: Path, judged: tuple[str, ...], count: int, kinds: tuple[bool, ...] = (True, False)
) -> list[Judged]:
    loaded = [row for row in load_judged(judged) if row.desirable in kinds][:count]
    return encode(loaded, Encoder(load_tokenizer(folder), max_tokens=128))


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("shift", [-3.0, 3.0], ids=["gone", "at the bound"])
def test_gradients_are_those_of_the_mean_loss_however_rows_are_cut(packing, shift, make_policy, judged, tmp_path):
    """The reference point is that of all rows of the step; below 0 it is 0; no gradient goes through it."""
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    reference = Noisy(Answers(load_policy(folder, tokenizer), tokenizer, "float32"), shift)
    rows = reference.of(some_rows(folder, judged, 9))
    others = reference.of(mismatched(rows, 128))
    assert len(others) == 9
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def logprob(answer: EncodedResponse) -> torch.Tensor:
        ids = torch.tensor(answer.ids.tolist())
        table = naive(ids[None]).logits[0].log_softmax(-1)
        return torch.stack([table[t - 1, ids[t]] for t in range(answer.prompt_tokens, len(ids))]).sum()

    beta, weights = 0.3, {True: 1.5, False: 0.7}
    with torch.no_grad():
        drift = float(np.mean([logprob(item.answer).item() - item.reference for item in others]))
    point = max(0.0, drift)
    assert (point > 1.0) == (shift < 0)
    gains = [logprob(row.answer) - row.reference for row in rows]
    losses = []
    for row, gain in zip(rows, gains, strict=True):
        value = torch.sigmoid(beta * (gain - point) if row.desirable else beta * (point - gain))
        losses.append(weights[row.desirable] * (1 - value))
    expected = torch.stack(losses).mean()
    expected.backward()
    scale = max(float(p.grad.abs().max()) for p in naive.parameters())
    for micro_batch_tokens in (1, 60, 10_000):
        policy = load_policy(folder, tokenizer).train()
        settings = settings_of(
            folder,
            judged,
            tmp_path,
            beta=beta,
            desirable_weight=weights[True],
            undesirable_weight=weights[False],
            micro_batch_tokens=micro_batch_tokens,
        )
        trainer = KtoTrainer(Answers(policy, tokenizer, "float32", packing), settings, reference)
        figures = trainer.accumulate(rows, others)
        assert policy.training
        assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert figures["reference_point"] == pytest.approx(point, abs=1e-4)
        for ours, theirs in zip(policy.parameters(), naive.parameters(), strict=True):
            assert float((ours.grad.double() - theirs.grad).abs().max()) < 1e-4 * scale
    for name, kind in (("good", True), ("bad", False)):
        of_kind = [gain.item() for row, gain in zip(rows, gains, strict=True) if row.desirable == kind]
        assert figures[f"{name}_reward_mean"] == pytest.approx(beta * np.mean(of_kind), abs=1e-4)
    right = [(gain.item() > point) == row.desirable for row, gain in zip(rows, gains, strict=True)]
    assert figures["label_accuracy"] == pytest.approx(np.mean(right))
    assert trainer.evaluate(rows, others)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    # Asked at every step, the reference says the same.
    live = settings.model_copy(update={"reference_live": True})
    unknown = [[replace(item, reference=math.nan) for item in items] for items in (rows, others)]
    asked = KtoTrainer(trainer.answers, live, reference).accumulate(*unknown)
    assert asked["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_of_one_kind_alone_has_the_figures_of_that_kind(make_policy, judged, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    answers = Answers(load_policy(folder, tokenizer), tokenizer, "float32")
    reference = Noisy(answers, 0.0)
    rows = reference.of(some_rows(folder, judged, 4, kinds=(False,)))
    trainer = KtoTrainer(answers, settings_of(folder, judged, tmp_path), reference)
    figures = trainer.accumulate(rows, reference.of(mismatched(rows, 128)))
    assert "bad_reward_mean" in figures
    assert "good_reward_mean" not in figures
    assert all(math.isfinite(value) for value in figures.values())
    alone = trainer.accumulate(rows[:1], mismatched(rows[:1], 128))
    assert (alone["reference_point"], alone["reference_answers"]) == (0.0, 0)


def test_a_run_learns_the_judgements_and_goes_on_to_the_same_bits(make_policy, judged, tmp_path, capsys):
    folder = make_policy(seed=4, scale=0.3)
    settings = settings_of(folder, judged, tmp_path / "run", epochs=3, save_every=10, keep_checkpoints=9, dropout=0.1)
    train_kto(settings)
    printed = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    # Policy and reference are one, so every value is sigmoid(0).
    assert evaluation["before"]["eval_loss"] == pytest.approx(0.5, abs=1e-6)
    assert evaluation["before"]["eval_reference_point"] == pytest.approx(0.0, abs=1e-5)
    after = evaluation["after"]
    assert after["eval_loss"] < 0.4
    assert evaluation["label_accuracy"]["low"] > 0.6
    assert after["eval_good_reward_mean"] > after["eval_bad_reward_mean"] + 0.5
    assert "held-out answers on the side of the reference point that they were judged to be: " in printed
    records = read_metrics(tmp_path / "run")
    assert records[0]["loss"] == pytest.approx(0.5, abs=0.05)  # Dropout is the policy's alone.
    assert read_run(tmp_path / "run").kind == "kto"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "KTO run" in page
    assert 'id="plot-judged"' in page
    # As if it had been killed after step 10.
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "run", broken)
    shutil.rmtree(broken / "model")
    for checkpoint in broken.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-000010":
            shutil.rmtree(checkpoint)
    train_kto(settings.model_copy(update={"output": broken, "resume": True}))
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (broken, tmp_path / "run"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [r["loss"] for r in read_metrics(broken)] == [r["loss"] for r in records]


def test_the_interval_of_held_out_label_accuracy_counts_prompts_and_not_rows(make_policy, judged, tmp_path):
    """Each held-out row stands there four times: nothing more is known than of one."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(line * 4 for line in Path(judged[0]).read_text().splitlines(keepends=True)[:20]))
    options = {"eval_data": (str(held_out),), "max_steps": 1, "learning_rate": 1e-5, "seed": 1}
    train_kto(settings_of(make_policy(seed=4), judged, tmp_path / "run", **options))
    accuracy = json.loads((tmp_path / "run" / "evaluation.json").read_text())["label_accuracy"]
    share, count, z = accuracy["value"], 80, 1.959963984540054
    assert 0 < share < 1
    # Kish: independent variance over that between clusters of four equal values, both with Bessel's correction.
    effective = count * ((count / (count - 1) * count) / (20 / 19 * 20 * 16))
    half = z / (1 + z**2 / effective) * math.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
    assert accuracy["count"] == count
    assert (accuracy["high"] - accuracy["low"]) / 2 == pytest.approx(half, abs=1e-9)


def test_kinds_that_count_differently_are_told_with_the_weight_that_evens_them(tmp_path, capsys):
    warn_of_balance(100, 80, settings_of(tmp_path, ("d",), tmp_path))
    warn_of_balance(100, 200, settings_of(tmp_path, ("d",), tmp_path, undesirable_weight=0.5))
    assert capsys.readouterr().err == ""
    warn_of_balance(100, 20, settings_of(tmp_path, ("d",), tmp_path))
    assert "--undesirable-weight 5 would even it out" in capsys.readouterr().err
    warn_of_balance(100, 0, settings_of(tmp_path, ("d",), tmp_path))
    assert "warning: 100 good answers of weight 1 and 0 bad ones of weight 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "--desirable-weight and --undesirable-weight are 0"),
        ({"undesirable_weight": -1.0}, "greater than or equal to 0"),
        ({"reference_live": True}, "--reference-live is set without --reference"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, ("d",), tmp_path, **changes)
