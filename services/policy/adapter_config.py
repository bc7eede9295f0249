"""How a LoRA adapter is applied, and the checks of what a client wants to load. Knows no model library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet.fingerprint import TensorDigest, adapter_fingerprint
from services.policy.staging import TensorSpec, wire_dtype_problem
from services.runtime.errors import InvalidArgumentError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_LONGEST_NAME = 512
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,128}")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``, scales B A x. See adapters.proto."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    module_ranks: Mapping[str, int] = field(default_factory=dict)
    module_alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Rows of the module's A."""
        return self.module_ranks.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A x of the module is multiplied by."""
        rank = self.rank_of(module)
        return self.module_alphas.get(module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def fingerprint(self, digests: Sequence[TensorDigest]) -> str:
        """Of this configuration with these tensors."""
        return adapter_fingerprint(
            digests,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            module_ranks=self.module_ranks,
            module_alphas=self.module_alphas,
        )

    def write(self, folder: Path) -> None:
        """As PEFT would have saved it; its patterns are regular expressions."""
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.target_modules),
            "use_rslora": self.use_rslora,
            "rank_pattern": {re.escape(name): rank for name, rank in self.module_ranks.items()},
            "alpha_pattern": {re.escape(name): alpha for name, alpha in self.module_alphas.items()},
            "bias": "none",
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config))


def module_of(tensor: str) -> tuple[str, str] | None:
    """The module and the factor ("A" or "B") that a tensor belongs to by its name; None for another name."""
    found = _TENSOR.fullmatch(tensor)
    return (found["module"], found["factor"]) if found else None


def check_name(name: str, field: str) -> None:
    """Refuses what is no name of an adapter.

    Raises:
        InvalidArgumentError: with the name and what it must be.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{field} is {name[:160]!r}, must be 1 to 128 of the characters A-Z, a-z, 0-9, '.', '_', '@' and '-'",
            field=field,
        )


def check_adapter(
    config: AdapterConfig,
    specs: Sequence[TensorSpec],
    modules: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> None:
    """Refuses an adapter that the served model can't take whole.

    Args:
        config: as it came.
        specs: of its tensors, as they came.
        modules: (in, out) features of the layers that may be adapted.
        max_rank: the largest rank.

    Raises:
        InvalidArgumentError: names the field, what it is and what it must be.
    """
    _check_config(config, max_rank)
    if not specs:
        raise _refused("tensors", "there are none: an adapter has at least one pair lora_A, lora_B")
    seen: dict[str, set[str]] = {}
    for spec in specs:
        _check_tensor(spec, config, modules, seen)
    for module, factors in seen.items():
        if len(factors) == 1:
            (has,) = factors
            lacks = "B" if has == "A" else "A"
            raise _refused("tensors", f"of {module!r} lora_{has} came without lora_{lacks}")
    for name, overrides in (("module_ranks", config.module_ranks), ("module_alphas", config.module_alphas)):
        if strangers := sorted(set(overrides) - set(seen)):
            raise _refused(f"config.{name}", f"{strangers[0]!r} is none of the modules that tensors came for")


def _check_config(config: AdapterConfig, max_rank: int) -> None:
    ranks = {"rank": config.rank} | {f"module_ranks[{name!r}]": rank for name, rank in config.module_ranks.items()}
    for name, rank in ranks.items():
        if not 1 <= rank <= max_rank:
            raise _refused(f"config.{name}", f"is {rank}, must lie in [1, {max_rank}] (--max-lora-rank)")
    alphas = {"alpha": config.alpha} | {f"module_alphas[{name!r}]": x for name, x in config.module_alphas.items()}
    for name, alpha in alphas.items():
        if not (math.isfinite(alpha) and alpha > 0):
            raise _refused(f"config.{name}", f"is {alpha}, must be a finite number above 0")
    if not all(0 < len(end) <= _LONGEST_NAME for end in config.target_modules):
        raise _refused("config.target_modules", f"a name is empty or longer than {_LONGEST_NAME} characters")


def _check_tensor(
    spec: TensorSpec, config: AdapterConfig, modules: Mapping[str, tuple[int, int]], seen: dict[str, set[str]]
) -> None:
    """Checks one tensor and notes its module and factor in ``seen``."""
    if len(spec.name) > _LONGEST_NAME:
        raise _refused("tensors", f"a name has {len(spec.name)} characters, at most {_LONGEST_NAME} are accepted")
    if (parsed := module_of(spec.name)) is None:
        raise _refused(
            "tensors",
            f"{spec.name!r} is no tensor of a LoRA adapter: they are named base_model.model.<module>.lora_A.weight and "
            "base_model.model.<module>.lora_B.weight",
        )
    module, factor = parsed
    if module not in modules:
        raise _refused(
            "tensors",
            f"{spec.name!r} is of module {module!r}, which can't be adapted here or does not exist in the served "
            f"model: linear layers below its head can, such as {next(iter(modules), '')!r}",
        )
    if not any(module == end or module.endswith(f".{end}") for end in config.target_modules):
        raise _refused(
            "tensors",
            f"{spec.name!r} is of module {module!r}, which no entry of config.target_modules "
            f"({', '.join(config.target_modules[:8])}) is the end of",
        )
    if problem := wire_dtype_problem(spec):
        raise _refused("tensors", problem)
    rank, (into, out) = config.rank_of(module), modules[module]
    expected = (rank, into) if factor == "A" else (out, rank)
    if spec.shape != expected:
        raise _refused("tensors", f"{spec.name!r} has shape {list(spec.shape)}, must have {list(expected)}")
    factors = seen.setdefault(module, set())
    if factor in factors:
        raise _refused("tensors", f"{spec.name!r} stands in it twice")
    factors.add(factor)


def _refused(name: str, reason: str) -> InvalidArgumentError:
    separator = " " if reason.startswith("is ") else ": "
    return InvalidArgumentError(f"begin.{name}{separator}{reason}", field=f"begin.{name}")
