"""Models on their way out: as tensors for a service, and as plain Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from quartet.model_folder import write_metadata
from trainer.distributed import led
from trainer.files import replace_folder, written
from trainer.lineage import Origin, write_lineage
from trainer.lora import adapter_of, plain_state_dict
from trainer.models import quiet_transformers

# Beside the model, where an adapter was trained.
ADAPTER_FOLDER = "adapter"


def export_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Names and tensors exactly as ``save_pretrained`` would write them: tied copies left out, names of checkpoints.

    The tensors share memory with the model wherever the checkpoint stores what the model holds. An adapter is merged
    into them.
    """
    state = plain_state_dict(model)
    if not state:  # Of a model split among processes the first has them all.
        return []
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    state = revert_weight_conversion(model, state)
    return [(name, tensor.detach()) for name, tensor in state.items()]


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
    step: int = 0,
) -> None:
    """Writes model, tokenizer and quartet.json as a plain Hugging Face folder, which appears whole or not at all.

    An existing folder is replaced. quartet.json keeps what it held of the model that was loaded, under ``metadata``;
    lineage.json says where the model comes from: its ``origin``, and the ``step`` of its training. Of a model with an
    adapter the folder holds both merged, and ADAPTER_FOLDER beside it the adapter as peft saves it.

    Raises:
        OutputError: it can't be written.
    """
    state = plain_state_dict(model)  # Of a split model all processes bring it together, and the first writes it.
    _write_model(model, state, tokenizer, folder, metadata, origin, step)


@led
def _write_model(
    model: Any,
    state: dict[str, Tensor],
    tokenizer: Any,
    folder: Path,
    metadata: Mapping[str, Any] | None,
    origin: Origin | None,
    step: int,
) -> None:
    with written(folder), replace_folder(folder) as partial, quiet_transformers():
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        if metadata:
            write_metadata(partial, **metadata)
        if origin is not None:
            write_lineage(partial, origin, step)
    if adapter_of(model) is not None:
        # Several models in one folder have one each.
        beside = folder.with_name(ADAPTER_FOLDER if folder.name == "model" else f"{folder.name}-{ADAPTER_FOLDER}")
        save_adapter(model, tokenizer, beside, origin=origin, step=step)


def save_adapter(model: Any, tokenizer: Any, folder: Path, *, origin: Origin | None = None, step: int = 0) -> None:
    """Writes the adapter of ``model`` alone as peft saves it, whole or not at all; arguments as ``save_model``.

    Raises:
        OutputError: it can't be written.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError("the model has no adapter")
    with written(folder), replace_folder(folder) as partial:
        adapter.save(partial)
        tokenizer.save_pretrained(partial)
        if origin is not None:
            write_lineage(partial, origin, step)
