"""The report of a run: one HTML file that needs nothing beside it, and the same figures as JSON.

The page has no scripts, loads nothing and forbids itself to. It can be made of a run that is still going on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from trainer.files import replace_file
from trainer.monitor_alarms import Alarm
from trainer.report.alarms import bounds_of, find_alarms
from trainer.report.data import Evaluation, Run, Sample, Supervised, flat, read_run
from trainer.report.findings import (
    Header,
    Phase,
    Verdict,
    estimates,
    interval,
    judge,
    make_header,
    signed,
    split_time,
    time_sentence,
)
from trainer.report.plots import draw_intervals, draw_panels, draw_time
from trainer.report_settings import ReportSettings
from trainer.wording import brief, decimals_of_intervals, duration, fixed, number, percent

PAGE_FILE = "report.html"
FIGURES_FILE = "report.json"

_OPEN_SAMPLES = 8  # Samples in sight; the rest unfold.
_LONG_TEXT = 700  # Characters beyond which a text folds.
_SHOWN_TEXT = 400  # Characters of a folded text that stay in sight.


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where a report is: for people, and for machines. As a text it is the page's path."""

    page: Path
    figures: Path

    def __str__(self) -> str:
        return str(self.page)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run and what there is to say about it."""

    run: Run
    header: Header
    verdict: Verdict
    alarms: tuple[Alarm, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One figure for the page: ``value`` as the JSON has it under ``key``, ``text`` as a person reads it."""

    key: str
    label: str
    value: float | str
    text: str
    note: str = ""


def write_report(run_dir: Path, *, kl_budget: float | None = None) -> ReportFiles:
    """Writes ``report.html`` and ``report.json`` into the run's folder.

    Args:
        run_dir: a run's folder, finished or not.
        kl_budget: nats a response above which there is an alarm; None: the run's own --alarm-kl.

    Raises:
        TrainerError: the folder holds no run, one of its files is damaged, or the report can't be written.
    """
    run = read_run(run_dir)
    bounds = bounds_of(run, kl_budget)
    header = make_header(run, bounds.alarm_kl)
    report = Report(
        run=run, header=header, verdict=judge(header), alarms=find_alarms(run, header, bounds), phases=split_time(run)
    )
    files = ReportFiles(page=run_dir / PAGE_FILE, figures=run_dir / FIGURES_FILE)
    figures = json.dumps(_figures(report), allow_nan=False, ensure_ascii=False, indent=1)
    # Whole or not at all: somebody may be reading the report of a run that goes on.
    replace_file(files.figures, figures + "\n")
    replace_file(files.page, _render(report))
    return files


def main(settings: ReportSettings) -> None:
    """Writes the report and prints where it is.

    Raises:
        TrainerError: as ``write_report``.
    """
    files = write_report(settings.run_dir, kl_budget=settings.kl_budget)
    sys.stdout.write(f"report: {files.page}\nfigures: {files.figures}\n")


# The figures as JSON


def _figures(report: Report) -> dict[str, Any]:
    run = report.run
    evaluations: dict[str, Evaluation | None] = {"before": run.before, "after": run.after}
    return {
        "header": asdict(report.header),
        "verdict": asdict(report.verdict),
        "alarms": [asdict(alarm) for alarm in report.alarms],
        "time": [
            {"name": phase.name, "label": phase.label, "total_s": phase.total_s, "share": phase.share}
            for phase in report.phases
        ],
        "evaluation": {name: found.model_dump(exclude={"samples"}) for name, found in evaluations.items() if found}
        or _dumped(run.supervised),
        "series": {
            "step": [int(record["step"]) for record in run.records],
            **{key: [record.get(key) for record in run.records] for key in run.figure_keys()},
        },
        "samples": [
            {"prompt": pair.prompt, "before": _dumped_sample(pair.before), "after": _dumped_sample(pair.after)}
            for pair in run.pairs
        ],
        "settings": dict(run.settings),
    }


def _dumped(supervised: Supervised | None) -> dict[str, Any]:
    return dict(flat(supervised.model_dump(exclude_unset=True))) if supervised else {}


def _dumped_sample(sample: Sample | None) -> dict[str, Any] | None:
    return sample.model_dump(exclude={"prompt"}) if sample else None


# The page


def _render(report: Report) -> str:
    run, header = report.run, report.header
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": lambda value: typeset(number(value)),
        "brief": lambda value: typeset(brief(value)),
        "percent": lambda value: typeset(percent(value)),
        "signed": lambda value: typeset(signed(value)),
        "nats": lambda value: typeset(fixed(value, 2)),
        "typeset": typeset,
        "duration": duration,
        "visible": visible,
        "setting": lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
    }
    what, estimated = estimates(run)
    changes = [pair.change for pair in run.pairs if pair.change is not None]
    return environment.get_template("report.html.j2").render(
        run=run,
        header=header,
        verdict=report.verdict,
        alarms=report.alarms,
        facts=_facts(header),
        interval_plot=Markup(draw_intervals(what, estimated)),
        interval_title=what,
        plots=draw_panels(run, header) if run.records else (),
        time_plot=draw_time(run, report.phases),
        time_rows=report.phases,
        time_sentence=time_sentence(header),
        evaluation=_evaluation_rows(run, header),
        supervised=_dumped(run.supervised),
        better=(sum(change > 0 for change in changes), len(changes)) if changes else None,
        open_samples=_OPEN_SAMPLES,
        long_text=_LONG_TEXT,
        shown_text=_SHOWN_TEXT,
        extremes=_extremes(run),
    )


