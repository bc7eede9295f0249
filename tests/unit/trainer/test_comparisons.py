"""Comparisons of every shape, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from trainer.comparisons import Comparison, load_comparisons, refuse_strange_attributes
from trainer.data import load_preferences, load_prompts, split_held_out
from trainer.encoding import Encoder
from trainer.errors import DataError
from trainer.rows import row_texts

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path) -> Write:
    def make(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def said(row: Comparison) -> list[tuple[str, str, float]]:
    """Better answer, worse answer, probability."""
    return [(row.answers[j.first], row.answers[j.second], j.probability) for j in row.judgements]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chosen": "a", "rejected": "b"}, [("a", "b", 1.0)]),
        ({"chosen": "a", "rejected": "b", "preference": 0.8}, [("a", "b", 0.8)]),
        ({"first": "a", "second": "b", "preference": "first"}, [("a", "b", 1.0)]),
        ({"first": "a", "second": "b", "preference": "second"}, [("b", "a", 1.0)]),
        ({"first": "a", "second": "b", "preference": "tie"}, [("a", "b", 0.5)]),
        ({"first": "a", "second": "b", "preference": 0.3}, [("b", "a", 0.7)]),
        ({"first": "a", "second": "b", "preference": ["first", "second", "first", "tie"]}, [("a", "b", 0.625)]),
        ({"first": "a", "second": "b", "preference": {"ann": "second", "bob": "tie", "eve": None}}, [("b", "a", 0.75)]),
        ({"ranking": ["a", "b", "c"]}, [("a", "b", 1.0), ("a", "c", 1.0), ("b", "c", 1.0)]),
        ({"answers": ["a", "b", "c"], "ranks": [2, 1, 3]}, [("b", "a", 1.0), ("b", "c", 1.0), ("a", "c", 1.0)]),
        ({"answers": ["a", "b", "c"], "ranks": [2, 1, 2]}, [("b", "a", 1.0), ("b", "c", 1.0), ("a", "c", 0.5)]),
        (
            {
                "answers": ["a", "b", "c"],
                "comparisons": [
                    {"first": 0, "second": 2, "preference": "second"},
                    {"first": 1, "second": 2, "preference": "tie"},
                ],
            },
            [("c", "a", 1.0), ("b", "c", 0.5)],
        ),
    ],
)
def test_every_shape_says_which_answer_is_better_and_how_surely(fields, expected, write):
    (row,) = load_comparisons([write({"prompt": "p", **fields})])
    assert row.prompt == "p"
    assert [(a, b, pytest.approx(p)) for a, b, p in expected] == said(row)
    # Whole orders are told from parts of one.
    assert row.ranked == ("ranking" in fields or fields.get("ranks") == [2, 1, 3])
    if row.ranked:
        assert list(row.answers) == [expected[0][0], expected[0][1], expected[-1][1]]
    # A policy is trained on the same prompt, and a tokenizer on all answers.
    assert [read.prompt for read in load_prompts([write({"prompt": "p", **fields})])] == ["p"]
    assert {text for answers in (row.answers, ("p",)) for text in answers} == set(row_texts({"prompt": "p", **fields}))


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["first", "second", "first"], ("a", "b", 1.0)),
        (["second", "second", "first"], ("b", "a", 1.0)),
        (["first", "second"], ("a", "b", 0.5)),
        (["tie"], ("a", "b", 0.5)),
        (["second", "tie", "tie"], ("a", "b", 0.5)),
        (["first", "tie", "tie"], ("a", "b", 0.5)),
        (["first", "second", "tie"], ("a", "b", 0.5)),
        (["first", "first", "second", "tie"], ("a", "b", 1.0)),
        (["first", "first", "second", "second", "tie"], ("a", "b", 0.5)),
        ([0.6, 0.6, 0.0], ("a", "b", 1.0)),
        ([0.4, 0.4, 1.0], ("b", "a", 1.0)),
        ([0.5, 0.5, 0.9], ("a", "b", 0.5)),
    ],
)
def test_the_majority_says_what_most_annotators_do_and_a_draw_is_a_tie(votes, expected, write):
    source = write({"first": "a", "second": "b", "preference": votes})
    (row,) = load_comparisons([source], annotators="majority")
    assert said(row) == [expected]


def test_margins_and_attributes_are_of_their_pair(write):
    pair = {"chosen": "a", "rejected": "b", "margin": 1.5, "attribute": "tone"}
    judged = {"first": "a", "second": "b", "preferences": {"tone": "second", "facts": ["first", "tie"], "x": None}}
    said_of = [{"first": 0, "second": 1, "preference": "first", "margin": 2}]
    rows = load_comparisons(
        [
            write(pair),
            write(judged, name="judged.jsonl"),
            write({"answers": ["a", "b"], "comparisons": said_of}, name="answers.jsonl"),
        ]
    )
    assert [(j.margin, j.attribute) for row in rows for j in row.judgements] == [
        (1.5, "tone"),
        (None, "tone"),
        (None, "facts"),
        (2.0, None),
    ]
    assert said(rows[1]) == [("b", "a", 1.0), ("a", "b", 0.75)]
    refuse_strange_attributes(rows[:2], ["facts", "tone"])
    refuse_strange_attributes(rows[2:], ["only"])
    with pytest.raises(DataError, match=r"answers.jsonl, line 1: has no field 'attribute'.*names 'facts', 'tone'"):
        refuse_strange_attributes(rows, ["facts", "tone"])
    with pytest.raises(DataError, match=r"line 1: is judged by attribute 'tone', and --heads names none"):
        refuse_strange_attributes(rows, [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "a comparison needs chosen and rejected; first, second and preference; ranking; or answers"),
        ({"first": "a", "preference": "tie"}, "field 'second' is missing"),
        ({"first": "a", "second": " ", "preference": "tie"}, "field 'second' is empty"),
        ({"first": "a", "second": "b"}, "field 'preference' is missing (first, second, tie, a probability"),
        ({"first": "a", "second": "b", "preference": "b"}, "field 'preference' must be first, second, tie, or the"),
        ({"first": "a", "second": "b", "preference": 1.5}, "from 0 to 1 that the first is better, is float '1.5'"),
        ({"first": "a", "second": "b", "preference": True}, "field 'preference' must be first, second, tie"),
        ({"first": "a", "second": "b", "preference": []}, "field 'preference' is empty: nobody has said anything"),
        ({"first": "a", "second": "b", "preferences": {}}, "field 'preferences' must be an object of preferences by"),
        ({"first": "a", "second": "b", "preference": "tie", "margin": 1}, "field 'margin' is 1 of a tie"),
        ({"chosen": "a", "rejected": "b", "margin": -1}, "field 'margin' must be at least 0, is -1"),
        ({"chosen": "a", "rejected": "b", "margin": "1"}, "field 'margin' must be a finite number, is str '1'"),
        ({"chosen": "a", "rejected": "b", "attribute": 1}, "field 'attribute' must be the name of one, is int '1'"),
        ({"ranking": ["a"]}, "field 'ranking' must be a list of at least 2 answers"),
        ({"ranking": ["a", ""]}, "field 'ranking' is empty"),
        ({"ranking": ["a", 1]}, "field 'ranking' must be text or a list of messages, is int '1'"),
        ({"answers": ["a", "b"]}, "field 'comparisons' is missing"),
        ({"answers": ["a", "b"], "ranks": [1]}, "field 'ranks' must be a list of 2 numbers, one an answer"),
        ({"answers": ["a", "b"], "ranks": [1, "2"]}, "field 'ranks', number 2 must be a finite number"),
        ({"answers": ["a", "b"], "comparisons": []}, "field 'comparisons' must be a list of at least one object"),
        (
            {"answers": ["a", "b"], "comparisons": [{"first": 0, "second": 2, "preference": "tie"}]},
            "field 'comparisons', number 1: field 'second' must be a whole number from 0 to 1, is 2",
        ),
        (
            {"answers": ["a", "b"], "comparisons": [{"first": 1, "second": 1, "preference": "tie"}]},
            "fields 'first' and 'second' are both 1",
        ),
    ],
)
def test_a_bad_comparison_is_refused_with_file_line_and_reason(row, message, write):
    source = write({"chosen": "a", "rejected": "b"}, row)
    with pytest.raises(DataError) as refused:
        load_comparisons([source])
    assert str(refused.value).startswith(f"{source}, line 2: ")
    assert message in str(refused.value)


def test_comparisons_hold_out_the_prompts_that_preferences_do(write):
    source = write(*({"prompt": f"p{i % 30}" if i % 2 else "", "chosen": f"c{i}", "rejected": "r"} for i in range(90)))
    parts = [split_held_out(load([source]), 0.25, seed=3) for load in (load_preferences, load_comparisons)]
    for preferences, comparisons in zip(*parts, strict=True):
        assert [(row.chosen, row.rejected) for row in preferences] == [row.answers for row in comparisons]


def test_answers_are_closed_by_the_end_token_once_each(write, tokenizer):
    rows = load_comparisons([write({"prompt": "hello", "ranking": [" thanks", " no", " the order"]})])
    (encoded,) = Encoder(tokenizer, max_tokens=64).comparisons(rows)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in ("hello", *rows[0].answers)]
    expected = [[*ids[0], *answer, tokenizer.eos_token_id] for answer in ids[1:]]
    assert [answer.ids.tolist() for answer in encoded.answers] == expected
    assert [answer.prompt_tokens for answer in encoded.answers] == [len(ids[0])] * 3
    assert len(encoded) == max(map(len, expected))
