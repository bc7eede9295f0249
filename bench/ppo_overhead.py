"""The share of a PPO step that is neither a model's work nor waiting for it, from a real run against real services.

    python -m bench.ppo_overhead

``quartet-local`` starts the three services and ``quartet-train ppo`` trains against them with its default settings; the
figures are those that every run logs in metrics.jsonl, summed over the steps after the first two. The services stamp
when they worked for us: what of a rollout no service was at work in is transport, and with the publishing of weights
(hashing, sending, and the policy service's loading of them) it is ``time/rpc_s``. Optimisation and forward passes are
the trainer's own work with its models. The share is (rpc_s + other_s) / step_s.

A share depends on how heavy the work is that it is a share of, so milliseconds a step are printed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.models import make_models, write_prompts

TARGET = 0.05
_WARM_UP = 2  # Steps that are not counted.
_PROMPT_WORDS = 12


@dataclass(frozen=True, kw_only=True)
class Load:
    """Size of the run."""

    steps: int = 6
    """That count."""
    prompts: int = 64
    new_tokens: int = 48


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one step, by what they went into."""

    step_s: float
    services_s: float
    """At least one service generated, scored or gave reference log-probabilities."""
    forward_s: float
    update_s: float
    publish_s: float
    rpc_s: float
    """Publishing included, as it is logged."""
    other_s: float

    @classmethod
    def of(cls, record: dict[str, float]) -> Step:
        """From a line of metrics.jsonl."""
        transport_s = record["time/rpc_s"] - record["time/publish_s"]
        return cls(
            step_s=record["time/step_s"],
            services_s=record["time/rollout_s"] - transport_s,
            forward_s=record["time/forward_s"],
            update_s=record["time/update_s"],
            publish_s=record["time/publish_s"],
            rpc_s=record["time/rpc_s"],
            other_s=record["time/other_s"],
        )

    @property
    def share(self) -> float:
        return (self.rpc_s + self.other_s) / self.step_s


@dataclass(frozen=True, kw_only=True)
class Result:
    """The counted steps; ``between_s``: time between them, such as logging, which no step contains."""

    load: Load
    steps: tuple[Step, ...]
    between_s: float
    response_tokens: float

    def total(self, name: str) -> float:
        """Of a field of ``Step``, over all counted steps."""
        return sum(float(getattr(step, name)) for step in self.steps)

    @property
    def share(self) -> float:
        """Neither work nor waiting for it, of all counted steps together."""
        return (self.total("rpc_s") + self.total("other_s")) / self.total("step_s")

    def lines(self) -> list[str]:
        """The table."""
        whole_s = self.total("step_s")

        def row(name: str, seconds: float) -> str:
            return f"{name:<44}{1000 * seconds / len(self.steps):>9,.1f}{seconds / whole_s:>9.2%}"

        shares = [step.share for step in self.steps]
        return [
            f"{'of a step':<44}{'ms':>9}{'share':>9}",
            row("generation, scoring, reference", self.total("services_s")),
            row("the trainer's forward passes", self.total("forward_s")),
            row("the trainer's update", self.total("update_s")),
            row("publishing the weights", self.total("publish_s")),
            row("transport and bookkeeping of the rollout", self.total("rpc_s") - self.total("publish_s")),
            row("other", self.total("other_s")),
            row("neither work nor waiting for it (last three)", self.total("rpc_s") + self.total("other_s")),
            f"{len(shares)} steps of {self.load.prompts} responses of {self.response_tokens:.0f} tokens; share of "
            f"single steps {min(shares):.2%} to {max(shares):.2%}, median {statistics.median(shares):.2%}; between "
            f"steps {1000 * self.between_s / len(shares):.1f} ms, in none of these",
        ]

    def figures(self) -> dict[str, Any]:
        """What a program wants to know of it."""
        return {"share": self.share, "between_s": self.between_s, "steps": [asdict(step) for step in self.steps]}


def measure(load: Load) -> Result:
    """Runs PPO and adds up what its log says.

    Raises:
        SystemExit: the run failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, reward = make_models(folder)
        write_prompts(folder / "prompts.jsonl", 400, _PROMPT_WORDS)
        scripts = Path(sys.executable).parent
        command = [
            str(scripts / "quartet-local"), "--policy-model", str(policy), "--reward-model", str(reward), "--",
            str(scripts / "quartet-train"), "ppo", "--model", str(policy), "--prompts", str(folder / "prompts.jsonl"),
            "--output", str(folder / "run"), "--steps", str(load.steps + _WARM_UP),
            "--prompts-per-step", str(load.prompts), "--max-new-tokens", str(load.new_tokens),
            "--max-eval-prompts", "8", "--save-every", "0",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            raise SystemExit(f"the run ended with {done.returncode}:\n{done.stdout[-4000:]}")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    if len(records) != load.steps + _WARM_UP:
        raise SystemExit(f"the run logged {len(records)} steps, not {load.steps + _WARM_UP}")
    counted = records[_WARM_UP:]
    steps = tuple(Step.of(record) for record in counted)
    elapsed_s = records[-1]["elapsed_s"] - records[_WARM_UP - 1]["elapsed_s"]
    return Result(
        load=load,
        steps=steps,
        between_s=elapsed_s - sum(step.step_s for step in steps),
        response_tokens=statistics.mean(record["response/length_mean"] for record in counted),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Load.steps, help="steps that count")
    parser.add_argument("--prompts", type=int, default=Load.prompts, help="responses a step")
    parser.add_argument("--new-tokens", type=int, default=Load.new_tokens)
    options = parser.parse_args()
    print("\n".join(measure(Load(**vars(options))).lines()))


if __name__ == "__main__":
    main()
