"""Rows of every shape, and every way in which a row can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.comparisons import Comparison, load_comparisons
from trainer.data import load_demonstrations, load_preferences, load_prompts, split_held_out
from trainer.encoding import Encoder
from trainer.errors import DataError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
OTHER = {"role": "assistant", "content": "What?"}


def said(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"question {number}"}


@pytest.fixture
def write(tmp_path):
    """write(*rows) makes a JSON Lines file of rows, or of raw lines where they are text."""

    def make(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return make


def test_json_parquet_and_json_lines_hold_the_same_rows(tmp_path, write):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    expected = [(row["prompt"], row["completion"]) for row in rows]
    for source in (write(*rows), str(array), str(parquet)):
        assert [(row.prompt, row.completion) for row in load_demonstrations([source])] == expected
    both = load_demonstrations([write(*rows), str(array)])
    assert len(both) == 10
    assert both[7].where == f"{array}, row 3"


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (load_demonstrations, {"prompt": "a"}, "field 'completion' is missing (the answer); the row has 'prompt'"),
        (load_demonstrations, {"prompt": "a", "completion": 5}, "field 'completion' must be text or a list"),
        (load_demonstrations, {"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        (load_demonstrations, {"instruction": "a"}, "field 'output' is missing"),
        (load_demonstrations, {"question": "a"}, "a demonstration needs prompt and completion, messages"),
        (load_demonstrations, {"messages": [USER]}, "field 'messages' must end with the assistant's, ends with user's"),
        (load_demonstrations, {"messages": [{"role": "user"}]}, "field 'messages', message 1: field 'content' must be"),
        (load_preferences, {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        (load_preferences, {"prompt": "a", "chosen": "b", "rejected": ""}, "field 'rejected' is empty"),
        (load_preferences, {"prompt": "a"}, "a preference needs chosen and rejected"),
        (
            load_preferences,
            {"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "Bye"}, ASSISTANT]},
            "fields 'chosen' and 'rejected' differ before their last message",
        ),
        (load_prompts, {"prompt": ""}, "field 'prompt' is empty: there is nothing to answer"),
        (load_prompts, {"text": "a"}, "a prompt needs prompt, instruction, messages, or chosen and rejected"),
        (load_prompts, {"chosen": "a", "rejected": "b"}, "field 'prompt' is missing or empty, and 'chosen' and"),
        (load_prompts, {"prompt": "", "chosen": "a", "rejected": "b"}, "field 'prompt' is missing or empty"),
        (load_prompts, {"chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "field 'prompt' is missing or empty"),
        (load_prompts, "not json", "not valid JSON"),
        (load_prompts, "[1]", "must be a JSON object, is a list"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_field(load, row, message, write):
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    source = write(good, good, row)
    with pytest.raises(DataError) as refused:
        load([source])
    assert f"{source}, line 3: " in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": "Hi", "chosen": [ASSISTANT], "rejected": [OTHER]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": "Hi", "chosen": " yes", "rejected": " no"}, "Hi"),
        ({"instruction": "Hi", "chosen": "yes", "rejected": "no"}, [USER]),
    ],
)
def test_a_preference_has_one_prompt_whichever_stage_reads_it(row, prompt, write):
    source = write(row)
    for load in (load_demonstrations, load_preferences, load_prompts):
        assert [read.prompt for read in load([source])] == [prompt]
    # So every stage holds out the same ones.
    many = write(*({"chosen": [said(i), ASSISTANT], "rejected": [said(i), OTHER]} for i in range(40)))
    held_out = [
        {json.dumps(read.prompt) for read in split_held_out(load([many]), 0.2, seed=3)[1]}
        for load in (load_demonstrations, load_preferences, load_prompts)
    ]
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) == 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jsonl", "absent.jsonl: there is no such file"),
        ("./absent", "./absent: there is no such file"),
        ("somebody/some-data", "somebody/some-data: there is no such file, and the hub gave: "),
    ],
)
def test_a_source_that_is_not_there_is_named(source, message):
    with pytest.raises(DataError) as refused:
        load_prompts([source])
    assert str(refused.value).startswith(message)


def test_empty_files_folders_and_unknown_kinds_are_refused(tmp_path, write):
    for source, message in (
        (write(), "holds no rows"),
        (str(tmp_path), "is a folder; name the file in it"),
        (write("a", name="rows.csv"), "files must end in one of .jsonl, .ndjson, .json, .parquet"),
    ):
        with pytest.raises(DataError) as refused:
            load_prompts([source])
        assert message in str(refused.value)


def test_a_split_keeps_prompts_apart_and_depends_on_the_seed_alone(write):
    rows = load_preferences(
        [write(*({"prompt": f"p{i % 40}", "chosen": f"c{i}", "rejected": "r"} for i in range(200)))]
    )
    train, held_out = split_held_out(rows, 0.25, seed=3)
    assert {row.prompt for row in train} & {row.prompt for row in held_out} == set()
    assert len(train) + len(held_out) == 200
    assert len(held_out) == 50
    again_train, again_held_out = split_held_out(list(reversed(rows)), 0.25, seed=3)
    assert {row.prompt for row in again_held_out} == {row.prompt for row in held_out}
    assert len(again_train) == len(train)
    other = split_held_out(rows, 0.25, seed=4)[1]
    assert {row.prompt for row in other} != {row.prompt for row in held_out}


def test_a_field_can_keep_rows_together(write):
    source = write(*({"chosen": f"c{i}", "rejected": f"r{i}", "twin": i // 2} for i in range(40)))
    rows = load_preferences([source], split_by="twin")
    train, held_out = split_held_out(rows, 0.3, seed=0)
    assert {row.group for row in train} & {row.group for row in held_out} == set()
    with pytest.raises(DataError, match=r"line 1: field 'family' is missing \(the field named by --split-by\)"):
        load_preferences([source], split_by="family")


def test_prompt_and_response_are_encoded_apart_and_closed_by_the_end_token(write, tokenizer):
    whole = write({"text": "good"}, name="texts.jsonl")
    rows = load_demonstrations([write({"prompt": "hello", "completion": " thanks"}), whole])
    first, second = Encoder(tokenizer, max_tokens=20).demonstrations(rows)
    prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in ("hello", " thanks"))
    assert first.ids.tolist() == [*prompt, *response, tokenizer.eos_token_id]
    assert first.prompt_tokens == len(prompt)
    assert second.prompt_tokens == 0
    assert not first.truncated


def test_long_rows_are_refused_by_name_or_cut_at_the_end_that_is_asked_for(write, tokenizer):
    source = write({"prompt": "hi", "completion": " no"}, {"prompt": "please help", "completion": " thanks" * 30})
    rows = load_demonstrations([source])
    with pytest.raises(DataError, match=r"1 of 2 rows have more than 12 tokens of prompt and completion: .*, line 2 "):
        Encoder(tokenizer, max_tokens=12).demonstrations(rows)
    whole = Encoder(tokenizer, max_tokens=1000).demonstrations(rows)[1]
    right = Encoder(tokenizer, max_tokens=12, truncation="right").demonstrations(rows)[1]
    left = Encoder(tokenizer, max_tokens=12, truncation="left").demonstrations(rows)[1]
    assert right.ids.tolist() == whole.ids[:12].tolist()
    assert left.ids.tolist() == whole.ids[-12:].tolist()
    assert (right.truncated, left.truncated) == (True, True)
    assert (right.prompt_tokens, left.prompt_tokens) == (whole.prompt_tokens, 0)


def with_beginning(tokenizer):
    """The tokenizer as Llama's are: it puts <bos> before a text."""
    import copy

    from tokenizers import processors

    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", own.bos_token_id)]
    )
    assert own("hello").input_ids[0] == own.bos_token_id
    return own


