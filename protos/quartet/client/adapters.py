"""Client of the adapters of a policy: load, unload and list LoRA adapters; and reading what PEFT saves."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from quartet.client.arguments import message
from quartet.client.channel import ServiceClient
from quartet.client.errors import InvalidInputError
from quartet.client.policy import CHUNK_BYTES, WireTensor, tensor_specs, upload
from quartet.fingerprint import adapter_fingerprint
from quartet.policy.v1 import adapters_pb2, adapters_pb2_grpc, weights_pb2

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Of the buffer protocol.
_FORMATS = {"f": "float32", "<f": "float32", "e": "float16", "<e": "float16"}
# A live module's names have its adapter's name between; what PEFT saves has not.
_TENSOR = re.compile(r"(?P<stem>.+\.lora_[AB])\.(?:[^.]+\.)?weight")
_PREFIX = "base_model.model."
# Settings of PEFT's LoraConfig that change what an adapter computes, and the values that leave it plain LoRA.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    # Others rewrite the base weights when PEFT loads them.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}

# A state dict of arrays that show their memory (numpy float32 or float16), or tensors that are ready to be sent.
AdapterTensors = Mapping[str, Any] | Sequence[WireTensor]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``, scales B A x. See adapters.proto."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    module_ranks: Mapping[str, int] = field(default_factory=dict)
    module_alphas: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """A loaded adapter. ``running_requests`` run with it now; ``unloading``: it waits for their end."""

    name: str
    fingerprint: str
    config: AdapterConfig
    running_requests: int
    unloading: bool


@dataclass(frozen=True, kw_only=True)
class AdapterLoad:
    """Outcome of loading. ``already_loaded``: the same content was there under this name."""

    adapter: AdapterInfo
    already_loaded: bool
    received_bytes: int


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The loaded adapters, in the order of loading, and the service's limits; ``max_adapters`` 0: LoRA is off."""

    adapters: tuple[AdapterInfo, ...]
    max_adapters: int
    max_rank: int


class AdapterClient(ServiceClient):
    """Loads and unloads adapters of one policy replica, on its admin listener."""

    health_service = "quartet.policy.v1.AdapterService"
    name = "policy adapter service"

    async def load_adapter(
        self, name: str, adapter: Path | str | tuple[AdapterConfig | Mapping[str, Any], AdapterTensors]
    ) -> AdapterLoad:
        """Loads ``adapter`` under ``name``; requests choose it by ``PolicyClient.generate(..., adapter=name)``.

        Never retried by itself, but safe to repeat: a name means one content for good.

        Args:
            name: 1 to 128 of A-Z, a-z, 0-9, '.', '_', '@' and '-'; a new version takes a new name ("helpful@2").
            adapter: a folder that PEFT saved, or a configuration (ours, or the content of adapter_config.json) with the
                state dict, by PEFT's names.

        Raises:
            InvalidInputError: it is not plain LoRA, or does not fit the served model or its limits; names the field.
            AlreadyExistsError: the name means other content; take another.
            PreconditionError: LoRA is off, or the name is being loaded or unloaded by somebody else.
            OverloadedError: as many adapters are loaded as may be.
            DamagedError: the service received something else; nothing was loaded.
            QuartetError: see quartet.client.errors.
        """
        config, tensors = read_adapter(adapter)
        stub = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        async with self._stream(method="LoadAdapter") as metadata:
            call: grpc.aio.StreamUnaryCall[adapters_pb2.LoadAdapterRequest, adapters_pb2.LoadAdapterResponse]
            call = stub.LoadAdapter(timeout=self.policy.deadline_s, metadata=metadata, wait_for_ready=True)
            reply = await upload(call, _load_steps(name, config, tensors))
        return AdapterLoad(
            adapter=_info(reply.adapter), already_loaded=reply.already_loaded, received_bytes=reply.received_bytes
        )

    async def unload_adapter(self, name: str) -> AdapterInfo:
        """Takes an adapter out; returns when the requests that run with it have ended and its memory is free.

        Raises:
            NotFoundError: no such adapter is loaded.
            QuartetError: see quartet.client.errors.
        """
        stub = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        async with self._stream(method="UnloadAdapter") as metadata:
            request = message("", adapters_pb2.UnloadAdapterRequest, name=name)
            reply = await stub.UnloadAdapter(request, timeout=self.policy.deadline_s, metadata=metadata)
        return _info(reply.adapter)

    async def list_adapters(self) -> Adapters:
        """Which adapters are loaded, and how many may be."""
        stub = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        reply = await self._call(stub.ListAdapters, adapters_pb2.ListAdaptersRequest())
        return Adapters(
            adapters=tuple(map(_info, reply.adapters)), max_adapters=reply.max_adapters, max_rank=reply.max_rank
        )


