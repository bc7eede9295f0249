"""``make study-overoptimisation``: what becomes of the true reward while PPO raises a proxy of it.

Policies of ``bench.small_world`` are trained by the trainer's own PPO step (``trainer.ppo.Learner``) on a proxy at
three prices of KL, on ensembles of proxies, and on the gold reward itself; seeds differ in everything, corpus and gold
included. Sampling and scoring happen in this process: services would change nothing but the time.

Each finished run is a line of bench/out/overoptimisation.jsonl, and what was broken off goes on. ``--plot-only`` makes
tables and figure of the lines that there are; those of docs/overoptimisation.md are in
bench/results/overoptimisation.jsonl (``--rows``).

Source: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization"; Coste et al. 2023, "Reward Model Ensembles
Help Mitigate Overoptimization".

Shapes: N sequences, P prompt tokens, T response tokens, S of both.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bench.outcome import OUTPUT, Verdict, conclude
from bench.small_world import Protocol, World, exact_kl, make_world, response_logprobs
from services.reward.combining import Reduction, reduce_members
from trainer.critic import Critic
from trainer.models import TokenLogprobs
from trainer.ppo import Learner
from trainer.ppo_config import PPOSettings
from trainer.rollout import Rollout, Sample
from trainer.statistics import Interval, bootstrap_interval, mean_interval

if TYPE_CHECKING:
    from trainer.ppo_run import PPORun

SEEDS = tuple(range(8, 16))
"""Those to report: none that was looked at while the world was chosen, see docs/overoptimisation.md."""
PENALTY = 0.5
"""Price of the members' variance: the reward service's default."""
# Updates whose means are one point of a run's curve.
_POINT = 4


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a policy is trained on."""

    beta: float = 0.0
    gold: bool = False
    """On the gold itself, in place of proxies."""
    reduction: Reduction | None = None
    """How the members' scores become one; None: the first proxy scores alone."""

    def reward(self, world: World, ids_NS: Tensor) -> Tensor:
        """(N,) what is optimised, before KL is paid."""
        if self.gold:
            return world.gold(ids_NS)
        if self.reduction is None:
            return world.members[0](ids_NS)
        by_member = [member(ids_NS).tolist() for member in world.members]
        return torch.tensor([reduce_members(row, self.reduction, PENALTY) for row in zip(*by_member, strict=True)])


