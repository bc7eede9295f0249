"""Settings come from flags, environment, TOML and defaults, in this order, and refuse what is wrong by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from quartet.settings import (
    Finite,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Settings,
    UnitFloat,
)


class Example(Settings):
    """An example."""

    command: ClassVar[str] = "quartet-example try"

    model: str = Field(description="needed")
    learning_rate: PositiveFloat = Field(0.5, description="positive")
    grace_s: NonNegativeFloat = Field(30.0, description="not negative")
    share: UnitFloat = Field(0.25, description="in [0, 1]")
    offset: Finite = Field(0.0, description="finite")
    steps: PositiveInt = Field(10, description="at least 1")
    seed: NonNegativeInt = Field(0, description="at least 0")
    port: Port = Field(50051, description="a port")
    smoothing: Annotated[UnitFloat, Field(lt=0.5)] = Field(0.0, description="below a half")
    dtype: Literal["auto", "float32"] = Field("auto", description="a choice")
    data: tuple[str, ...] = Field((), description="several")
    limit: PositiveInt | None = Field(None, description="may be left out")
    output: Path = Field(Path("out"), description="a folder")
    fast: bool = Field(False, description="a switch")

    @model_validator(mode="after")
    def _not_both(self) -> Example:
        if self.fast and self.dtype == "float32":
            raise ValueError("--fast and --dtype float32 exclude each other")
        return self


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in Example.model_fields:
        monkeypatch.delenv(f"QUARTET_EXAMPLE_TRY_{name.upper()}", raising=False)


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        Example.from_command_line(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_flags_win_over_environment_over_toml_over_defaults(tmp_path, monkeypatch):
    config = tmp_path / "settings.toml"
    config.write_text('model = "toml"\nsteps = 1\nseed = 1\nlearning-rate = 0.125\n'.replace("-", "_"))
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_STEPS", "2")
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_MODEL", "environment")
    monkeypatch.setenv("QUARTET_EXAMPLE_MODEL", "of another command")
    read = Example.from_command_line(["--config", str(config), "--model", "flag"])
    assert (read.model, read.steps, read.seed, read.learning_rate, read.port) == ("flag", 2, 1, 0.125, 50051)
    read = Example.from_command_line([f"--config={config}"])
    assert (read.model, read.steps, read.seed) == ("environment", 2, 1)
    monkeypatch.delenv("QUARTET_EXAMPLE_TRY_STEPS")
    monkeypatch.delenv("QUARTET_EXAMPLE_TRY_MODEL")
    read = Example.from_command_line([f"--config={config}"])
    assert (read.model, read.steps, read.seed) == ("toml", 1, 1)


def test_every_kind_of_field_is_read_from_a_flag_and_from_the_environment(monkeypatch):
    flags = ["--model", "m", "--data", "a.jsonl", "--data", "b.jsonl", "--limit", "3", "--output", "x/y", "--fast"]
    read = Example.from_command_line([*flags, "--offset", "-1.5"])
    assert (read.data, read.limit, read.output, read.fast, read.offset) == (
        ("a.jsonl", "b.jsonl"),
        3,
        Path("x/y"),
        True,
        -1.5,
    )
    assert Example.from_command_line(["--model", "m", "--no-fast"]).fast is False
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_DATA", '["c.jsonl"]')
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_FAST", "true")
    read = Example.from_command_line(["--model", "m"])
    assert (read.data, read.fast) == (("c.jsonl",), True)


@pytest.mark.parametrize(
    ("flag", "value", "bound"),
    [
        ("--learning-rate", "-1", "greater than 0"),
        ("--learning-rate", "0", "greater than 0"),
        ("--learning-rate", "nan", "greater than 0"),
        ("--learning-rate", "inf", "finite"),
        ("--learning-rate", "fast", "valid number"),
        ("--grace-s", "-0.1", "greater than or equal to 0"),
        ("--grace-s", "nan", "greater than or equal to 0"),
        ("--grace-s", "inf", "finite"),
        ("--share", "1.01", "less than or equal to 1"),
        ("--share", "-0.01", "greater than or equal to 0"),
        ("--share", "nan", ""),
        ("--offset", "nan", "finite"),
        ("--offset", "-inf", "finite"),
        ("--steps", "0", "greater than or equal to 1"),
        ("--steps", "-5", "greater than or equal to 1"),
        ("--steps", "1.5", "valid integer"),
        ("--seed", "-1", "greater than or equal to 0"),
        ("--port", "65536", "less than or equal to 65535"),
        ("--smoothing", "0.5", "less than 0.5"),
        ("--dtype", "float8", "'auto' or 'float32'"),
        ("--limit", "0", "greater than or equal to 1"),
        ("--fast", "perhaps", "valid boolean"),
    ],
)
def test_a_bad_value_is_refused_with_flag_value_and_bound(capsys, monkeypatch, flag, value, bound):
    if flag != "--fast":
        told = refusal(capsys, "--model", "m", f"{flag}={value}")
        assert told.startswith(f"quartet-example try: {flag} is '{value}': "), told
        assert bound in told
        assert told.count("\n") == 1
    # The environment is named by the same flag: it is the same setting.
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_" + flag.removeprefix("--").replace("-", "_").upper(), value)
    told = refusal(capsys, "--model", "m")
    assert told.startswith(f"quartet-example try: {flag} is '{value}': "), told
    assert bound in told


def test_all_problems_are_told_at_once(capsys):
    told = refusal(capsys, "--steps", "0", "--seed", "-1")
    assert told.splitlines() == [
        "quartet-example try: --model is required",
        "quartet-example try: --steps is '0': Input should be greater than or equal to 1",
        "quartet-example try: --seed is '-1': Input should be greater than or equal to 0",
    ]


def test_rules_between_settings_are_told_in_their_own_words(capsys):
    told = refusal(capsys, "--model", "m", "--fast", "--dtype", "float32")
    assert told == "quartet-example try: --fast and --dtype float32 exclude each other\n"


def test_unknown_settings_are_refused_wherever_they_stand(capsys, tmp_path):
    told = refusal(capsys, "--model", "m", "--stepz", "3")
    assert told == "quartet-example try: unrecognized arguments: --stepz 3; see --help\n"
    told = refusal(capsys, "--model", "m", "--step", "3")  # No guessing at abbreviations.
    assert told == "quartet-example try: unrecognized arguments: --step 3; see --help\n"
    told = refusal(capsys, "--model")
    assert told == "quartet-example try: argument --model: expected one argument; see --help\n"
    config = tmp_path / "settings.toml"
    config.write_text('model = "m"\nstepz = 3\n')
    told = refusal(capsys, "--config", str(config))
    assert told == "quartet-example try: --stepz: there is no such setting (value 3); see --help\n"


def test_a_config_file_that_cannot_be_read_is_named(capsys, tmp_path):
    assert refusal(capsys, "--config") == "quartet-example try: --config needs a file\n"
    missing = tmp_path / "none.toml"
    assert refusal(capsys, "--config", str(missing)) == (
        f"quartet-example try: --config is '{missing}': there is no such file\n"
    )
    broken = tmp_path / "broken.toml"
    broken.write_text('model = "m\n')
    told = refusal(capsys, "--config", str(broken))
    assert told.startswith(f"quartet-example try: --config is '{broken}': not valid TOML: ")
    assert "line 1" in told
    told = refusal(capsys, "--config", str(tmp_path))
    assert told == f"quartet-example try: --config is '{tmp_path}': cannot be read: Is a directory\n"


def test_a_bad_value_in_toml_is_refused_like_any_other(capsys, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text('model = "m"\nshare = nan\nsteps = "many"\n')
    told = refusal(capsys, "--config", str(config)).splitlines()
    assert told[0].startswith("quartet-example try: --share is nan: ")
    assert told[1].startswith("quartet-example try: --steps is 'many': ")


@pytest.mark.parametrize("given", ['["a.jsonl", "b.jsonl"]', "a.jsonl,b.jsonl", " a.jsonl , b.jsonl"])
def test_a_list_in_the_environment_is_json_or_has_commas_between(monkeypatch, given):
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_DATA", given)
    assert Example.from_command_line(["--model", "m"]).data == ("a.jsonl", "b.jsonl")
    assert Example.from_command_line(["--model", "m", "--data", given.replace("a.", "c.")]).data == (
        "c.jsonl",
        "b.jsonl",
    )


def test_a_list_in_the_environment_that_is_broken_json_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("QUARTET_EXAMPLE_TRY_DATA", '["a.jsonl"')
    told = refusal(capsys, "--model", "m")
    assert told.startswith("quartet-example try: --data: its value in the environment is not valid JSON: ")


def test_settings_are_frozen_and_plain_instances_of_their_class():
    read = Example.from_command_line(["--model", "m"])
    assert type(read) is Example
    with pytest.raises(ValidationError, match="frozen"):
        read.steps = 3
    assert read == Example(model="m")


def test_help_lists_every_flag_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        Example.from_command_line(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for name in Example.model_fields:
        assert f"--{name.replace('_', '-')}" in told
    assert "QUARTET_EXAMPLE_TRY_NAME" in told
    assert "below a half" in told
