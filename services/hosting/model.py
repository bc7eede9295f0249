"""Loading a transformers model to host, and what a service says about it.

Shapes: B sequences, S tokens of prompt and response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from quartet.common.v1 import common_pb2
from quartet.fingerprint import safetensors_fingerprint, tokenizer_fingerprint
from services.runtime import allocator
from services.runtime.config import ServiceSettings
from services.runtime.errors import StartError

# Where a configuration says how long a sequence may be.
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """Where and how precisely to compute."""

    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False

    @property
    def engine(self) -> str:
        """For people: what computes, and where."""
        return f"transformers {transformers.__version__} on {self.device.type}"

    @property
    def loading(self) -> dict[str, Any]:
        """For ``from_pretrained``: code of the model's own only when asked for, and no pickles, which are code too."""
        return {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code, "use_safetensors": True}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_hosting(settings: ServiceSettings) -> Hosting:
    """The GPU when there is one; ``auto`` precision is float32 on a CPU and bfloat16 on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        allocator.keep_freed()
    if settings.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.dtype]
    return Hosting(device=device, dtype=dtype, trust_remote_code=settings.trust_remote_code)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        StartError: it does not load.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise StartError(f"model {str(folder)!r}: its tokenizer does not load: {error}") from error


def longest_sequence(config: Any, tokenizer: Any) -> int:
    """Longest sequence in tokens, prompt and response together, by the model's configuration."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _LENGTH_FIELDS:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    declared = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return declared if 0 < declared < 1_000_000 else 32768


def end_tokens(folder: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: of the generation configuration, the configuration and the tokenizer."""
    found: list[int] = []
    generation = folder / "generation_config.json"
    sources = [config.eos_token_id, tokenizer.eos_token_id]
    if generation.is_file():
        sources.insert(0, transformers.GenerationConfig.from_pretrained(folder).eos_token_id)
    for source in sources:
        for token in source if isinstance(source, list) else [source]:
            if token is not None and token not in found:
                found.append(int(token))
    return tuple(found)


def describe(
    *,
    model_id: str,
    folder: Path,
    engine: str,
    dtype: str,
    tokenizer: Any,
    max_sequence_tokens: int,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    deterministic: bool,
) -> common_pb2.ModelInfo:
    """What GetModelInfo answers. Reads every byte of the weights, for their fingerprint."""
    return common_pb2.ModelInfo(
        served_by=common_pb2.ServedBy(
            model_id=model_id,
            weights_version=0,
            weights_fingerprint=safetensors_fingerprint(folder),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        ),
        engine=engine,
        dtype=dtype,
        max_sequence_tokens=max_sequence_tokens,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        deterministic=deterministic,
    )


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) int64 and their mask (B, S), True for real tokens, padded on the right."""
    longest = max(map(len, sequences))
    ids_BS = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    lengths_B = torch.tensor([len(sequence) for sequence in sequences])
    for row, sequence in enumerate(sequences):
        ids_BS[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    mask_BS = torch.arange(longest)[None, :] < lengths_B[:, None]
    return ids_BS.to(device), mask_BS.to(device)


def out_of_range(token_ids: Sequence[int], vocab_size: int) -> str | None:
    """The reason to refuse ``token_ids``, or None."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
        return f"token id {worst} lies outside the vocabulary, [0, {vocab_size})"
    return None
