"""Where a model comes from: ``lineage.json`` in its folder, and ``quartet-train lineage``.

The file holds a chain: a record of how these weights came about, then that of the model they started from, and so on to
the first. Parents are copied into it, so that the chain outlives their folders. A model is known by the fingerprint of
its weights, never by its name.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from quartet.fingerprint import safetensors_fingerprint
from quartet.model_folder import find_model
from trainer.config import LineageSettings
from trainer.errors import ModelError

LINEAGE_FILE = "lineage.json"

_VERSIONS = ("torch", "transformers", "tokenizers", "peft")
_SHORT = 12  # Characters of a hash that people are shown.


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of a model before its first step: all of its record but step, date and weights."""

    stage: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    parent: Mapping[str, Any] | None
    """Name and weights fingerprint of the model that it starts from; None: of random weights."""
    ancestors: Sequence[Mapping[str, Any]] = ()
    """The chain of that model."""
    judges: Mapping[str, Any] = field(default_factory=dict)
    """Models behind services that the training learned from, by role."""

    def chain(self, *, step: int, weights: str, now: datetime | None = None) -> list[dict[str, Any]]:
        """The whole chain of the trained model.

        Args:
            step: optimiser steps of a supervised stage, rollouts of PPO.
            weights: fingerprint of the model as it is saved.
            now: for tests.
        """
        own = {
            "stage": self.stage,
            "step": step,
            "date": (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "weights": weights,
            "parent": self.parent,
            "data": self.data,
            "judges": self.judges,
            "settings": self.settings,
            "code": code_version(),
            "versions": library_versions(),
        }
        return [own, *map(dict, self.ancestors)]


def origin(
    stage: str,
    settings: Mapping[str, Any],
    *,
    parent: str | None,
    sources: Iterable[str],
    digest: str | None,
    judges: Mapping[str, Any] | None = None,
) -> Origin:
    """What is known of a model at the start of its training. Reads the parent's weights and the files once.

    Args:
        stage: sft, reward, dpo, kto, ppo, online-dpo or init.
        settings: of the stage, as JSON values.
        parent: folder or hub id of the model that training starts from; None: random weights.
        sources: files and hub names of the data, held-out ones included.
        digest: of the rows as the model sees them, ``runs.ids_digest``; None: there are none yet.
        judges: models behind services, by role.

    Raises:
        ModelFolderError: there is no such parent.
        ModelError: its lineage is damaged.
    """
    found: dict[str, Any] | None = None
    ancestors: list[dict[str, Any]] = []
    if parent is not None:
        folder = find_model(parent)
        found = {"model": parent, "weights": safetensors_fingerprint(folder)}
        ancestors = read_chain(folder)
        if ancestors and ancestors[0]["weights"] != found["weights"]:
            sys.stderr.write(f"warning: {parent}: its weights are not those that its {LINEAGE_FILE} is of; left out\n")
            ancestors = []
    return Origin(
        stage=stage,
        settings=dict(settings),
        data={"rows_sha256": digest, "files": [_file(source) for source in dict.fromkeys(sources)]},
        parent=found,
        ancestors=ancestors,
        judges=dict(judges or {}),
    )


def _file(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if not path.is_file():  # A name of the hub.
        return {"name": source, "sha256": None}
    with path.open("rb") as file:
        return {"name": source, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_lineage(folder: Path, of: Origin, step: int) -> None:
    """Writes the chain beside the weights that are already in ``folder``."""
    chain = of.chain(step=step, weights=safetensors_fingerprint(folder))
    content = {"format": 1, "chain": chain}
    (folder / LINEAGE_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_chain(folder: Path) -> list[dict[str, Any]]:
    """The records from the model of ``folder`` to its first ancestor; none where no lineage is kept.

    Raises:
        ModelError: the file is no lineage.
    """
    path = folder / LINEAGE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        chain = content["chain"]
        if content["format"] != 1 or not chain:
            raise ValueError(f"format is {content['format']!r} with {len(chain)} records: it must be 1, with some")
        for record in chain:
            for name, kind in (("stage", str), ("step", int), ("date", str), ("weights", str), ("data", dict)):
                if not isinstance(record[name], kind):
                    raise ValueError(f"{name} is {record[name]!r}: it must be of type {kind.__name__}")
            record["parent"], record["settings"], record["code"], record["versions"], record["judges"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no lineage: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no lineage: {error} is missing") from error
    return list(chain)


def code_version() -> dict[str, Any]:
    """Version of the package, and the git commit that it runs from where that is known; ``changed``: with changes."""
    try:
        version: str | None = metadata.version("quartet")
    except metadata.PackageNotFoundError:
        version = None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"version": version, "commit": commit or None, "changed": bool(changed) if commit else None}


def _git(*arguments: str) -> str | None:
    """Of the repository that this file is tracked in: installed into some other project's, it is none of its."""
    here = Path(__file__).resolve().parent
    try:
        subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=True,
            timeout=10,
        )
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def library_versions() -> dict[str, str]:
    """Python's and those of the libraries that decide what weights come out, as far as they are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# The command


def main(settings: LineageSettings) -> None:
    """Prints the chain of a model, itself first.

    Raises:
        ModelError: it has no lineage, or a damaged one.
    """
    folder = find_model(settings.model, need_tokenizer=False)
    chain = read_chain(folder)
    if not chain:
        raise ModelError(
            f"{settings.model} has no {LINEAGE_FILE}: it was not saved by quartet-train, or by one that kept none"
        )
    if settings.as_json:
        sys.stdout.write(json.dumps(chain, indent=1, ensure_ascii=False) + "\n")
        return
    sys.stdout.write("\n".join(describe(settings.model, chain)) + "\n")
    if safetensors_fingerprint(folder) != chain[0]["weights"]:
        sys.stderr.write(f"warning: the weights in {settings.model} are not those that this was written of\n")


def describe(model: str, chain: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines for people: each model, what made it of which data, and under which code."""
    name = model
    for record in chain:
        yield f"{name}  weights {record['weights'][:_SHORT]}"
        steps = "" if record["stage"] == "init" else f", step {record['step']:,d}"
        yield f"  {record['stage']}{steps}, {record['date']}, {_code(record['code'])}"
        yield "  " + ", ".join(f"{library} {version}" for library, version in record["versions"].items())
        digest = record["data"].get("rows_sha256")
        yield (
            "  data: "
            + (f"rows {digest[:_SHORT]} of " if digest else "")
            + ", ".join(
                f"{file['name']} ({file['sha256'][:_SHORT]})" if file["sha256"] else f"{file['name']} (of the hub)"
                for file in record["data"]["files"]
            )
        )
        for role, judge in record["judges"].items():
            yield f"  {role}: {judge['model']}  weights {judge['weights'][:_SHORT]}"
        yield "  settings: " + ", ".join(
            f"{key}={json.dumps(value, ensure_ascii=False)}"
            for key, value in record["settings"].items()
            if value not in (None, [], False)
        )
        if record["parent"] is not None:
            name = record["parent"]["model"]
            yield "from"
    if chain[-1]["parent"] is not None:
        yield f"{name}  weights {chain[-1]['parent']['weights'][:_SHORT]}"
        yield "  not made by quartet-train, or before it kept a lineage"


def _code(code: Mapping[str, Any]) -> str:
    commit = f" (commit {code['commit'][:_SHORT]}{', changed' if code['changed'] else ''})" if code["commit"] else ""
    return f"quartet {code['version'] or 'not installed'}{commit}"
