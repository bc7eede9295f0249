"""What the study of sentiment makes of twins, and the arithmetic of its table. Its runs are not made here."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import sentiment, sentiment_judge
from bench.sentiment_data import (
    LEAST_WORDS,
    MOST_WORDS,
    PROMPT_WORDS,
    Twins,
    balanced,
    longer_by,
    make_files,
    passages,
    preference,
    read_twins,
    split,
    texts,
    write_files,
)
from bench.sentiment_models import USUAL_S, seconds_left
from trainer.evaluate import EvaluatedSample, Evaluation
from trainer.monitor_settings import AlarmSettings
from trainer.monitoring import PolicyMonitor
from trainer.ppo_config import PPOSettings

WORDS = "the film actor plot scene end that with was of and story camera light music".split()


def made_up(count: int = 60) -> list[Twins]:
    """Reviews of sentences of random words, of which about every second one ends otherwise in the twin."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        positive, negative = [], []
        for _ in range(draw.randint(3, 9)):
            sentence = draw.choices(WORDS, k=draw.randint(10, 24))
            good, bad = draw.choice([("good.", "bad."), ("fine, really.", "dull."), ("there.", "there.")])
            positive += [*sentence, good]
            negative += [*sentence, bad]
        made.append(Twins(name=str(number), positive=" ".join(positive), negative=" ".join(negative)))
    return made


def evaluation(scores: list[float], judges: list[float | None], **changes: Any) -> Evaluation:
    """Two responses a prompt, one after the other."""
    known = [judge for judge in judges if judge is not None]
    values: dict[str, Any] = {
        "n": len(scores), "failed": 0, "weights_version": 1, "score_mean": float(np.mean(scores)), "score_ci95": 0.1,
        "score_std": 1.0, "kl_sequence_mean": 1.0, "kl_ci95": 0.1, "length_mean": 9.0, "finished_share": 1.0,
        "distinct_1": 0.25, "distinct_2": 0.5, "distinct_3": 0.75, "unique_share": 1.0, "tokens_per_s": 100.0,
        "prompts": len(scores) // 2, "judge_mean": float(np.mean(known)), "judge_ci95": 0.05, "kl_exact_mean": 1.5,
        "kl_exact_ci95": 0.25, "entropy_mean": 4.0, "self_bleu_4": 0.125, "repeated_4_share": 0.0,
        "demonstration_perplexity": 123.4,
        "samples": tuple(
            EvaluatedSample(index=i, prompt=f"p{i // 2}", response="r", score=s, kl=1.0, finished=True, judge=j)
            for i, (s, j) in enumerate(zip(scores, judges, strict=True))
        ),
    }  # fmt: skip
    return Evaluation(**(values | changes))


# Twins ---------------------------------------------------------------------------------------------------------------


def test_twins_are_cut_where_both_end_a_sentence():
    same = "I saw this film in town with my whole family on a rainy day in the winter. "
    twins = Twins(
        name="1",
        positive=same + "It was great fun from the first to the last minute, so we went again the next day. " + same,
        negative=same + "It was no fun from the first to the last minute, and we left before it was over. " + same,
    )
    cut = [(" ".join(p), " ".join(n)) for p, n in passages(twins)]
    # The first sentence has fewer words than a passage needs: the second one belongs to it.
    assert [words[:3] for words, _ in passages(twins)] == [["I", "saw", "this"], ["I", "saw", "this"]]
    assert cut[0][0].endswith("again the next day.")
    assert cut[0][1].endswith("before it was over.")
    assert cut[1][0] == cut[1][1] == same.strip()


def test_passages_are_parts_of_their_reviews_in_order_and_of_usable_length():
    edited = 0
    for twins in made_up():
        found = passages(twins)
        for text, side in ((twins.positive, 0), (twins.negative, 1)):
            at = 0
            for part in found:
                words = " ".join(part[side])
                at = text.index(words, at) + len(words)
                assert 12 <= len(part[side]) <= MOST_WORDS
                assert words.endswith(".")
        assert all(len(p) >= LEAST_WORDS for p, _ in found[:-1])
        edited += sum(p != n for p, n in found)
    assert edited > 100


