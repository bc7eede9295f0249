"""The loaded policy and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quartet.common.v1 import common_pb2
from services.policy.adapters import AdapterRegistry
from services.policy.engine import Engine
from services.policy.staging import Layout


@dataclass(frozen=True, kw_only=True)
class HostedPolicy:
    """``model.served_by`` changes with every weight update, ``adapters`` when one is loaded or unloaded.

    ``characters_per_token``: of its tokenizer; None where text has to be read to know. ``opening``: tokens that a
    prompt in plain text begins with.
    """

    engine: Engine
    tokenizer: Any
    model: common_pb2.ModelInfo
    layout: Layout
    characters_per_token: int | None = None
    opening: tuple[int, ...] = ()
    adapters: AdapterRegistry = field(default_factory=AdapterRegistry)
