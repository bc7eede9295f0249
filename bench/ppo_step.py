"""A step of PPO by phase: the trainer and its services against TRL's PPO and against the same step written naively.

    python -m bench.ppo_step --pairs pref_hh_harmless_dev.jsonl

as ``make bench-trainer`` does it, too.

- TRL 1.12, the last that has PPO: its PPOTrainer, in one process, without gradient checkpointing, which would only slow
  it here. In bfloat16 it is told by ACCELERATE_MIXED_PRECISION, the only word that it takes; it generates in float32.
- naive: transformers' generate, forward passes over the padded batch, full logits, log_softmax, gather, torch's AdamW.
- ours: the trainer's own classes against live services, which ``quartet-local`` starts, with default settings but for
  those that the others have not (see ``bench.ppo_sides``); and with --compile besides, for which the first turn waits.

The policy, the reference that it starts as, the reward model and the critic that starts as it: Llamas of 29 M
parameters. 32 prompts of at most 24 words, 48 response tokens to each, 4 epochs over all of them at once. A turn is one
step; sides are processes that take turns (see ``bench.turns``). In the first turn, which warms up, all learn from the
same responses, and the losses of its four epochs are compared: all did the same work. In the others each learns from
what it sampled. Phases are

- rollout: until the last response is sampled; ours with publishing the weights, scores what has arrived meanwhile;
- scoring: the reward model's scores and the reference's log-probabilities, ours what is left of them;
- values: the critic's values, the policy's log-probabilities before the update;
- update: four epochs, optimisers included.

Tokens are those of prompts and responses, without padding. Peak memory is that of the process that trains: those of the
others hold the reward model and the reference, too, which of ours the services hold.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import PRECISIONS, can_compile, native_precisions
from bench.models import END, VOCABULARY, make_models, sentence, train_tokenizer
from bench.outcome import Verdict, conclude
from bench.peers import TRL_PPO, has_trl
from bench.turns import Side, Turn, start_sides

PHASES = ("rollout", "scoring", "values", "update")
TRL, NAIVE, OURS, COMPILED = "TRL 1.12", "naive", "ours", "ours compiled"
TARGET, HALF_TARGET = 1.5, 3.0
"""How many times as fast as TRL a step is in equal precision, and in bfloat16 as TRL's in float32."""
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}
"""Largest difference from the naive losses: of the policy's itself, whose advantages have variance 1, of the critic's
relative to it."""
_WORDS = 24
_HELD_OUT = 2
"""As many as a run must have."""
# Mean and standard deviation of the logarithm of HH harmless's prompts, in words.
_LENGTHS = (4.25, 0.97)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Size of a step. ``small``: models of 5 M parameters."""

    prompts: int = 32
    new_tokens: int = 48
    epochs: int = 4
    small: bool = False

    @classmethod
    def read(cls, folder: Path) -> Load:
        return cls(**json.loads((folder / "load.json").read_text()))

    def write(self, folder: Path) -> None:
        (folder / "load.json").write_text(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a side says of a step. ``phases_s``: seconds of PHASES; losses: of each epoch."""

    phases_s: tuple[float, ...]
    tokens: float
    policy_losses: tuple[float, ...]
    value_losses: tuple[float, ...]

    @property
    def numbers(self) -> list[float]:
        """As ``bench.turns`` takes them."""
        return [*self.phases_s, self.tokens, *self.policy_losses, *self.value_losses]

    @classmethod
    def of(cls, turn: Turn) -> Found:
        phases_s, (tokens, *losses) = turn.found[: len(PHASES)], turn.found[len(PHASES) :]
        epochs = len(losses) // 2
        return cls(
            phases_s=tuple(phases_s),
            tokens=tokens,
            policy_losses=tuple(losses[:epochs]),
            value_losses=tuple(losses[epochs:]),
        )


