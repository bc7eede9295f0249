"""The models of ``bench.sentiment``, by quartet's own commands and live services; each one skips what is done.

    python -m bench.sentiment_models FLAGS_OF_QUARTET_TRAIN_PPO     evaluates them, inside quartet-local

All are evaluated by one policy service, which is given the weights of each in turn: the same prompts and seeds, one
reward model, one judge, one reference.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench import sentiment_judge
from deploy.demo import BIN, run, stage, title, train
from deploy.supervision import HeldPort, start_tethered
from trainer.ppo_config import PPOSettings

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "sentiment"
DATA = WORK / "data"
SFT, REWARD = WORK / "sft" / "model", WORK / "reward" / "model"
EVALUATIONS = WORK / "evaluations"
SECONDS = WORK / "seconds.jsonl"
PPO, PPO_WITHOUT_KL = "PPO", "PPO, KL off"
MODELS = {"SFT": "sft", "DPO": "dpo", PPO: "ppo", PPO_WITHOUT_KL: "ppo-kl-off"}
"""Folder of each model's run, by what it is called."""

KL_BETA = {PPO: "0.1", PPO_WITHOUT_KL: "0"}
USUAL_S = {
    "init": 20.0, "SFT": 300.0, "reward model": 330.0, "DPO": 330.0, PPO: 440.0, PPO_WITHOUT_KL: 440.0,
    "evaluation": 180.0,
}  # fmt: skip
"""Of each stage on two slow cores; how long the rest takes is told from that and from what the stages before took."""
_COMMON = ("--max-tokens", "96", "--truncation", "right", "--track", "none")
# Steps and rows are what half an hour on two slow cores allows.
# 2.7 M parameters; heads of 64, which vLLM takes.
_SHAPE = ("--vocab-size", "4096", "--hidden-size", "192", "--layers", "4", "--heads", "3", "--max-positions", "128")
_PPO = (
    "--steps", "40", "--prompts-per-step", "48", "--epochs", "2", "--minibatches", "2", "--learning-rate", "3e-4",
    "--critic-learning-rate", "1e-3", "--save-every", "10", "--eval-every", "10", "--no-keep-best",
    "--max-eval-prompts", "64", "--eval-samples", "2",
)  # fmt: skip
_EVALUATION = ("--max-eval-prompts", "192", "--eval-samples", "2", "--max-monitor-demonstrations", "500")


def train_models() -> None:
    """From random weights to every model of the table, evaluated."""
    with timed("init"):
        draw_model()
    with timed("SFT"):
        train_sft()
    with timed("reward model"):
        train_reward()
    with timed("DPO"):
        train_dpo()
    with judging() as judge:
        for name in KL_BETA:
            with timed(name):
                train_ppo(name, judge)
        with timed("evaluation"):
            evaluate_all(judge)


def draw_model() -> None:
    if not (WORK / "init").is_dir():
        title("a small model with random weights, and a tokenizer")
        train("init", "--data", rows("texts"), "--output", str(WORK / "init"), *_SHAPE)


def train_sft() -> None:
    title("SFT on passages of reviews that praise and of their twins that don't")
    stage(
        WORK / "sft", "sft", "--model", str(WORK / "init"), "--data", rows("texts"), "--eval-data",
        rows("held_out_demonstrations"), "--batch-size", "16", "--max-steps", "400", "--learning-rate", "2e-3",
        "--save-every", "100", *_COMMON,
    )  # fmt: skip


def train_reward() -> None:
    title("a reward model on edited passages: the positive one is the better")
    stage(
        WORK / "reward", "reward", "--model", str(SFT), *preferences(), "--learning-rate", "1e-3", "--batch-size", "32",
        "--epochs", "5", "--dropout", "0.1", "--weight-decay", "0.1", "--save-every", "50", *_COMMON,
    )  # fmt: skip


def train_dpo() -> None:
    title("DPO on the same preferences")
    stage(
        WORK / "dpo", "dpo", "--model", str(SFT), *preferences(), "--learning-rate", "2e-4", "--batch-size", "32",
        "--save-every", "50", *_COMMON,
    )  # fmt: skip


def train_ppo(name: str, judge: str) -> None:
    """``judge``: its address."""
    output = WORK / MODELS[name]
    if not (output / "model").is_dir():
        title(f"{name}, against live policy, reward and reference services, and the judge's")
        local(str(BIN / "quartet-train"), "ppo", *ppo(output, judge), *_PPO, "--kl-beta", KL_BETA[name])


def evaluate_all(judge: str) -> None:
    if not all(evaluation_of(name).exists() for name in MODELS):
        title("every model on the same held-out prompts")
        local(sys.executable, "-m", "bench.sentiment_models", *ppo(EVALUATIONS, judge), *_EVALUATION)


def preferences() -> tuple[str, ...]:
    return ("--data", rows("preferences"), "--eval-data", rows("held_out_preferences"), "--split-by", "batch_id")


def rows(name: str) -> str:
    return str(DATA / f"{name}.jsonl")


def evaluation_of(name: str) -> Path:
    return EVALUATIONS / f"{MODELS[name]}.json"


