"""The share of a PPO step that is neither a model's work nor waiting for it, from a real run against real services.

    python -m bench.ppo_overhead

``quartet-local`` starts the three services and ``quartet-train ppo`` trains against them; the figures are those that
every run logs. Transport is what is left of a rollout when no service had our work, and publishing the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.models import make_models, write_prompts

TARGET = 0.05
_WARM_UP = 2  # Steps that are not counted.


@dataclass(frozen=True, kw_only=True)
class Result:
    """Seconds of all counted steps together, by what they went into."""

    steps: int
    services_s: float
    forward_s: float
    update_s: float
    rpc_s: float
    other_s: float

    @property
    def total_s(self) -> float:
        return self.services_s + self.forward_s + self.update_s + self.rpc_s + self.other_s

    @property
    def share(self) -> float:
        return (self.rpc_s + self.other_s) / self.total_s

    def lines(self) -> list[str]:
        rows = (
            ("generation, scoring, reference", self.services_s),
            ("the trainer's forward passes", self.forward_s),
            ("optimisation", self.update_s),
            ("transport, new weights included", self.rpc_s),
            ("everything else", self.other_s),
        )
        found = [f"{name:<32} {s / self.steps:>7.3f} s a step  {s / self.total_s:>6.1%}" for name, s in rows]
        return [*found, f"{'neither work nor waiting for it':<32} {'':>17} {self.share:>6.1%}"]


def measure(steps: int = 12, prompts: int = 64, new_tokens: int = 64) -> Result:
    """Runs PPO and adds up what its log says.

    Raises:
        CalledProcessError: the run failed; its output says why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, reward = make_models(folder)
        write_prompts(folder / "prompts.jsonl", 400, 12)
        scripts = Path(sys.executable).parent
        command = [
            str(scripts / "quartet-local"), "--policy-model", str(policy), "--reward-model", str(reward), "--",
            str(scripts / "quartet-train"), "ppo", "--model", str(policy), "--prompts", str(folder / "prompts.jsonl"),
            "--output", str(folder / "run"), "--steps", str(steps + _WARM_UP), "--prompts-per-step", str(prompts),
            "--max-new-tokens", str(new_tokens), "--max-eval-prompts", "16", "--save-every", "0",
            "--learning-rate", "1e-5", "--critic-learning-rate", "1e-5",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines][_WARM_UP:]

    def total(name: str) -> float:
        return sum(record[f"time/{name}"] for record in records)

    return Result(
        steps=len(records),
        # What of the rollout is not transport is the services' work; rpc_s holds publishing beside transport.
        services_s=total("rollout_s") - (total("rpc_s") - total("publish_s")),
        forward_s=total("forward_s"),
        update_s=total("update_s"),
        rpc_s=total("rpc_s"),
        other_s=total("other_s"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=64, help="responses a step")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    print("\n".join(measure(options.steps, options.prompts, options.new_tokens).lines()))


if __name__ == "__main__":
    main()