def measure(load: Load, pairs: Path | None, precisions: Sequence[str], rounds: int) -> list[Side]:
    """The sides, each with its turns, of which the first warms up. ``pairs``: whose prompts; None: made-up ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, load, pairs)
        peers = [NAIVE]
        if has_trl(TRL_PPO):
            peers.insert(0, TRL)
        else:
            print("TRL 1.12 is not installed and left out: `make bench-trainer` installs it")
        own = [OURS, COMPILED] if can_compile() else [OURS]
        print(f"\nppo: {load.prompts} prompts, {load.new_tokens} response tokens, {load.epochs} epochs", flush=True)
        commands = {
            f"{side}, {precision}": ["-m", "bench.ppo_sides", side, precision, name]
            for precision in precisions
            for side in [*peers, *own]
        }
        with services(folder), start_sides(commands) as sides:
            for number in range(-1, rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    side.turn()
            print("\n".join(table(sides)), flush=True)
        return sides


def prepare(folder: Path, load: Load, pairs: Path | None) -> None:
    """Models, load.json, prompts.jsonl, held_out.jsonl with prompts that nobody asks for, and the first responses."""
    load.write(folder)
    make_models(folder, larger=not load.small)
    draw = random.Random(0)
    if pairs is None:
        lengths = [min(_WORDS, max(2, round(draw.lognormvariate(*_LENGTHS)))) for _ in range(load.prompts + _HELD_OUT)]
        prompts = [sentence(draw, length) for length in lengths]
    else:
        rows = [json.loads(line)["prompt"] for line in pairs.read_text(encoding="utf-8").splitlines()]
        prompts = list(dict.fromkeys(" ".join(prompt.split()[-_WORDS:]) for prompt in rows))[: load.prompts + _HELD_OUT]
        for model in ("policy", "reward"):
            train_tokenizer(rows, VOCABULARY).save_pretrained(folder / model)
    if len(prompts) < (needed := load.prompts + _HELD_OUT):
        raise SystemExit(f"{pairs} has {len(prompts)} different prompts: at least {needed} are needed")
    for name, some in (("prompts", prompts[: load.prompts]), ("held_out", prompts[load.prompts :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in some))
    responses = [[draw.randrange(END + 1, VOCABULARY) for _ in range(load.new_tokens)] for _ in range(load.prompts)]
    (folder / "responses.json").write_text(json.dumps(responses))


@contextlib.contextmanager
def services(folder: Path) -> Iterator[None]:
    """Policy, reward and reference service for as long as the block lasts; services.json says where."""
    command = [sys.executable, "-m", "deploy.local", "--policy-model", str(folder / "policy")]
    command += ["--reward-model", str(folder / "reward")]
    print("starting the services", flush=True)
    # SIGTERM alone would end this process and leave them behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        addresses: dict[str, str] = {}
        for line in process.stdout:
            name, address = line.split(maxsplit=1)
            addresses[name] = address.strip()
            if name == "reward_admin":
                break
        else:
            raise SystemExit(f"the services ended with {process.wait()} before they were ready")
        (folder / "services.json").write_text(json.dumps(addresses))
        yield
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)


def step_s(side: Side) -> float:
    """Median seconds of the turns after the first."""
    return statistics.median(turn.seconds for turn in side.turns[1:])


def phase_s(side: Side, phase: str) -> float:
    """The same of one phase."""
    return statistics.median(Found.of(turn).phases_s[PHASES.index(phase)] for turn in side.turns[1:])


def table(sides: Sequence[Side]) -> list[str]:
    """Seconds of a step and of its phases, speed and memory."""
    names = "".join(f"{name:>9}" for name in ("step s", *PHASES))
    lines = [f"{'':<20}{names}{'tokens/s':>10}{'update t/s':>12}{'peak MiB':>10}{'value loss':>12}"]
    for side in sides:
        seconds = [step_s(side), *(phase_s(side, phase) for phase in PHASES)]
        tokens = statistics.median(Found.of(turn).tokens for turn in side.turns[1:])
        losses = Found.of(side.turns[0]).value_losses
        epochs = len(losses)
        peak = side.model_mib + max(turn.peak_mib for turn in side.turns)
        lines.append(
            f"{side.name:<20}{''.join(f'{value:>9.2f}' for value in seconds)}{tokens / seconds[0]:>10,.0f}"
            f"{epochs * tokens / seconds[-1]:>12,.0f}{peak:>10,.0f}{losses[0]:>12.5f}"
        )
    return lines


def verdicts(sides: Sequence[Side]) -> Iterator[Verdict]:
    """What is asked of us, the faster way, and whether it holds."""
    by_name = {side.name: side for side in sides}

    def ratios(peer: str, ours: str) -> tuple[float, str]:
        """Of the step, and in words of all that took time."""
        theirs, own = by_name[peer], by_name[ours]
        whole, update = step_s(theirs) / step_s(own), phase_s(theirs, "update") / phase_s(own, "update")
        return whole, f"ppo: step of {peer} / {ours} {whole:.2f}, its update {update:.2f}"

    for precision in dict.fromkeys(name.split(", ")[1] for name in by_name):
        both = [name for name in by_name if name.startswith(OURS) and name.endswith(precision)]
        ours = min(both, key=lambda name: step_s(by_name[name]))
        if (peer := f"{TRL}, {precision}") in by_name:
            ratio, text = ratios(peer, ours)
            yield Verdict(ratio >= TARGET, f"{text}, target at least {TARGET}")
        if precision == "bfloat16" and (peer := f"{TRL}, float32") in by_name:
            ratio, text = ratios(peer, ours)
            yield Verdict(ratio >= HALF_TARGET, f"{text}, target at least {HALF_TARGET:.0f}")
        yield Verdict(True, ratios(f"{NAIVE}, {precision}", ours)[1])
        alike = [side for side in sides if side.name.endswith(precision)]
        error, bound = disagreement(alike), AGREEMENT[precision]
        yield Verdict(error <= bound, f"ppo {precision}: first losses agree: {error:.1e}, target at most {bound:.0e}")


def figures(sides: Sequence[Side]) -> dict[str, Any]:
    """Seconds of each phase in every turn that counts, by side."""
    return {
        side.name: [dict(zip(PHASES, Found.of(turn).phases_s, strict=True)) for turn in side.turns[1:]]
        for side in sides
    }


def disagreement(sides: Sequence[Side]) -> float:
    """Largest difference of the first turn's losses from the naive ones, epoch by epoch."""
    truth = next(Found.of(side.turns[0]) for side in sides if side.name.startswith(NAIVE))
    largest = 0.0
    for side in sides:
        found = Found.of(side.turns[0])
        pairs = zip(found.policy_losses, truth.policy_losses, strict=True)
        largest = max(largest, *(abs(own - true) for own, true in pairs))
        pairs = zip(found.value_losses, truth.value_losses, strict=True)
        largest = max(largest, *(abs(own / true - 1) for own, true in pairs))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSON Lines with prompts; default: made-up ones")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: those that the processor has instructions for"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=Load.prompts)
    parser.add_argument("--new-tokens", type=int, default=Load.new_tokens)
    parser.add_argument("--epochs", type=int, default=Load.epochs)
    parser.add_argument("--small", action="store_true", help="models of 5 M parameters")
    options = parser.parse_args()
    load = Load(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Load)})
    sides = measure(load, options.pairs, options.precisions or native_precisions(), options.rounds)
    conclude("ppo_step", list(verdicts(sides)), {"load": dataclasses.asdict(load), "phases": figures(sides)})


if __name__ == "__main__":
    main()
