"""SFT and reward training: against naive computations, interrupted, refused.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import brier_score_loss
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from quartet.fingerprint import derive_seed
from quartet.model_folder import read_metadata
from tests.conftest import WORDS
from trainer.__main__ import main
from trainer.calibration import expected_calibration_error
from trainer.comparisons import Comparison, Judgement, load_comparisons
from trainer.config import RewardSettings, SftSettings
from trainer.data import load_demonstrations, split_held_out
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import CheckpointError, CollapsedError
from trainer.models import load_policy, load_reward_model, load_tokenizer
from trainer.reward_evaluation import baselines, pair_figures
from trainer.reward_model import main as train_reward
from trainer.reward_trainer import RewardTrainer
from trainer.runs import rows_digest
from trainer.sft import SftTrainer
from trainer.sft import main as train_sft
from trainer.tracking import RunTracker, read_metrics

KIND, RUDE = ("thanks please sorry help we can good great", "awful bad not no do it today close")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Demonstrations and preferences over one small vocabulary: the preferred answers are kind."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("rows")

    def words(text: str, count: int) -> str:
        return " " + " ".join(draw.choices(text.split(), k=count))

    pairs = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=3)) + f" {i}",
            "chosen": words(KIND, draw.randint(2, 6)),
            "rejected": words(RUDE, draw.randint(2, 6)),
        }
        for i in range(240)
    ]
    files = {}
    for name, content in (
        ("preferences", pairs),
        ("demonstrations", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]),
    ):
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in content))
    return files


def sft_settings(model: Path, rows: dict[str, str], output: Path, **changes: Any) -> SftSettings:
    values = {"model": str(model), "data": (rows["demonstrations"],), "output": output, "learning_rate": 3e-3}
    return SftSettings(**(values | {"batch_size": 16} | changes))


def reward_settings(model: Path, rows: dict[str, str], output: Path, **changes: Any) -> RewardSettings:
    values = {"model": str(model), "data": (rows["preferences"],), "output": output, "learning_rate": 1e-3}
    return RewardSettings(**(values | {"batch_size": 16, "held_out_fraction": 0.2} | changes))


def assert_same_gradients(first: Any, second: Any, tolerance: float) -> None:
    scale = max(float(p.grad.abs().max()) for p in second.parameters() if p.grad is not None)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        if theirs.grad is not None:
            assert float((ours.grad.double() - theirs.grad.double()).abs().max()) < tolerance * scale


@pytest.mark.parametrize("tied", [False, True])
def test_sft_gradients_are_those_of_the_mean_over_all_response_tokens(tied, make_policy, rows, tmp_path):
    folder = make_policy(seed=3, tied=tied)
    tokenizer = load_tokenizer(folder)
    batch = Encoder(tokenizer, max_tokens=128).demonstrations(load_demonstrations([rows["demonstrations"]])[:8])
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = sum(len(row) - row.prompt_tokens for row in batch)
    loss = torch.zeros((), dtype=torch.float64)
    for row in batch:
        ids = torch.tensor(row.ids.tolist())
        table = naive(ids[None]).logits[0].log_softmax(-1)
        loss = loss - sum(table[t - 1, ids[t]] for t in range(row.prompt_tokens, len(ids))) / tokens
    loss.backward()
    for micro_batch_tokens in (1, 60, 10_000):
        policy = load_policy(folder, tokenizer)
        settings = sft_settings(folder, rows, tmp_path, micro_batch_tokens=micro_batch_tokens)
        figures = SftTrainer(policy, tokenizer, settings).accumulate(batch)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(policy, naive, 1e-4)
    found = SftTrainer(policy, tokenizer, settings).evaluate(batch)
    assert found["eval_perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert found["eval_tokens"] == tokens


def test_sft_learns_and_its_model_ends_by_itself(make_policy, rows, tmp_path, capsys):
    folder = make_policy(seed=4, scale=0.3)
    train_sft(sft_settings(folder, rows, tmp_path / "run", epochs=8, learning_rate=5e-3))
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["eval_perplexity"] < 0.2 * evaluation["before"]["eval_perplexity"]
    tokenizer = load_tokenizer(tmp_path / "run" / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    prompt = torch.tensor([tokenizer("hello please 7", add_special_tokens=False).input_ids])
    torch.manual_seed(0)
    answers = policy.generate(prompt.repeat(16, 1), max_new_tokens=60, do_sample=True, top_k=0)[:, prompt.shape[1] :]
    assert sum(tokenizer.eos_token_id in answer for answer in answers) >= 14
    assert len(read_metrics(tmp_path / "run")) == 8 * math.ceil(228 / 16)
    assert "held-out perplexity: before" in capsys.readouterr().out


def test_the_digest_of_rows_tells_their_ids_their_order_their_ends_and_where_responses_begin():
    def row(ids: list[int], prompt_tokens: int = 1) -> EncodedResponse:
        return EncodedResponse(ids=np.array(ids, dtype=np.int32), prompt_tokens=prompt_tokens, truncated=False)

    first, second, third = row([5, 6]), row([7]), row([8])
    digests = [
        rows_digest([first, second], [third]),
        rows_digest([second, first], [third]),
        rows_digest([first, second, third], []),
        rows_digest([first], [second, third]),
        rows_digest([row([5, 6], 2), second], [third]),
        rows_digest([row([5]), row([6, 7])], [third]),
        rows_digest([row([5, 6]), row([9])], [third]),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == rows_digest([row([5, 6]), row([7])], [row([8])])


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_does_not_go_on_with_other_rows_under_the_same_name(
    stage, make_policy, make_reward_model, rows, tmp_path
):
    name, make, train, model = {
        "sft": ("demonstrations", sft_settings, train_sft, make_policy(seed=4)),
        "reward": ("preferences", reward_settings, train_reward, make_reward_model(seed=4)),
    }[stage]
    copies = {}
    for file in ("data", "held_out"):
        copies[file] = tmp_path / f"{file}.jsonl"
        copies[file].write_text(Path(rows[name]).read_text())
    own = {name: str(copies["data"])}
    changes = {"eval_data": (str(copies["held_out"]),), "max_steps": 2, "save_every": 1}
    train(make(model, own, tmp_path / "run", **changes))
    for file in copies.values():
        before = file.read_text()
        lines = before.splitlines(keepends=True)
        file.write_text("".join(lines[1:]))
        with pytest.raises(CheckpointError, match="checkpoint-000002 was written with other rows than --data"):
            train(make(model, own, tmp_path / "run", **changes, resume=True))
        file.write_text(before)
    train(make(model, own, tmp_path / "run", **changes, resume=True))


@pytest.fixture(scope="module")
def rude(rows, tmp_path_factory) -> str:
    """Held-out answers of other words than those trained on: their loss falls while words are learned, then rises."""
    path = tmp_path_factory.mktemp("rude") / "rude.jsonl"
    pairs = [json.loads(line) for line in Path(rows["preferences"]).read_text().splitlines()[:30]]
    path.write_text("".join(json.dumps({"prompt": p["prompt"], "completion": p["rejected"]}) + "\n" for p in pairs))
    return str(path)


def overfitting(model: Path, rows: dict[str, str], rude: str, output: Path, **changes: Any) -> SftSettings:
    few = {"max_steps": 24, "epochs": 2, "learning_rate": 3e-3, "eval_every": 4, "eval_data": (rude,)}
    return sft_settings(model, rows, output, **(few | {"track": ("none",)} | changes))


def test_the_best_checkpoint_stays_and_is_the_model_also_of_a_run_broken_off(make_policy, rows, rude, tmp_path):
    model = make_policy(seed=4, scale=0.3)
    options = {"keep_best": True, "keep_checkpoints": 1, "save_every": 5}
    train_sft(overfitting(model, rows, rude, tmp_path / "run", **options))
    losses = {record["step"]: record["eval_loss"] for record in read_metrics(tmp_path / "run") if "eval_loss" in record}
    best = min(losses, key=losses.__getitem__)
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert min(losses) < best < max(losses)
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{best:06d}", f"checkpoint-{last - last % 5:06d}"]
    kept = load_file(tmp_path / "run" / saved[0] / "model.safetensors")
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() <= kept.keys()
    assert all(exported[name].equal(kept[name]) for name in exported)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["eval_loss"] == losses[best]
    assert json.loads((tmp_path / "run" / "model" / "lineage.json").read_text())["chain"][0]["step"] == best

    # Broken off before and after the best, it ends with the same bits.
    for stop in (best - 1, best + 2):
        output = tmp_path / f"broken-{stop}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunTracker, "log", broken_off_at(stop))
            with pytest.raises(KeyboardInterrupt):
                train_sft(overfitting(model, rows, rude, output, **options))
        train_sft(overfitting(model, rows, rude, output, **options, resume=True))
        for file in ("model/model.safetensors", f"{saved[0]}/model.safetensors", "evaluation.json"):
            assert (output / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file
    with pytest.raises(CheckpointError, match="--eval-every was 4, is 3"):
        train_sft(overfitting(model, rows, rude, tmp_path / "run", **options, eval_every=3, resume=True))


def broken_off_at(step: int) -> Any:
    log = RunTracker.log

    def breaks_off(tracker: RunTracker, done: int, metrics: Any) -> None:
        log(tracker, done, metrics)
        if done == step:
            raise KeyboardInterrupt

    return breaks_off


def test_a_run_that_says_nothing_of_checkpoints_keeps_some_and_its_last_model(make_policy, rows, rude, tmp_path):
    train_sft(overfitting(make_policy(seed=4, scale=0.3), rows, rude, tmp_path / "run"))
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert steps[-1] == 24
    # Each tenth of 24 steps, rounded up: 3; the newest two of these.
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-000021",
        "checkpoint-000024",
    ]
    assert json.loads((tmp_path / "run" / "model" / "lineage.json").read_text())["chain"][0]["step"] == 24
    train_sft(overfitting(make_policy(seed=4, scale=0.3), rows, rude, tmp_path / "none", max_steps=3, save_every=0))
    assert not list((tmp_path / "none").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": 0}, "--keep-best is set and --eval-every 0"),
        ({"eval_every": 3, "held_out_fraction": 0.0}, "--keep-best is set and nothing is held out"),
    ],
)
def test_the_best_of_no_evaluations_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sft_settings(tmp_path, {"demonstrations": "d"}, tmp_path / "run", keep_best=True, **changes)


def test_reward_gradients_are_those_of_the_mean_bradley_terry_loss(make_policy, rows, tmp_path):
    folder = make_policy(seed=5)
    tokenizer = load_tokenizer(folder)
    pairs = Encoder(tokenizer, max_tokens=128).comparisons(load_comparisons([rows["preferences"]])[:8])
    naive = load_reward_model(folder, tokenizer, new_head_seed=1).double()
    loss = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        scores = [naive(torch.tensor([x.ids.tolist()])).logits[0, 0] for x in pair.answers]
        loss = loss - torch.nn.functional.logsigmoid(scores[0] - scores[1]) / len(pairs)
    loss.backward()
    for micro_batch_tokens in (1, 100, 10_000):
        model = load_reward_model(folder, tokenizer, new_head_seed=1)
        settings = reward_settings(folder, rows, tmp_path, micro_batch_tokens=micro_batch_tokens)
        figures = RewardTrainer(model, tokenizer, settings).accumulate(pairs)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(model, naive, 1e-4)


def test_a_reward_model_learns_is_calibrated_and_scores_as_the_service_will(make_policy, rows, tmp_path, capsys):
    """Row 17. Historical: trl#5813, EOS added in reward-model training and absent when scoring."""
    folder = make_policy(seed=6, scale=0.5)
    train_reward(reward_settings(folder, rows, tmp_path / "run", epochs=2))
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["eval_accuracy"] >= 0.95
    assert evaluation["accuracy"]["low"] > 0.5
    assert evaluation["baselines"]["TF-IDF logistic"]["value"] >= 0.95
    printed = capsys.readouterr().out
    assert "this reward model" in printed
    assert "length alone" in printed
    exported = tmp_path / "run" / "model"
    metadata = read_metadata(exported)
    assert (metadata["kind"], metadata["append_eos"]) == ("reward", True)
    # Row 17, computed anew: transformers' own classifier on the calibration set, end token appended.
    model = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    tokenizer = load_tokenizer(exported)
    calibration = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert calibration["calibrate_on"] == "chosen"
    kept = metadata["normalisation"]

    def encode(prompt: str, response: str) -> list[int]:
        texts = tokenizer([prompt, response], add_special_tokens=False).input_ids
        return [*texts[0], *texts[1], tokenizer.eos_token_id]

    @torch.inference_mode()
    def score(prompt: str, response: str) -> float:
        return model(torch.tensor([encode(prompt, response)])).logits[0, 0].item()

    train, held_out = split_held_out(load_comparisons([rows["preferences"]]), 0.2, seed=0)
    train, apart = split_held_out(train, 0.1, seed=derive_seed("temperature", 0))
    scores = [score(row.prompt, row.answers[0]) for row in train]
    normalised = (np.array(scores) - kept["mean"]) / kept["std"]
    assert abs(normalised.mean()) < 0.01
    assert normalised.std(ddof=1) == pytest.approx(1.0, abs=1e-3)
    assert kept["count"] == len(train)
    # What the service checks itself by: held-out answers of both kinds, from the shortest to the longest.
    assert (metadata["truncation"], metadata["max_tokens"]) == ("refuse", 128)
    golden = metadata["golden"]
    assert golden["score_std"] == evaluation["eval_score_std"]
    answers = [{(row.prompt, row.answers[place]) for row in held_out} for place in range(2)]
    for place, item in enumerate(golden["items"]):
        assert (item["prompt"], item["response"]) in answers[place % 2]
        assert item["score"] == pytest.approx(score(item["prompt"], item["response"]), abs=1e-5)
        assert item["token_count"] == len(encode(item["prompt"], item["response"]))
    assert len(golden["items"]) == 6
    longest = [max(len(encode(row.prompt, a)) for a in row.answers) for row in held_out]
    kept_rows = [row for i in golden["items"] for row in held_out if row.prompt == i["prompt"]]
    assert {min(longest), max(longest)} <= {max(len(encode(row.prompt, a)) for a in row.answers) for row in kept_rows}
    # What the service compares its scores with: raw ones of held-out answers.
    baseline = [score(row.prompt, answer) for row in held_out for answer in row.answers]
    assert metadata["baseline"]["scores"] == pytest.approx(baseline, abs=1e-4)
    # The temperature: least loss on rows that are neither trained on nor held out, by a search over a grid.
    differences = np.array([score(row.prompt, row.answers[0]) - score(row.prompt, row.answers[1]) for row in apart])
    target = (len(apart) + 1) / (len(apart) + 2)
    inverse = np.geomspace(0.01, 100, 20_001)[:, None]
    losses = target * np.logaddexp(0, -inverse * differences) + (1 - target) * np.logaddexp(0, inverse * differences)
    best = 1 / inverse[losses.mean(axis=1).argmin(), 0]
    assert metadata["calibration"]["temperature"] == pytest.approx(best, rel=2e-3)
    assert metadata["calibration"]["pairs"] == len(apart) == 19
    assert set(evaluation["calibration"]) == {"before", "after", "temperature", "pairs", "at_bound"}