ARMS = {
    "beta 0": Arm(),
    "beta .05": Arm(beta=0.05),
    "beta .2": Arm(beta=0.2),
    "worst case, beta 0": Arm(reduction=Reduction.WORST_CASE),
    "mean - variance, beta 0": Arm(reduction=Reduction.UNCERTAINTY),
    "gold, beta 0": Arm(gold=True),
}
FREE, PRICED, ENSEMBLES, GOLD = "beta 0", ("beta .05", "beta .2"), tuple(ARMS)[3:5], "gold, beta 0"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run. Rewards are in standard deviations of what the policy said before, whose mean is 0."""

    protocol: str
    seed: int
    arm: str
    accuracies: tuple[float, ...]
    """Of the proxies, on pairs with right labels."""
    kl: float
    """Nats a response, over the whole vocabulary; this and the next two on held-out prompts, after the last update."""
    gold: float
    reward: float
    """What was optimised."""
    curve: tuple[tuple[float, float, float], ...]
    """KL (sampled), reward and gold of the responses that were trained on, means over four updates each."""
    sampler_difference: float
    """Largest difference of a log-probability as sampled and as the learner has it before its update."""
    seconds: float

    @property
    def best_gold(self) -> float:
        """The highest on the way."""
        return max(gold for _, _, gold in self.curve)


Runs = dict[str, dict[int, Run]]
"""By arm and seed."""


# Training ----------------------------------------------------------------------------------------------------------


def make_learner(world: World, arm: Arm) -> Learner:
    """A learner of a copy of the world's policy, with a critic that starts from its first layer with values of 0."""
    protocol = world.protocol
    settings: dict[str, Any] = {
        "model": "the world's policy",
        "prompts": ("the world's corpus",),
        "output": OUTPUT,
        "steps": protocol.updates,
        "prompts_per_step": protocol.batch,
        "max_new_tokens": protocol.response_tokens,
        "epochs": protocol.epochs,
        "learning_rate": protocol.learning_rate,
        "critic_learning_rate": protocol.learning_rate,
        "kl_beta": arm.beta,
        "missing_eos": "none",
        "packing": "off",  # There is no padding to be saved.
        "precision": "float32",
        "seed": world.seed,
    }
    policy = copy.deepcopy(world.policy).requires_grad_(True).train()
    body = copy.deepcopy(policy.base_model)
    body.layers = body.layers[:1]  # What a small critic tells is enough, and half of an update's time would be its.
    body.config.num_hidden_layers = 1
    head = nn.Linear(protocol.width, 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    # All that a learner wants of a run; the rest of one are services and a folder.
    run = SimpleNamespace(
        settings=PPOSettings(**settings),
        device=torch.device("cpu"),
        tokenizer=SimpleNamespace(eos_token_id=None),
        normalisation=None,
        policy=policy,
        critic=Critic(body, head),
    )
    return Learner(cast("PPORun[PPOSettings]", run))


def train(world: World, name: str) -> Run:
    """PPO from the world's policy on the reward of the arm called ``name``."""
    start_s = time.perf_counter()
    protocol, arm = world.protocol, ARMS[name]
    learner, reference = make_learner(world, arm), TokenLogprobs(world.policy)
    steps: list[tuple[float, float, float]] = []
    difference = 0.0
    for step in range(protocol.updates):
        prompts_NP = world.prompts(protocol.batch, "ppo", step)
        ids_NS, logprobs_NT = world.respond(learner.policy, prompts_NP, "ppo", step)
        with torch.no_grad():
            ref_logprobs_NT = response_logprobs(reference, ids_NS, protocol.prompt_tokens)
        reward_N = arm.reward(world, ids_NS)
        figures = learner.step(make_rollout(ids_NS, logprobs_NT, ref_logprobs_NT, reward_N, step), step)
        steps.append((figures["kl/sequence_mean"], float(reward_N.mean()), float(world.gold(ids_NS).mean())))
        difference = max(difference, figures["rollout/logprob_max_abs_difference"])
    # The same prompts and draws in all arms.
    prompts_NP = world.prompts(protocol.held_out, "held out")
    ids_NS, _ = world.respond(learner.policy, prompts_NP, "held out")
    return Run(
        protocol=protocol.digest,
        seed=world.seed,
        arm=name,
        accuracies=tuple(round(share, 4) for share in world.accuracies),
        kl=float(exact_kl(learner.policy, world.policy, ids_NS, protocol.prompt_tokens).mean()),
        gold=float(world.gold(ids_NS).mean()),
        reward=float(arm.reward(world, ids_NS).mean()),
        curve=tuple(point_of(steps[at : at + _POINT]) for at in range(0, len(steps), _POINT)),
        sampler_difference=difference,
        seconds=round(time.perf_counter() - start_s, 1),
    )


def make_rollout(ids_NS: Tensor, logprobs_NT: Tensor, ref_logprobs_NT: Tensor, reward_N: Tensor, step: int) -> Rollout:
    """What the services would have made of the prompts."""
    prompt_tokens = ids_NS.shape[1] - logprobs_NT.shape[1]
    rows = zip(ids_NS.tolist(), logprobs_NT.tolist(), ref_logprobs_NT.tolist(), reward_N.tolist(), strict=True)
    samples = tuple(
        Sample(
            index=index,
            prompt_ids=tuple(ids[:prompt_tokens]),
            response_ids=tuple(ids[prompt_tokens:]),
            logprobs=tuple(logprobs),
            ref_logprobs=tuple(ref_logprobs),
            score=score,
            finished=False,
        )
        for index, (ids, logprobs, ref_logprobs, score) in enumerate(rows)
    )
    return Rollout(samples=samples, failures=(), weights_version=step, duration_s=0.0, service_work_s=0.0)


def point_of(steps: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    kl, reward, gold = (round(mean(values), 3) for values in zip(*steps, strict=True))
    return kl, reward, gold


# Lines -------------------------------------------------------------------------------------------------------------


def read_runs(path: Path, protocol: Protocol) -> Runs:
    """The finished runs of this protocol. Lines of another one, and one that was broken off, are named and left out."""
    runs: Runs = {name: {} for name in ARMS}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            print(f"{path}, line {number}: is no JSON and left out; a run that was broken off is done again")
            continue
        if row["protocol"] != protocol.digest:
            print(f"{path}, line {number}: is of protocol {row['protocol']}, not {protocol.digest}, and left out")
            continue
        row |= {"accuracies": tuple(row["accuracies"]), "curve": tuple(map(tuple, row["curve"]))}
        runs[row["arm"]][row["seed"]] = Run(**row)
    return runs


def append(path: Path, run: Run) -> None:
    """Adds a line in one write, so that other processes may add theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if broken else "") + json.dumps(asdict(run)) + "\n")


def finish(path: Path, protocol: Protocol, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Every run of the seeds and arms that is not there yet, seed by seed."""
    for seed in seeds:
        runs = read_runs(path, protocol)
        if not (missing := [name for name in arms if seed not in runs[name]]):
            continue
        start_s = time.perf_counter()
        world = make_world(protocol, seed)
        shares = ", ".join(f"{share:.3f}" for share in world.accuracies)
        print(f"seed {seed}: proxies' accuracy {shares}; {time.perf_counter() - start_s:.0f} s", flush=True)
        for name in missing:
            run = train(world, name)
            append(path, run)
            told = f"KL {run.kl:.1f}, reward {run.reward:.2f}, gold {run.gold:.2f} (best {run.best_gold:.2f})"
            print(f"seed {seed}, {name}: {told}; {run.seconds:.0f} s", flush=True)


# Figures -----------------------------------------------------------------------------------------------------------


def whole_seeds(runs: Runs) -> list[int]:
    """Those of which every arm is there: comparisons are of these alone."""
    return sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))


