"""The report's plots: small panels over the steps of a run, as SVG to stand in an HTML page.

The SVG keeps its text as text, takes its colours from the page's custom properties (so that light, dark and print are
the page's business) and has ids of its own, so that many fit into one page. Colours are told apart by people of every
colour vision (Okabe and Ito 2008, darkened for contrast on white), and no two lines of a row by colour alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.report.data import Run
from trainer.report.findings import Estimate, Header, Phase
from trainer.report.panels import PANELS, Line, Panel, Row
from trainer.wording import brief, number, percent

# Colours that stand for the page's: replaced in the SVG. Matplotlib leaves out pure black, so none of them is.
_PAGE_COLOURS = {
    "ink": "#000011",
    "muted": "#000012",
    "rule": "#000013",
    "c1": "#000021",
    "c2": "#000022",
    "c3": "#000023",
    "c4": "#000024",
    "c5": "#000025",
    "c6": "#000026",
}
_SIZE_IN = (5.6, 3.1)  # At 72 points an inch: about 400 wide, so that text stays legible on a phone.
_MAX_POINTS = 400  # More are averaged in groups: a plot is 400 dots wide, and the page has to stay small.
_MARKED_POINTS = 40  # Up to so many are drawn as dots, too.

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quartet",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": _PAGE_COLOURS["rule"],
    "axes.labelcolor": _PAGE_COLOURS["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": _PAGE_COLOURS["rule"],
    "grid.linewidth": 0.8,
    "text.color": _PAGE_COLOURS["ink"],
    "xtick.color": _PAGE_COLOURS["muted"],
    "ytick.color": _PAGE_COLOURS["muted"],
    "xtick.major.size": 3.0,
    "xtick.major.width": 0.8,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a plot's key: the colour's custom property, and whether the line is dashed."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn panel: its SVG, the key to its lines and what it shows in words."""

    name: str
    title: str
    svg: str
    legend: tuple[Key, ...]
    words: tuple[str, ...]


def draw_panels(run: Run, header: Header) -> tuple[Plot, ...]:
    """Every panel of which the run logged a figure."""
    logged = set(run.figure_keys())
    plots = []
    for panel in PANELS:
        rows = [
            (row, [line for line in row.lines if line.key in logged])
            for row in panel.rows
            if any(line.key in logged for line in row.lines)
        ]
        if rows:
            plots.append(_draw_panel(run, panel, rows, header))
    return tuple(plots)


def _draw_panel(run: Run, panel: Panel, rows: list[tuple[Row, list[Line]]], header: Header) -> Plot:
    logged = set(run.figure_keys())
    legend: list[Key] = []
    words: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes([1.0 if index else 1.5 for index in range(len(rows))])
        for ax, (row, lines) in zip(axes, rows, strict=True):
            for index, line in enumerate(lines):
                colour = f"c{index + 1}"
                _draw_line(ax, run, line, colour, dashed=index > 0, clip=row.cut_below is not None)
                if len(lines) > 1:
                    legend.append(Key(label=line.label, colour=colour, dashed=index > 0))
                words.append(_line_in_words(run, line))
            if panel.name == "kl" and lines[0].key == "kl/sequence_mean" and header.kl_target is not None:
                _draw_guide(ax, header.kl_target, f"target {brief(header.kl_target)}")
                words.append(f"The target is {brief(header.kl_target)} nats.")
            if _finish_axes(ax, row, ticks=6 if len(rows) == 1 else 4):
                words.append(f"The axis is cut at {brief(row.cut_below or 0.0)}.")
        if any(line.band in logged for _, lines in rows for line in lines):
            words.append(f"The {'bar' if len(run.records) == 1 else 'band'} is the 95 % interval of the mean.")
        _finish_steps(axes[-1], run)
        size = max(_group_size(len(run.series(line.key)[0])) for _, lines in rows for line in lines)
        if size > 1:
            words.append(f"Each point is the mean of {size} steps.")
        svg = _svg(figure, panel.name, f"{panel.title}, by step")
    return Plot(name=panel.name, title=panel.title, svg=svg, legend=tuple(legend), words=tuple(words))


def _axes(heights: Sequence[float]) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=_SIZE_IN, dpi=72)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    # The same frame for every panel, so that steps stand above each other all over the page.
    figure.subplots_adjust(left=0.115, right=0.975, top=0.91, bottom=0.135, hspace=0.45)
    return figure, list(axes)