def test_a_collapsed_model_is_refused_and_not_exported(make_policy, rows, tmp_path):
    with pytest.raises(CollapsedError, match="the reward model has collapsed"):
        train_reward(reward_settings(make_policy(seed=6), rows, tmp_path / "run", weight_clip=1e-6, baselines=False))
    assert not (tmp_path / "run" / "model").exists()


def test_pair_figures_are_those_of_independent_libraries():
    random_ = np.random.default_rng(0)
    chosen, rejected = random_.normal(0.5, 1, 500), random_.normal(0, 1, 500)
    chosen[:10] = rejected[:10]
    found = pair_figures(chosen, rejected)
    probability = 1 / (1 + np.exp(rejected - chosen))
    assert found["eval_accuracy"] == pytest.approx(((chosen > rejected).sum() + 5) / 500)
    assert found["eval_loss"] == pytest.approx(-np.log(probability).mean())
    assert found["eval_brier"] == pytest.approx(brier_score_loss(np.ones(500), probability, pos_label=1))
    # Two bins by hand: confidences .6 (right half the time) and .9 (always right).
    assert expected_calibration_error(np.array([0.6, 0.4, 0.9, 0.9])) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_baselines_see_what_is_there_and_nothing_in_noise(rows):
    pairs = load_comparisons([rows["preferences"]])
    found = baselines(pairs[:180], pairs[180:])
    assert found["TF-IDF logistic"].value == 1.0
    draw = random.Random(1)
    shuffled = [
        Comparison(prompt=p.prompt, answers=tuple(draw.sample(p.answers, 2)), judgements=p.judgements) for p in pairs
    ]
    noise = baselines(shuffled[:180], shuffled[180:])
    assert noise["TF-IDF logistic"].low < 0.5 < noise["TF-IDF logistic"].high


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["nothing"], ["there is no command 'nothing'; there are helpdesk, check, init, sft, reward, dpo, kto, ppo"]),
        (["sft"], ["--model is required", "--data is required", "--output is required"]),
        (
            ["sft", "--model", "m", "--data", "d", "--output", "o", "--learning-rate", "-1"],
            ["--learning-rate is '-1': Input should be greater than 0"],
        ),
        (
            ["reward", "--model", "m", "--data", "d", "--output", "o", "--learning-rate", "nan"],
            ["--learning-rate is 'nan'"],
        ),
        (
            ["reward", "--model", "m", "--data", "d", "--output", "o", "--label-smoothing", "0.5"],
            ["--label-smoothing is '0.5': Input should be less than 0.5"],
        ),
        (["sft", "--model", "absent", "--data", "absent.jsonl", "--output", "o"], ["absent.jsonl: there is no such"]),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_in_one_line_each(arguments, messages, tmp_path):
    done = subprocess.run([sys.executable, "-m", "trainer", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "--data", "d.jsonl", "--output", "FILE"], "--output is 'FILE': it is a file; name a folder"),
        (["init", "--data", "d.jsonl", "--output", "FILE/x"], "/FILE' is a file; name a folder"),
        (["helpdesk", "--output", "FILE/x"], "/FILE' is a file; name a folder"),
        (["sft", "--model", "m", "--data", "d.jsonl", "--output", "FILE"], "--output is 'FILE': it is a file"),
        (["sft", "--model", "m", "--data", "d.jsonl", "--output", "FILE/x/y"], "/FILE' is a file; name a folder"),
        (["reward", "--model", "m", "--data", "d.jsonl", "--output", "FILE/x"], "/FILE' is a file; name a folder"),
        (["ppo", "--model", "m", "--prompts", "d.jsonl", "--output", "FILE/x"], "/FILE' is a file; name a folder"),
        (
            ["evaluate", "--model", "m", "--prompts", "d.jsonl", "--output", "FILE/x"],
            "the folder of --output is 'FILE'",
        ),
        (["evaluate", "--model", "m", "--prompts", "d.jsonl", "--output", "."], "--output is '.': it is a folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_before_anything_is_done(
    arguments, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert (tmp_path / "FILE").read_text() == "kept"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff{{", "not UTF-8 text: 'utf-8' codec can't decode byte 0xff"), (None, "No such file")],
)
def test_a_chat_template_that_cannot_be_read_is_one_line(content, message, make_policy, rows, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    if content is not None:
        template.write_bytes(content)
    flags = ["--chat-template", str(template), "--output", str(tmp_path / "run")]
    model = str(make_policy())
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["sft", "--model", model, "--data", rows["demonstrations"], *flags])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"quartet-train sft: --chat-template is '{template}': {message}" in told
    assert told.count("\n") == 1


def test_data_are_checked_as_every_stage_would_read_them(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    command = [sys.executable, "-m", "trainer", "check", "--data", "d.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"d.jsonl: 3 {kind}" for kind in ("demonstrations", "preferences", "prompts")]
    done = subprocess.run([*command, "--kinds", "demonstrations"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "d.jsonl: 3 demonstrations\n"
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "quartet-train check: d.jsonl, line 4: this row has 'prompt' and 'completion', line 1 has 'prompt' and 'chosen'"
    )


def test_help_lists_every_setting_and_loads_no_torch():
    code = (
        "import sys\nfrom trainer.__main__ import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n        main([name, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--kl-beta" in done.stdout
    assert "price of a nat of KL" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("flag", "message"),
    [("folder", "there is no such folder"), ("tokenizer", "the folder has no tokenizer")],
)
def test_a_model_that_cannot_be_used_is_refused(flag, message, make_policy, rows, tmp_path):
    model = tmp_path / "absent" if flag == "folder" else make_policy(with_tokenizer=False)
    command = [sys.executable, "-m", "trainer", "sft", "--model", str(model), "--data", rows["demonstrations"]]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_texts_without_common_words_cost_the_baselines_and_not_the_model(capsys):
    said = (Judgement(first=0, second=1),)
    pairs = [Comparison(prompt="", answers=(f"oui{i}", f"non{i}"), judgements=said) for i in range(4)]
    assert baselines(pairs, pairs) == {}
    assert "no baselines: TF-IDF can't be fitted on these texts" in capsys.readouterr().err
