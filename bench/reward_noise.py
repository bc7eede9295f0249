"""``make study-reward-noise``: reward models on people's preferences, and what wrong labels do to them.

The texts are those of the folder that QUARTET_DATA names: HH harmless (pairs), PandaLM (pairs, three annotators each),
fine-grained QA (four answers, six judged pairs), and model-written instruction pairs, where there is much to learn.

1. Each of the first three: held-out accuracy of a small model trained from nothing, beside TF-IDF and length alone.
2. A quarter of the training labels turned round, held-out ones left alone: the plain loss, label smoothing, the robust
   loss, an ensemble, and the labels that its members doubt turned back; over several seeds of split, noise and weights.

Every model is written below runs/reward-noise and found there again: what was broken off goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.outcome import Verdict, conclude

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "reward-noise"
FLIPPED_SHARE = 0.25
HELD_OUT_FRACTION = 0.2
MEMBERS = 4
MAX_TOKENS = 192

Row = dict[str, Any]


def harmless(row: Row) -> Row | None:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def pandalm(row: Row) -> Row | None:
    said = [("tie", "first", "second")[row[f"annotator{number}"]] for number in (1, 2, 3)]
    # Some answers are the word True, which JSON made a truth.
    first, second = str(row["response1"]), str(row["response2"])
    if not first.strip() or not second.strip():
        return None
    asked = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
    prompt = [{"role": "user", "content": asked}]
    return {"prompt": prompt, "first": first, "second": second, "preference": said}


def fine_grained_qa(row: Row) -> Row | None:
    said = [
        {"first": first, "second": second, "preference": ("tie", "first", "second")[label]}
        for (first, second), label in zip(row["pair_index"], row["pair_label"], strict=True)
    ]
    return {"prompt": row["prompt"] + "\n", "answers": row["responses"], "comparisons": said}


def instructions(row: Row) -> Row | None:
    return {name: row[name] for name in ("instruction", "input", "chosen", "rejected")}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, how its rows are read (None: one of its answers is empty), and how it is learned from."""

    title: str
    file: str
    convert: Callable[[Row], Row | None]
    epochs: int
    learning_rate: float = 1e-3
    noise_seeds: int = 0
    learnable: bool = False
    """Whether so small a model, trained from nothing, must be better than chance with so few rows."""


TASKS = {
    "hh": Task(
        title="HH harmless",
        file="pref_hh_harmless_dev.jsonl",
        convert=harmless,
        epochs=1,
        noise_seeds=3,
        learnable=True,
    ),
    "pandalm": Task(title="PandaLM, 3 annotators", file="multi_pandalm_dev.jsonl", convert=pandalm, epochs=3),
    "qa": Task(title="fine-grained QA", file="pref_finegrained_qa_dev.jsonl", convert=fine_grained_qa, epochs=2),
    "synth": Task(
        title="instructions, model-written",
        file="pref_synth_instruct_dev.jsonl",
        convert=instructions,
        epochs=3,
        noise_seeds=4,
    ),
}
CLEAN = ("hh", "pandalm", "qa")
NOISY = ("synth", "hh")

NO_FLIPS = "no flips"
ENSEMBLE = f"ensemble of {MEMBERS}"
ARMS: dict[str, dict[str, Any]] = {
    NO_FLIPS: {},
    "plain": {},
    "smoothing": {"label_smoothing": FLIPPED_SHARE},
    "robust": {"label_smoothing": FLIPPED_SHARE, "robust": True},
    ENSEMBLE: {"members": MEMBERS, "member_fraction": 0.5},
    "doubted labels turned": {"noise_flip": 0.15, "noise_smooth": 0.2},
}
"""Settings beside the common ones. The last one doubts what the ensemble before it doubts."""


@dataclass
class Run:
    """One model: its held-out figures and the seconds that it took, whenever that was."""

    evaluation: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("clean", "noise"), help="one of the two parts")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("QUARTET_DATA", ROOT.parent / "shared" / "data"))
    if missing := [task.file for task in TASKS.values() if not (folder / task.file).is_file()]:
        sys.exit(f"bench.reward_noise: {folder} has no {missing[0]}; QUARTET_DATA names the folder of the data")
    figures: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    if arguments.only != "noise":
        figures["clean"], judged = measure_clean(folder)
        verdicts += judged
    if arguments.only != "clean":
        figures["noise"], judged = measure_noise(folder)
        verdicts += judged
    conclude("reward-noise", verdicts, figures)


# People's preferences ----------------------------------------------------------------------------------------------


