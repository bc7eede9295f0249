"""How every quartet command reads its settings: flags, then environment, then a TOML file, then defaults.

One place, so that all commands behave alike: frozen, keyword-only, refused with the field, its value and the bound.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
PositiveFloat = Annotated[float, Field(gt=0), AfterValidator(_finite)]
NonNegativeFloat = Annotated[float, Field(ge=0), AfterValidator(_finite)]
UnitFloat = Annotated[float, Field(ge=0, le=1), AfterValidator(_finite)]
AdamBeta = Annotated[float, Field(ge=0, lt=1), AfterValidator(_finite)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Environment(EnvSettingsSource):
    """Lists in the environment are JSON, or values with commas between, as flags take them."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
            return [part.strip() for part in value.split(",") if part.strip()]
        return super().decode_complex_value(field_name, field, value)


class Settings(BaseSettings):
    """Base of every command's settings. Subclasses set ``command`` and document each field by its description."""

    command: ClassVar[str] = "quartet"

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
        env_nested_delimiter="__",
        validate_default=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, _Environment(settings_cls), TomlConfigSettingsSource(settings_cls))

    @classmethod
    def from_command_line(cls, argv: list[str] | None = None) -> Self:
        """Reads ``argv``, the environment and the file of ``--config FILE``; exits with 2 and a clear message."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        config_file = _take_config(arguments, cls.command)
        prefix = cls.command.replace("-", "_").replace(" ", "_").upper() + "_"

        class Reader(cls):  # type: ignore[misc, valid-type]
            model_config = SettingsConfigDict(
                toml_file=config_file,
                env_prefix=prefix,
                cli_prog_name=cls.command,
                cli_exit_on_error=False,  # The usage of many flags would bury what is wrong.
                title=cls.__name__,
            )

        Reader.__doc__ = (cls.__doc__ or "") + (
            f"\n\nEvery setting is also read from the environment as {prefix}NAME, "
            "and from a TOML file given as --config FILE; flags win over the environment, that over the file."
        )
        try:
            read = CliApp.run(Reader, cli_args=arguments)
        except (ValidationError, SettingsError) as error:
            sys.exit(_fail(cls.command, explain(error)))
        return cls.model_construct(**{name: getattr(read, name) for name in cls.model_fields})


def explain(error: ValidationError | SettingsError) -> str:
    """One line a problem: the field, its value and what is allowed."""
    if isinstance(error, SettingsError):
        if parsed := re.match(r'error parsing value for field "(\w+)" from source "_Environment"', str(error)):
            flag = "--" + parsed[1].replace("_", "-")
            return f"{flag}: its value in the environment is not valid JSON: {error.__cause__}"
        return f"{str(error).removeprefix('error parsing CLI: ')}; see --help"
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "settings"
        flag = "--" + field.replace("_", "-")
        if problem["type"] == "missing":
            lines.append(f"{flag} is required")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{flag}: there is no such setting (value {problem['input']!r}); see --help")
        elif isinstance(problem["input"], dict) or field == "settings":
            lines.append(problem["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{flag} is {_shown(problem['input'])}: {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _take_config(arguments: list[str], command: str) -> Path | None:
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.removeprefix("--config=") if "=" in argument else None
            if inline is None and index + 1 >= len(arguments):
                sys.exit(_fail(command, "--config needs a file"))
            path = Path(inline if inline is not None else arguments[index + 1])
            del arguments[index : index + (1 if inline is not None else 2)]
            try:
                # Read here for its message alone: pydantic-settings reads it again, and would fail without a word.
                tomllib.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                sys.exit(_fail(command, f"--config is {str(path)!r}: there is no such file"))
            except OSError as error:
                sys.exit(_fail(command, f"--config is {str(path)!r}: cannot be read: {error.strerror}"))
            except ValueError as error:  # Of TOML, or of UTF-8.
                sys.exit(_fail(command, f"--config is {str(path)!r}: not valid TOML: {error}"))
            return path
    return None


def _fail(command: str, message: str) -> int:
    for line in message.splitlines():
        sys.stderr.write(f"{command}: {line}\n")
    return 2
