"""The report against numbers computed anew from the run's own files, hostile and damaged ones among them."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.synthetic_runs import write_reward_run, write_run, write_sft_run
from trainer.errors import TrainerError
from trainer.report import write_report
from trainer.report.findings import with_interval
from trainer.report.page import typeset
from trainer.report.plots import grouped

SVG = "{http://www.w3.org/2000/svg}"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, texts, and the figures that the page marks as such."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.figures: dict[str, float] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "data":
            with_text = str(attributes["value"])
            if re.fullmatch(r"-?\d.*", with_text):
                self.figures.setdefault(str(attributes["data-key"]), float(with_text))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def plots(self) -> list[str]:
        return [str(a["id"]).removeprefix("plot-") for tag, a in self.tags if tag == "figure" and "id" in a]


def report(folder: Path, **options: Any) -> tuple[Page, dict[str, Any]]:
    files = write_report(folder, **options)
    return Page(files.page.read_text(encoding="utf-8")), json.loads(files.figures.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    return folder, write_run(folder, steps=30, total_steps=30)


def column(records: list[dict[str, float]], key: str) -> np.ndarray:
    return np.array([record[key] for record in records])


def test_the_header_is_what_the_files_say(healthy):
    folder, records = healthy
    _, figures = report(folder)
    header = figures["header"]
    before, after = (json.loads((folder / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    old, new = (np.array([sample["score"] for sample in found["samples"]]) for found in (before, after))
    change = new - old
    half = stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / math.sqrt(len(change))
    expected = {
        "reward_before": old.mean(),
        "reward_after": new.mean(),
        "reward_before_ci95": 1.96 * old.std(ddof=1) / 8,
        "reward_change": change.mean(),
        "reward_change_ci95": half,
        "effect_sft_std": (new.mean() - old.mean()) / old.std(ddof=1),
        "kl_spent": np.mean([sample["kl"] for sample in after["samples"]]),
        "kl_last_step": records[-1]["kl/sequence_mean"],
        "tokens_per_s_median": statistics.median(column(records, "throughput/generated_tokens_per_s")),
        "rpc_share": column(records, "time/rpc_s").sum() / column(records, "time/step_s").sum(),
        "wall_time_s": records[-1]["elapsed_s"],
        "beta_first": records[0]["kl/beta"],
        "beta_last": records[-1]["kl/beta"],
        "kl_target": 6.0,
        "kl_budget": 20.0,
    }
    assert {key: header[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert (header["steps"], header["total_steps"], header["episodes"]) == (30, 30, 128 * 30)
    assert (header["kind"], header["model"], header["held_out_prompts"]) == ("ppo", "models/help-desk-sft", 64)
    assert header["intervals_disjoint"] is True
    assert figures["verdict"]["kind"] == "improved"


def test_the_json_holds_every_step_every_sample_and_the_settings(healthy):
    folder, records = healthy
    _, figures = report(folder)
    assert [
        dict(zip(figures["series"], row, strict=True)) for row in zip(*figures["series"].values(), strict=True)
    ] == (records)
    before, after = (json.loads((folder / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    for pair, old, new in zip(figures["samples"], before["samples"], after["samples"], strict=True):
        assert {"prompt": pair["prompt"], **pair["before"]} == old
        assert {"prompt": pair["prompt"], **pair["after"]} == new
    assert figures["evaluation"]["after"]["kl_ci95"] == after["kl_ci95"]
    assert figures["settings"]["services.reward.model"] == "models/help-desk-reward"


def test_figures_on_the_page_are_those_of_the_json(healthy):
    folder, _ = healthy
    page, figures = report(folder)
    header = figures["header"]
    for key in ("effect_sft_std", "kl_spent", "tokens_per_s_median", "rpc_share", "steps", "wall_time_s", "beta_last"):
        assert page.figures[key] == header[key], key
    for phase in figures["time"]:
        assert page.figures[f"time/{phase['name']}"] == phase["total_s"]
    for when in ("before", "after"):
        for key in ("score_mean", "kl_sequence_mean", "length_mean", "finished_share", "distinct_2", "unique_share"):
            assert page.figures[f"{when}/{key}"] == figures["evaluation"][when][key]
    assert page.figures["after/score_change"] == header["reward_change"]
    mean, half = header["reward_after"], header["reward_after_ci95"]
    assert f"{mean:.2f} (95\N{NO-BREAK SPACE}% interval {mean - half:.2f} to {mean + half:.2f})" in "".join(page.texts)


def test_phases_add_up_to_the_steps(healthy):
    folder, records = healthy
    _, figures = report(folder)
    times = {phase["name"]: phase["total_s"] for phase in figures["time"]}
    transport = (
        column(records, "time/rpc_s") - column(records, "time/rollout_s") + column(records, "time/service_work_s")
    )
    assert times == pytest.approx(
        {
            "services": column(records, "time/service_work_s").sum(),
            "rpc": column(records, "time/rpc_s").sum(),
            "publish": (column(records, "time/publish_s") - transport).sum(),
            "forward": column(records, "time/forward_s").sum(),
            "update": column(records, "time/update_s").sum(),
            "other": column(records, "time/other_s").sum(),
        },
        rel=1e-9,
    )
    assert sum(times.values()) == pytest.approx(column(records, "time/step_s").sum(), rel=1e-9)
    assert sum(phase["share"] for phase in figures["time"]) == pytest.approx(1.0, rel=1e-9)


def test_publishing_that_is_all_counted_as_rpc_is_no_phase_of_its_own(tmp_path):
    whole = {
        step: {
            "time/step_s": 10.0,
            "time/rollout_s": 6.0,
            "time/service_work_s": 5.5,
            "time/publish_s": 0.25,
            "time/rpc_s": 0.75,
            "time/forward_s": 1.0,
            "time/update_s": 2.0,
            "time/other_s": 0.75,
        }
        for step in (1, 2)
    }
    write_run(tmp_path, steps=2, overrides=whole)
    _, figures = report(tmp_path)
    assert {phase["name"]: phase["share"] for phase in figures["time"]} == pytest.approx(
        {"services": 0.55, "rpc": 0.075, "forward": 0.1, "update": 0.2, "other": 0.075}
    )


def test_without_the_services_times_the_rollout_stays_one_phase(tmp_path):
    records = write_run(tmp_path, steps=3, without=("time/service_work_s", "time/rpc_s"))
    page, figures = report(tmp_path)
    assert figures["header"]["rpc_share"] is None
    assert next(phase for phase in figures["time"] if phase["name"] == "rollout")["total_s"] == pytest.approx(
        column(records, "time/rollout_s").sum()
    )
    assert "time" in page.plots


def test_every_plot_that_a_ppo_run_owes_is_there(healthy):
    page, _ = report(healthy[0])
    assert {"reward", "kl", "entropy", "length", "value", "time"} <= set(page.plots)
    text = "".join(page.texts)
    assert "beta, reward per nat" in text
    assert "value loss" in text
    assert "went into RPC" in text


def svg_of(page_text: str, plot: str) -> ElementTree.Element:
    figure = page_text[page_text.index(f'<figure id="plot-{plot}">') :]
    text = figure[figure.index("<svg") : figure.index("</svg>") + len("</svg>")]
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def points(path: str) -> np.ndarray:
    return np.array([[float(x), float(y)] for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)])


def drawn_line(svg: ElementTree.Element, count: int) -> np.ndarray:
    """The path in the first colour that has ``count`` points."""
    found = [
        points(path.get("d", ""))
        for path in svg.iter(f"{SVG}path")
        if "stroke: var(--c1)" in path.get("style", "") and "fill: none" in path.get("style", "")
    ]
    return next(line for line in found if len(line) == count)


@pytest.mark.parametrize(
    ("plot", "key"),
    [
        ("reward", "reward/score_mean"),
        ("kl", "kl/sequence_mean"),
        ("entropy", "policy/entropy_mean"),
        ("length", "response/length_mean"),
        ("value", "value/loss"),
    ],
)
def test_a_plots_line_is_its_figure_to_scale(healthy, plot, key):
    folder, records = healthy
    text = write_report(folder).page.read_text()
    line = drawn_line(svg_of(text, plot), len(records))
    values = column(records, key)
    for drawn, true in ((line[:, 0], column(records, "step")), (line[:, 1], values)):
        slope, intercept = np.polyfit(true, drawn, 1)
        assert np.abs(slope * true + intercept - drawn).max() < 0.01  # Of 223 points' height.
    assert slope < 0  # SVG counts downwards.


def test_the_rewards_band_is_its_95_percent_interval(healthy):
    folder, records = healthy
    svg = svg_of(write_report(folder).page.read_text(), "reward")
    line = drawn_line(svg, len(records))
    slope, intercept = np.polyfit(column(records, "reward/score_mean"), line[:, 1], 1)
    use = next(use for use in svg.iter(f"{SVG}use") if "fill: var(--c1); fill-opacity" in use.get("style", ""))
    path = next(path for path in svg.iter(f"{SVG}path") if f"#{path.get('id')}" == use.get("href"))
    offset = np.array([float(use.get("x", "nan")), float(use.get("y", "nan"))])
    band = points(path.get("d", "")) + offset
    values = (band[:, 1] - intercept) / slope
    for index, record in enumerate(records):
        at_step = values[np.abs(band[:, 0] - line[index, 0]) < 0.01]
        mean, half = record["reward/score_mean"], record["reward/score_ci95"]
        assert at_step.min() == pytest.approx(mean - half, abs=1e-3)
        assert at_step.max() == pytest.approx(mean + half, abs=1e-3)


def test_long_runs_are_drawn_as_means_of_groups(tmp_path):
    records = write_run(tmp_path, steps=900, total_steps=900, prompts=4)
    text = write_report(tmp_path).page.read_text()
    assert "Each point is the mean of 3 steps." in text
    assert grouped([1.0, 2.0, 6.0, 7.0], 3) == [3.0, 7.0]
    values = column(records, "policy/entropy_mean")
    assert json.loads((tmp_path / "report.json").read_text())["series"]["policy/entropy_mean"] == list(values)
    line = next(
        points(path.get("d", ""))
        for path in svg_of(text, "entropy").iter(f"{SVG}path")
        if "stroke: var(--c1)" in path.get("style", "") and "fill: none" in path.get("style", "")
    )
    means = values.reshape(300, 3).mean(axis=1)
    # Zero is the lowest of this axis, so ratios of heights are ratios of values.
    bottom = float(re.search(r"([\d.]+) *\nL [\d.]+ \1", text[text.index("entropy-patch_3") :])[1])
    assert len(line) <= 300
    assert (bottom - line[0, 1]) / (bottom - line[-1, 1]) == pytest.approx(means[0] / means[-1], abs=1e-4)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=https://example.com/x.png onerror=alert(1)>',
    "</td></tr></table></main><h1>taken over",
    "{{ 7 * 7 }} {% raw %} & &amp; &lt;b&gt;",
    "a\x1b[31mred\x00 and \x7f",
    "half a pair: \ud83d end",
    "\u202egnp.exe",
]


def test_hostile_text_stays_text_wherever_it_stands(tmp_path):
    texts = dict(enumerate(HOSTILE))
    write_run(
        tmp_path,
        steps=2,
        prompts=len(HOSTILE),
        texts_before=texts,
        texts_after=texts,
        prompt_texts=texts,
        settings={"model": HOSTILE[0], "<i>name</i>": HOSTILE[1], "note": HOSTILE[2]},
    )
    page, figures = report(tmp_path)
    seen = "".join(page.texts)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "embed", "link", "i>name"})
    assert [tag for tag, _ in page.tags].count("h1") == 1
    for attribute in (name for _, attributes in page.tags for name in attributes):
        assert not attribute.startswith("on"), attribute
    for text in HOSTILE[:4]:
        assert page.texts.count(text) >= 3  # Prompt, before, after.
    assert "a\N{SYMBOL FOR ESCAPE}[31mred\N{SYMBOL FOR NULL} and \N{SYMBOL FOR DELETE}" in seen
    assert "half a pair: \N{REPLACEMENT CHARACTER} end" in seen
    assert "<i>name</i>" in seen
    assert [pair["after"]["response"] for pair in figures["samples"][:5]] == HOSTILE[:5]


def test_long_texts_fold_and_stay_whole(tmp_path):
    long = "0123456789" * 300
    write_run(tmp_path, steps=1, prompts=2, texts_after={0: long, 1: ""})
    page, _ = report(tmp_path)
    assert long in page.texts
    assert " … all 3,000 characters" in page.texts
    assert "(empty)" in page.texts


def test_the_page_asks_for_nothing_from_anywhere(healthy):
    text = write_report(healthy[0]).page.read_text()
    page = Page(text)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert str(attributes.get(name, "#")).startswith("#"), (tag, name)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "https://" not in text


def test_ids_are_unique_and_references_lead_to_one(healthy):
    text = write_report(healthy[0]).page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("evaluation_before.json", "score_mean", math.nan, "score_mean is nan: must be a finite number"),
        ("evaluation_after.json", "kl_ci95", math.inf, "kl_ci95 is inf: must be a finite number"),
        ("evaluation_after.json", "score_ci95", -0.1, "score_ci95 is -0.1: Input should be greater than or equal to 0"),
        (
            "evaluation_after.json",
            "finished_share",
            1.5,
            "finished_share is 1.5: Input should be less than or equal to 1",
        ),
        ("evaluation_after.json", "score_mean", None, "score_mean is None: Input should be a valid number"),
        ("evaluation_after.json", "n", 0, "n is 0: Input should be greater than or equal to 1"),
        ("evaluation_after.json", "samples", [{"prompt": "p"}], "samples.0.response is missing"),
        (
            "evaluation_after.json",
            "samples",
            [{"prompt": "p", "response": "r", "score": math.nan}],
            "samples.0.score is nan: must be a finite number",
        ),
        (
            "evaluation_after.json",
            "samples",
            [{"prompt": "another", "response": "r", "score": 1.0}],
            "is of other prompts than evaluation_before.json: none is in both",
        ),
    ],
)
def test_a_bad_field_is_named_with_its_file_value_and_bound(tmp_path, name, field, value, message):
    write_run(tmp_path, steps=2, prompts=3)
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(content | {field: value}))
    with pytest.raises(TrainerError) as caught:
        write_report(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "kl/beta": NaN}\n', "line 1: kl/beta is nan: it must be a finite number"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "line 2: not JSON"),
        ("settings.json", "{", "settings.json is not JSON"),
        ("settings.json", "[1]", "settings.json must hold an object, not list"),
        ("evaluation_before.json", '{"n": 3}', "score_mean is missing"),
        ("evaluation_before.json", "\xff", "evaluation_before.json is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    write_run(tmp_path, steps=2, prompts=3)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(TrainerError) as caught:
        write_report(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(TrainerError, match=r"holds no run: there is no metrics\.jsonl in it"):
        write_report(tmp_path)


def test_an_interrupted_run_is_reported_without_a_judgement(tmp_path):
    records = write_run(tmp_path, steps=7, total_steps=50, after_mean=None)
    page, figures = report(tmp_path)
    assert figures["verdict"]["kind"] == "unfinished"
    assert figures["verdict"]["headline"] == "Step 7 of 50: not judged yet"
    assert figures["header"]["reward_after"] is None
    assert "after" not in figures["evaluation"]
    assert page.figures["kl_last_step"] == records[-1]["kl/sequence_mean"]
    assert page.texts.count("not evaluated yet") == 64
    assert {"reward", "kl", "time"} <= set(page.plots)


def test_a_run_without_a_finished_step_or_an_evaluation_is_reported(tmp_path):
    write_run(tmp_path, steps=0, before_mean=None, after_mean=None)
    page, figures = report(tmp_path)
    assert figures["verdict"]["kind"] == "empty"
    assert page.plots == []
    assert figures["series"] == {"step": []}


@pytest.mark.parametrize(
    ("after_mean", "kind", "words"),
    [(1.4, "improved", "rose from"), (-1.4, "worsened", "fell from"), (0.05, "unclear", "No clear change")],
)
def test_the_verdict_says_no_more_than_the_intervals_carry(tmp_path, after_mean, kind, words):
    write_run(tmp_path, steps=2, after_mean=after_mean)
    page, figures = report(tmp_path)
    assert figures["verdict"]["kind"] == kind
    assert words in next(text for text in page.texts if text.startswith(("Held-out reward", "No clear")))


def test_overlapping_intervals_are_decided_by_the_change_prompt_by_prompt(tmp_path):
    write_run(tmp_path, steps=2)
    path = tmp_path / "evaluation_after.json"
    after = json.loads((tmp_path / "evaluation_before.json").read_text())
    for sample in after["samples"]:
        sample["score"] += 0.1
    path.write_text(json.dumps(after | {"score_mean": after["score_mean"] + 0.1}))
    _, figures = report(tmp_path)
    assert figures["header"]["intervals_disjoint"] is False
    assert figures["header"]["reward_change"] == pytest.approx(0.1)
    assert figures["verdict"]["kind"] == "improved"


def test_a_sample_that_failed_in_one_evaluation_leaves_the_others_paired(tmp_path):
    write_run(tmp_path, steps=2, prompts=5)
    path = tmp_path / "evaluation_after.json"
    after = json.loads(path.read_text())
    lost = after["samples"].pop(1)
    path.write_text(json.dumps(after | {"n": 4, "failed": 1}))
    page, figures = report(tmp_path)
    before = json.loads((tmp_path / "evaluation_before.json").read_text())
    assert [pair["after"] is None for pair in figures["samples"]] == [False, True, False, False, False]
    assert figures["samples"][1]["prompt"] == lost["prompt"]
    kept = [0, 2, 3, 4]
    changes = [figures["samples"][i]["after"]["score"] - before["samples"][i]["score"] for i in kept]
    assert figures["header"]["reward_change"] == pytest.approx(np.mean(changes))
    assert "failed, not scored" in page.texts
    assert [alarm["key"] for alarm in figures["alarms"]] == ["evaluation_after/failed"]


def test_a_healthy_run_raises_no_alarm(healthy):
    page, figures = report(healthy[0])
    assert figures["alarms"] == []
    assert "No alarms" in page.texts


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("samples/failed", 3, 0),
        ("rollout/importance_weight_mean", 2.1, 2.0),
        ("rollout/importance_weight_mean", 0.45, 0.5),
        ("rollout/ess", 0.29, 0.3),
        ("rollout/kl_old", 0.11, 0.1),
        ("rollout/kl_old", -0.11, -0.1),
        ("policy/first_ratio_max_abs_log", 0.02, 0.01),
        ("kl/sequence_mean", 20.5, 20.0),
        ("response/finished_share", 0.49, 0.5),
        ("reward/final_mean", -56.0, -10.0),
    ],
)
def test_a_figure_out_of_bounds_raises_one_alarm_at_its_step(tmp_path, key, value, bound):
    write_run(tmp_path, steps=5, prompts=4, overrides={4: {key: value}, 5: {key: bound}})
    page, figures = report(tmp_path)
    (alarm,) = figures["alarms"]
    assert (alarm["key"], alarm["step"], alarm["value"], alarm["bound"]) == (key, 4, value, bound)
    assert f"{'above' if value > bound else 'below'}" in alarm["text"]
    assert "in 1 of 5 steps" in alarm["text"]
    assert any(typeset(alarm["text"]) == text for text in page.texts)


def test_the_worst_of_several_steps_is_named_with_their_number(tmp_path):
    write_run(tmp_path, steps=6, prompts=4, overrides={2: {"rollout/ess": 0.2}, 5: {"rollout/ess": 0.1}})
    (alarm,) = report(tmp_path)[1]["alarms"]
    assert (alarm["step"], alarm["value"]) == (5, 0.1)
    assert "in 2 of 6 steps" in alarm["text"]


def test_collapsed_entropy_raises_an_alarm_against_its_own_start(tmp_path):
    start = write_run(tmp_path, steps=5, prompts=4)[0]["policy/entropy_mean"]
    write_run(tmp_path, steps=5, prompts=4, overrides={5: {"policy/entropy_mean": 0.19 * start}})
    (alarm,) = report(tmp_path)[1]["alarms"]
    assert (alarm["key"], alarm["step"]) == ("policy/entropy_mean", 5)
    assert alarm["bound"] == pytest.approx(0.2 * start)


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [("unique_share", 0.4, 0.9), ("finished_share", 0.3, 0.5), ("kl_sequence_mean", 25.0, 20.0), ("failed", 2, 0)],
)
def test_a_held_out_figure_out_of_bounds_raises_an_alarm(tmp_path, key, value, bound):
    write_run(tmp_path, steps=2, prompts=8)
    path = tmp_path / "evaluation_after.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (alarm,) = report(tmp_path)[1]["alarms"]
    assert (alarm["key"], alarm["step"], alarm["value"]) == (f"evaluation_after/{key}", None, value)
    assert alarm["bound"] == pytest.approx(bound)


def test_the_kl_budget_is_the_callers(tmp_path):
    write_run(tmp_path, steps=2, prompts=8)
    keys = [alarm["key"] for alarm in report(tmp_path, kl_budget=0.1)[1]["alarms"]]
    assert keys == ["kl/sequence_mean", "evaluation_after/kl_sequence_mean"]


def test_rpc_beyond_a_twentieth_of_the_time_raises_an_alarm(tmp_path):
    slow = {step: {"time/step_s": 5.0, "time/rpc_s": 0.3} for step in range(1, 4)}
    write_run(tmp_path, steps=3, prompts=4, overrides=slow)
    (alarm,) = report(tmp_path)[1]["alarms"]
    assert (alarm["key"], alarm["bound"]) == ("time/rpc_s", 0.05)
    assert alarm["value"] == pytest.approx(0.06)


def test_an_sft_run_is_reported_by_its_losses(tmp_path):
    records = write_sft_run(tmp_path)
    page, figures = report(tmp_path)
    header = figures["header"]
    assert (header["kind"], header["model"]) == ("sft", "models/base")
    assert (header["eval_loss_before"], header["eval_loss"], header["loss_last"]) == (5.31, 1.27, records[-1]["loss"])
    assert figures["verdict"]["headline"] == "Held-out loss fell from 5.31 to 1.27"
    assert figures["evaluation"]["after.eval_perplexity"] == pytest.approx(math.exp(1.27))
    assert {"loss", "perplexity", "speed"} == set(page.plots)


def test_an_interrupted_sft_run_is_reported_by_its_last_evaluation(tmp_path):
    records = write_sft_run(tmp_path, finished=False)
    _, figures = report(tmp_path)
    assert figures["header"]["eval_loss"] == records[49]["eval_loss"]
    assert figures["evaluation"] == {}


def test_a_reward_run_is_reported_beside_its_baselines(tmp_path):
    write_reward_run(tmp_path)
    page, figures = report(tmp_path)
    assert (figures["header"]["kind"], figures["header"]["eval_accuracy"]) == ("reward", 0.9123)
    assert page.figures["eval_accuracy"] == 0.9123
    assert figures["verdict"]["headline"] == "91 % of held-out pairs are ranked as annotated"
    assert {"loss", "accuracy", "speed"} == set(page.plots)
    picture = next(str(a["aria-label"]) for tag, a in page.tags if tag == "svg")
    assert "this model 0.912, 95 % interval 0.878 to 0.938" in picture
    assert "TF-IDF logistic 0.850, 95 % interval 0.808 to 0.884" in picture
    assert "length alone 0.520, 95 % interval 0.467 to 0.573" in picture


def test_the_held_out_evaluations_between_steps_are_drawn_with_the_reward(tmp_path):
    between = {step: {"eval/score_mean": 0.1 * step, "eval/score_ci95": 0.2} for step in (2, 4)}
    write_run(tmp_path, steps=5, prompts=4, overrides=between)
    text = write_report(tmp_path).page.read_text()
    line = next(
        points(path.get("d", ""))
        for path in svg_of(text, "reward").iter(f"{SVG}path")
        if "stroke: var(--c2)" in path.get("style", "") and "stroke-dasharray" in path.get("style", "")
    )
    assert len(line) == 2
    assert line[0, 1] > line[1, 1]


def test_what_is_watched_between_steps_is_drawn_and_its_alarm_has_the_runs_own_bound(tmp_path):
    quiet = {
        "eval/judge_mean": 0.1,
        "eval/judge_ci95": 0.05,
        "eval/length_correlation": 0.2,
        "eval/unique_share": 0.97,
        "eval/distinct_2": 0.6,
        "eval/repeated_4_share": 0.01,
        "eval/self_bleu_4": 0.2,
        "eval/kl_exact_mean": 3.0,
        "eval/entropy_mean": 2.0,
        "eval/demonstration_perplexity": 9.0,
    }
    between = {2: quiet, 4: quiet | {"eval/unique_share": 0.5, "eval/judge_mean": 0.3}}
    write_run(
        tmp_path, steps=5, prompts=4, overrides=between, settings={"steps": 5, "alarm_unique": 0.8, "alarm_kl": 30}
    )
    page, figures = report(tmp_path)
    (alarm,) = figures["alarms"]
    assert (alarm["key"], alarm["step"], alarm["value"], alarm["bound"]) == ("eval/unique_share", 4, 0.5, 0.8)
    assert "at step 4 (in 1 of 3), below 0.8" in alarm["text"]
    assert figures["header"]["kl_budget"] == 30
    assert {"judge", "variety", "kl", "perplexity"} <= set(page.plots)
    assert "self-BLEU-4" in "".join(page.texts)
    (tmp_path / "settings.json").write_text('{"alarm_unique": 2}')
    with pytest.raises(TrainerError, match=r"settings\.json: alarm_unique is 2: "):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_report_byte_for_byte(healthy):
    folder, _ = healthy
    first = [path.read_bytes() for path in (write_report(folder).page, write_report(folder).figures)]
    assert [path.read_bytes() for path in (write_report(folder).page, write_report(folder).figures)] == first


def test_means_are_written_to_the_decimals_that_their_interval_carries():
    assert with_interval(1.4567, 0.19) == "1.46 (95 % interval 1.27 to 1.65)"
    assert with_interval(-12.34, 3.4) == "-12.3 (95 % interval -15.7 to -8.9)"
    assert with_interval(-1e-9, 4e-8) == "0.0000 (95 % interval 0.0000 to 0.0000)"
    assert with_interval(0.5, None) == "0.500"


def test_figures_are_typeset_and_names_are_not():
    assert typeset("-1.5 to -0.2 (-3)") == "\N{MINUS SIGN}1.5 to \N{MINUS SIGN}0.2 (\N{MINUS SIGN}3)"
    assert typeset("1.00e-4, llama-7b, 95 %") == "1.00e-4, llama-7b, 95\N{NO-BREAK SPACE}%"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", "report", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_writes_the_report_and_says_where(tmp_path):
    write_run(tmp_path, steps=2, prompts=4)
    done = command(str(tmp_path), "--kl-budget", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {tmp_path / 'report.html'}\nfigures: {tmp_path / 'report.json'}\n"
    assert json.loads((tmp_path / "report.json").read_text())["header"]["kl_budget"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "quartet-train report: nowhere holds no run: there is no metrics.jsonl in it"),
        ([], "the following arguments are required: RUN-DIR"),
        (["nowhere", "--kl-budget", "nan"], "--kl-budget is "),
        (["nowhere", "--kl-budget", "-1"], "--kl-budget is "),
    ],
)
def test_the_command_refuses_in_one_clear_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_reading_the_command_line_imports_nothing_heavy():
    code = (
        "import sys; import trainer.__main__; from trainer.report_settings import ReportSettings; "
        "ReportSettings.from_command_line(['somewhere']); "
        "print(sorted({'numpy', 'matplotlib', 'torch', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


# In a browser


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH: the page is not looked at in a browser here")


def browse(browser: str, folder: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # Chromium has errands of its own: none leaves this machine.
            "--no-first-run",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def look(browser: str, folder: Path, page: Path, *options: str) -> tuple[Path, set[str], list[str]]:
    """A screenshot of the page, what it asked the network for, and what it had to say on the console."""
    log, picture = folder / "net.json", folder / "page.png"
    done = browse(browser, folder, page, f"--log-net-log={log}", f"--screenshot={picture}", *options)
    parameters = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # Chromium's own errands are "not an origin"; a page from a file is the origin "null".
    requested = {p["url"] for p in parameters if "url" in p and p.get("initiator", "not an origin") != "not an origin"}
    return picture, requested, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_looking_sees_requests_and_errors(browser, tmp_path):
    page = tmp_path / "control.html"
    page.write_text('<img src="http://report.invalid/x.png"><script>throw new Error("seen")</script>')
    _, requested, console = look(browser, tmp_path, page)
    assert requested == {"http://report.invalid/x.png"}
    assert any("seen" in line for line in console)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_page_without_errors_and_requests(browser, tmp_path, dark):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    texts = dict(enumerate(HOSTILE))
    write_run(tmp_path / "run", steps=40, total_steps=40, prompts=9, texts_before=texts, texts_after=texts)
    page = write_report(tmp_path / "run").page
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    picture, requested, console = look(browser, tmp_path, page, "--window-size=1200,3200", scheme)
    assert requested == set()
    assert console == []
    pixels = matplotlib_image.imread(picture)[:, :, :3]
    paper, ink = pixels[2, 2], pixels.reshape(-1, 3)
    assert bool(paper.mean() < 0.2) == dark
    assert (np.abs(ink - paper).max(axis=1) > 0.2).mean() > 0.02
    blue = (0x4B, 0xA6, 0xE8) if dark else (0x00, 0x68, 0xA8)
    drawn = (np.abs(pixels - np.array(blue) / 255).max(axis=2) < 0.02).any(axis=1)
    # The reward's line stands in the upper half, the bars of the time in the lower.
    assert drawn[:1600].sum() > 50
    assert drawn[1600:].sum() > 50


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 375, 768])
def test_nothing_sticks_out_of_a_narrow_screen(browser, tmp_path, width):
    write_run(tmp_path / "run", steps=3, prompts=3, texts_after={0: "x" * 3000, 1: "a" * 500})
    write_report(tmp_path / "run")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="run/report.html" width="{width}" height="900" style="border:0"></iframe><p id="out"></p>'
        "<script>f.onload = () => { const e = f.contentDocument.documentElement;"
        " out.textContent = `${e.clientWidth} ${e.scrollWidth}`; }</script>"
    )
    done = browse(browser, tmp_path, frame, "--allow-file-access-from-files", "--dump-dom")
    measured = re.search(r'id="out">(\d+) (\d+)<', done.stdout)
    assert measured is not None, done.stdout[-500:]
    assert (int(measured[1]), int(measured[2])) == (width, width)
