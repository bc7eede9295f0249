"""What a loaded model is given before it is trained: an adapter, and activations that are computed anew."""

from __future__ import annotations

from typing import Any

from trainer import distributed
from trainer.errors import ModelError
from trainer.lora import add_adapter
from trainer.scale_config import ScaleSettings


def prepare(model: Any, settings: ScaleSettings, *, seed: int) -> Any:
    """``model``, as ``trainer.models`` loads it, the way that ``settings`` want it trained; changed in place.

    Args:
        model: a causal language model, a sequence classifier, or the body of either.
        settings: of the stage.
        seed: of an adapter's weights.

    Raises:
        ModelError: the model can't be trained that way.
    """
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
