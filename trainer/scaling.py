"""What a loaded model is given before it is trained: an adapter, activations that are computed anew, compiled layers,
and its share of it for each process."""

from __future__ import annotations

from typing import Any

from trainer import distributed
from trainer.compiling import compile_layers, require_compiler
from trainer.errors import ModelError
from trainer.lora import add_adapter
from trainer.optimisation import Precision, choose_device
from trainer.scale_config import ScaleSettings
from trainer.sharding import shard


def prepare(model: Any, settings: ScaleSettings, *, seed: int) -> Any:
    """``model``, as ``trainer.models`` loads it, the way that ``settings`` want it trained; changed in place.

    Args:
        model: a causal language model, a sequence classifier, or the body of either.
        settings: of the stage.
        seed: of an adapter's weights.

    Raises:
        ModelError: the model, or this machine, can't be trained that way.
    """
    if settings.compile:
        require_compiler(choose_device())
    if settings.lora_rank:
        if distributed.count() > 1:
            raise ModelError(
                f"--lora-rank is {settings.lora_rank}, and there are {distributed.count()} processes: an adapter is "
                "trained by one; leave torchrun away, or train all weights"
            )
        add_adapter(model, settings, seed=seed)
    if settings.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"--activation-checkpointing is set, but {type(model).__name__} can't do without its own")
        # Not reentrant: a frozen embedding below would keep the reentrant kind from any gradient.
        kwargs = {"use_reentrant": False, "preserve_rng_state": True}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def settle(model: Any, settings: ScaleSettings, precision: Precision) -> None:
    """Compiles the layers of ``model`` and splits it among the processes, where that is wanted; in place.

    To be called on the device of training, when nothing about the model has to be tried out any more, and before its
    optimiser is made.

    Args:
        model: of ``prepare``, or a critic around it.
        settings: of the stage.
        precision: of its forward passes.

    Raises:
        ModelError: its layers can't be told.
    """
    if settings.compile:
        compile_layers(model)
    shard(model, precision)