def test_a_preference_is_what_twins_begin_with_and_how_each_goes_on():
    positive, negative = "a b c good film to see".split(), "a b c bad film to see".split()
    assert preference(positive, negative) == {
        "prompt": "a b c",
        "chosen": " good film to see",
        "rejected": " bad film to see",
    }
    assert preference(positive, positive) is None
    assert preference("good film".split(), "bad film".split()) is None  # Nothing in common: no prompt.
    long = "one two three four five six seven eight nine".split()
    row = preference([*long, "good"], [*long, "bad"])
    assert row is not None
    assert (row["prompt"], row["chosen"]) == (" ".join(long[:8]), " nine good")


def test_passages_that_were_not_edited_are_learned_once():
    assert texts([(["a"], ["a"]), (["b"], ["c"])]) == [["a"], ["b"], ["c"]]


def length_counts(pairs: list[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    """By difference in words and by length, in bands of 8: pairs whose positive answer is the shorter, the longer."""
    found: dict[tuple[int, int], list[int]] = {}
    for pair in pairs:
        chosen, rejected = (len(pair[side].split()) for side in ("chosen", "rejected"))
        if chosen != rejected:
            band = (chosen + rejected) // 16
            found.setdefault((abs(chosen - rejected), band), [0, 0])[chosen > rejected] += 1
    return found


def test_preferences_are_balanced_by_length_by_leaving_out_no_more_than_it_takes():
    draw = random.Random(0)
    pairs = []
    for number in range(400):
        rejected = draw.randint(5, 40)
        chosen = max(1, rejected + draw.choice([-5, -2, -1, -1, -1, 0, 0, 1, 1, 2]))
        pairs.append({"prompt": str(number), "chosen": " a" * chosen, "rejected": " b" * rejected})
    kept = balanced(pairs, seed=0)
    before, after = length_counts(pairs), length_counts(kept)
    assert sum(a != b for a, b in before.values()) > 5
    assert after == {key: [min(both)] * 2 for key, both in before.items() if min(both)}
    assert [pair for pair in pairs if pair in kept] == kept
    ties = [pair for pair in pairs if longer_by(pair) == 0]
    assert len(ties) > 50
    assert all(pair in kept for pair in ties)
    assert balanced(pairs, seed=0) == kept != balanced(pairs, seed=1)


def test_what_is_trained_on_is_balanced_and_what_is_held_out_is_not_touched():
    twins = made_up(200)
    files = make_files(twins, seed=3)
    assert all(shorter == longer for shorter, longer in length_counts(files["preferences"]).values())
    held_out = split(twins, seed=3)["held_out"]
    made = [row for each in held_out for pair in passages(each) if (row := preference(*pair)) is not None]
    assert [{k: v for k, v in row.items() if k != "batch_id"} for row in files["held_out_preferences"]] == made


def test_parts_are_disjoint_and_the_judge_shares_no_review_with_anything():
    twins = made_up()
    parts = split(twins, seed=3)
    names = [{each.name for each in part} for part in parts.values()]
    assert sum(map(len, names)) == len(twins) == len(set.union(*names))
    assert {name: len(part) for name, part in parts.items()} == {"held_out": 11, "judge": 16, "train": 33}
    assert split(twins, seed=4)["judge"] != parts["judge"]
    files = make_files(twins, seed=3)
    by_batch = {name: {row["batch_id"] for row in files[name]} for name in files if "batch_id" in files[name][0]}
    assert by_batch["judge"] == {each.name for each in parts["judge"]}
    assert by_batch["preferences"] <= {each.name for each in parts["train"]}
    assert by_batch["held_out_preferences"] <= by_batch["held_out_reviews"] == {e.name for e in parts["held_out"]}
    judged = " ".join(row["text"] for row in files["judge"])
    assert not any(row["text"] in judged for row in files["texts"])


def test_held_out_prompts_begin_no_text_that_is_trained_on():
    twins = made_up()
    # Two reviews of different parts that begin alike.
    parts = split(twins, seed=0)
    first, other = parts["train"][0], parts["held_out"][0]
    start = "these eight words are the same in both of them and then it goes on for a while until the end is"
    twins = [
        Twins(name=each.name, positive=f"{start} good. {each.positive}", negative=f"{start} bad. {each.negative}")
        if each in (first, other)
        else each
        for each in twins
    ]
    files = make_files(twins, seed=0)
    prompt = " ".join(start.split()[:PROMPT_WORDS])
    assert {"prompt": prompt} in files["prompts"]
    assert {"prompt": prompt} not in files["held_out_prompts"]
    assert len(files["held_out_prompts"]) > 10
    begun = {tuple(row["text"].split()[:PROMPT_WORDS]) for row in files["texts"]}
    for row in files["held_out_prompts"]:
        assert len(row["prompt"].split()) == PROMPT_WORDS
        assert tuple(row["prompt"].split()) not in begun


def test_files_are_read_back_as_they_were_made(tmp_path):
    source, twins = tmp_path / "reviews.jsonl", made_up(20)
    rows = [
        {"Sentiment": kind, "Text": text.replace(". ", ".<br /><br />"), "batch_id": int(each.name)}
        for each in twins
        for kind, text in (("Negative", each.negative), ("Positive", each.positive))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_twins(source) == sorted(twins, key=lambda each: each.name)
    write_files(source, tmp_path / "data", seed=0)
    for name, made in make_files(read_twins(source), seed=0).items():
        assert [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()] == made


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"Sentiment": "Positive", "Text": "t"}], "line 1: field 'batch_id' is missing"),
        ([{"Sentiment": "Positive", "Text": "t", "batch_id": "7"}], r"batch 7 has \['Positive'\], must have"),
        ([{"Sentiment": "Positive", "Text": "t", "batch_id": "7"}] * 2, "line 2: batch 7 has two Positive reviews"),
    ],
)
def test_rows_that_are_no_twins_are_refused(tmp_path, rows, message):
    source = tmp_path / "reviews.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_twins(source)