def test_plain_text_begins_as_the_tokenizer_begins_it_and_messages_as_their_template_does(write, tokenizer):
    own = with_beginning(tokenizer)

    def ids(text):
        return own(text, add_special_tokens=False).input_ids

    bos, eos = own.bos_token_id, own.eos_token_id
    encoder = Encoder(own, max_tokens=50)
    for prompt in ("hello", "<bos>hello"):  # Who has written it himself is given no second one.
        (row,) = encoder.demonstrations(load_demonstrations([write({"prompt": prompt, "completion": " thanks"})]))
        assert row.ids.tolist() == [bos, *ids("hello"), *ids(" thanks"), eos]
        assert row.prompt_tokens == 1 + len(ids("hello"))
        (asked,) = encoder.prompts(load_prompts([write({"prompt": prompt})]))
        assert asked.tolist() == own("hello").input_ids == [bos, *ids("hello")]
    # Of a text without a prompt the very first word is learned, since <bos> stands before it.
    (text,) = encoder.demonstrations(load_demonstrations([write({"text": "good"})]))
    assert (text.ids.tolist(), text.prompt_tokens) == ([bos, *ids("good"), eos], 1)
    (pair,) = encoder.preferences(load_preferences([write({"prompt": "hello", "chosen": " a", "rejected": " b"})]))
    assert pair.rejected.ids.tolist() == [bos, *ids("hello"), *ids(" b"), eos]
    for template in (own.chat_template, "{{ bos_token }}" + own.chat_template):
        own.chat_template = template
        (talk,) = Encoder(own, max_tokens=50).demonstrations(
            load_demonstrations([write({"messages": [USER, ASSISTANT]})])
        )
        rendered = own.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        assert talk.ids[: talk.prompt_tokens].tolist() == ids(rendered)
        assert talk.ids.tolist().count(bos) == template.startswith("{{ bos_token }}")


