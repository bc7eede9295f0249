"""A weight update while it arrives: a safetensors file outside the engine, verified before the engine sees it.

Bytes go to their final place in the file as they come, so that memory does not hold them twice, and every tensor is
hashed on the way. Nothing here touches the weights that serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from quartet.fingerprint import TensorDigest, weights_fingerprint
from services.runtime.errors import DataLossError, InvalidArgumentError, OverloadedError, StartError

WEIGHTS_FILE = "model.safetensors"
_WIRE_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, wire dtype and shape of one tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _WIRE_DTYPES[self.dtype][1]


def wire_dtype_problem(spec: TensorSpec) -> str | None:
    """Why a tensor of this dtype is not accepted, or None."""
    if spec.dtype in _WIRE_DTYPES:
        return None
    return f"{spec.name!r} has dtype {spec.dtype!r}, must be one of {', '.join(_WIRE_DTYPES)}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Tensors that the served model's checkpoint consists of. Tied ones may be sent or left out."""

    shapes: dict[str, tuple[int, ...]]
    optional: frozenset[str]

    def check(self, specs: Sequence[TensorSpec], max_bytes: int) -> None:
        """Refuses what is not a whole checkpoint of this model.

        Raises:
            InvalidArgumentError: names the tensor, what it is and what it must be.
        """
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise _refused(f"{twice!r} stands in it twice")
        for spec in specs:
            if problem := wire_dtype_problem(spec):
                raise _refused(problem)
            expected = self.shapes.get(spec.name)
            if expected is None:
                raise _refused(f"{spec.name!r} is no tensor of the served model's checkpoint")
            if spec.shape != expected:
                raise _refused(f"{spec.name!r} has shape {list(spec.shape)}, the served model's is {list(expected)}")
        missing = sorted(set(self.shapes) - self.optional - set(names))
        if missing:
            raise _refused(
                f"{len(missing)} tensors of the served model are missing, such as {missing[0]!r}; send all of them"
            )
        total = sum(spec.nbytes for spec in specs)
        if total > max_bytes:
            raise _refused(f"the tensors have {total} bytes, at most {max_bytes} are accepted (--max-update-gib)")


def _refused(reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"begin.tensors: {reason}", field="begin.tensors")


