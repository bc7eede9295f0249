"""LoRA adapters inside vLLM: its options, its requests, and who runs with which."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from services.policy.config import PolicySettings
from services.policy.engine import AdapterRefusedError
from services.policy.held_files import HeldFolder
from services.runtime.errors import StartError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def lora_options(settings: PolicySettings, on_cpu: bool) -> dict[str, Any]:
    """vLLM's options for ``--max-adapters`` and ``--max-lora-rank``, whose ranks are rounded up to those it knows.

    Raises:
        StartError: the rank is larger than vLLM's largest.
    """
    from vllm.config.lora import MaxLoRARanks

    ranks = [rank for rank in sorted(get_args(MaxLoRARanks)) if rank >= settings.max_lora_rank]
    if not ranks:
        raise StartError(
            f"--max-lora-rank is {settings.max_lora_rank}, vLLM takes at most {max(get_args(MaxLoRARanks))}: lower it, "
            "or choose --engine transformers"
        )
    # vLLM 0.32 on a CPU marks tokens of the base model by slot -1, and then adds what lies in the last slot to them:
    # with one slot more than adapters that one stays empty. (Its GPU kernels skip them.)
    slots = settings.max_adapters + 1 if on_cpu else settings.max_adapters
    return {"enable_lora": True, "max_loras": slots, "max_lora_rank": ranks[0]}


@dataclass(kw_only=True)
class _Loaded:
    """An adapter that the engine process holds, and how many generations run with it."""

    request: LoRARequest
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class VllmAdapters:
    """By number. vLLM's prefix cache tells adapters apart by name and path, which are new with every number.

    Their files are kept: vLLM drops all adapters when weights are replaced, and reads them again.
    """

    def __init__(self) -> None:
        self._loaded: dict[int, _Loaded] = {}
        self._files: HeldFolder | None = None

    def open(self, parent: Path) -> None:
        """Keeps files below ``parent`` from now on, until ``close``."""
        self._files = HeldFolder(parent)

    def close(self) -> None:
        """Removes the files."""
        if self._files is not None:
            self._files.close()
            self._files = None

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[LoRARequest | None]:
        """What a generation gives to vLLM, and that it runs; None for number 0, the base model."""
        if not number:
            yield None
            return
        loaded = self._loaded[number]
        loaded.running += 1
        try:
            yield loaded.request
        finally:
            loaded.running -= 1
            if not loaded.running:
                loaded.idle.set()

    async def load(self, llm: Any, number: int, folder: Path) -> None:
        """Has the engine process read the adapter in ``folder``.

        Raises:
            AdapterRefusedError: it does not take it.
            vllm.v1.engine.exceptions.EngineDeadError: it died.
        """
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._files is not None, "open() comes first"
        name = f"adapter-{number}"
        try:
            path = self._files.take(name, folder)
            request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))
            await llm.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM hands every failure of its worker on as a plain Exception.
            self._files.drop(name)
            raise AdapterRefusedError(str(error)) from error
        self._loaded[number] = _Loaded(request=request)

    async def load_again(self, llm: Any) -> None:
        """Gives the engine process all adapters anew, after it has dropped them."""
        for loaded in self._loaded.values():
            await llm.add_lora(loaded.request)

    async def unload(self, llm: Any, number: int) -> None:
        """Has the engine process forget it, when those who were cancelled while they ran with it have left, too."""
        loaded = self._loaded[number]
        while loaded.running:
            loaded.idle.clear()
            await loaded.idle.wait()
        del self._loaded[number]
        await llm.remove_lora(number)
        if self._files is not None:
            self._files.drop(loaded.request.lora_name)
