"""What the figures of a run say: the numbers at its head, the verdict in words, and where the time went."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.report.data import Evaluation, Kind, Run
from trainer.statistics import mean_interval
from trainer.wording import decimals_of_intervals, duration, fixed, number, percent


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with the bounds of its 95 % interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Header:
    """The figures at the head of the report. None: the run did not get that far, or did not log it.

    ``..._ci95`` are half widths of 95 % intervals; ``reward_change`` is after less before, paired by prompt.
    """

    kind: Kind
    run: str
    model: str | None
    steps: int
    total_steps: int | None
    episodes: int | None
    wall_time_s: float | None
    tokens_per_s_median: float | None
    rpc_s: float | None
    rpc_share: float | None
    held_out_prompts: int | None
    reward_before: float | None
    reward_before_ci95: float | None
    reward_after: float | None
    reward_after_ci95: float | None
    intervals_disjoint: bool | None
    reward_change: float | None
    reward_change_ci95: float | None
    effect_sft_std: float | None
    reward_first_step: float | None
    reward_last_step: float | None
    kl_spent: float | None
    kl_spent_ci95: float | None
    kl_last_step: float | None
    kl_budget: float
    kl_target: float | None
    beta_first: float | None
    beta_last: float | None
    loss_first: float | None
    loss_last: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    eval_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``kind`` is for machines, ``headline`` for a glance, ``sentences`` for whoever reads on."""

    kind: Literal["improved", "worsened", "unclear", "unfinished", "empty", "trained"]
    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of the steps' time. ``seconds`` is per step, in order; ``share`` is of the time of all steps."""

    name: str
    label: str
    seconds: tuple[float, ...]
    share: float

    @property
    def total_s(self) -> float:
        return sum(self.seconds)


def make_header(run: Run, kl_budget: float) -> Header:
    """Figures from the log and the evaluations; model, target and number of steps from the settings."""
    before, after = run.before, run.after
    step_s, rpc_s = sum(run.series("time/step_s")[1]), sum(run.series("time/rpc_s")[1])
    has_rpc = step_s > 0 and "time/rpc_s" in run.figure_keys()
    rates = run.series("throughput/generated_tokens_per_s")[1] or run.series("tokens_per_s")[1]
    model = run.settings.get("model")
    total_steps = run.settings.get("steps")
    kl_target = run.settings.get("kl_target") if run.settings.get("kl") == "adaptive" else None
    changes = [pair.change for pair in run.pairs if pair.change is not None]
    change = mean_interval(changes) if len(changes) > 1 else None
    episodes = run.last("episodes")
    supervised = run.supervised
    eval_loss = eval_accuracy = eval_loss_before = None
    if supervised is not None:
        eval_loss_before = supervised.before.get("eval_loss")
        eval_loss = supervised.after.get("eval_loss", supervised.eval_loss)
        eval_accuracy = supervised.accuracy.value if supervised.accuracy is not None else None
    return Header(
        kind=run.kind,
        run=run.name,
        model=str(model) if model is not None else None,
        steps=int(run.records[-1]["step"]) if run.records else 0,
        total_steps=total_steps if isinstance(total_steps, int) else None,
        episodes=int(episodes) if episodes is not None else None,
        wall_time_s=run.last("elapsed_s") or step_s or None,
        tokens_per_s_median=statistics.median(rates) if rates else None,
        rpc_s=rpc_s if has_rpc else None,
        rpc_share=rpc_s / step_s if has_rpc else None,
        held_out_prompts=(after.prompts or after.n) if after else (before.prompts or before.n) if before else None,
        reward_before=before.score_mean if before else None,
        reward_before_ci95=before.score_ci95 if before else None,
        reward_after=after.score_mean if after else None,
        reward_after_ci95=after.score_ci95 if after else None,
        intervals_disjoint=_disjoint(before, after),
        reward_change=change.value if change else None,
        reward_change_ci95=(change.high - change.low) / 2 if change else None,
        effect_sft_std=_effect(before, after),
        reward_first_step=run.first("reward/score_mean"),
        reward_last_step=run.last("reward/score_mean"),
        kl_spent=after.kl_sequence_mean if after else None,
        kl_spent_ci95=after.kl_ci95 if after else None,
        kl_last_step=run.last("kl/sequence_mean"),
        kl_budget=kl_budget,
        kl_target=float(kl_target) if isinstance(kl_target, (int, float)) else None,
        beta_first=run.first("kl/beta"),
        beta_last=run.last("kl/beta"),
        loss_first=run.first("loss"),
        loss_last=run.last("loss"),
        eval_loss_before=eval_loss_before,
        eval_loss=eval_loss if eval_loss is not None else run.last("eval_loss"),
        eval_accuracy=eval_accuracy if eval_accuracy is not None else run.last("eval_accuracy"),
    )