def measure_clean(folder: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Each data set once, beside the baselines."""
    table, verdicts = {}, []
    for name in CLEAN:
        task = TASKS[name]
        data = prepare(folder, name, seed=0)
        run = train(name, data, "clean", seed=0, train="train.jsonl", baselines=True)
        found = run.evaluation
        accuracies = {"this reward model": found["accuracy"], **found["baselines"]}
        table[name] = {
            "accuracies": accuracies,
            "ties": found["ties"],
            "by_length": found["by_length"],
            "calibration": found["calibration"],
            "seconds": run.seconds,
        }
        print(f"\n{task.title}: {found['accuracy']['count']} held-out pairs, {found['ties']} ties beside them")
        for what, interval in accuracies.items():
            print(f"  {what:<20} {shown(interval)}")
        for when, figures in (("as it is", "before"), (f"T = {found['calibration']['temperature']:.2f}", "after")):
            told = found["calibration"][figures]
            print(f"  {when:<20} " + ", ".join(f"{figure} {shown(told[figure])}" for figure in ("nll", "brier", "ece")))
        print("  tokens by which the better answer is longer, and accuracy there:")
        for part in found["by_length"]:
            print(f"    {part['from']:>5.0f} to {part['to']:>5.0f}: {shown(part['accuracy'])}")
        above = found["accuracy"]["low"] > 0.5
        told = f"{task.title}: accuracy {shown(found['accuracy'])}, {'above' if above else 'not above'} chance"
        verdicts.append(Verdict(above or not task.learnable, told + (", which is asked for" * task.learnable)))
    return table, verdicts


# Wrong labels ------------------------------------------------------------------------------------------------------


def measure_noise(folder: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Every arm on every seed, and the difference of each to the plain loss, paired by seed."""
    from trainer.statistics import mean_interval

    table: dict[str, Any] = {}
    for name in NOISY:
        task = TASKS[name]
        found: dict[str, list[Row]] = {arm: [] for arm in ARMS}
        for seed in range(task.noise_seeds):
            data = prepare(folder, name, seed=seed)
            for arm, changes in ARMS.items():
                if "noise_flip" in changes:
                    changes = {**changes, "noise_from": run_folder(name, ENSEMBLE, seed)}
                rows = "train.jsonl" if arm == NO_FLIPS else "flipped.jsonl"
                run = train(name, data, arm, seed=seed, train=rows, **changes)
                figures = {"accuracy": run.evaluation["accuracy"]["value"]}
                for when, figures_then in run.evaluation["calibration"].items():
                    if when in ("before", "after"):
                        figures[f"nll_{when}"] = figures_then["nll"]["value"]
                found[arm].append(figures)
                print(f"{name}, seed {seed}, {arm}: {figures['accuracy']:.3f} in {run.seconds:.0f} s", flush=True)
        table[name] = {}
        print(f"\n{task.title}, {FLIPPED_SHARE:.0%} of the training labels turned round, {task.noise_seeds} seeds")
        print(f"  {'':<24}{'accuracy':>10}{'nll':>8}{'with T':>8}  accuracy less plain")
        for arm, runs in found.items():
            means = {key: math.fsum(run[key] for run in runs) / len(runs) for key in runs[0]}
            less = [one["accuracy"] - other["accuracy"] for one, other in zip(runs, found["plain"], strict=True)]
            interval = mean_interval(less).as_json()
            table[name][arm] = {"runs": runs, "means": means, "less_plain": interval}
            difference = "" if arm == "plain" else shown(interval)
            figures_shown = f"{means['accuracy']:>10.3f}{means['nll_before']:>8.3f}{means['nll_after']:>8.3f}"
            print(f"  {arm:<24}{figures_shown}  {difference}")
    return table, []


# Runs --------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, name: str, *, seed: int) -> Path:
    """train.jsonl, flipped.jsonl, held_out.jsonl and a language model of random weights, in a folder of their own."""
    from trainer.comparisons import load_comparisons
    from trainer.config import InitSettings
    from trainer.data import split_held_out
    from trainer.init_model import main as init_model

    data = WORK / name / f"seed-{seed}"
    if (data / "init").is_dir():
        return data
    data.mkdir(parents=True, exist_ok=True)
    task = TASKS[name]
    with (folder / task.file).open(encoding="utf-8") as file:
        converted = [task.convert(json.loads(line)) for line in file]
    rows = [row for row in converted if row is not None]
    if left_out := len(converted) - len(rows):
        print(f"{task.file}: {left_out} of {len(converted)} rows have an empty answer and are left out")
    write(data / "all.jsonl", rows)
    read = load_comparisons([str(data / "all.jsonl")])
    held_out = {row.where for row in split_held_out(read, HELD_OUT_FRACTION, seed=seed)[1]}
    parts: dict[bool, list[Row]] = {True: [], False: []}
    for row, raw in zip(read, rows, strict=True):
        parts[row.where in held_out].append(raw)
    write(data / "held_out.jsonl", parts[True])
    write(data / "train.jsonl", parts[False])
    draw = random.Random(seed)
    if name in NOISY:
        write(data / "flipped.jsonl", [flipped(row) if draw.random() < FLIPPED_SHARE else row for row in parts[False]])
    with contextlib.redirect_stdout(io.StringIO()):
        init_model(
            InitSettings(
                data=(str(data / "train.jsonl"),),
                output=data / "init",
                vocab_size=2048,
                hidden_size=96,
                layers=2,
                heads=3,
                intermediate_size=288,
                max_positions=MAX_TOKENS,
                tie_embeddings=True,
                seed=seed,
            )
        )
    return data


def flipped(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def run_folder(name: str, arm: str, seed: int) -> Path:
    return WORK / name / f"seed-{seed}" / arm.replace(" ", "-").replace(",", "")


def train(name: str, data: Path, arm: str, *, seed: int, train: str, **changes: Any) -> Run:
    """The figures of one run, from its folder where it has been there before."""
    from trainer.config import RewardSettings
    from trainer.reward_model import main as train_reward

    task = TASKS[name]
    output = run_folder(name, arm, seed)
    done = output / "run.json"
    if not done.is_file():
        if output.exists():
            shutil.rmtree(output)
        settings = RewardSettings(
            model=str(data / "init"),
            data=(str(data / train),),
            eval_data=(str(data / "held_out.jsonl"),),
            output=output,
            max_tokens=MAX_TOKENS,
            truncation="left",
            epochs=task.epochs,
            learning_rate=task.learning_rate,
            batch_size=16,
            dropout=0.1,
            weight_decay=0.1,
            seed=seed,
            **{"baselines": False, **changes},
        )
        started_s = time.monotonic()
        with quietly():
            train_reward(settings)
        done.write_text(json.dumps({"seconds": time.monotonic() - started_s}) + "\n")
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return Run(evaluation=evaluation, seconds=json.loads(done.read_text())["seconds"])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def shown(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


if __name__ == "__main__":
    main()
