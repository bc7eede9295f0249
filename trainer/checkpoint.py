"""Checkpoints: everything that decides a run's future, written whole or not at all.

Of several processes the first writes, with whole tensors, and each reads its own part: a checkpoint doesn't know how
many there were, and any number goes on from it.

A checkpoint is a folder ``checkpoint-000123``:

    state.json            step, what the stage keeps (settings, counters, controllers), the size of every other file,
                          and the fingerprints of weights that are not trained
    NAME.safetensors      one file a module: what of it is trained, and its buffers
    optimiser-NAME.pt     one file an optimiser, read back with weights_only
    tensors.safetensors   what else the stage keeps as tensors
    rng.pt                states of Python's, numpy's and torch's random numbers
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quartet.fingerprint import TensorDigest, weights_fingerprint
from trainer.distributed import collected, count, led, number
from trainer.errors import CheckpointError, StoppedError
from trainer.files import remove_folder, replace_folder, written
from trainer.sharding import finite_everywhere, load_optimiser, placed, whole_optimiser, whole_state

_NAME = re.compile(r"checkpoint-(\d{6,})")
_STATE = "state.json"
_RNG = "rng.pt"
_TENSORS = "tensors.safetensors"
_SAME_REQUEST_S = 1.0
# Fingerprints of modules' frozen weights: they never change, so they are computed once.
_frozen: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint says besides modules, optimisers and random numbers, which are restored in place."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:06d}"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, Optimizer],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    keep: int = 2,
) -> Path:
    """Writes ``folder``/checkpoint-STEP and removes all but the ``keep`` newest and those that these call their best.

    Args:
        folder: where the run's checkpoints stand.
        step: steps done.
        modules: by name; parameters (tied ones once) and persistent buffers are kept. Of parameters that want no
            gradient, such as those beneath an adapter, the fingerprint alone.
        optimisers: by name.
        state: JSON values; ``best``, where it has one, names by its ``step`` the checkpoint that stays with this one.
        tensors: further tensors, such as rollouts in flight.
        keep: at least 1.

    Returns:
        Its path.

    Raises:
        CheckpointError: it can't be written, or a weight is not finite; the older ones are untouched.
    """
    for name, module in modules.items():
        if (odd := odd_weight(module)) is not None:
            raise CheckpointError(
                f"{checkpoint_path(folder, step)} is not written: weight {odd} of {name} is not finite, training "
                f"diverged; the last good checkpoint is {latest_checkpoint(folder) or 'none'}. Lower the learning "
                "rate, in another --output"
            )
    frozen = {name: fingerprint for name, module in modules.items() if (fingerprint := frozen_weights(module))}
    return _write(
        folder,
        step,
        {name: _own_tensors(module, whole_state(module)) for name, module in modules.items()},
        {name: whole_optimiser(optimiser) for name, optimiser in optimisers.items()},
        {"step": step, "state": dict(state), "frozen": frozen},
        tensors or {},
        keep,
    )


@led
def _write(
    folder: Path,
    step: int,
    modules: Mapping[str, Mapping[str, Tensor]],
    optimisers: Mapping[str, Mapping[str, Any]],
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    keep: int,
) -> Path:
    path = checkpoint_path(folder, step)
    with written(path, CheckpointError):
        with replace_folder(path) as partial:
            for name, own in modules.items():
                safetensors.torch.save_file(
                    {key: tensor.detach().contiguous() for key, tensor in own.items()}, partial / f"{name}.safetensors"
                )
            for name, optimiser in optimisers.items():
                torch.save(optimiser, partial / f"optimiser-{name}.pt")
            safetensors.torch.save_file(
                {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
                partial / _TENSORS,
            )
            torch.save(_random_state(), partial / _RNG)
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            described = {**content, "files": sizes}
            (partial / _STATE).write_text(json.dumps(described, indent=2, allow_nan=False) + "\n")
        found = _whole(folder)
        newest = found[-max(1, keep) :]
        stay = {step for step, _ in newest} | {_best_step(newer) for _, newer in newest}
        for step, old in found:
            if step not in stay:
                remove_folder(old)
    return path


def _best_step(path: Path) -> int | None:
    best = read_state(path).state.get("best")
    return best["step"] if best else None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one that is not whole (a copy that broke off) is passed over and named on stderr."""
    whole = _whole(folder)
    return whole[-1][1] if whole else None


