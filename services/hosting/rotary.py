"""Which sequences may be computed together, where rotary frequencies change with the longest of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn


class RotaryLengths:
    """Which sequences have the same rotary frequencies, of a model where these change with the length.

    With longrope there are two sets of them, for sequences up to the original length and for longer ones. With dynamic
    scaling every length beyond the original one has its own. transformers goes by the longest sequence of a forward
    pass (``modeling_rope_utils.dynamic_rope_update``).
    """

    def __init__(self, body: nn.Module, config: Any) -> None:
        """``config``: of the text model ``body``, which has seen no sequence beyond the original length yet."""
        declared = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._long = self._dynamic = math.inf
        # Layers of several types have parameters each.
        for parameters in (declared, *(own for own in declared.values() if isinstance(own, dict))):
            if any(name.startswith("long_") for name in parameters):
                original = parameters.get("original_max_position_embeddings")
                original = original or getattr(config, "original_max_position_embeddings", None)
                self._long = min(self._long, original or config.max_position_embeddings)
            if "dynamic" in str(parameters.get("rope_type", parameters.get("type"))):
                self._dynamic = config.max_position_embeddings
        self._growing = [module for module in body.modules() if hasattr(module, "original_max_seq_len")]

    def group(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the sequences that may be computed together."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for index, length in enumerate(map(len, sequences)):
            alike = (length > self._long, length if length > self._dynamic else 0)
            groups.setdefault(alike, []).append(index)
        return list(groups.values())

    def forget(self) -> None:
        """Undoes what longer sequences have left: dynamic frequencies stay those of the longest so far.

        transformers does so itself for shorter ones than the original length, but for none of just that or more.
        """
        if self._dynamic == math.inf:
            return
        for module in self._growing:
            for name, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items():
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
                elif name.endswith("original_inv_freq"):
                    setattr(module, name.replace("original_", ""), value)