def _draw_line(ax: Any, run: Run, line: Line, colour: str, *, dashed: bool, clip: bool) -> None:
    steps, values = run.series(line.key)
    size = _group_size(len(steps))
    x, y = grouped(steps, size), grouped(values, size)
    drawn = _PAGE_COLOURS[colour]
    ax.plot(
        x,
        y,
        color=drawn,
        linestyle=(0, (4, 2)) if dashed else "-",
        marker="o" if len(x) <= _MARKED_POINTS else "",
        markersize=7 if len(x) == 1 else 3,
        markeredgewidth=0,
        clip_on=clip,  # Uncut axes show the dots at their edges whole.
        zorder=3,
    )
    if line.band is not None:
        widths = {int(record["step"]): record[line.band] for record in run.records if line.band in record}
        band = [(step, value, widths[step]) for step, value in zip(steps, values, strict=True) if step in widths]
        if len(band) == 1:
            ax.errorbar([band[0][0]], [band[0][1]], yerr=[band[0][2]], color=drawn, capsize=3, linewidth=1.2)
        elif band:
            ax.fill_between(
                grouped([step for step, _, _ in band], size),
                grouped([value - width for _, value, width in band], size),
                grouped([value + width for _, value, width in band], size),
                color=drawn,
                alpha=0.18,
                linewidth=0,
            )


def _group_size(points: int) -> int:
    return math.ceil(points / _MAX_POINTS) if points > _MAX_POINTS else 1


def grouped(values: Sequence[float], size: int) -> list[float]:
    """Means of consecutive groups of ``size``; the last group may be smaller."""
    groups = (values[start : start + size] for start in range(0, len(values), size))
    return [sum(group) / len(group) for group in groups]


def _draw_guide(ax: Any, level: float, label: str) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, low + 1.2 * (level - low)))  # Room for the label above the line.
    ax.axhline(level, color=_PAGE_COLOURS["muted"], linewidth=1, linestyle=(0, (1.5, 2)), zorder=2)
    ax.annotate(
        label,
        (0.0, level),  # On the left: KL starts at 0, so that there the line is far away.
        xycoords=("axes fraction", "data"),
        xytext=(2, 3),
        textcoords="offset points",
        color=_PAGE_COLOURS["muted"],
        fontsize=9.5,
    )


def _finish_axes(ax: Any, row: Row, ticks: int) -> bool:
    """Sets the scale of the values; True where it cut some of them off."""
    low, high = ax.get_ylim()
    if row.floor is not None:
        low = min(low, row.floor)
    if row.whole:
        low, high = -0.04, 1.04  # A line at 100 % would lie on the frame.
    cut = row.cut_below is not None and low < row.cut_below < high
    if row.cut_below is not None and cut:
        low = row.cut_below
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    if row.share:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value) if -1e-9 <= value <= 1.001 else ""))
    else:
        ax.yaxis.set_major_formatter(_tick_label(ax))
    ax.annotate(
        row.unit,
        (0.0, 1.0),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(0, 8),
        textcoords="offset points",
        color=_PAGE_COLOURS["muted"],
        fontsize=9.5,
    )
    return cut


def _tick_label(ax: Any) -> FuncFormatter:
    """Ticks written out where that is short, and as powers of ten otherwise; never with an offset to add up."""

    def text(value: float, _: int) -> str:
        largest = max(abs(bound) for bound in ax.get_ylim())
        if value == 0 or abs(value) < 1e-9 * largest:
            return "0"
        written = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        if largest < 1e-3:
            mantissa, exponent = f"{value:.2e}".split("e")
            written = f"{float(mantissa):g}e{int(exponent)}"
        return written.replace("-", "\N{MINUS SIGN}")

    return FuncFormatter(text)


def _finish_steps(ax: Any, run: Run) -> None:
    first, last = int(run.records[0]["step"]), int(run.records[-1]["step"])
    if first == last:
        ax.set_xlim(first - 1, first + 1)
        ax.set_xticks([first])
    else:
        ax.set_xlim(first, last)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.annotate(
        "step",
        (1.0, 0.0),
        xycoords="axes fraction",
        xytext=(0, -30),
        textcoords="offset points",
        ha="right",
        color=_PAGE_COLOURS["muted"],
        fontsize=9.5,
        annotation_clip=False,
    )