def read_layout(folder: Path) -> Layout:
    """The layout of the checkpoint in ``folder``, from the headers of its safetensors files.

    Raises:
        StartError: a file is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            shapes |= {name: tuple(x["shape"]) for name, x in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise StartError(f"{path} is not a readable safetensors file: {error}") from error
    config = json.loads((folder / "config.json").read_text())
    tied = bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)))
    optional = frozenset(name for name in shapes if tied and name.endswith("lm_head.weight"))
    return Layout(shapes=shapes, optional=optional)


class StagedCheckpoint:
    """One incoming checkpoint in a folder of its own, removed on leaving the context.

    The class attributes say what it is: another kind of checkpoint has a class of its own.
    """

    what = "weights"
    folder_prefix = "quartet-weights-"
    file_name = WEIGHTS_FILE
    fingerprint_field = "commit.weights_fingerprint"
    otherwise = "the old weights go on serving"

    def __init__(self, specs: Sequence[TensorSpec], parent: Path) -> None:
        """
        Args:
            specs: in the order in which the bytes will come; checked before.
            parent: where the folder is made.

        Raises:
            OverloadedError: there is not enough room; nothing is left behind.
        """
        self.specs = list(specs)
        self.received_bytes = 0
        self._digests: list[TensorDigest] = []
        self._hash = hashlib.sha256()
        self._filled = 0
        self._index = 0
        offsets = [0]
        for spec in specs:
            offsets.append(offsets[-1] + spec.nbytes)
        entries = {
            spec.name: {"dtype": _WIRE_DTYPES[spec.dtype][0], "shape": spec.shape, "data_offsets": offsets[i : i + 2]}
            for i, spec in enumerate(specs)
        }
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._starts = [8 + len(header) + offset for offset in offsets]
        free = shutil.disk_usage(parent).free
        if self._starts[-1] > free:
            raise OverloadedError(
                f"the {self.what} have {self._starts[-1] / _GIB:.2f} GiB, {parent} has {free / _GIB:.2f} GiB free: "
                "give the service more room or another --staging-dir"
            )
        # The room seen above may be gone by now.
        with contextlib.ExitStack() as undo:
            try:
                self.folder = Path(tempfile.mkdtemp(prefix=self.folder_prefix, dir=parent))
                undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
                self.path = self.folder / self.file_name
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                undo.callback(os.close, self._file)
                os.ftruncate(self._file, self._starts[-1])
                self._write(struct.pack("<Q", len(header)) + header, 0)
            except OSError as error:
                raise OverloadedError(f"the {self.what} could not be staged in {parent}: {error}") from error
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, tensor_index: int, data: bytes) -> None:
        """Takes the next bytes of a tensor.

        Raises:
            InvalidArgumentError: they belong to no tensor, come out of order, or are too many.
            OverloadedError: the disk is full.
        """
        if not 0 <= tensor_index < len(self.specs):
            raise InvalidArgumentError(
                f"chunk.tensor_index is {tensor_index}, must lie in [0, {len(self.specs) - 1}]",
                field="chunk.tensor_index",
            )
        if tensor_index < self._index:
            raise InvalidArgumentError(
                f"chunk.tensor_index is {tensor_index} after {self._index}: tensors must come in the order of begin",
                field="chunk.tensor_index",
            )
        while self._index < tensor_index:
            self._end_tensor()
        spec = self.specs[tensor_index]
        if self._filled + len(data) > spec.nbytes:
            raise InvalidArgumentError(
                f"chunk.data: {spec.name!r} has {spec.nbytes} bytes, {self._filled + len(data)} came",
                field="chunk.data",
            )
        self._hash.update(data)
        try:
            self._write(data, self._starts[tensor_index] + self._filled)
        except OSError as error:
            raise OverloadedError(f"the {self.what} could not be staged in {self.folder.parent}: {error}") from error
        self._filled += len(data)
        self.received_bytes += len(data)

    def finish(self, expected_fingerprint: str) -> str:
        """Checks that everything came and is what the sender has; returns the fingerprint.

        Raises:
            DataLossError: bytes are missing or differ.
        """
        while self._index < len(self.specs):
            self._end_tensor()
        fingerprint = self._fingerprint(self._digests)
        if fingerprint != expected_fingerprint:
            raise DataLossError(
                f"{self.fingerprint_field} is {expected_fingerprint[:16]!r}..., what arrived has "
                f"{fingerprint[:16]!r}...: it was damaged on the way; {self.otherwise}",
                field=self.fingerprint_field,
            )
        return fingerprint

    def _fingerprint(self, digests: Sequence[TensorDigest]) -> str:
        return weights_fingerprint(digests)

    def _write(self, data: bytes, offset: int) -> None:
        if os.pwrite(self._file, data, offset) != len(data):
            raise OSError("no room")

    def _end_tensor(self) -> None:
        spec = self.specs[self._index]
        if self._filled != spec.nbytes:
            raise DataLossError(f"{spec.name!r} has {spec.nbytes} bytes, only {self._filled} came; {self.otherwise}")
        self._digests.append(
            TensorDigest(name=spec.name, dtype=spec.dtype, shape=spec.shape, sha256=self._hash.hexdigest())
        )
        self._hash = hashlib.sha256()
        self._filled = 0
        self._index += 1


def staging_parent(configured: Path | None) -> Path:
    """Where to stage: the configured folder, else memory (/dev/shm) where it can be written, else a temporary one.

    Raises:
        StartError: the configured folder can't be written.
    """
    if configured is not None:
        if not configured.is_dir() or not os.access(configured, os.W_OK):
            raise StartError(f"--staging-dir is {str(configured)!r}: there is no such folder, or it can't be written")
        return configured
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