def test_both_answers_of_a_pair_lose_the_same_of_their_prompt(write, tokenizer):
    row = {"prompt": "please help my phone", "chosen": " ok", "rejected": " no no no"}
    rows = load_preferences([write(row)])
    (whole,) = Encoder(tokenizer, max_tokens=1000).preferences(rows)
    for limit in range(2, len(whole) + 1):
        encoder = Encoder(tokenizer, max_tokens=limit, truncation="left")
        (cut,) = encoder.preferences(rows)
        gone = min(whole.chosen.prompt_tokens, len(whole) - limit)
        for answer, of in ((cut.chosen, whole.chosen), (cut.rejected, whole.rejected)):
            assert answer.prompt_tokens == of.prompt_tokens - gone
            assert answer.ids.tolist() == of.ids[gone:][-limit:].tolist()
            assert len(answer) <= limit
            assert answer.truncated == (len(whole) > limit)
        (compared,) = encoder.comparisons(
            [Comparison(prompt=row["prompt"], answers=(" ok", " no no no"), judgements=())]
        )
        assert [a.ids.tolist() for a in compared.answers] == [cut.chosen.ids.tolist(), cut.rejected.ids.tolist()]


def test_pairs_that_prefer_an_answer_to_itself_are_counted_and_the_first_is_named(write, tokenizer, capsys):
    rows = [{"prompt": f"p{i}", "chosen": " a b", "rejected": " a" if i % 2 else " a b"} for i in range(5)]
    source = write(*rows)
    encoder = Encoder(tokenizer, max_tokens=50)
    told = f"warning: 3 of 5 rows prefer an answer to itself, token by token (the first: {source}, line 1): nothing is"
    encoder.preferences(load_preferences([source]))
    assert told in capsys.readouterr().err
    encoder.comparisons(load_comparisons([source]))
    assert told in capsys.readouterr().err
    # A tie says no more than that.
    encoder.comparisons(load_comparisons([write({"prompt": "p", "first": " a", "second": " a", "preference": "tie"})]))
    assert capsys.readouterr().err == ""


def test_messages_need_a_chat_template(write, tokenizer):
    rows = load_demonstrations([write({"messages": [USER, ASSISTANT]})])
    (encoded,) = Encoder(tokenizer, max_tokens=100).demonstrations(rows)
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert encoded.ids[: encoded.prompt_tokens].tolist() == tokenizer(rendered, add_special_tokens=False).input_ids
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    with pytest.raises(DataError, match=r"line 1: the prompt is chat messages, but the model's tokenizer has no chat"):
        Encoder(bare, max_tokens=100).demonstrations(rows)


def test_real_texts_load_in_the_shapes_that_are_promised(data_folder: Path):
    harmless = load_preferences([str(data_folder / "pref_hh_harmless_dev.jsonl")])
    instructions = load_demonstrations([str(data_folder / "sft_instruct_dev.jsonl")])
    assert len(harmless) == 1710
    assert harmless[0].prompt.startswith("\n\nHuman: ")
    assert len(instructions) == 915
    with pytest.raises(DataError, match=r"sft_gsm8k_train2500\.jsonl, line 1: a demonstration needs"):
        load_demonstrations([str(data_folder / "sft_gsm8k_train2500.jsonl")])


def test_messages_that_the_chat_template_refuses_are_named(write, tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with system') }}{% endif %}"
    )
    path = write({"messages": [USER]})
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: the model's chat template refuses .*: begin with system"):
        Encoder(strict, max_tokens=50).prompts(load_prompts([path]))
