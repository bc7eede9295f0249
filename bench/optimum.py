"""``make study-optimum``: PPO and DPO against the optimum that theory gives in closed form.

The task is ``bench.enumerable``'s: every response has a random reward, and all of them are listed, so that the value
J(pi) = E[r] - beta KL(pi, ref) of a policy and its largest, beta log Z, are sums and not estimates.

1. PPO, for several prices of KL: ``quartet-train ppo`` against a policy, a reward and a reference service, which are
   processes of their own. How far it is on the way from J(ref) to beta log Z is computed from its checkpoints.
2. DPO, for the same prices, on preferences between any two responses, as often as Bradley-Terry says.
3. Total variation of both to pi*, and to each other.

Everything is written below runs/optimum; the figures go to bench/out as optimum.json and optimum.png.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import enumerable
from bench.enumerable import Array, Task
from bench.outcome import OUTPUT, Verdict, conclude
from bench.reward_noise import quietly
from bench.turns import free_port

if TYPE_CHECKING:
    from trainer.config import DpoSettings
    from trainer.ppo_config import PPOSettings

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "optimum"
BETAS = (0.5, 1.0, 2.0)
GAP_TARGET = 0.98
VARIATION_TARGET = 0.05
TASK = Task(words=4, longest=3)
PPO: dict[str, Any] = {
    "samples_per_prompt": 256,
    "critic_learning_rate": 1.5e-3,
    "save_every": 2,
    "keep_checkpoints": 1000,
}
DPO: dict[str, Any] = {"batch_size": 1024, "learning_rate": 2e-3}
VOTES = 40
# The smaller beta is, the further from the reference is the optimum; near it, what counts is the noise of sampling: the
# gap is the smaller, the larger beta is.
PPO_LEARNING_RATES = {0.5: 1.5e-3, 1.0: 1.5e-3, 2.0: 8e-4}
PPO_STEPS = {0.5: 150, 1.0: 150, 2.0: 300}
# A preference says the less of the difference of two rewards, the larger it is, and a smaller beta makes more of it.
DPO_EPOCHS = {0.5: 8, 1.0: 4, 2.0: 3}
_WIDTH, _LAYERS = 64, 2


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of one price of KL.

    ``start`` is J(ref), ``optimum`` beta log Z, in the mean over prompts; ``ppo``, ``dpo`` and ``best``, which is pi*,
    are (P, Y) log-probabilities; ``curve`` has steps of PPO and the share of the gap that is closed after each.
    """

    beta: float
    optimum: float
    start: float
    ppo: Array
    dpo: Array
    best: Array
    curve: list[tuple[int, float]]

    def figures(self, ref_PY: Array) -> dict[str, float]:
        """What the table has, by name."""
        gap = {
            name: enumerable.gap_closed(logp_PY, ref_PY, TASK.rewards_PY, self.beta)
            for name, logp_PY in (("ppo", self.ppo), ("dpo", self.dpo))
        }
        return {
            "beta": self.beta,
            "start": self.start,
            "optimum": self.optimum,
            "gap_closed_ppo": gap["ppo"],
            "gap_closed_dpo": gap["dpo"],
            "variation_ppo": enumerable.total_variation(self.ppo, self.best),
            "variation_dpo": enumerable.total_variation(self.dpo, self.best),
            "variation_ppo_dpo": enumerable.total_variation(self.ppo, self.dpo),
        }


def ppo_settings(
    task: Task, folder: Path, beta: float, output: Path, services: Mapping[str, Any], **changes: Any
) -> PPOSettings:
    """PPO of the task in ``folder``: KL in the reward, scores as they are, nothing off for a missing end token.

    Args:
        task: that was written to ``folder``.
        folder: of ``Task.write``.
        beta: price of KL.
        output: folder of the run.
        services: settings by name that say where they are.
        changes: further settings, by name.
    """
    from trainer.ppo_config import PPOSettings

    prompts = (str(folder / enumerable.PROMPTS),)
    values: dict[str, Any] = {
        "model": str(folder / enumerable.MODEL),
        "critic": "policy",
        "prompts": prompts,
        # The prompts themselves: what is asked is how well this task is solved, and not what carries over to others.
        "eval_prompts": prompts,
        "output": output,
        "max_new_tokens": task.longest,
        "prompts_per_step": task.prompts,
        "kl_beta": beta,
        "normalise_reward": "off",
        "missing_eos": "none",
        # Packed, short sequences cost more than their padding.
        "packing": "off",
        "track": ("none",),
        "save_every": 0,
    }
    return PPOSettings(**(values | dict(services) | changes))