def estimates(run: Run) -> tuple[str, tuple[Estimate, ...]]:
    """The held-out figures to compare at a glance, with what they are: rewards before and after, or accuracies."""
    if run.supervised is not None and run.supervised.accuracy is not None:
        shares = {"this model": run.supervised.accuracy, **run.supervised.baselines}
        found = [Estimate(name=n, value=s.value, low=s.low, high=s.high) for n, s in shares.items()]
        return "held-out pairs ranked as annotated", tuple(found)
    found = [
        Estimate(name=name, value=e.score_mean, low=e.score_mean - e.score_ci95, high=e.score_mean + e.score_ci95)
        for name, e in (("before", run.before), ("after", run.after))
        if e is not None and e.score_ci95 is not None
    ]
    return "held-out mean reward", tuple(found)


def _disjoint(before: Evaluation | None, after: Evaluation | None) -> bool | None:
    if before is None or after is None or before.score_ci95 is None or after.score_ci95 is None:
        return None
    return abs(after.score_mean - before.score_mean) > before.score_ci95 + after.score_ci95


def _effect(before: Evaluation | None, after: Evaluation | None) -> float | None:
    if before is None or after is None or not before.score_std:
        return None
    return (after.score_mean - before.score_mean) / before.score_std


# The verdict


def judge(header: Header) -> Verdict:
    """Says in words what came of the run, and no more than the intervals carry."""
    if header.steps == 0:
        return Verdict(kind="empty", headline="No step is finished yet", sentences=_before_sentence(header))
    if header.reward_before is not None and header.reward_after is not None:
        return _held_out_verdict(header, header.reward_before, header.reward_after)
    if header.kind in ("ppo", "online-dpo"):
        missing = "after" if header.reward_after is None else "before"
        of = f" of {header.total_steps:,d}" if header.total_steps else ""
        return Verdict(
            kind="unfinished",
            headline=f"Step {header.steps:,d}{of}: not judged yet",
            sentences=(
                *_before_sentence(header),
                *_training_sentence(header),
                f"There is no held-out evaluation {missing} training, so nothing is said here about what it brought.",
            ),
        )
    return _supervised_verdict(header)


def _before_sentence(header: Header) -> tuple[str, ...]:
    if header.reward_before is None:
        return ()
    mean = with_interval(header.reward_before, header.reward_before_ci95)
    return (f"Before training the held-out mean reward is {mean}.",)


def _training_sentence(header: Header) -> tuple[str, ...]:
    if header.reward_first_step is None or header.reward_last_step is None or header.steps < 2:
        return ()
    return (
        f"In training the mean score went from {number(header.reward_first_step)} in the first step "
        f"to {number(header.reward_last_step)} in the last.",
    )


def _held_out_verdict(header: Header, before: float, after: float) -> Verdict:
    widths = (header.reward_before_ci95, header.reward_after_ci95)
    old, new = (with_interval(mean, width, *widths) for mean, width in zip((before, after), widths, strict=True))
    old_mean, new_mean = (text.partition(" (")[0] for text in (old, new))
    sentence = f"On {header.held_out_prompts:,d} held-out prompts the mean reward went from {old} to {new}. "
    change, change_width = header.reward_change, header.reward_change_ci95
    paired = change is not None and change_width is not None and abs(change) > change_width
    kind: Literal["improved", "worsened", "unclear"] = "unclear"
    headline = f"No clear change in held-out reward: {old_mean} before, {new_mean} after"
    if header.intervals_disjoint or paired:
        kind = "improved" if after > before else "worsened"
        headline = f"Held-out reward {'rose' if after > before else 'fell'} from {old_mean} to {new_mean}"
    if header.intervals_disjoint is not None:
        sentence += f"The 95 % intervals {'are disjoint' if header.intervals_disjoint else 'overlap'}."
    if not header.intervals_disjoint and change is not None:
        sentence += f" Prompt by prompt the change is {with_interval(change, change_width)}."
    return Verdict(kind=kind, headline=headline, sentences=(sentence, *_cost_sentence(header)))


def _cost_sentence(header: Header) -> tuple[str, ...]:
    sentences = []
    if header.effect_sft_std is not None:
        sentences.append(
            f"The means differ by {signed(header.effect_sft_std)} standard deviations of the SFT policy's scores."
        )
    if header.kl_spent is not None:
        kl = with_interval(header.kl_spent, header.kl_spent_ci95)
        sentences.append(f"The trained policy's KL to the reference is {kl}, in nats per response.")
    return (" ".join(sentences),) if sentences else ()