def typeset(text: str) -> str:
    """Minus signs for hyphens before figures, but not in words such as 1e-5; and no line that begins with a %."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text))


def visible(text: str) -> Markup:
    """A sample's text, escaped, with control characters drawn as their Unicode pictures instead of obeyed."""
    pictured = "".join(
        chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else "\u2421" if char == "\x7f" else char
        for char in text
    )
    return escape(pictured)


def _facts(header: Header) -> list[Fact]:
    """The header's figures that a person looks for first, as far as they are known."""
    of = f"of {header.total_steps:,d}" if header.total_steps else ""
    wanted: list[tuple[str, str, Callable[[Any], str], str]] = [
        ("effect_sft_std", "Effect", signed, "standard deviations of the SFT policy's scores"),
        ("kl_spent", "KL spent", number, _kl_note(header)),
        ("tokens_per_s_median", "Tokens per second", number, "median of the steps"),
        ("rpc_share", "Spent in RPC", percent, "of the steps' time"),
        ("eval_accuracy", "Held-out accuracy", percent, "of the pairs"),
        ("eval_loss", "Held-out loss", number, ""),
        ("loss_last", "Last training loss", number, ""),
        ("steps", "Steps", number, of),
        ("wall_time_s", "Wall time", duration, ""),
        ("beta_last", "KL price beta", number, _beta_note(header)),
        ("model", "Model", str, ""),
    ]
    if header.kl_spent is None:
        wanted[1] = ("kl_last_step", "KL in the last step", number, "nats per response, in training")
    return [
        Fact(key=key, label=label, value=value, text=typeset(written(value)), note=typeset(note))
        for key, label, written, note in wanted
        if (value := getattr(header, key)) is not None
    ]


def _kl_note(header: Header) -> str:
    note = "nats per response, held out"
    if header.kl_spent is None or header.kl_spent_ci95 is None:
        return note
    return f"{note}, 95 % interval {interval(header.kl_spent, header.kl_spent_ci95)}"


def _beta_note(header: Header) -> str:
    if header.beta_first is None:
        return ""
    if header.kl_target is not None:
        return f"from {number(header.beta_first)}, adaptive, target {brief(header.kl_target)} nats"
    return (
        "fixed, reward per nat of KL" if header.beta_first == header.beta_last else f"from {number(header.beta_first)}"
    )


def _evaluation_rows(run: Run, header: Header) -> list[dict[str, Any]]:
    """The two evaluations line by line; figures that neither has are left out."""
    lines: list[tuple[str, str, Callable[[Any], str], str | None]] = [
        ("n", "prompts", number, None),
        ("score_mean", "mean reward", number, "score_ci95"),
        ("score_std", "standard deviation of the reward", number, None),
        ("judge_mean", "mean score of the judge", number, "judge_ci95"),
        ("spread_mean", "spread of the reward ensemble", number, None),
        ("kl_sequence_mean", "KL, nats per response, sampled", number, "kl_ci95"),
        ("kl_exact_mean", "KL, nats per response, over the whole vocabulary", number, "kl_exact_ci95"),
        ("entropy_mean", "entropy, nats per token", number, None),
        ("demonstration_perplexity", "perplexity of held-out demonstrations", number, None),
        ("length_mean", "mean length, tokens", number, None),
        ("length_p05", "5th percentile of the length", number, None),
        ("length_p50", "median length", number, None),
        ("length_p95", "95th percentile of the length", number, None),
        ("length_correlation", "correlation of reward and length", signed, None),
        ("length_correlation_within", "the same within prompts", signed, None),
        ("finished_share", "finished responses", percent, None),
        ("distinct_1", "distinct tokens", percent, None),
        ("distinct_2", "distinct pairs of tokens", percent, None),
        ("distinct_3", "distinct triples of tokens", percent, None),
        ("unique_share", "unique responses", percent, None),
        ("repeated_4_share", "repeated 4-grams within a response", percent, None),
        ("self_bleu_4", "self-BLEU-4", number, None),
        ("tokens_per_s", "tokens per second", number, None),
    ]
    rows: list[dict[str, Any]] = []
    for key, label, written, half_width_key in lines:
        cells = [_cell(evaluation, key, written, half_width_key) for evaluation in (run.before, run.after)]
        if any(cell is not None for cell in cells):
            rows.append({"key": key, "label": label, "cells": cells})
        if key == "score_mean" and header.reward_change is not None:
            change = _estimate(header.reward_change, header.reward_change_ci95, number)
            rows.append({"key": "score_change", "label": "change, paired by prompt", "cells": [None, change]})
    return rows


def _cell(
    evaluation: Evaluation | None, key: str, written: Callable[[Any], str], half_width_key: str | None
) -> Mapping[str, Any] | None:
    value = getattr(evaluation, key) if evaluation is not None else None
    if value is None:
        return None
    return _estimate(value, getattr(evaluation, half_width_key) if half_width_key else None, written)


def _estimate(value: float, half_width: float | None, written: Callable[[Any], str]) -> Mapping[str, Any]:
    if half_width is None:
        return {"value": value, "text": typeset(written(value)), "interval": ""}
    text = fixed(value, decimals_of_intervals(half_width))
    return {"value": value, "text": typeset(text), "interval": typeset(interval(value, half_width))}


def _extremes(run: Run) -> Sequence[Mapping[str, Any]]:
    """First, last, lowest and highest value of every figure, with the steps of the latter two."""
    found = []
    for key in run.figure_keys():
        steps, values = run.series(key)
        low, high = min(values), max(values)
        found.append(
            {
                "key": key,
                "first": values[0],
                "last": values[-1],
                "lowest": low,
                "lowest_step": steps[values.index(low)],
                "highest": high,
                "highest_step": steps[values.index(high)],
            }
        )
    return found