# Judge and table -----------------------------------------------------------------------------------------------------


def test_the_judge_scores_prompt_and_response_together_as_the_service_asks_it(tmp_path, monkeypatch):
    rows = tmp_path / "judge.jsonl"
    said = [(f"film {i} is a {'good' if i % 2 else 'bad'} one", bool(i % 2)) for i in range(20)]
    rows.write_text("".join(json.dumps({"text": text, "positive": positive}) + "\n" for text, positive in said))
    monkeypatch.setenv(sentiment_judge.ROWS, str(rows))
    good, bad, split_good = sentiment_judge.score([("it is a", " good one"), ("it is a", " bad one"), ("", "good one")])
    assert 0 < bad < 0.2 < 0.8 < good < 1
    assert split_good > 0.8
    assert isinstance(good, float)


def test_accuracy_of_two_is_told_by_which_of_them_is_longer():
    lengths = [(3, 5), (4, 5), (5, 5), (6, 6), (5, 4), (7, 4), (9, 4)]
    pairs = [
        {"chosen": " a" * chosen, "rejected": " b" * rejected, "batch_id": str(place)}
        for place, (chosen, rejected) in enumerate(lengths)
    ]
    found = sentiment.of_two("judge", pairs, [0.2, 0.1, 0.0, 0.3, -0.1, 0.1, -0.2])
    told = {what.removeprefix("judge, edited passages, of two"): (i.value, i.count) for what, i in found.items()}
    expected = {"": 4.5 / 7, ", the shorter": 1.0, ", as long": 0.75, ", the longer": 1 / 3}
    assert {what: value for what, (value, _) in told.items()} == pytest.approx(expected)


def test_the_time_left_goes_by_what_the_stages_before_took(monkeypatch):
    assert list(USUAL_S) == ["init", "SFT", "reward model", "DPO", "PPO", "PPO, KL off", "evaluation"]
    usual = dict(zip(USUAL_S, (20.0, 300.0, 120.0, 330.0, 240.0, 240.0, 180.0), strict=True))
    monkeypatch.setattr("bench.sentiment_models.USUAL_S", usual)
    half = {"init": 10.0, "SFT": 150.0, "reward model": 60.0, "DPO": 165.0}
    assert seconds_left("DPO", half) == pytest.approx((240 + 240 + 180) / 2)
    # A stage that was broken off has a part of its time behind it, but none below 0.
    assert seconds_left("DPO", half | {"PPO": 20.0}) == pytest.approx((240 + 240 + 180) / 2 - 20)
    assert seconds_left("DPO", half | {"PPO": 900.0}) == pytest.approx((240 + 180) / 2)
    assert seconds_left("evaluation", half) == 0.0


