"""Several processes train one model: each works on its share of every batch, and they agree on everything else.

``torchrun`` starts them; without it no function here does anything, and one process is what it always was. Settings,
rows, the order of batches and all figures are the same in every process, so each tells by itself which rows of a batch
are its own (``share``), counts the whole batch for its means, and an error in a row is everybody's. What one alone may
do (write, ask a service) the first does, and the others get its result or its failure (``led``). ``sharding`` splits
the weights.

A process that ends takes the others with it: whoever waits for it finds its connection closed, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from quartet.fingerprint import derive_seed
from trainer.batching import micro_batches
from trainer.errors import DistributedError, exit_code

T = TypeVar("T")
P = ParamSpec("P")

# So long may one wait for another to start; and then, for the first asks services, which can take as long as a rollout.
_START_TIMEOUT, _TIMEOUT = timedelta(minutes=10), timedelta(hours=1)
# What gloo, NCCL and the store say when another process is gone.
_SIGNS_OF_LOSS = ("gloo", "connection closed by peer", "connection reset by peer", "nccl", "timed out", "broken pipe")


# The group ---------------------------------------------------------------------------------------------------------


def active() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if active() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if active() else 0


def is_first() -> bool:
    """Whether this is the process that writes, prints and asks services."""
    return number() == 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within it this process is one of the group that torchrun has started, by its environment variables.

    Only the first is heard on stdout and stderr; of what goes wrong each message is told once, by whom it first met.

    Raises:
        DistributedError: the group can't be made, or another process was lost.
        SystemExit: it failed as another one did, which has said so.
    """
    store = _join()
    real = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        if not is_first():
            sys.stdout = sys.stderr = nowhere
        try:
            yield
            dist.barrier()
        except BaseException as error:
            sys.stdout, sys.stderr = real
            if (told := _told_once(error, store)) is error:
                raise
            raise told from error
        finally:
            sys.stdout, sys.stderr = real
    # Not after an error: it would wait for those that are gone.
    dist.destroy_process_group()


def _join() -> Store:
    """
    Raises:
        DistributedError: says what of the environment is wrong.
    """
    try:
        local, local_count = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise DistributedError(
            f"RANK and WORLD_SIZE are set, so this is one of several processes, but {error} is not as torchrun sets "
            "it: start them by torchrun, or unset RANK and WORLD_SIZE"
        ) from error
    cuda = torch.cuda.is_available()
    if cuda:
        if local_count > torch.cuda.device_count():
            raise DistributedError(
                f"--nproc-per-node is {local_count}, and this machine has {torch.cuda.device_count()} GPUs: each "
                "process needs one of its own"
            )
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
        # Objects and figures go by gloo, weights and gradients by where they are.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"the processes can't find each other: {_first_line(error)}") from error
    found: Store = store
    return found


def _told_once(error: BaseException, store: Store) -> BaseException:
    """What this process ends with: the error itself where nobody has told the same one, else a quiet exit."""
    if isinstance(error, FirstFailedError):
        return SystemExit(error.code)
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS_OF_LOSS)
    ):
        return DistributedError(
            f"process {number()} of {count()} has lost another one, which has ended or can't be reached, so it ends, "
            f"too: {_first_line(error)}. The run goes on from its newest checkpoint with --resume"
        )
    if isinstance(error, SystemExit):
        return error
    key = "told:" + hashlib.sha256(f"{type(error).__name__}: {error}".encode()).hexdigest()
    with contextlib.suppress(RuntimeError):  # A store that is gone with its process.
        if store.add(key, 1) > 1:
            return SystemExit(exit_code(error))
    return error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class FirstFailedError(Exception):
    """The first process failed at what it did for all, and tells why itself."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__(failure.kinds[0])
        self.code = failure.code
        self._kinds = failure.kinds

    def was(self, *kinds: type[BaseException]) -> bool:
        """Whether what it met is one of these."""
        return any(kind.__name__ in self._kinds for kind in kinds)


@dataclass(frozen=True)
class _Failure:
    """``kinds``: names of the error's class and of those above it."""

    code: int
    kinds: tuple[str, ...]