def _supervised_verdict(header: Header) -> Verdict:
    sentences = []
    if header.loss_first is not None and header.loss_last is not None:
        sentences.append(f"The training loss went from {number(header.loss_first)} to {number(header.loss_last)}.")
    headline = f"{header.steps:,d} {'step' if header.steps == 1 else 'steps'} done"
    if header.eval_accuracy is not None:
        headline = f"{percent(header.eval_accuracy)} of held-out pairs are ranked as annotated"
        if header.eval_loss is not None:
            sentences.append(f"The held-out loss is {number(header.eval_loss)}.")
    elif header.eval_loss is not None and header.eval_loss_before is not None:
        moved = "fell" if header.eval_loss < header.eval_loss_before else "did not fall:"
        headline = f"Held-out loss {moved} from {number(header.eval_loss_before)} to {number(header.eval_loss)}"
    elif header.eval_loss is not None:
        headline = f"Held-out loss {number(header.eval_loss)}"
    return Verdict(kind="trained", headline=headline, sentences=(" ".join(sentences),) if sentences else ())


def with_interval(mean: float, half_width: float | None, *alike: float | None) -> str:
    """The mean and its interval, "1.46 (95 % interval 1.27 to 1.65)", to the decimals that the half widths carry."""
    decimals = decimals_of_intervals(*(width for width in (half_width, *alike) if width is not None))
    if half_width is None:
        return fixed(mean, decimals)
    return f"{fixed(mean, decimals)} (95 % interval {interval(mean, half_width, decimals)})"


def interval(mean: float, half_width: float, decimals: int | None = None) -> str:
    """The bounds in words, "1.27 to 1.65"."""
    decimals = decimals_of_intervals(half_width) if decimals is None else decimals
    return f"{fixed(mean - half_width, decimals)} to {fixed(mean + half_width, decimals)}"


def signed(value: float) -> str:
    """With its sign, to two decimals."""
    return ("+" if value >= 0.005 else "") + fixed(value, 2)


# Where the time went


def split_time(run: Run) -> tuple[Phase, ...]:
    """The steps' time in parts that add up to the step; none where the log has no times.

    ``time/rpc_s`` is what the rollout and the publishing took beyond the work of the services: the rest of the two,
    beside ``time/service_work_s``, is the policy service putting new weights in place. Where the log does not say what
    the services did, rollout and publishing stay whole.
    """
    records = [record for record in run.records if "time/step_s" in record]
    total_s = sum(record["time/step_s"] for record in records)
    if not total_s:
        return ()
    parts: list[tuple[str, str, Callable[[Mapping[str, float]], float]]]
    if all("time/service_work_s" in record and "time/rpc_s" in record for record in records):
        parts = [
            ("services", "services at work", lambda t: t["time/service_work_s"]),
            ("rpc", "RPC", lambda t: t["time/rpc_s"]),
            ("publish", "new weights put in place", _publish_work_s),
        ]
    else:
        parts = [
            ("rollout", "rollout", lambda t: t.get("time/rollout_s", 0.0)),
            ("publish", "publishing", lambda t: t.get("time/publish_s", 0.0)),
        ]
    parts += [
        ("forward", "trainer: forward", lambda t: t.get("time/forward_s", 0.0)),
        ("update", "trainer: update", lambda t: t.get("time/update_s", 0.0)),
    ]
    columns = [[max(0.0, seconds(record)) for record in records] for _, _, seconds in parts]
    known_s = [sum(row) for row in zip(*columns, strict=True)]
    columns.append([max(0.0, record["time/step_s"] - s) for record, s in zip(records, known_s, strict=True)])
    names = [(name, label) for name, label, _ in parts] + [("other", "other")]
    return tuple(
        Phase(name=name, label=label, seconds=tuple(column), share=sum(column) / total_s)
        for (name, label), column in zip(names, columns, strict=True)
        if sum(column) > 0
    )


def _publish_work_s(times: Mapping[str, float]) -> float:
    moved_s = times.get("time/rollout_s", 0.0) + times.get("time/publish_s", 0.0)
    # Below a microsecond it is what rounding left.
    work_s = moved_s - times["time/service_work_s"] - times["time/rpc_s"]
    return work_s if work_s > 1e-6 else 0.0


def time_sentence(header: Header) -> str:
    """The share spent in RPC, in words; empty where the log does not tell."""
    if header.rpc_share is None or header.rpc_s is None:
        return ""
    return (
        f"{percent(header.rpc_share)} of the steps' time, {duration(header.rpc_s)} in all, "
        "went into RPC: neither model work nor waiting for it."
    )
