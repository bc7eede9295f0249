"""Numbers that are not finite: they stop a run, name their rows, and leave a checkpoint that is gone on from."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import WORDS
from tests.kills import differences
from tests.unit.trainer.test_ppo import ScriptedRun, make_learner, make_samples, rollout_of, settings
from trainer import dpo, optimisation, reward_model, runs, sft
from trainer.__main__ import main
from trainer.checkpoint import StopRequest, latest_checkpoint
from trainer.divergence import diverged, row_names
from trainer.errors import DivergedError, RolloutError
from trainer.ppo import train
from trainer.references import ModelReference, known_sums
from trainer.tracking import read_metrics

LOADED = {"sft": (sft, "load_policy"), "reward": (reward_model, "load_reward_model"), "dpo": (dpo, "load_policy")}
ODD = "~"  # One token of its own, which stands in the odd row alone.
ODD_LINE = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=3)) + (f" {ODD} {i}" if i + 1 == ODD_LINE else f" {i}"),
            "chosen": " " + " ".join(draw.choices(WORDS[:12], k=draw.randint(1, 4))),
            "rejected": " " + " ".join(draw.choices(WORDS[12:], k=draw.randint(1, 4))),
        }
        for i in range(36)
    ]
    files = {"train": folder / "train.jsonl", "held_out": folder / "held_out.jsonl", "odd": folder / "odd.jsonl"}
    for name, part in (("train", rows[:28]), ("held_out", rows[28:]), ("odd", [*rows[28:], rows[ODD_LINE - 1]])):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


def poison(model: Any, token: int, place: str, active: Callable[[], bool]) -> None:
    """Makes what ``model`` computes of sequences with ``token`` NaN, forwards or in the gradient alone."""

    def hook(module: nn.Module, given: Any, found: Tensor) -> Tensor:
        odd = (given[0] == token)[..., None]
        if not active():
            return found
        if place == "forward":
            return found.masked_fill(odd, math.nan)
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient.masked_fill(odd, math.nan))
        return found

    model.get_input_embeddings().register_forward_hook(hook)


@pytest.mark.parametrize("place", ["forward", "gradient"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_loss_or_gradient_of_a_row_stops_the_run_names_the_row_and_costs_no_more_than_its_step(
    stage: str,
    place: str,
    data: dict[str, Path],
    tokenizer: Any,
    make_policy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, name = {
        "sft": (sft, "load_policy"),
        "reward": (reward_model, "load_reward_model"),
        "dpo": (dpo, "load_policy"),
    }[stage]
    load, output = getattr(module, name), tmp_path / "run"
    token = tokenizer(ODD, add_special_tokens=False).input_ids[0]
    command = [
        *(stage, "--model", str(make_policy(seed=4)), "--data", str(data["train"]), "--track", "none"),
        *("--eval-data", str(data["held_out"]), "--batch-size", "4", "--epochs", "2", "--learning-rate", "0.001"),
        *("--save-every", "1", "--dropout", "0.1", "--micro-batch-tokens", "40"),
        *(["--no-baselines", "--temperature-fraction", "0"] if stage == "reward" else []),
    ]
    main([*command, "--output", str(tmp_path / "whole")])

    def loaded(*arguments: Any, **more: Any) -> Any:
        model = load(*arguments, **more)
        poison(model, token, place, lambda: latest_checkpoint(output) is not None)
        return model

    monkeypatch.setattr(module, name, loaded)
    for more in ((), ("--resume",)):  # And the same again.
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*command, "--output", str(output), *more])
        assert end.value.code == 2
        told = capsys.readouterr().err.splitlines()[-1]
        done = len(read_metrics(output))
        assert 0 < done < 14
        what = "the loss is nan" if place == "forward" else "the gradient's norm is nan"
        rows = f"in 1 of its 4 rows: {data['train']}, line {ODD_LINE}."
        newest = output / f"checkpoint-{done:06d}"
        assert told.startswith(
            f"quartet-train {stage}: step {done + 1}: {what}, {rows} The run stops, and the last good"
        )
        assert f"checkpoint is kept: {newest}." in told
        assert latest_checkpoint(output) == newest
        assert not (output / "model").exists()
    # When what was wrong has passed, it is gone on from.
    monkeypatch.setattr(module, name, load)
    main([*command, "--output", str(output), "--resume"])
    assert differences(output, tmp_path / "whole") == []


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_held_out_row_whose_figures_are_none_is_named(
    stage: str,
    data: dict[str, Path],
    tokenizer: Any,
    make_policy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, name = {
        "sft": (sft, "load_policy"),
        "reward": (reward_model, "load_reward_model"),
        "dpo": (dpo, "load_policy"),
    }[stage]
    load = getattr(module, name)
    token = tokenizer(ODD, add_special_tokens=False).input_ids[0]

    def loaded(*arguments: Any, **more: Any) -> Any:
        model = load(*arguments, **more)
        poison(model, token, "forward", lambda: True)
        return model

    monkeypatch.setattr(module, name, loaded)
    with pytest.raises(SystemExit) as end:
        main(
            [
                *(stage, "--model", str(make_policy(seed=4)), "--data", str(data["held_out"]), "--track", "none"),
                *("--eval-data", str(data["odd"]), "--max-steps", "1", "--output", str(tmp_path / "run")),
                *(["--no-baselines", "--temperature-fraction", "0"] if stage == "reward" else []),
            ]
        )
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"{data['odd']}, line 9" in told
    assert "line 8" not in told
    assert " is nan, in " in told
    assert "Traceback" not in told


def test_a_reference_that_gives_no_number_is_named_with_its_row(tmp_path: Path) -> None:
    class Odd(ModelReference):
        def __init__(self) -> None:
            self.identity = "odd"

        def sums(self, rows: Any) -> Any:
            return np.array([-1.0, -math.inf, -2.0])

    with pytest.raises(DivergedError, match=r"under the reference odd is -inf, in 1 of its 3 rows: d.jsonl, line 7\."):
        known_sums(tmp_path, "digest", Odd(), [None] * 3, [f"d.jsonl, line {n}" for n in (6, 7, 8)])  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


def test_weights_that_a_last_step_ruined_are_not_exported(
    data: dict[str, Path],
    make_policy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ruin(optimiser: torch.optim.Optimizer, max_norm: float) -> float:
        norm = optimisation.apply_gradients(optimiser, max_norm)
        with torch.no_grad():
            optimiser.param_groups[0]["params"][0][0, 0] = math.inf
        return norm

    command = ["sft", "--model", str(make_policy(seed=4)), "--data", str(data["train"]), "--batch-size", "16"]
    command += ["--max-steps", "2", "--held-out-fraction", "0", "--track", "none"]
    monkeypatch.setattr(runs, "apply_gradients", ruin)
    for flags, said in (
        (["--save-every", "0"], "after step 2 the weight model.embed_tokens.weight is not finite. The run stops, and"),
        (["--save-every", "1"], "checkpoint-000001 is not written: weight model.embed_tokens.weight of model is not"),
    ):
        output = tmp_path / flags[1]
        with pytest.raises(SystemExit) as end:
            main([*command, *flags, "--output", str(output)])
        assert end.value.code == 2
        # With a weight that is infinite the next loss is none, unless nothing comes after it.
        told = capsys.readouterr().err
        assert said in told or "step 2: the loss is nan, in every one of its 12 rows" in told
        assert not (output / "model").exists()
        assert latest_checkpoint(output) is None


PROMPTS = tuple(f"p.jsonl, line {line}" for line in range(1, 9))


@pytest.mark.parametrize(
    ("where", "place", "said"),
    [
        ("policy", "forward", "a log-probability or a value is not finite"),
        ("critic", "forward", "a log-probability or a value is not finite"),
        ("policy", "update", "policy/loss is nan"),
        ("critic", "update", "value/loss is nan"),
        ("policy", "gradient", "the gradient's norm is nan"),
        ("critic", "gradient", "the gradient's norm is nan"),
    ],
)
@pytest.mark.parametrize("packing", ["on", "off"])
def test_ppo_names_the_prompts_whose_numbers_are_none(packing: str, where: str, place: str, said: str) -> None:
    learner = make_learner(settings(packing=packing, minibatches=2, micro_batch_tokens=60))
    odd = 299
    samples = [replace(s, where=w) for s, w in zip(make_samples(8), PROMPTS, strict=True)]
    ids = samples[3].response_ids
    samples[3] = replace(samples[3], response_ids=(*ids[:2], odd, *ids[3:]))
    for row in (0, 1, 2, 4, 5, 6, 7):
        samples[row] = replace(
            samples[row],
            prompt_ids=tuple(min(token, 298) for token in samples[row].prompt_ids),
            response_ids=tuple(min(token, 298) for token in samples[row].response_ids),
        )
    model: Any = learner.policy if where == "policy" else learner.critic.body  # type: ignore[union-attr]
    active = torch.is_grad_enabled if place == "update" else lambda: True
    poison(model, odd, "forward" if place == "update" else place, active)
    before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
    with pytest.raises(DivergedError) as raised:
        learner.step(rollout_of(*samples), 4)
    told = str(raised.value)
    assert told.startswith(f"step 5: {said}, in 1 of its ")
    assert "rows: p.jsonl, line 4. The run stops, and there is no checkpoint" in told
    if place == "forward":
        assert all(now.equal(was) for now, was in zip(learner.policy.parameters(), before, strict=True))


@pytest.mark.parametrize("changes", [{"score": math.nan}, {"score": 1e300}, {"ref_logprobs": (math.inf,)}])
def test_a_service_that_gives_no_number_is_named_with_the_prompt(changes: dict[str, Any]) -> None:
    samples = [replace(s, where=w) for s, w in zip(make_samples(8), PROMPTS, strict=True)]
    samples[5] = replace(samples[5], **changes)
    with pytest.raises(RolloutError, match=r"the (reward|reference) service gave the .* to p\.jsonl, line 6: it must"):
        make_learner(settings()).step(rollout_of(*samples), 0)


def test_a_ppo_run_that_diverges_saves_nothing_after_its_last_good_step(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path)
    rollouts = [run.collect() for _ in range(2)]
    run.collect = lambda: rollouts.pop(0)  # type: ignore[method-assign]
    poison(run.policy, make_samples(8)[3].response_ids[2], "forward", lambda: run.step == 1)
    with pytest.raises(DivergedError, match=r"^step 2: a log-probability or a value .* in 1 of its 8 rows"):
        train(run, StopRequest())  # type: ignore[arg-type]
    assert run.saved == []
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_rows_are_named_once_and_the_rest_of_many_counted(tmp_path: Path) -> None:
    assert row_names(["a", "b", "a"]) == "a; b"
    assert row_names([str(i) for i in range(8)]) == "0; 1; 2; 3; 4; and 3 more"
    alone = str(diverged("step 1: the loss is inf", [], 3, tmp_path))
    assert alone.startswith(
        "step 1: the loss is inf, in none of its 3 rows alone, but in all of them together. The run"
    )
    every = str(diverged("step 1: the loss is inf", ["a", "b"], 2, tmp_path))
    assert "in every one of its 2 rows (a; b), so it is the weights that have diverged" in every