def led(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, done by the first process alone: the others get its result (pickled), or end as it does."""

    @functools.wraps(function)
    def by_the_first(*args: P.args, **kwargs: P.kwargs) -> T:
        if not active():
            return function(*args, **kwargs)
        said: list[Any] = [None]
        if is_first():
            try:
                said = [function(*args, **kwargs)]
            except BaseException as error:
                dist.broadcast_object_list(
                    [_Failure(exit_code(error), tuple(kind.__name__ for kind in type(error).__mro__))], src=0
                )
                raise
        dist.broadcast_object_list(said, src=0)
        if isinstance(said[0], _Failure):
            raise FirstFailedError(said[0])
        result: T = said[0]
        return result

    return by_the_first


# Shares ------------------------------------------------------------------------------------------------------------


def require_divisible(flag: str, value: int) -> None:
    """Every process has as many rows of a batch.

    Raises:
        DistributedError: ``value`` of ``flag`` is no multiple of the number of processes.
    """
    if value % count():
        raise DistributedError(
            f"{flag} is {value}, and there are {count()} processes: it is of all of them together, so it must be a "
            f"multiple of {count()}, such as {-(-value // count()) * count()}"
        )


def share(lengths: Sequence[int]) -> list[int]:
    """Which rows of a batch are this process's, ascending: all where it is the only one.

    Dealt out from the longest to the shortest, so that all have about as much to do. ``lengths``: of the whole batch.
    """
    if count() == 1:
        return list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return sorted(order[number() :: count()])


def own_parts(lengths: Sequence[int], cut: Callable[[list[int]], list[list[int]]]) -> list[tuple[list[int], float]]:
    """Micro-batches of this process's share of a batch, each with its weight, which is 1.

    Every forward and backward pass is all processes' (they bring the weights together for it), so each does as many:
    who has fewer goes through the batch's shortest row with weight 0 in the end.

    Args:
        lengths: of the rows of the whole batch.
        cut: makes micro-batches, by places in the list, of the rows that it is given.
    """
    if not lengths:
        return []
    mine = share(lengths)
    parts = [([mine[place] for place in part], 1.0) for part in (cut(mine) if mine else [])]
    shortest = min(range(len(lengths)), key=lambda index: lengths[index])
    return parts + [([shortest], 0.0)] * (int(largest(len(parts))) - len(parts))


def own_micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[tuple[list[int], float]]:
    """``own_parts`` by ``batching.micro_batches``."""
    return own_parts(lengths, lambda mine: micro_batches([lengths[index] for index in mine], max_tokens, packed=packed))


def seed_step(seed: int, step: int) -> None:
    """Of several processes each draws dropout of its own, which follows from seed, step and its number alone.

    So no state of random numbers has to outlive a step, and a run can be resumed by another number of processes.
    """
    if active():
        torch.manual_seed(derive_seed("step", seed, step, number()))


# Agreement ---------------------------------------------------------------------------------------------------------


def total(figures: Mapping[str, float]) -> dict[str, float]:
    """The sum of each figure over all processes, which have the same ones, in float64."""
    if not active():
        return dict(figures)
    sums = torch.tensor([float(value) for value in figures.values()], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(figures, sums.tolist(), strict=True))


def collected(found: Mapping[int, T]) -> dict[int, T]:
    """What each process has found of its own rows, together."""
    if not active():
        return dict(found)
    everywhere: list[Any] = [None] * count()
    dist.all_gather_object(everywhere, dict(found))  # type: ignore[no-untyped-call]
    return {row: value for part in everywhere for row, value in part.items()}


def add_up(*tensors: Tensor) -> None:
    """Makes each tensor, in place, the sum of those of all processes."""
    if active():
        for tensor in tensors:
            dist.all_reduce(tensor)


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    return largest(flag) > 0


def largest(value: float) -> float:
    """The largest of all processes' values."""
    if not active():
        return value
    found = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
