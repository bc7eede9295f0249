"""``make demo``: the whole of RLHF on this machine, by the commands that a user would type.

    python -m deploy.demo [--data FILE_OR_HUB_NAME] [--model FOLDER_OR_HUB_ID] [--output FOLDER]

Without anything it makes a small corpus (a help desk's courteous and curt answers) and a small model with random
weights; teaches the model to answer both ways; trains a reward model that prefers courtesy; and lets PPO raise the
reward against live policy, reward and reference services. An interrupted demo goes on where it stopped.

``--data`` names preferences (rows of prompt, chosen, rejected) to use instead: chosen answers are the demonstrations,
prompts those of PPO; a tenth of the prompts is held out of all stages. ``--model`` names a model to start from instead.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates: a small model that knows nothing yet takes others than a pretrained one."""

    sft: str
    reward: str
    policy: str
    critic: str


FROM_NOTHING = Rates(sft="2e-3", reward="5e-4", policy="3e-4", critic="1e-3")
PRETRAINED = Rates(sft="2e-5", reward="1e-5", policy="1e-6", critic="5e-6")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What each stage reads, as flags."""

    demonstrations: list[str]
    preferences: list[str]
    prompts: list[str]
    max_new_tokens: str


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="preferences to use instead of the corpus that the demo makes")
    parser.add_argument("--model", help="model to start from instead of a small one with random weights")
    parser.add_argument("--output", type=Path, help="folder for everything; default runs/demo, or the next free one")
    parser.add_argument("--steps", default="24", help="steps of PPO")
    options = parser.parse_args(argv)
    folder = options.output or next_folder(Path("runs"))
    start_s = time.monotonic()
    try:
        run_stages(folder, options.data, options.model, options.steps)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: stopped in {shlex.join(map(str, error.cmd))}; the same command goes on from there")
    except KeyboardInterrupt:
        sys.exit(130)
    conclude(folder / "ppo", time.monotonic() - start_s)
    # Of its own corpus it is known what must come out; of other data a short run need not show it.
    if options.data is None and not has_risen(folder / "ppo"):
        sys.exit("demo: the reward after PPO is not above the one before, with disjoint 95 % intervals")


def next_folder(parent: Path) -> Path:
    """runs/demo, or the first of runs/demo-2, runs/demo-3, ... that is free or holds a demo to go on with."""
    number = 1
    while True:
        folder = parent / ("demo" if number == 1 else f"demo-{number}")
        if not (folder / "ppo" / "report.html").exists():
            return folder
        number += 1


def run_stages(folder: Path, data: str | None, model: str | None, steps: str) -> None:
    rates = PRETRAINED if model else FROM_NOTHING
    sources = own_corpus(folder) if data is None else named_data(data)
    if model is None:
        model = str(folder / "init")
        if not (folder / "init").is_dir():
            init = ["init", *sources.demonstrations[:2], "--output", model]
            title("a small model with random weights, and a tokenizer")
            train(*init)
    title("supervised fine-tuning on demonstrations")
    stage(folder / "sft", "sft", "--model", model, *sources.demonstrations, "--learning-rate", rates.sft)
    title("a reward model from preferences")
    stage(
        folder / "reward", "reward", "--model", str(folder / "sft" / "model"), *sources.preferences,
        "--learning-rate", rates.reward, "--batch-size", "32",
    )  # fmt: skip
    title("PPO against live policy, reward and reference services")
    sft, reward = str(folder / "sft" / "model"), str(folder / "reward" / "model")
    run(
        str(BIN / "quartet-local"), "--policy-model", sft, "--reward-model", reward, "--",
        str(BIN / "quartet-train"), "ppo", "--model", sft, *sources.prompts, "--output", str(folder / "ppo"),
        "--steps", steps, "--max-new-tokens", sources.max_new_tokens, "--minibatches", "2",
        "--learning-rate", rates.policy, "--critic-learning-rate", rates.critic, "--save-every", "10", "--resume",
    )  # fmt: skip


def own_corpus(folder: Path) -> Sources:
    data = folder / "data"
    if not data.is_dir():
        title("a corpus: questions to a help desk, courteous and curt answers")
        train("helpdesk", "--output", str(data))
    return Sources(
        demonstrations=["--data", f"{data}/sft.jsonl", "--epochs", "3"],
        preferences=[
            "--data", f"{data}/preferences.jsonl", "--eval-data", f"{data}/held_out_preferences.jsonl",
            "--calibrate-on", f"{data}/sft.jsonl",
        ],
        prompts=["--prompts", f"{data}/prompts.jsonl", "--eval-prompts", f"{data}/held_out_prompts.jsonl"],
        max_new_tokens="48",
    )  # fmt: skip


def named_data(data: str) -> Sources:
    # The split goes by prompt and seed alone, so all stages hold out the same prompts.
    common = ["--data", data, "--held-out-fraction", "0.1", "--truncation", "left"]
    return Sources(
        demonstrations=common,
        preferences=common,
        prompts=["--prompts", data, "--held-out-fraction", "0.1", "--truncation", "left"],
        max_new_tokens="64",
    )


def stage(output: Path, *arguments: str) -> None:
    """Runs a stage of training unless it is done already; a broken one goes on."""
    if not (output / "model").is_dir():
        train(*arguments, "--output", str(output), "--resume")


def train(*arguments: str) -> None:
    run(str(BIN / "quartet-train"), *arguments)


def run(*command: str) -> None:
    """Shows and runs a command; its output goes straight through.

    Raises:
        CalledProcessError: it failed.
    """
    prefix = f"{BIN}/"
    shown = shlex.join(part.removeprefix(prefix) for part in command)
    sys.stdout.write(f"$ {shown}\n")
    sys.stdout.flush()
    subprocess.run(command, check=True)


def title(text: str) -> None:
    sys.stdout.write(f"\n== {text}\n")
    sys.stdout.flush()


def has_risen(output: Path) -> bool:
    """Whether the 95 % interval of the held-out reward after PPO lies above the one before."""
    before, after = read_evaluations(output)
    return bool(after["score_mean"] - after["score_ci95"] > before["score_mean"] + before["score_ci95"])


def read_evaluations(output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures before and after PPO."""
    before, after = (json.loads((output / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    return before, after


def conclude(output: Path, seconds: float) -> None:
    """What came out, at the end where it is seen."""
    before, after = read_evaluations(output)
    width = min(shutil.get_terminal_size().columns, 110)
    sys.stdout.write(f"\n== done in {seconds:.0f} s\n")
    for name, figures in (("before PPO", before), ("after PPO", after)):
        low, high = (figures["score_mean"] + sign * figures["score_ci95"] for sign in (-1, 1))
        sys.stdout.write(
            f"{name:>11}: held-out mean reward {figures['score_mean']:.3f} [{low:.3f}, {high:.3f}] (95 %), "
            f"KL {figures['kl_sequence_mean']:.2f} nats a response, {figures['tokens_per_s']:,.0f} tokens/s\n"
        )
    later = {sample["index"]: sample for sample in after["samples"]}
    for old, new in [(old, later[old["index"]]) for old in before["samples"] if old["index"] in later][:3]:
        for name, text in (("asked", old["prompt"]), ("before", old["response"]), ("after", new["response"])):
            sys.stdout.write(f"{name:>11}: {' '.join(text.split())}"[:width] + "\n")
    sys.stdout.write(f"{'report':>11}: {output / 'report.html'}\n")


if __name__ == "__main__":
    main()