def dpo_settings(task: Task, folder: Path, beta: float, data: Path, output: Path, **changes: Any) -> DpoSettings:
    """DPO of the task in ``folder`` on the preferences in ``data``; arguments as ``ppo_settings`` has them."""
    from trainer.config import DpoSettings

    values: dict[str, Any] = {
        "model": str(folder / enumerable.MODEL),
        "data": (str(data),),
        "held_out_fraction": 0.0,
        "output": output,
        "beta": beta,
        # Of responses that are as long as can be the end token is cut off, as sampling leaves it out.
        "max_tokens": task.max_tokens,
        "truncation": "right",
        "packing": "off",
        "track": ("none",),
    }
    return DpoSettings(**(values | changes))


def log_distribution(task: Task, model: Path, weights: Path | None = None) -> Array:
    """(P, Y) of the model in a folder, or of ``weights`` of a checkpoint in its place."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    if weights is not None:
        policy.load_state_dict(load_file(weights))
    return task.log_distribution(policy)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    from trainer.dpo import main as train_dpo
    from trainer.ppo import main as train_ppo

    shutil.rmtree(WORK, ignore_errors=True)
    folder = WORK / "task"
    folder.mkdir(parents=True)
    TASK.write(folder, width=_WIDTH, layers=_LAYERS)
    ref_PY = log_distribution(TASK, folder / enumerable.MODEL)
    print(
        f"{len(TASK.responses)} responses to each of {TASK.prompts} prompts, of {TASK.words} words and an end token, "
        f"at most {TASK.longest} tokens"
    )
    with running_services(folder) as services:
        for beta in BETAS:
            start_s = time.monotonic()
            with quietly():
                own = PPO | {"learning_rate": PPO_LEARNING_RATES[beta], "steps": PPO_STEPS[beta]}
                train_ppo(ppo_settings(TASK, folder, beta, WORK / f"ppo-{beta:g}", services, **own))
            print(f"PPO, beta {beta:g}: {time.monotonic() - start_s:.0f} s", flush=True)
    for beta in BETAS:
        start_s = time.monotonic()
        data = WORK / f"preferences-{beta:g}.jsonl"
        enumerable.write_rows(data, TASK.preferences(VOTES))
        with quietly():
            train_dpo(dpo_settings(TASK, folder, beta, data, WORK / f"dpo-{beta:g}", epochs=DPO_EPOCHS[beta], **DPO))
        print(f"DPO, beta {beta:g}: {time.monotonic() - start_s:.0f} s", flush=True)
    found = [measure(folder, beta, ref_PY) for beta in BETAS]
    figures = [trained.figures(ref_PY) for trained in found]
    print("\n" + "\n".join(lines(figures)))
    draw(found)
    conclude("optimum", verdicts(figures), {"runs": figures, "curves": {t.beta: t.curve for t in found}})


def measure(folder: Path, beta: float, ref_PY: Array) -> Trained:
    """What the runs of one price of KL came to, from their folders."""
    best, largest_P = enumerable.optimum(ref_PY, TASK.rewards_PY, beta)
    model, run = folder / enumerable.MODEL, WORK / f"ppo-{beta:g}"

    def closed(weights: Path) -> float:
        return enumerable.gap_closed(log_distribution(TASK, model, weights), ref_PY, TASK.rewards_PY, beta)

    curve = [
        (int(checkpoint.name.rpartition("-")[2]), closed(checkpoint / "policy.safetensors"))
        for checkpoint in sorted(run.glob("checkpoint-*"))
    ]
    return Trained(
        beta=beta,
        optimum=float(largest_P.mean()),
        start=float(enumerable.value(ref_PY, ref_PY, TASK.rewards_PY, beta).mean()),
        ppo=log_distribution(TASK, run / "model"),
        dpo=log_distribution(TASK, WORK / f"dpo-{beta:g}" / "model"),
        best=best,
        curve=[(0, 0.0), *curve],
    )


def lines(figures: list[dict[str, float]]) -> list[str]:
    """A table of Markdown."""
    return [
        "| beta | J(ref) | beta log Z | gap closed by PPO | by DPO | TV of PPO to pi* | of DPO | of PPO to DPO |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {f['beta']:g} | {f['start']:.4f} | {f['optimum']:.4f} | {f['gap_closed_ppo']:.2%} | "
            f"{f['gap_closed_dpo']:.2%} | {f['variation_ppo']:.4f} | {f['variation_dpo']:.4f} | "
            f"{f['variation_ppo_dpo']:.4f} |"
            for f in figures
        ),
    ]


def verdicts(figures: list[dict[str, float]]) -> list[Verdict]:
    """PPO's share of the gap and DPO's total variation, for each price of KL."""
    found = []
    for one in figures:
        beta, gap, variation = one["beta"], one["gap_closed_ppo"], one["variation_dpo"]
        found += [
            Verdict(gap >= GAP_TARGET, f"beta {beta:g}: PPO closes {gap:.2%} of the gap, target {GAP_TARGET:.0%}"),
            Verdict(
                variation < VARIATION_TARGET,
                f"beta {beta:g}: total variation of DPO to pi* is {variation:.4f}, target below {VARIATION_TARGET:g}",
            ),
        ]
    return found


def draw(found: list[Trained]) -> None:
    """What is left of the gap by steps, and both policies' probabilities beside those of pi*."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    OUTPUT.mkdir(exist_ok=True)
    figure, (whole, rest, each) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for trained in found:
        steps, closed = (np.array(values) for values in zip(*trained.curve, strict=True))
        (line,) = whole.plot(steps, closed, label=f"beta {trained.beta:g}")
        rest.plot(steps, 1 - closed, label=f"beta {trained.beta:g}", color=line.get_color())
    whole.axhline(1, color="gray", linewidth=0.8)
    whole.set(title="share of the gap from J(ref) to beta log Z that PPO has closed")
    rest.axhline(1 - GAP_TARGET, color="gray", linestyle=":", label=f"target, {1 - GAP_TARGET:.0%}")
    rest.set(title="what is left of it", yscale="log")
    for axis in (whole, rest):
        axis.set(xlabel="steps of PPO, a rollout and its updates each")
        axis.legend()
    middle = found[len(found) // 2]
    for name, logp_PY in (("PPO", middle.ppo), ("DPO", middle.dpo)):
        each.scatter(np.exp(middle.best).ravel(), np.exp(logp_PY).ravel(), s=8, alpha=0.6, label=name)
    ends = [float(np.exp(middle.best).min()), float(np.exp(middle.best).max())]
    each.plot(ends, ends, color="gray", linewidth=0.8)
    each.set(xscale="log", yscale="log", xlabel="probability of a response under pi*", ylabel="under the policy")
    each.set(title=f"all responses, beta {middle.beta:g}")
    each.legend()
    figure.savefig(OUTPUT / "optimum.png", dpi=110)


@contextlib.contextmanager
def running_services(folder: Path) -> Iterator[dict[str, Any]]:
    """Policy, reward and reference service of the task in ``folder``; yields the trainer's settings that name them."""
    processes: list[subprocess.Popen[bytes]] = []
    environment = os.environ | {"QUARTET_REWARDS": str(folder / enumerable.REWARDS)}

    def start(name: str, *flags: str) -> str:
        port = free_port()
        command = [sys.executable, "-m", f"services.{name}", "--port", str(port), "--threads", "1"]
        command += ["--metrics-port", str(free_port()), "--log-level", "error", *flags]
        processes.append(subprocess.Popen(command, stdout=sys.stderr, cwd=ROOT, env=environment))
        return f"127.0.0.1:{port}"

    model, admin_port = ["--model", str(folder / enumerable.MODEL)], free_port()
    try:
        yield {
            "policy": start("policy", *model, "--engine", "transformers", "--admin-port", str(admin_port)),
            "policy_admin": (f"127.0.0.1:{admin_port}",),
            "reward": start("reward", "--scorer", "bench.enumerable:score", "--admin-port", "0"),
            "reference": start("reference", *model),
        }
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


if __name__ == "__main__":
    main()
