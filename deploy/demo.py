"""``make demo``: the whole of RLHF on this machine, by the commands that a user would type.

    python -m deploy.demo [--data FILE_OR_HUB_NAME] [--model FOLDER_OR_HUB_ID] [--output FOLDER]

Without anything it makes a small corpus (a help desk's courteous and curt answers) and a small model with random
weights; teaches the model to answer both ways; trains a reward model that prefers courtesy; and lets PPO raise the
reward against live policy, reward and reference services. An interrupted demo goes on where it stopped, given the same
data and model again.

``--data`` names preferences (rows of prompt, chosen, rejected, or two conversations) to use instead: chosen answers are
the demonstrations, prompts those of PPO; a tenth of the prompts is held out of all stages. ``--model`` names a model to
start from instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deploy.supervision import UNDERSTOOD, start_tethered, take_signal

BIN = Path(sys.executable).parent
_MADE_OF = "demo.json"
_POLL_S = 0.1
# On SIGTERM a stage finishes its step and saves; quartet-local gives it a minute, and then ends its services.
_STAGE_GRACE_S = 90.0


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
    start_s = time.monotonic()
    try:
        made_of = ingredients(options.data, options.model, options.steps)
        folder = options.output or next_folder(Path("runs"), made_of)
        claim(folder, made_of)
        run_stages(folder, options.data, options.model, options.steps)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: stopped in {shlex.join(map(str, error.cmd))}; the same command goes on from there")
    except KeyboardInterrupt:
        sys.exit(130)
    conclude(folder / "ppo", time.monotonic() - start_s)
    # Of its own corpus it is known what must come out; of other data a short run need not show it.
    if options.data is None and not has_risen(folder / "ppo"):
        sys.exit("demo: the reward after PPO is not above the one before, with disjoint 95 % intervals")


# Folders --------------------------------------------------------------------------------------------------------------


def ingredients(data: str | None, model: str | None, steps: str) -> dict[str, str | None]:
    """What decides the models of a demo: names, and digests of what they name where that is on this disk."""
    return {
        "data": data,
        "data_sha256": None if data is None else content_sha256(Path(data).expanduser()),
        "model": model,
        "model_sha256": None if model is None else content_sha256(Path(model).expanduser()),
        "steps": steps,
    }


def content_sha256(path: Path) -> str | None:
    """Hexadecimal digest of a file, or of the files of a folder with their names; None where there is neither."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = sorted(file for file in path.iterdir() if file.is_file())
    named = "".join(f"{file.name} {content_sha256(file)}\n" for file in files)
    return hashlib.sha256(named.encode()).hexdigest()


def next_folder(parent: Path, made_of: dict[str, str | None]) -> Path:
    """runs/demo, or the first of runs/demo-2, runs/demo-3, ... that is free or holds the same demo, to go on with."""
    number = 1
    while True:
        folder = parent / ("demo" if number == 1 else f"demo-{number}")
        if is_free(folder) or (holds(folder, made_of) and not (folder / "ppo" / "report.html").exists()):
            return folder
        number += 1


def claim(folder: Path, made_of: dict[str, str | None]) -> None:
    """Notes in ``folder`` what its demo is made of.

    Raises:
        SystemExit: it holds another demo, or something else.
    """
    if holds(folder, made_of):
        return
    if not is_free(folder):
        refuse(f"--output is {str(folder)!r}: it holds something other than a demo of this data, model and steps")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under its name only when it is whole: without it, the folder belongs to no demo.
        partial = folder / f".{_MADE_OF}.partial"
        partial.write_text(json.dumps(made_of, indent=1) + "\n")
        partial.replace(folder / _MADE_OF)
    except OSError as error:
        refuse(f"--output is {str(folder)!r}: can't be written: {error.strerror}")


def is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def holds(folder: Path, made_of: dict[str, str | None]) -> bool:
    """Whether a demo of just this was begun in ``folder``."""
    try:
        return bool(json.loads((folder / _MADE_OF).read_text()) == made_of)
    except (OSError, ValueError):
        return False


def refuse(message: str) -> NoReturn:
    sys.stderr.write(f"demo: {message}\n")
    sys.exit(2)


# Stages ---------------------------------------------------------------------------------------------------------------


def run_stages(folder: Path, data: str | None, model: str | None, steps: str) -> None:
    rates = PRETRAINED if model else FROM_NOTHING
    sources = own_corpus(folder) if data is None else named_data(folder, data)
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


def named_data(folder: Path, data: str) -> Sources:
    if not (folder / "sft" / "model").is_dir():
        title("the rows of the data, read as each stage will read them")
        train("check", "--data", data)
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

    Ctrl-C and SIGTERM are the command's to answer: a stage saves what it has. This process waits for that.

    Raises:
        SystemExit: a signal asked for the end, and the command has ended.
        CalledProcessError: it failed.
    """
    prefix = f"{BIN}/"
    shown = shlex.join(part.removeprefix(prefix) for part in command)
    sys.stdout.write(f"$ {shown}\n")
    sys.stdout.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, UNDERSTOOD)
    try:
        told = None
        tether = start_tethered(command, environment=os.environ, kill_after_s=_STAGE_GRACE_S, own_session=False)
        while (code := tether.poll()) is None:
            number, from_terminal = take_signal(_POLL_S)
            if number is not None:
                told = number
                tether.hand_on(number, from_terminal)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if told is not None:
        sys.stderr.write("stopped, as asked; the same command goes on from there\n")
        sys.exit(128 + told)
    if code != 0:
        raise subprocess.CalledProcessError(code, command)


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
