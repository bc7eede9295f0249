"""Settings of every stage that decide how much memory training takes. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quartet.settings import NonNegativeInt, PositiveFloat, Settings, UnitFloat

# What of these changes nothing in the result.
FREE = frozenset({"activation_checkpointing", "compile", "dry_run", "gradient_sync"})


class ScaleSettings(Settings):
    """LoRA, activations that are computed anew instead of kept, and what all of it takes."""

    lora_rank: NonNegativeInt = Field(
        0,
        description="train a LoRA adapter of this rank and leave the model's own weights as they are; wants about ten "
        "times the learning rate. In PPO the critic has one, too (its head is trained whole), and the policy service "
        "gets the adapter alone (its --max-adapters, --max-lora-rank). 0: all weights are trained",
    )
    lora_alpha: PositiveFloat = Field(32.0, description="what the adapter adds is scaled by alpha / rank")
    lora_dropout: Annotated[UnitFloat, Field(lt=1)] = Field(
        0.0, description="of what goes into the adapter, in training"
    )
    lora_targets: tuple[str, ...] = Field(
        ("all-linear",),
        description="layers that get an adapter, by the ends of their names (q_proj v_proj); all-linear: every linear "
        "layer but the output's",
        min_length=1,
    )
    activation_checkpointing: bool = Field(
        False, description="keep one activation a layer and compute the others anew when the gradient wants them"
    )
    compile: bool = Field(
        False,
        description="make code for the decoder layers by torch.compile: half a minute to two at the first step, then "
        "steps are faster (make bench-trainer measures by how much); not measured on a GPU. Needs a C++ compiler, on a "
        "GPU triton. The result differs by rounding, and with dropout by what is dropped",
    )
    gradient_sync: Literal["micro-batch", "step"] = Field(
        "micro-batch",
        description="of several processes: when gradients are brought together. step: after the last micro-batch "
        "alone, which sends less and takes the memory of a whole gradient in every process",
    )
    dry_run: bool = Field(
        False,
        description="load no weights and train nothing: print what the run takes of memory and disk, and what the "
        "machine has; exit code 1 where it does not fit",
    )
