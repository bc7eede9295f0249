"""From the name of a model to a folder on this disk, checked before anything heavy is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# What quartet keeps beside a model: normalisation of a reward model and how it was trained.
METADATA_FILE = "quartet.json"
# What PEFT saves an adapter's configuration in.
_ADAPTER_FILE = "adapter_config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class ModelFolderError(Exception):
    """A model cannot be used; the message says why and what to do."""


def find_model(
    model: str, *, revision: str | None = None, need_tokenizer: bool = True, with_code: bool = False
) -> Path:
    """The folder of ``model``, a local folder or a hub id, which is downloaded; ``with_code``: its Python files too.

    Raises:
        ModelFolderError: no such folder, no configuration, no weights, or no tokenizer in it; weights that are
            pickled, or listed as lying outside of it.
    """
    if "\0" in model:
        raise ModelFolderError(f"model {model!r}: a name has no NUL character")
    if revision is not None and (".." in revision.split("/") or not re.fullmatch(r"\w[\w.+@/-]*", revision)):
        # It becomes part of a path in the hub's cache.
        raise ModelFolderError(f"model {model!r}: revision is {revision!r}, must be a branch, tag or commit")
    folder = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or folder.exists() or model.count("/") != 1
    if not looks_local:
        folder = _download(model, revision, *(["*.py"] if with_code else []))
    if not folder.is_dir():
        raise ModelFolderError(f"model {model!r}: there is no such folder")
    if (folder / _ADAPTER_FILE).is_file():
        raise ModelFolderError(
            f"model {model!r}: the folder holds a LoRA adapter ({_ADAPTER_FILE}), not a whole model: name the folder "
            "of the model with the adapter merged into it, which quartet-train writes beside the adapter; peft's "
            "merge_and_unload makes one of any other"
        )
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"model {model!r}: the folder has no config.json, so it is not a Hugging Face model")
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ModelFolderError(
            f"model {model!r}: its weights are pickled ({pickled[0]}), and a pickle runs whatever code it holds; "
            "where you trust it, convert it in a place that has nothing to lose: load it with transformers and save it "
            "anew with save_pretrained(folder), which writes .safetensors"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelFolderError(
            f"model {model!r}: the folder has no .safetensors weights; save it with save_pretrained(folder)"
        )
    _require_within(model, folder)
    if need_tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelFolderError(
            f"model {model!r}: the folder has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            "save it beside the weights with tokenizer.save_pretrained(folder)"
        )
    return folder


def _require_within(model: str, folder: Path) -> None:
    """Refuses an index of shards that leads out of the folder: a model may read its own files alone."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFolderError(f"model {model!r}: {index.name} is no index of weights: {error}") from error
        for shard in sorted(map(str, shards)):
            if shard != Path(shard).name or shard == ".." or "\\" in shard:
                raise ModelFolderError(
                    f"model {model!r}: {index.name} names {shard!r}, which is not a file of the folder"
                )


def _download(model: str, revision: str | None, *more_patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *more_patterns]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelFolderError(
            f"model {model!r}: there is no such folder, and the hub gave: {str(error).splitlines()[0]}"
        ) from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of quartet.json, empty when there is none.

    Raises:
        ModelFolderError: the file is not a JSON object.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFolderError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path}: must hold a JSON object, is a {type(content).__name__}")
    return content


def write_metadata(folder: Path, **content: Any) -> None:
    """Merges ``content`` into quartet.json, atomically."""
    path = folder / METADATA_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(read_metadata(folder) | content, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