def _line_in_words(run: Run, line: Line) -> str:
    steps, values = run.series(line.key)
    name = line.label[0].upper() + line.label[1:]
    if len(values) == 1:
        return f"{name} {number(values[0])} at step {steps[0]:,d}."
    low, high = min(values), max(values)
    if low == high:
        return f"{name} stays at {number(low)}."
    return f"{name} from {number(values[0])} to {number(values[-1])}, between {number(low)} and {number(high)}."


def draw_time(run: Run, phases: Sequence[Phase]) -> Plot | None:
    """The steps' time, stacked by phase; None where the run logged none."""
    if not phases:
        return None
    steps = [int(record["step"]) for record in run.records if "time/step_s" in record]
    size = _group_size(len(steps))
    x = grouped(steps, size)
    colours = {phase.name: f"c{index + 1}" for index, phase in enumerate(phases)}
    with matplotlib.rc_context(_STYLE):
        figure, (ax,) = _axes([1.0])
        bottom = [0.0] * len(x)
        spacing = (x[-1] - x[0]) / (len(x) - 1) if len(x) > 1 else 1.0
        for phase in phases:
            heights = grouped(phase.seconds, size)
            top = [low + height for low, height in zip(bottom, heights, strict=True)]
            colour = _PAGE_COLOURS[colours[phase.name]]
            if len(x) <= _MARKED_POINTS:
                ax.bar(x, heights, width=0.8 * spacing, bottom=bottom, color=colour)
            else:
                ax.fill_between(x, bottom, top, step="mid", color=colour, linewidth=0)
            bottom = top
        _finish_axes(ax, Row(unit="seconds per step", lines=(), floor=0.0), ticks=6)
        _finish_steps(ax, run)
        margin = 0.5 * spacing if 1 < len(x) <= _MARKED_POINTS else 0.0
        if len(x) > 1:
            ax.set_xlim(x[0] - margin, x[-1] + margin)
        words = ", ".join(f"{phase.label} {percent(phase.share)}" for phase in phases)
        svg = _svg(figure, "time", f"Seconds per step by phase. Of all the time: {words}.")
    legend = tuple(Key(label=phase.label, colour=colours[phase.name]) for phase in phases)
    return Plot(name="time", title="Time of a step by phase", svg=svg, legend=legend, words=())


def draw_intervals(what: str, estimates: Sequence[Estimate]) -> str:
    """Figures of the same kind with their 95 % intervals, one above the other on one scale; "" for fewer than two.

    The last one of two, or the first one of more, stands out: after training, or this model among its baselines.
    """
    if len(estimates) < 2:
        return ""
    chosen = 1 if len(estimates) == 2 else 0
    height_in = 0.47 + 0.34 * len(estimates)
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(_SIZE_IN[0], height_in), dpi=72)
        ax = figure.subplots()
        widest = max(len(estimate.name) for estimate in estimates)
        figure.subplots_adjust(left=0.03 + 0.0145 * widest, right=0.975, top=0.96, bottom=0.34 / height_in)
        for row, estimate in enumerate(estimates):
            colour = _PAGE_COLOURS["c1" if row == chosen else "muted"]
            ax.plot([estimate.low, estimate.high], [-row, -row], color=colour, linewidth=3, solid_capstyle="butt")
            ax.plot([estimate.value], [-row], "o", color=colour, markersize=8, markeredgewidth=0, zorder=4)
        ax.set_ylim(0.6 - len(estimates) - 0.2, 0.6)
        ax.set_yticks([-row for row in range(len(estimates))], [estimate.name for estimate in estimates])
        ax.margins(x=0.06)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("-", "\N{MINUS SIGN}")))
        words = "; ".join(
            f"{estimate.name} {number(estimate.value)}, 95 % interval {number(estimate.low)} to {number(estimate.high)}"
            for estimate in estimates
        )
        return _svg(figure, "intervals", f"{what[0].upper()}{what[1:]}: {words}.")


def _svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an SVG element for a page: named, themed, of the page's font and of any width."""
    out = StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]+)"', text)
    if view_box is None:
        raise ValueError("matplotlib's SVG has no viewBox")
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}">' + text[text.index(">") + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    for property_name, colour in _PAGE_COLOURS.items():
        text = text.replace(colour, f"var(--{property_name})")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    # "font: 10px 'Name', ..." and "font-family: ...": the page's font instead, at the size that was asked for.
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    return re.sub(r">\s+<", "><", text).strip()
