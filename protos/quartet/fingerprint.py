"""Content fingerprints of weights and tokenizers: equal on every machine exactly when the content is equal."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names of safetensors dtypes as torch and our contract know them.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


@dataclass(frozen=True, kw_only=True)
class TensorDigest:
    """SHA-256 of one tensor's contiguous, little-endian, row-major bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def weights_fingerprint(tensors: Iterable[TensorDigest]) -> str:
    """SHA-256 over the sorted lines ``name dtype shape sha256``: independent of file layout and order."""
    lines = sorted(f"{t.name} {t.dtype} {list(t.shape)} {t.sha256}" for t in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def adapter_fingerprint(
    tensors: Iterable[TensorDigest],
    *,
    rank: int,
    alpha: float,
    target_modules: Iterable[str],
    use_rslora: bool,
    module_ranks: Mapping[str, int],
    module_alphas: Mapping[str, float],
) -> str:
    """SHA-256 of a LoRA adapter: of its configuration as JSON with sorted keys and its tensors' fingerprint.

    The fields are those of ``AdapterConfig`` in adapters.proto; numbers that JSON may write in several ways are written
    as Python does (``16.0``). Order and repetition of ``target_modules`` do not count.
    """
    config = {
        "alpha": float(alpha),
        "module_alphas": {name: float(value) for name, value in module_alphas.items()},
        "module_ranks": dict(module_ranks),
        "rank": rank,
        "target_modules": sorted(set(target_modules)),
        "use_rslora": use_rslora,
    }
    text = f"{json.dumps(config, sort_keys=True, ensure_ascii=True)}\n{weights_fingerprint(tensors)}"
    return hashlib.sha256(text.encode()).hexdigest()


def safetensors_fingerprint(folder: Path) -> str:
    """Fingerprint of all ``*.safetensors`` weights in a model folder. Reads every byte, several tensors at once.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return weights_fingerprint([digest for path in files for digest in _digests(path, pool)])


def _digests(path: Path, pool: ThreadPoolExecutor) -> Iterator[TensorDigest]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (header_bytes,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + header_bytes])
        base = 8 + header_bytes

        def digest(item: tuple[str, dict[str, Any]]) -> TensorDigest:
            name, entry = item
            start, end = entry["data_offsets"]
            with memoryview(data) as view:
                sha256 = hashlib.sha256(view[base + start : base + end]).hexdigest()
            dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
            return TensorDigest(name=name, dtype=dtype, shape=tuple(entry["shape"]), sha256=sha256)

        yield from pool.map(digest, [item for item in header.items() if item[0] != "__metadata__"])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a Hugging Face tokenizer does to text: its vocabulary, merges, added tokens and normalisation.

    Padding and truncation are left out: they are settings of a call, and change while it is in use.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**31) from any parts, the same on every machine: sample s of prompt p of step t gets its own."""
    return derive_seeds([parts])[0]


def derive_seeds(keys: Sequence[Sequence[int | str]]) -> list[int]:
    """``derive_seed`` of every key."""
    return [
        int.from_bytes(hashlib.sha256(":".join(map(str, key)).encode()).digest()[:4], "little") >> 1 for key in keys
    ]
