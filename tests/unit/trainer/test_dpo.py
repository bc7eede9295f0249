"""DPO training: against a naive computation, its figures, its references, and what is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quartet.fingerprint import safetensors_fingerprint
from tests.conftest import WORDS
from trainer import dpo, references
from trainer.answers import Answers
from trainer.checkpoint import save_checkpoint
from trainer.config import DpoSettings
from trainer.data import load_preferences
from trainer.dpo import DpoTrainer, with_reference
from trainer.dpo import main as train_dpo
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import CheckpointError
from trainer.models import load_policy, load_tokenizer
from trainer.references import REFERENCE_FILE, ModelReference, known_sums
from trainer.report.data import read_run
from trainer.tracking import read_metrics


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Kind answers are preferred; lengths differ."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "preferences.jsonl"
    kind, rude = ("thanks please sorry help we can good great", "awful bad not no do it today close")

    def words(text: str) -> str:
        return " " + " ".join(draw.choices(text.split(), k=draw.randint(2, 6)))

    rows = [
        {"prompt": " ".join(draw.choices(WORDS, k=3)) + f" {i}", "chosen": words(kind), "rejected": words(rude)}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings_of(model: Path, data: str, output: Path, **changes: Any) -> DpoSettings:
    values: dict[str, Any] = {"model": str(model), "data": (data,), "output": output, "learning_rate": 3e-3}
    return DpoSettings(**(values | {"batch_size": 16, "held_out_fraction": 0.2} | changes))


class Noisy:
    """A reference that differs from the policy, the same way at every answer."""

    identity = "noisy"

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.asked = 0

    def sums(self, rows: Any) -> Any:
        self.asked += len(rows)
        return self.answers.all_sums(rows, 10_000).numpy() + np.array([math.sin(float(row.ids.sum())) for row in rows])


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo-mean", "ipo-sum"])
def test_gradients_are_those_of_the_mean_loss_over_pairs_however_they_are_cut(loss, make_policy, preferences, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    encoded = Encoder(tokenizer, max_tokens=128).preferences(load_preferences([preferences])[:6])
    reference = Noisy(Answers(load_policy(folder, tokenizer), tokenizer, "float32"))
    answers = [answer for pair in encoded for answer in (pair.chosen, pair.rejected)]
    pairs = with_reference(encoded, reference.sums(answers))
    smoothing = {"label_smoothing": 0.2} if loss == "robust" else {}
    beta, e, weight = 0.3, 0.2, 0.5
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def logprob(answer: EncodedResponse) -> torch.Tensor:
        ids = torch.tensor(answer.ids.tolist())
        table = naive(ids[None]).logits[0].log_softmax(-1)
        return torch.stack([table[t - 1, ids[t]] for t in range(answer.prompt_tokens, len(ids))]).sum()

    def nll(x: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(x)

    expected = torch.zeros((), dtype=torch.float64)
    differences, rewards = [], []
    chosen_tokens = sum(len(pair.chosen) - pair.chosen.prompt_tokens for pair in pairs)
    for pair in pairs:
        chosen, rejected = logprob(pair.chosen), logprob(pair.rejected)
        gains = [chosen - pair.reference_chosen, rejected - pair.reference_rejected]
        if loss == "ipo-mean":
            lengths = [len(answer) - answer.prompt_tokens for answer in (pair.chosen, pair.rejected)]
            gains = [gain / length for gain, length in zip(gains, lengths, strict=True)]
        h = gains[0] - gains[1]
        differences.append(h.item())
        rewards.append([beta * gain.item() for gain in gains])
        one = {
            "sigmoid": nll(beta * h),
            "robust": ((1 - e) * nll(beta * h) - e * nll(-beta * h)) / (1 - 2 * e),
            "ipo-mean": (h - 1 / (2 * beta)) ** 2,
            "ipo-sum": (h - 1 / (2 * beta)) ** 2,
        }[loss]
        expected = expected + one / len(pairs) - weight * chosen / chosen_tokens
    expected.backward()  # type: ignore[no-untyped-call]
    scale = max(float(p.grad.abs().max()) for p in naive.parameters())
    for micro_batch_tokens in (1, 150, 10_000):
        policy = load_policy(folder, tokenizer)
        settings = settings_of(
            folder,
            preferences,
            tmp_path,
            beta=beta,
            loss=loss,
            sft_weight=weight,
            micro_batch_tokens=micro_batch_tokens,
            **smoothing,
        )
        figures = DpoTrainer(policy, tokenizer, settings, reference).accumulate(pairs)
        assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
        # What is told is what the loss compares: of ipo-mean, averages.
        assert figures["margin_mean"] == pytest.approx(beta * np.mean(differences), abs=1e-5)
        assert figures["accuracy"] == np.mean(np.array(differences) > 0)
        told = [figures["chosen_reward_mean"], figures["rejected_reward_mean"]]
        assert told == pytest.approx(np.mean(rewards, axis=0), abs=1e-5)
        for ours, theirs in zip(policy.parameters(), naive.parameters(), strict=True):
            assert float((ours.grad.double() - theirs.grad).abs().max()) < 1e-4 * scale


def test_a_policy_learns_the_preferences_and_says_what_became_of_both_answers(
    make_policy, preferences, tmp_path, capsys
):
    folder = make_policy(seed=4, scale=0.3)
    train_dpo(settings_of(folder, preferences, tmp_path / "run", epochs=2, eval_every=5))
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluation["before"]["eval_margin_mean"] == pytest.approx(0.0, abs=1e-5)
    assert evaluation["before"]["eval_accuracy"] == pytest.approx(0.5, abs=0.5)
    after = evaluation["after"]
    assert after["eval_loss"] < 0.5
    assert evaluation["accuracy"]["low"] > 0.8
    # What was printed, computed anew by transformers.
    start = AutoModelForCausalLM.from_pretrained(folder).eval()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = load_tokenizer(folder)
    from trainer.data import split_held_out

    _, held_out = split_held_out(load_preferences([preferences]), 0.2, seed=0)
    rows = Encoder(tokenizer, max_tokens=128).preferences(held_out)

    @torch.inference_mode()
    def logprob(model: Any, answer: EncodedResponse) -> float:
        ids = torch.tensor(answer.ids.tolist())
        table = model(ids[None]).logits[0].log_softmax(-1)
        return float(sum(table[t - 1, ids[t]] for t in range(answer.prompt_tokens, len(ids))))

    found = np.array([[logprob(m, a) for m in (trained, start)] for r in rows for a in (r.chosen, r.rejected)])
    gains = (found[:, 0] - found[:, 1]).reshape(-1, 2)
    assert after["eval_chosen_logprob_mean"] == pytest.approx(found[0::2, 0].mean(), abs=1e-3)
    assert after["eval_rejected_logprob_mean"] == pytest.approx(found[1::2, 0].mean(), abs=1e-3)
    assert after["eval_chosen_reward_mean"] == pytest.approx(0.1 * gains[:, 0].mean(), abs=1e-3)
    assert after["eval_margin_mean"] == pytest.approx(0.1 * (gains[:, 0] - gains[:, 1]).mean(), abs=1e-3)
    assert after["eval_accuracy"] == pytest.approx((gains[:, 0] > gains[:, 1]).mean(), abs=1e-9)
    lengths = [len(r.rejected) - r.rejected.prompt_tokens for r in rows]
    assert after["eval_rejected_length_mean"] == pytest.approx(np.mean(lengths))
    records = read_metrics(tmp_path / "run")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {"chosen_logprob_mean", "rejected_logprob_mean", "margin_mean", "accuracy"} <= records[0].keys()
    assert sum("eval_loss" in record for record in records) == 3
    assert read_run(tmp_path / "run").kind == "dpo"
    assert "DPO run" in (tmp_path / "run" / "report.html").read_text()
    assert "held-out pairs ranked as annotated by the policy's implicit reward" in capsys.readouterr().out


def test_the_interval_of_held_out_accuracy_counts_prompts_and_not_pairs(make_policy, preferences, tmp_path):
    """Each held-out pair stands there four times: nothing more is known than of one."""
    held_out = tmp_path / "held_out.jsonl"
    rows = [json.loads(line) for line in Path(preferences).read_text().splitlines()[:20]]
    # Some of them the other way round, so that not all are right.
    rows[:8] = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:8]]
    held_out.write_text("".join(4 * (json.dumps(row) + "\n") for row in rows))
    folder = make_policy(seed=4)
    train_dpo(
        settings_of(
            folder, preferences, tmp_path / "run", eval_data=(str(held_out),), max_steps=1, learning_rate=1e-5, seed=3
        )
    )
    accuracy = json.loads((tmp_path / "run" / "evaluation.json").read_text())["accuracy"]
    share, count = accuracy["value"], 80
    # Kish: independent variance over that between clusters of four equal values, both with Bessel's correction.
    assert 0 < share < 1
    effective = count * ((count / (count - 1) * count) / (20 / 19 * 20 * 16))
    z = 1.959963984540054
    half = z / (1 + z**2 / effective) * math.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
    assert accuracy["count"] == count
    assert (accuracy["high"] - accuracy["low"]) / 2 == pytest.approx(half, abs=1e-9)


def test_a_single_held_out_pair_has_an_interval_of_its_own(make_policy, preferences, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(Path(preferences).read_text().splitlines(keepends=True)[0])
    train_dpo(settings_of(make_policy(seed=4), preferences, tmp_path / "run", eval_data=(str(held_out),), max_steps=1))
    accuracy = json.loads((tmp_path / "run" / "evaluation.json").read_text())["accuracy"]
    assert accuracy["count"] == 1
    assert accuracy["high"] - accuracy["low"] > 0.7


def test_a_reference_is_asked_once_and_its_answers_are_kept_with_the_run(make_policy, preferences, tmp_path):
    folder = make_policy(seed=4)
    tokenizer = load_tokenizer(folder)
    rows = Encoder(tokenizer, max_tokens=128).demonstrations([])
    encoded = Encoder(tokenizer, max_tokens=128).preferences(load_preferences([preferences])[:5])
    rows = [answer for pair in encoded for answer in (pair.chosen, pair.rejected)]
    answers = Answers(load_policy(folder, tokenizer), tokenizer, "float32")
    reference = Noisy(answers)
    first = known_sums(tmp_path, "digest", reference, rows)
    again = known_sums(tmp_path, "digest", reference, rows)
    assert reference.asked == len(rows)
    assert first.tolist() == again.tolist()
    # Before the first checkpoint another reference is asked anew; a run that has taken steps is not given another one.
    other = ModelReference(answers, 1000, "its start")
    asked_anew = known_sums(tmp_path, "digest", other, rows)
    assert asked_anew.tolist() == other.sums(rows).tolist() != first.tolist()
    known_sums(tmp_path, "digest", reference, rows)
    assert reference.asked == 2 * len(rows)
    save_checkpoint(tmp_path, step=1, modules={}, optimisers={}, state={})
    with pytest.raises(CheckpointError, match=r"reference\.json is of the reference noisy, and this one is its start"):
        known_sums(tmp_path, "digest", other, rows)
    known_sums(tmp_path, "other rows", reference, rows)
    assert reference.asked == 3 * len(rows)
    (tmp_path / REFERENCE_FILE).write_text("{")  # Whatever became of the file.
    assert known_sums(tmp_path, "digest", reference, rows).tolist() == first.tolist()


@pytest.mark.parametrize(("several", "asked"), [(True, [512, 512, 176]), (False, [1200])])
def test_of_several_processes_the_first_asks_the_service_in_parts_between_which_all_meet(several, asked, monkeypatch):
    met: list[tuple[int, int, int]] = []

    class Service:
        identity = "a service"

        def sums(self, rows: Any, told: int, of: int) -> Any:
            met.append((len(rows), told, of))
            return np.array([float(row.ids[0]) for row in rows])

    monkeypatch.setattr(references, "active", lambda: several)
    reference = references.LedReference(lambda: Service())  # type: ignore[arg-type,return-value]
    draw = random.Random(0)
    rows = [
        EncodedResponse(ids=np.full(draw.randint(2, 40), place, dtype=np.int32), prompt_tokens=1, truncated=False)
        for place in range(1200)
    ]
    assert reference.sums(rows).tolist() == list(range(1200))
    assert met == [(count, sum(asked[:place]), 1200) for place, count in enumerate(asked)]
    assert reference.sums([]).tolist() == []


def test_a_model_made_anew_under_the_same_path_is_another_reference(make_policy, preferences, tmp_path, monkeypatch):
    """The run is killed when the reference's numbers are kept, and then the model is written anew."""
    folder = tmp_path / "model"
    shutil.copytree(make_policy(seed=4), folder)
    settings = settings_of(folder, preferences, tmp_path / "run", max_steps=2, save_every=1)

    class KilledError(Exception):
        pass

    def kept_and_killed(*args: Any) -> Any:
        known_sums(*args)
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(dpo, "known_sums", kept_and_killed)
        with pytest.raises(KilledError):
            train_dpo(settings)
    stale = json.loads((tmp_path / "run" / REFERENCE_FILE).read_text())
    shutil.copytree(make_policy(seed=5), folder, dirs_exist_ok=True)
    train_dpo(settings)
    kept = json.loads((tmp_path / "run" / REFERENCE_FILE).read_text())
    assert kept["data"] == stale["data"]
    assert kept["reference"] == f"{folder}, where training starts (weights {safetensors_fingerprint(folder)})"
    assert kept["logprobs"] != stale["logprobs"]
    # Policy and reference are one before the first step: with stale numbers the margin would not be 0.
    before = json.loads((tmp_path / "run" / "evaluation.json").read_text())["before"]
    assert before["eval_margin_mean"] == pytest.approx(0.0, abs=1e-5)
    # A run that has taken steps does not go on with the numbers of a third model.
    shutil.copytree(make_policy(seed=6), folder, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"reference\.json is of the reference .* begin another run"):
        train_dpo(settings.model_copy(update={"resume": True}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ipo-sum", "label_smoothing": 0.1}, "--label-smoothing is 0.1 and --loss ipo-sum: IPO has none"),
        ({"loss": "robust"}, "--loss is robust and --label-smoothing 0"),
        ({"reference_live": True}, "--reference-live is set without --reference"),
        ({"beta": 0.0}, "greater than 0"),
        ({"reference": "nowhere:1,else:2"}, "nowhere"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message, preferences, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, preferences, tmp_path / "run", **changes)