def gain(runs: Runs, one: str, other: str) -> Interval:
    """Final gold of one arm less that of another, paired by seed."""
    return bootstrap_interval([runs[one][seed].gold - runs[other][seed].gold for seed in whole_seeds(runs)])


def judge(runs: Runs) -> tuple[dict[str, Any], list[Verdict]]:
    """Tables on the screen; figures and verdicts. At least 2 whole seeds."""
    seeds = whole_seeds(runs)
    accuracy = mean_interval([runs[FREE][seed].accuracies[0] for seed in seeds])
    print(f"\n{len(seeds)} seeds; the proxy is right on {accuracy} of pairs; rewards in standard deviations before PPO")
    print(f"  {'':<26}{'KL, least':>10}{'mean':>7}{'most':>7}{'optimised':>11}{'best gold':>11}  final gold, 95 %")
    table: dict[str, Any] = {}
    for name, by_seed in runs.items():
        found = [by_seed[seed] for seed in seeds]
        kl, gold = [run.kl for run in found], mean_interval([run.gold for run in found])
        reward, best = mean(run.reward for run in found), mean(run.best_gold for run in found)
        table[name] = {"kl": kl, "reward": reward, "best_gold": best, "gold": gold.as_json()}
        kls = f"{min(kl):>10.1f}{mean(kl):>7.1f}{max(kl):>7.1f}"
        print(f"  {name:<26}{kls}{reward:>11.2f}{best:>11.2f}  {gold}")
    print("\n  final gold, difference paired by seed: mean and 95 % interval, by bootstrap and by Student")
    compared = [(name, FREE) for name in (*PRICED, *ENSEMBLES, GOLD)]
    compared += [(GOLD, name) for name in (*PRICED, *ENSEMBLES)] + [(ENSEMBLES[0], PRICED[0])]
    differences = {}
    for one, other in compared:
        values = [runs[one][seed].gold - runs[other][seed].gold for seed in seeds]
        interval, student = gain(runs, one, other), mean_interval(values)
        won = sum(value > 0 for value in values)
        differences[f"{one} less {other}"] = interval.as_json() | {"above_0": won, "values": values}
        told = f"{interval}  [{student.low:.3f}, {student.high:.3f}]  above 0 in {won} of {len(seeds)}"
        print(f"  {one + ' less ' + other:<48} {told}")
    worst = max(run.sampler_difference for by_seed in runs.values() for run in by_seed.values())
    print(f"\n  log-probabilities as sampled and as learned from differ by at most {worst:.1e}")
    figures = {"seeds": seeds, "accuracy": accuracy.as_json(), "arms": table, "differences": differences}
    return figures, verdicts(runs)