def read_adapter(
    adapter: Path | str | tuple[AdapterConfig | Mapping[str, Any], AdapterTensors],
) -> tuple[AdapterConfig, list[WireTensor]]:
    """Configuration and tensors as they go over the wire; see :meth:`AdapterClient.load_adapter`.

    Raises:
        InvalidInputError: a file can't be read, the adapter is not plain LoRA, or an array holds something else than
            float32 or float16.
    """
    config: AdapterConfig | Mapping[str, Any]
    if isinstance(adapter, Path | str):
        folder = Path(adapter)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            tensors = _file_tensors((folder / TENSORS_FILE).read_bytes())
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise InvalidInputError(
                f"{str(folder)!r} is no adapter that PEFT saved ({CONFIG_FILE}, {TENSORS_FILE}): {error}"
            ) from error
    else:
        config, given = adapter
        tensors = _array_tensors(given) if isinstance(given, Mapping) else list(given)
    tensors = [
        WireTensor(name=_wire_name(tensor.name), dtype=tensor.dtype, shape=tensor.shape, data=tensor.data)
        for tensor in tensors
    ]
    if not isinstance(config, AdapterConfig):
        config = _peft_config(config, sorted({_module(tensor.name) for tensor in tensors}))
    return config, tensors


def _peft_config(config: Mapping[str, Any], modules: Sequence[str]) -> AdapterConfig:
    """PEFT's configuration for these modules, its patterns resolved as PEFT's ``get_pattern_key`` does: the first one
    that is the end of a module's name wins."""
    for key, plain in _PLAIN.items():
        if (value := config.get(key)) not in plain:
            raise InvalidInputError(
                f"{key} is {value!r} in the adapter's configuration: only plain LoRA is served "
                f"({key} {' or '.join(repr(x) for x in plain if x is not None)})"
            )
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        ranks = _resolve(config.get("rank_pattern") or {}, modules)
        alphas = _resolve(config.get("alpha_pattern") or {}, modules)
        return AdapterConfig(
            rank=rank,
            alpha=alpha,
            # What PEFT's list, expression or "all-linear" came to is told by the tensors.
            target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
            use_rslora=bool(config.get("use_rslora")),
            module_ranks={module: int(value) for module, value in ranks.items()},
            module_alphas={module: float(value) for module, value in alphas.items()},
        )
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise InvalidInputError(f"the adapter's configuration can't be read: {error!r}") from error


def _resolve(patterns: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in modules:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                found[module] = value
                break
    return found


def _file_tensors(content: bytes) -> list[WireTensor]:
    """The tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    data = memoryview(content)[8 + size :]
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
        tensors.append(WireTensor(name=name, dtype=dtype, shape=tuple(entry["shape"]), data=data[start:end]))
    return tensors


def _array_tensors(state: Mapping[str, Any]) -> list[WireTensor]:
    tensors = []
    for name, array in state.items():
        try:
            view = memoryview(array)
        except TypeError as error:
            raise InvalidInputError(
                f"{name!r} is a {type(array).__name__}: give numpy arrays, or WireTensors (of bfloat16, too)"
            ) from error
        if view.format not in _FORMATS:
            raise InvalidInputError(f"{name!r} has values of format {view.format!r}: give float32 or float16")
        data = memoryview(view.tobytes())  # Row-major, whatever the strides.
        tensors.append(WireTensor(name=name, dtype=_FORMATS[view.format], shape=tuple(view.shape or ()), data=data))
    return tensors


def _wire_name(name: str) -> str:
    """As PEFT saves it. What is no name of a LoRA tensor stays as it is, for the service to refuse."""
    found = _TENSOR.fullmatch(name)
    if found is None:
        return name
    stem = found["stem"]
    return f"{stem if stem.startswith(_PREFIX) else _PREFIX + stem}.weight"


def _module(name: str) -> str:
    return re.sub(r"\.lora_[AB]\.weight$", "", name.removeprefix(_PREFIX))


def _load_steps(
    name: str, config: AdapterConfig, tensors: Sequence[WireTensor]
) -> Iterator[adapters_pb2.LoadAdapterRequest]:
    begin = message(
        "begin.",
        adapters_pb2.BeginAdapter,
        name=name,
        config=message(
            "begin.config.",
            adapters_pb2.AdapterConfig,
            rank=config.rank,
            alpha=config.alpha,
            target_modules=config.target_modules,
            use_rslora=config.use_rslora,
            module_ranks=config.module_ranks,
            module_alphas=config.module_alphas,
        ),
        tensors=tensor_specs(tensors),
    )
    yield adapters_pb2.LoadAdapterRequest(begin=begin)
    for index, tensor in enumerate(tensors):
        data = tensor.data.cast("B")
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = weights_pb2.TensorChunk(tensor_index=index, data=bytes(data[start : start + CHUNK_BYTES]))
            yield adapters_pb2.LoadAdapterRequest(chunk=chunk)
    fingerprint = adapter_fingerprint(
        [tensor.digest() for tensor in tensors],
        rank=config.rank,
        alpha=config.alpha,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        module_ranks=config.module_ranks,
        module_alphas=config.module_alphas,
    )
    yield adapters_pb2.LoadAdapterRequest(commit=adapters_pb2.CommitAdapter(fingerprint=fingerprint))


def _info(message: adapters_pb2.AdapterInfo) -> AdapterInfo:
    config = message.config
    return AdapterInfo(
        name=message.name,
        fingerprint=message.fingerprint,
        config=AdapterConfig(
            rank=config.rank,
            alpha=config.alpha,
            target_modules=tuple(config.target_modules),
            use_rslora=config.use_rslora,
            module_ranks=dict(config.module_ranks),
            module_alphas=dict(config.module_alphas),
        ),
        running_requests=message.running_requests,
        unloading=message.unloading,
    )
