"""Settings of online DPO. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from quartet.settings import PositiveFloat, PositiveInt
from trainer.config import PairLossSettings
from trainer.ppo_config import RunSettings


class OnlineDpoSettings(PairLossSettings, RunSettings):
    """Trains a policy by DPO on its own best and worst answers, against the policy, reward and reference services."""

    command: ClassVar[str] = "quartet-train online-dpo"
    title: ClassVar[str] = "online DPO"

    samples_per_prompt: Annotated[PositiveInt, Field(ge=2)] = Field(
        2, description="responses sampled to each prompt, of which the best and the worst are learned from"
    )
    epochs: PositiveInt = Field(1, description="passes over the pairs of each rollout")
    learning_rate: PositiveFloat = Field(5e-7, description="at the start; falls linearly to 0. TRL's default")
    max_tied_steps: PositiveInt = Field(
        3,
        description="steps in a row that may teach nothing, because all responses to each of their prompts have one "
        "score, before the run stops",
    )

    @property
    def reference_live(self) -> bool:
        """The reference service has already been asked about every response, as it arrived."""
        return False

    @property
    def decisive(self) -> dict[str, object]:
        """When to give up decides nothing of what is learned until then."""
        return {name: value for name, value in super().decisive.items() if name != "max_tied_steps"}

    @model_validator(mode="after")
    def _minibatches_have_pairs(self) -> Self:
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"--minibatches is {self.minibatches}: a rollout of {self.prompts_per_step} prompts has at most as "
                "many pairs"
            )
        return self