def verdicts(runs: Runs) -> list[Verdict]:
    """What the study must show."""
    seeds = whole_seeds(runs)
    prices = (FREE, *PRICED)
    ordered = 0
    for seed in seeds:
        kl = [runs[name][seed].kl for name in prices]
        ordered += kl == sorted(kl, reverse=True)
    gains = {name: gain(runs, name, FREE) for name in PRICED}
    best = max(gains, key=lambda name: gains[name].low)
    over = {name: gain(runs, GOLD, name) for name in ARMS if name != GOLD}
    nearest = min(over, key=lambda name: over[name].low)
    return [
        Verdict(len(seeds) >= len(SEEDS), f"{len(seeds)} seeds with every arm (at least {len(SEEDS)})"),
        Verdict(8 * ordered >= 7 * len(seeds), f"final KL falls with beta in {ordered} of {len(seeds)} seeds (7 of 8)"),
        Verdict(gains[best].low > 0, f"final gold of {best} less that of {FREE}: {gains[best]} (above 0)"),
        Verdict(over[nearest].low > 0, f"final gold of {GOLD} less that of {nearest}, the nearest: {over[nearest]}"),
    ]


def draw(runs: Runs, path: Path) -> None:
    """Gold and what is optimised against the root of KL, and where every run ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seeds = whole_seeds(runs)
    # Okabe and Ito's colours, which people of every colour vision tell apart.
    colours = dict(zip(ARMS, ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#444444"), strict=True))
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")

    def curves(axis: Any, name: str, place: int, **style: Any) -> None:
        """Every seed thin, and their mean, point by point."""
        lines = [[(math.sqrt(max(0.0, point[0])), point[place]) for point in runs[name][seed].curve] for seed in seeds]
        for line in lines:
            axis.plot(*zip(*line, strict=True), color=colours[name], linewidth=0.5, alpha=0.3)
        middle = [tuple(map(mean, zip(*points, strict=True))) for points in zip(*lines, strict=True)]
        axis.plot(*zip(*middle, strict=True), color=colours[name], linewidth=2, **style)

    for name in (FREE, *PRICED):
        curves(axes[0], name, 2, label=f"{name}: gold")
        curves(axes[0], name, 1, label=f"{name}: proxy", linestyle="--")
    for name in (FREE, *ENSEMBLES, GOLD):
        curves(axes[1], name, 2, label=name)
    axes[0].set_title("a proxy at three prices of KL")
    axes[1].set_title("gold, where other rewards are optimised")
    for axis in axes[:2]:
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlabel="square root of KL, nats", ylabel="standard deviations before PPO")
        axis.legend(fontsize=8)
    for row, name in enumerate(ARMS):
        gold = [runs[name][seed].gold for seed in seeds]
        interval = mean_interval(gold)
        axes[2].plot(gold, [row] * len(gold), "o", color=colours[name], alpha=0.35, markersize=5)
        reach = [[interval.value - interval.low], [interval.high - interval.value]]
        axes[2].errorbar([interval.value], [row], xerr=reach, color=colours[name], fmt="D", capsize=4)
    axes[2].set_yticks(range(len(ARMS)), list(ARMS))
    axes[2].invert_yaxis()
    axes[2].set(title="final gold: seeds, mean, 95 % interval", xlabel="standard deviations before PPO")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _changed(text: str) -> tuple[str, float]:
    """Name and value of one thing that a pilot has otherwise."""
    name, _, value = text.partition("=")
    kinds = {name: type(value) for name, value in asdict(Protocol()).items()}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=VALUE of one of {', '.join(kinds)}")
    try:
        return name, kinds[name](value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {name} is no {kinds[name].__name__}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="those to run")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="those to run; default all")
    parser.add_argument(
        "--protocol", type=_changed, nargs="+", default=[], metavar="NAME=VALUE", help="another protocol, for a pilot"
    )
    parser.add_argument("--rows", type=Path, default=OUTPUT / "overoptimisation.jsonl", help="where finished runs are")
    parser.add_argument("--plot-only", action="store_true", help="tables and figure of the finished runs alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # At this size more only wait for one another; more seeds at once are better.
    protocol = replace(Protocol(), **dict(options.protocol))
    if not options.plot_only:
        finish(options.rows, protocol, options.seeds, options.arms)
    runs = read_runs(options.rows, protocol)
    if len(whole_seeds(runs)) < 2:
        sys.exit(
            f"bench.overoptimisation: {options.rows} has fewer than 2 seeds with every arm: nothing to compare yet"
        )
    figures, judged = judge(runs)
    draw(runs, OUTPUT / "overoptimisation.png")
    conclude("overoptimisation", judged, {"protocol": asdict(protocol)} | figures)


if __name__ == "__main__":
    main()
