"""Every stage refuses every fault of its rows, by file and line, in JSON Lines and in Parquet: a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.__main__ import main
from trainer.comparisons import load_comparisons
from trainer.data import load_demonstrations, load_judged, load_preferences, load_prompts
from trainer.encoding import Encoder
from trainer.errors import DataError
from trainer.strict_json import BadJsonError, objection, read_json

Row = dict[str, Any]

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
WORSE = {"role": "assistant", "content": "What?"}
PAIR: Row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
TALKS: Row = {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}
ASKED: Row = {"instruction": "Greet me.", "chosen": "good", "rejected": "bad"}

# Of each stage, the shapes of its rows.
SHAPES: dict[str, list[Row]] = {
    "sft": [
        {"prompt": "p", "completion": "c"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"instruction": "Translate.", "input": "cheese", "output": "fromage"},
        {"text": "A document."},
        PAIR,
    ],
    "reward": [
        PAIR,
        TALKS,
        ASKED,
        {"prompt": "p", "first": "a", "second": "b", "preference": "first"},
        {"prompt": "p", "ranking": ["a", "b", "c"]},
        {"prompt": "p", "answers": ["a", "b", "c"], "ranks": [2, 1, 3]},
        {"prompt": "p", "answers": ["a", "b"], "comparisons": [{"first": 0, "second": 1, "preference": "tie"}]},
    ],
    "dpo": [PAIR, TALKS, ASKED],
    "kto": [PAIR, {"prompt": "p", "completion": "c", "label": True}],
    "ppo": [{"prompt": "p"}, {"prompt": [USER]}, {"messages": [USER]}, {"instruction": "Greet me.", "input": "now"}],
}
OPTIONAL = {"input"}
LOADERS: dict[str, Callable[[list[str]], list[Any]]] = {
    "sft": load_demonstrations,
    "reward": load_comparisons,
    "dpo": load_preferences,
    "kto": load_judged,
    "ppo": load_prompts,
}


def faults(stage: str, shape: Row) -> Iterator[tuple[str, Row, str]]:
    """What is wrong, the row, and what must be said of it beside its file and line."""
    for name, value in shape.items():
        if name not in OPTIONAL:
            yield f"{name} missing", {key: other for key, other in shape.items() if key != name}, ""
            yield f"{name} null", {**shape, name: None}, ""
        yield f"{name} a number", {**shape, name: 7}, f"field '{name}' must be "
        yield f"{name} an object", {**shape, name: {"a": [1]}}, f"field '{name}' must be "
        if isinstance(value, list):
            yield f"{name} empty", {**shape, name: []}, f"field '{name}'"
        elif name not in OPTIONAL and (name != "prompt" or stage == "ppo"):
            yield f"{name} blank", {**shape, name: " \n"}, f"field '{name}'"
        for place, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, dict) and "role" in item:
                where = f"field '{name}', message {place + 1}: field "
                yield f"{name} without role", _with(shape, name, place, role=None), f"{where}'role' must be text"
                yield f"{name} with a number", _with(shape, name, place, content=3), f"{where}'content' must be text"
            yield f"{name}, one null", {**shape, name: [*value[:place], None, *value[place + 1 :]]}, f"field '{name}'"
        if isinstance(value, list) and value[-1] in (USER, ASSISTANT, WORSE) and (name != "prompt" or stage == "ppo"):
            yield f"{name} ends blank", _with(shape, name, len(value) - 1, content=" "), f"field '{name}'"
    for other in SHAPES[stage]:
        if other.keys() != shape.keys() or {type(v) for v in other.values()} != {type(v) for v in shape.values()}:
            yield f"mixed with {'+'.join(other)}", other, "all rows of a file have one shape"


def _with(shape: Row, name: str, place: int, **changes: object) -> Row:
    row = json.loads(json.dumps(shape))  # In which no message stands for two.
    row[name][place].update(changes)
    return row


CASES = [
    pytest.param(stage, shape, row, said, id=f"{stage}-{'+'.join(shape)}-{number}: {what}")
    for stage, shapes in SHAPES.items()
    for number, shape in enumerate(shapes)
    for what, row, said in faults(stage, shape)
]


def json_lines(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[Row]) -> str | None:
    """None where a column can't hold the fault: it has one type for all its rows."""
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        pyarrow.parquet.write_table(table, path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
        return None
    return str(path)


@pytest.mark.parametrize(("stage", "shape", "row", "said"), CASES)
def test_a_fault_is_refused_by_file_and_line(stage: str, shape: Row, row: Row, said: str, tmp_path: Path) -> None:
    rows = [shape, shape, row, shape]
    files = {"line": json_lines(tmp_path / "rows.jsonl", rows), "row": parquet(tmp_path / "rows.parquet", rows)}
    for unit, file in files.items():
        if file is None:
            continue
        with pytest.raises(DataError) as refused:
            LOADERS[stage]([file])
        assert str(refused.value).startswith(f"{file}, {unit} 3: ")
        # Parquet writes null for what is not there, and an object's fields into every row.
        assert said in str(refused.value) or unit == "row"
    assert len(LOADERS[stage]([json_lines(tmp_path / "good.jsonl", [shape] * 3)])) % 3 == 0


@pytest.mark.parametrize("stage", SHAPES)
def test_the_shapes_of_a_stage_are_read_from_parquet_as_from_json_lines(stage: str, tmp_path: Path) -> None:
    for shape in SHAPES[stage]:
        file = parquet(tmp_path / "rows.parquet", [shape] * 2)
        assert file is not None
        assert LOADERS[stage]([file]) == LOADERS[stage]([json_lines(tmp_path / "rows.jsonl", [shape] * 2)])
    # Files of several shapes are several files.
    each = [json_lines(tmp_path / f"{number}.jsonl", [shape]) for number, shape in enumerate(SHAPES[stage])]
    assert {row.where.split(", ")[0] for row in LOADERS[stage](each)} == set(each)


GOOD = json.dumps(PAIR | {"completion": "c"}).encode()
LINES = [
    (b"not json", "not valid JSON: Expecting value at column 1 (each line holds one whole object)"),
    (GOOD[:-2], "not valid JSON: Unterminated string"),
    (GOOD + GOOD, "not valid JSON: Extra data at column"),
    (b"[" + GOOD + b"]", "must be a JSON object, is a list (an array of objects? then name the file .json)"),
    (b"[", "not valid JSON: Expecting value at column 2 (an array of objects? then name the file .json)"),
    (b'"text"', "must be a JSON object, is a str"),
    (GOOD[:-1] + b', "prompt": "q"}', "field 'prompt' stands twice in one object: leave one of them"),
    (GOOD[:-1] + b', "x": [{"a": 1, "a": 2}]}', "field 'a' stands twice in one object"),
    (GOOD.replace(b"good", b"g\xe9n\xe9reux"), "not UTF-8 text (invalid continuation byte, 0xe9): save the file as"),
    ("\ufeff{}".encode("utf-16-le"), "not UTF-8 text (invalid start byte, 0xff): save the file as UTF-8"),
    (GOOD.replace(b"good", b"\\ud83d good"), r"half of a surrogate pair, \ud83d, stands in '\ud83d good': it is no"),
    (b"[" * 100_000, "not valid JSON: "),
]


@pytest.mark.parametrize(("line", "said"), LINES)
@pytest.mark.parametrize("stage", SHAPES)
def test_a_line_that_is_no_row_is_refused_by_its_number(stage: str, line: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as refused:
        LOADERS[stage]([str(file)])
    assert str(refused.value).startswith(f"{file}, line 3: {said}")


def test_what_other_systems_write_is_read(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, no newline at the end, separators that end no line, pairs of halves."""
    file = tmp_path / "rows.jsonl"
    texts = ["a", "\u2028b", "\U0001f600", "é"]
    lines = [json.dumps({"prompt": text}).encode() for text in texts[:3]] + ['{"prompt": "é"}'.encode()]
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n \r\n".join(lines))
    rows = load_prompts([str(file)])
    assert [row.prompt for row in rows] == texts
    assert [row.where for row in rows] == [f"{file}, line {line}" for line in (1, 3, 5, 7)]
    array = tmp_path / "rows.json"
    array.write_bytes(b"\xef\xbb\xbf[\r\n" + b",\r\n".join(lines) + b"]")
    assert [row.prompt for row in load_prompts([str(array)])] == texts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"prompt": "a"},\n {"prompt": "b", "prompt": "c"}]', ", row 2: field 'prompt' stands twice"),
        (b'[{"prompt": "a"},\n {"prompt": "\xff"}]', ", line 2: not UTF-8 text (invalid start byte, 0xff)"),
        (b'[{"prompt": "a"},\n {"prompt" "b"}]', ", line 2: not valid JSON: Expecting ':' delimiter at column"),
        (b'{"prompt": "a"}\n{"prompt": "b"}', ", line 2: not valid JSON: Extra data at column 1 (one object a line?"),
        (b'{"prompt": "a"}', ": must hold a JSON array of objects, is a"),
        (b'[{"prompt": "a"}, 7]', ", row 2: must be a JSON object, is a int"),
        (b"[]", ": holds no rows"),
    ],
)
def test_an_array_that_is_none_of_rows_is_refused_by_line_or_row(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_prompts([str(file)])
    assert str(refused.value).startswith(f"{file}{said}")


def test_parquet_that_is_no_table_of_rows_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "rows.parquet"
    text = pyarrow.array(["a", "b"])
    broken = pyarrow.array([b"a", b"\xff\xfe"]).cast(pyarrow.large_binary())
    unchecked = pyarrow.Array.from_buffers(pyarrow.large_string(), 2, broken.buffers())
    for table, said in (
        (pyarrow.table({"prompt": pyarrow.array([b"a", b"b"])}), ", row 1: field 'prompt' must be text or a list"),
        (pyarrow.table({"prompt": unchecked}), ", row 2: field 'prompt' is not UTF-8 text (invalid start byte): write"),
        (pyarrow.table([text, text], names=["prompt", "prompt"]), ": column 'prompt' stands twice: leave one of them"),
        (pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), ": holds no rows"),
        (pyarrow.table({"question": text}), ", row 1: a prompt needs prompt, instruction, messages"),
    ):
        pyarrow.parquet.write_table(table, file)
        with pytest.raises(DataError) as refused:
            load_prompts([str(file)])
        assert str(refused.value).startswith(f"{file}{said}")
    whole = file.read_bytes()
    for content in (b"", b"prompt\na\n", whole[: len(whole) // 2], whole[:4] + bytes(20) + whole[24:]):
        file.write_bytes(content)
        with pytest.raises(DataError) as refused:
            load_prompts([str(file)])
        assert str(refused.value).startswith(f"{file}: not a readable Parquet file: ")


@pytest.mark.parametrize("stage", SHAPES)
def test_rows_that_are_too_long_are_refused_by_line(stage: str, tokenizer: Any, tmp_path: Path) -> None:
    short, *_ = SHAPES[stage]
    name = "prompt" if stage == "ppo" else [*short][-1]
    file = json_lines(tmp_path / "rows.jsonl", [short, short | {name: "hello " * 40}, short])
    rows = LOADERS[stage]([file])
    encode = {"reward": "comparisons", "dpo": "preferences", "ppo": "prompts"}.get(stage, "demonstrations")
    with pytest.raises(DataError) as refused:
        getattr(Encoder(tokenizer, max_tokens=30), encode)(rows)
    assert " have more than 30 tokens of prompt" in str(refused.value)
    assert f": {file}, line 2 (" in str(refused.value)
    assert "line 1" not in str(refused.value)
    assert "raise --max-tokens if the model allows, or choose --truncation left or right" in str(refused.value)


def arguments(stage: str, model: Path, file: str, output: Path, *flags: str) -> list[str]:
    rows = "--prompts" if stage == "ppo" else "--data"
    return [stage, "--model", str(model), rows, file, "--output", str(output), *flags]


@pytest.mark.parametrize("stage", SHAPES)
def test_a_command_says_it_in_one_line_and_writes_nothing(
    stage: str, make_policy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = make_policy(), tmp_path / "run"
    good = SHAPES[stage][0]
    eval_rows = "--eval-prompts" if stage == "ppo" else "--eval-data"
    none, few = json_lines(tmp_path / "none.jsonl", []), json_lines(tmp_path / "few.jsonl", [good] * 3)
    bad = json_lines(tmp_path / "bad.jsonl", [good, {"question": "?"}])
    one = json_lines(tmp_path / "one.jsonl", [good] * 40)  # Of one prompt, so no part can be set apart.
    for file, flags, said in (
        (none, [], f"{none}: holds no rows"),
        (few, [eval_rows, none], f"{none}: holds no rows"),
        (bad, [], f"{bad}, line 2: "),
        (few, [eval_rows, bad], f"{bad}, line 2: "),
        (one, ["--held-out-fraction", "0.2"], f"{one}: {80 if stage == 'kto' else 40} rows of 1 groups"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments(stage, model, file, output, *flags))
        assert end.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith(f"quartet-train {stage}: {said}")
        assert told.count("\n") == 1
        assert not output.exists()


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_fraction_that_sets_no_row_apart_is_refused(
    stage: str, make_policy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c", "chosen": "c", "rejected": "d"} for i in range(3)]
    few = json_lines(tmp_path / "few.jsonl", rows)
    with pytest.raises(SystemExit):
        main(arguments(stage, make_policy(), few, tmp_path / "run", "--held-out-fraction", "0.1"))
    told = capsys.readouterr().err
    assert f"quartet-train {stage}: {few}: --held-out-fraction 0.1 of 3 " in told
    assert "raise it, " in told


def test_values_are_those_of_the_standard_reader_and_objections_are_named() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude00"], "b": {"c": {}}}'
    assert read_json(text.encode()) == json.loads(text)
    assert objection(read_json(text.encode())) is None
    assert objection(read_json(b'{"b": [{"\\udc00": 1}]}')) is not None
    with pytest.raises(BadJsonError) as bad:
        read_json(b'{\n"a": 1,\n}')
    assert bad.value.line == 3