def ppo(output: Path, judge: str) -> tuple[str, ...]:
    """What PPO and the evaluation of all models have in common."""
    return (
        "--model", str(SFT), "--prompts", rows("prompts"), "--eval-prompts", rows("held_out_prompts"), "--output",
        str(output), "--max-new-tokens", "48", "--missing-eos", "none", "--judge", judge, "--monitor-demonstrations",
        rows("held_out_demonstrations"), "--track", "none", "--resume",
    )  # fmt: skip


def local(*command: str) -> None:
    """Runs a command beside policy, reward and reference services; vLLM would take longer to start than it saves."""
    services = ("--policy-model", str(SFT), "--reward-model", str(REWARD), "--threads", "1", "--engine", "transformers")
    run(str(BIN / "quartet-local"), *services, "--", *command)


@contextlib.contextmanager
def judging() -> Iterator[str]:
    """The judge's service for as long as it is needed; gives its address. Whoever asks it waits until it is ready."""
    if all(evaluation_of(name).exists() for name in MODELS):
        yield ""
        return
    ports = [HeldPort("--port", 0) for _ in range(3)]
    flags = ("--port", str(ports[0]), "--metrics-port", str(ports[1]), "--admin-port", str(ports[2]))
    with (WORK / "judge.log").open("ab") as log:
        service = start_tethered(
            [sys.executable, "-m", "services.reward", "--scorer", "bench.sentiment_judge:score", *flags],
            environment=os.environ | {sentiment_judge.ROWS: rows("judge")},
            kill_after_s=10.0,
            own_session=True,
            log=log,
        )
    try:
        yield f"127.0.0.1:{ports[0]}"
    finally:
        service.end()
        service.process.wait()
        for port in ports:
            port.close()


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Keeps the seconds of a stage, as often as it is begun, and says at its end how long the others will take."""
    start_s = time.monotonic()
    try:
        yield
    finally:
        with SECONDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": name, "seconds": round(time.monotonic() - start_s, 1)}) + "\n")
    if (left_s := seconds_left(name, stage_seconds())) > 0:
        print(f"{name}: done; the study takes about {math.ceil(left_s / 60)} min more", flush=True)


def seconds_left(done: str, spent: Mapping[str, float]) -> float:
    """Of the stages after ``done``, if they are as much slower or faster than usual as those up to it were."""
    stages = list(USUAL_S)
    before, after = stages[: stages.index(done) + 1], stages[stages.index(done) + 1 :]
    ran = [stage for stage in before if spent.get(stage)]
    pace = sum(spent[stage] for stage in ran) / sum(USUAL_S[stage] for stage in ran) if ran else 1.0
    return pace * sum(max(0.0, USUAL_S[stage] - spent.get(stage, 0.0) / pace) for stage in after)


def stage_seconds() -> dict[str, float]:
    """Of each stage, all the times that it was begun together."""
    spent: dict[str, float] = {}
    for line in SECONDS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    return spent


# Evaluation ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Evaluates every model that has not been evaluated yet."""
    settings = PPOSettings.from_command_line()
    asyncio.run(_evaluate_all(settings))


async def _evaluate_all(settings: PPOSettings) -> None:
    from trainer.data import load_prompts
    from trainer.encoding import Encoder
    from trainer.evaluate import ask, different_prompts, longest_prompt, make_tasks, summarise
    from trainer.judging import open_judge
    from trainer.models import load_policy, load_tokenizer, longest_sequence
    from trainer.monitoring import PolicyMonitor
    from trainer.publishing import Weights
    from trainer.rollout import Services
    from trainer.saving import export_tensors

    tokenizer = load_tokenizer(Path(settings.model))
    EVALUATIONS.mkdir(parents=True, exist_ok=True)
    async with Services(settings, tokenizer, policy_admin=settings.policy_admin) as services:
        info = await services.connect()
        judge = await open_judge(settings, tokenizer)
        encoder = Encoder(tokenizer, max_tokens=longest_prompt(info, settings.max_new_tokens))
        prompts = different_prompts(load_prompts(settings.eval_prompts), settings.max_eval_prompts)
        tasks = make_tasks(prompts, encoder, seed=settings.seed, samples=settings.eval_samples)
        try:
            for name, run_folder in MODELS.items():
                if evaluation_of(name).exists():
                    continue
                policy = load_policy(WORK / run_folder / "model", tokenizer)
                await services.publish(Weights.of(export_tensors(policy)))
                monitor = PolicyMonitor(
                    settings,
                    policy,
                    tokenizer,
                    max_tokens=longest_sequence(policy),
                    reference=SFT,
                    before=EVALUATIONS / "none.json",
                    resumed_step=0,
                )
                rollout, judged = await ask(services, tasks, settings, judge=judge)
                found = summarise(rollout, tokenizer, judged=judged, policy=monitor.observe(rollout.samples))
                found.write(evaluation_of(name))
                print(f"{name}: {found.line()}", flush=True)
        finally:
            if judge is not None:
                await judge.close()


if __name__ == "__main__":
    main()