def load_checkpoint(path: Path, *, modules: Mapping[str, nn.Module], optimisers: Mapping[str, Optimizer]) -> Restored:
    """Restores modules, optimisers and random numbers in place. Of several processes all read the same ``path``.

    Raises:
        CheckpointError: it is not whole, a process doesn't see it, or it doesn't belong to these modules.
    """
    problems = {process: why for process, why in collected({number(): _damage(path)}).items() if why is not None}
    if problems:
        who = ", ".join(map(str, problems))
        shared = f", to process {who} of {count()} (from 0): --output must be on a disk that all of them share"
        raise CheckpointError(f"{path}: {next(iter(problems.values()))}{shared if len(problems) < count() else ''}")
    try:
        content = json.loads((path / _STATE).read_text())
        for name, module in modules.items():
            if frozen_weights(module) != content.get("frozen", {}).get(name, ""):
                raise ValueError(f"the weights of {name} that are not trained are others than they were")
            _restore(path / f"{name}.safetensors", module)
        for name, optimiser in optimisers.items():
            # map_location="cpu": load_state_dict moves each state to its parameter's device.
            file = path / f"optimiser-{name}.pt"
            load_optimiser(optimiser, torch.load(file, map_location="cpu", weights_only=True))
        tensors = safetensors.torch.load_file(path / _TENSORS)
        _set_random_state(torch.load(path / _RNG, map_location="cpu", weights_only=True))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} can't be continued from: {error}") from error
    return Restored(step=content["step"], state=content["state"], tensors=tensors)


def read_state(path: Path) -> Restored:
    """Step and state alone, before any model is built.

    Raises:
        CheckpointError: it is not whole.
    """
    if (problem := _damage(path)) is not None:
        raise CheckpointError(f"{path}: {problem}")
    content = json.loads((path / _STATE).read_text())
    return Restored(step=content["step"], state=content["state"], tensors={})


def _whole(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of each whole checkpoint, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            if (problem := _damage(path)) is None:
                found.append((int(match[1]), path))
            else:
                sys.stderr.write(f"passing over {path}: {problem}\n")
    return sorted(found)


def _damage(path: Path) -> str | None:
    """Why it is no whole checkpoint, or None."""
    if not path.is_dir():
        return "there is no such checkpoint"
    try:
        sizes = json.loads((path / _STATE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {_STATE}, so it was not written to its end"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or not of its {size} bytes, so the checkpoint is not whole"
    return None


def _own_tensors(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the ``state`` of ``module`` the parameters that are trained, tied ones once, and persistent buffers."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    others = {name for name, _ in module.named_parameters(remove_duplicate=False)} - trained
    return {name: tensor for name, tensor in state.items() if name not in others}


def odd_weight(module: nn.Module) -> str | None:
    """Name of a trained weight that is not finite, or None."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if finite_everywhere(*trained.values()):
        return None
    return next(name for name, parameter in trained.items() if not finite_everywhere(parameter))


def frozen_weights(module: nn.Module) -> str:
    """Fingerprint of the parameters that want no gradient; "" where all of them do."""
    if module not in _frozen:
        digests = [
            TensorDigest(
                name=name,
                dtype=str(parameter.dtype).removeprefix("torch."),
                shape=tuple(parameter.shape),
                sha256=hashlib.sha256(_bytes(parameter)).hexdigest(),
            )
            for name, parameter in module.named_parameters()
            if not parameter.requires_grad
        ]
        _frozen[module] = weights_fingerprint(digests) if digests else ""
    return _frozen[module]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


@torch.no_grad()
def _restore(file: Path, module: nn.Module) -> None:
    kept = safetensors.torch.load_file(file)
    own = _own_tensors(module, module.state_dict())
    if set(kept) != set(own):
        odd = sorted(set(kept) ^ set(own))
        raise ValueError(f"{file.name} holds other tensors than the model, such as {odd[0]}")
    for name, tensor in own.items():
        if tensor.shape != kept[name].shape or tensor.dtype != kept[name].dtype:
            raise ValueError(
                f"{file.name}: {name} is {tuple(kept[name].shape)} {kept[name].dtype}, "
                f"the model's is {tuple(tensor.shape)} {tensor.dtype}"
            )
        tensor.copy_(placed(kept[name], tensor))


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class StopRequest:
    """Whether someone asked the run to stop, by Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def stopped(self, *, step: int, total_steps: int, checkpoint: Path | None) -> StoppedError:
        """The error to raise once the run has saved itself; its message says how to go on."""
        done = "before the first step" if step == 0 else f"after step {step} of {total_steps}"
        saved = "nothing to save yet" if checkpoint is None else f"saved in {checkpoint}"
        return StoppedError(f"stopped {done}, as asked; {saved}. To go on, give the same command again with --resume")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop looks at after each step; the second ends at once.

    Those within a second of the first are the same request, come by two ways: to the whole process group, and handed on
    by a launcher.

    Only the main thread can be told of signals: elsewhere nothing is ever requested.
    """
    request = StopRequest()
    first_s = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if request.requested:
            if time.monotonic() - first_s < _SAME_REQUEST_S:
                return
            raise KeyboardInterrupt
        first_s = time.monotonic()
        request.signal = signal.Signals(number)
        sys.stderr.write("\nstopping: this step is finished and saved first (once more to quit at once)\n")

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                previous[number] = signal.signal(number, on_signal)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