def test_changes_are_paired_by_response_and_their_intervals_are_of_prompts():
    before = evaluation([0.0, 1.0, 2.0, 3.0], [0.5, None, 0.5, 0.5])
    after = evaluation([1.0, 3.0, 2.0, 4.0], [0.75, 0.5, 1.0, None])
    change = sentiment.paired(before, after, sentiment.by_score)
    # Means of prompts: 1.5 and .5; Student's quantile of one degree of freedom is 12.706.
    assert (change.value, change.count) == (1.0, 2)
    assert change.high - 1 == pytest.approx(12.706205 * math.sqrt(0.5) / math.sqrt(2), rel=1e-6)
    assert sentiment.paired(before, after, sentiment.by_judge).value == pytest.approx((0.25 + 0.5) / 2)


def test_the_table_has_a_column_a_model_and_no_change_of_the_first():
    found = {"SFT": evaluation([0.0] * 4, [0.25, 0.75, 0.25, 0.5]), "DPO": evaluation([1.0, 2.0] * 2, [0.75] * 4)}
    lines = sentiment.table(found)
    assert lines[0].split() == ["SFT", "DPO"]
    by_name = {line[:30].strip(): line[30:] for line in lines if not line.startswith("  ")}
    assert by_name["reward"].split() == ["0.000", "[-0.100,", "0.100]", "1.500", "[1.400,", "1.600]"]
    assert by_name["judged positive"].split()[0] == "0.375"  # One above a half, one at it.
    assert by_name["KL to SFT, exact, nats"].split()[:3] == ["1.5", "[1.2,", "1.8]"]
    assert by_name["distinct-1, 2, 3"].split()[:3] == ["0.250,", "0.500,", "0.750"]
    changes = [line for line in lines if line.startswith("  change")]
    assert [line[30:54].strip() for line in changes] == ["", ""]
    assert [line[54:].split()[0] for line in changes] == ["1.500", "0.312"]


def test_alarms_are_those_that_the_monitor_gave(tmp_path, capsys):
    series = [
        (0, evaluation([0.0, 0.1] * 4, [0.5, 0.52] * 4)),
        (8, evaluation([3.0, 3.1] * 4, [0.6, 0.62] * 4, kl_exact_mean=30.0)),
        (16, evaluation([6.0, 6.1] * 4, [0.3, 0.31] * 4, kl_exact_mean=40.0, unique_share=0.5)),
        (24, evaluation([7.0, 7.1] * 4, [0.3, 0.31] * 4, kl_exact_mean=10.0, distinct_1=0.01)),
        (32, evaluation([7.0, 7.1] * 4, [0.3, 0.31] * 4, kl_exact_mean=50.0)),
    ]
    run = tmp_path / "ppo"
    run.mkdir()
    settings = PPOSettings(model="m", prompts=("p",), output=run, track=("none",), steps=32)
    before, after = run / "evaluation_before.json", run / "evaluation_after.json"
    (run / "settings.json").write_text(settings.model_dump_json())
    monitor = PolicyMonitor(settings, None, None, max_tokens=9, reference=None, before=before, resumed_step=0)
    capsys.readouterr()
    for step, found in series:
        monitor.watch(step, found, {0: before, 32: after}.get(step))
    read = sentiment.read_series(run)
    assert [step for step, _ in read] == [0, 8, 16, 24, 32]
    said = sentiment.alarms(read, AlarmSettings())
    assert "".join(f"alarm: {text}\n" for _, text in said) == capsys.readouterr().err
    assert [step for step, text in said if text.startswith("The KL")] == [8, 32]
    assert len({text for _, text in said}) > 4
    assert sentiment.progress(read)[-1].split()[:4] == ["32", "7.05", "0.305", "50.0"]


def test_all_responses_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sentiment, "OUTPUT", tmp_path / "out")
    sentiment.keep_responses({"SFT": evaluation([0.0] * 4, [0.5] * 4), "DPO": evaluation([1.0] * 2, [0.5] * 2)})
    rows = [json.loads(line) for line in Path(tmp_path / "out" / "sentiment.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["SFT"] * 4 + ["DPO"] * 2
    assert rows[4]["score"] == 1.0
