"""The critic: values of every position, from a decoder's body and a head of its own.

Shapes: B sequences, S tokens of prompt and response, D hidden size, H heads of a reward model, M places asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quartet.model_folder import find_model
from trainer.errors import ModelError
from trainer.models import head_weights, hidden_at, initialise_head, linear_float32, load_policy, load_reward_model

HeadInit = Literal["zero", "normal", "reward"]


class Critic(nn.Module):
    """Values of every position: a decoder body and a float32 head."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    @classmethod
    def from_reward_model(
        cls,
        model: str | Path,
        tokenizer: Any,
        *,
        head: HeadInit = "zero",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A critic that starts from a reward model's body.

        Args:
            model: folder or hub id.
            tokenizer: of ``load_tokenizer``.
            head: "zero" (values start at 0), "normal" (N(0, 1 / (D + 1))) or "reward" (the reward model's own).
            seed: of the head's weights.
            dtype: of the body.

        Raises:
            ModelFolderError, ModelError: as ``load_reward_model``.
        """
        reward_model = load_reward_model(model, tokenizer, dtype=dtype)
        score = _combined_head(reward_model.score, head_weights(find_model(str(model))))
        return cls(reward_model.base_model, _value_head(reward_model, head, seed, score)).train()

    @classmethod
    def from_policy(
        cls,
        model: str | Path,
        tokenizer: Any,
        *,
        head: HeadInit = "zero",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A critic that starts from a policy's body; arguments as ``from_reward_model``, without head "reward".

        Raises:
            ModelFolderError, ModelError: as ``load_policy``; or head "reward" is asked for.
        """
        policy = load_policy(model, tokenizer, dtype=dtype)
        return cls(policy.base_model, _value_head(policy, head, seed, None)).train()

    def forward(self, ids_BS: Tensor, mask_BS: Tensor, wanted_BS: Tensor | None = None) -> Tensor:
        """(B, S) float32 value after each token of what is still to come; 0 where it was not asked for.

        Args:
            ids_BS: (B, S) token ids.
            mask_BS: (B, S) True on real tokens, on either side padded.
            wanted_BS: (B, S) True on real tokens after which it is asked for; None: after all of them.
        """
        wanted_BS = mask_BS if wanted_BS is None else wanted_BS
        values_M = linear_float32(hidden_at(self.body, ids_BS, mask_BS, wanted_BS), self.head)[:, 0]
        return values_M.new_zeros(ids_BS.shape).masked_scatter(wanted_BS, values_M)


def _combined_head(heads: nn.Linear, weights: Mapping[str, float]) -> nn.Linear:
    """One head that gives the score, the weighted sum of what several give."""
    if not weights:
        return heads
    weights_H = heads.weight.new_tensor(list(weights.values()))
    combined = nn.Linear(heads.in_features, 1)
    with torch.no_grad():
        combined.weight.copy_(weights_H @ heads.weight)
        combined.bias.zero_() if heads.bias is None else combined.bias.copy_(weights_H @ heads.bias)
    return combined


def _value_head(model: Any, init: HeadInit, seed: int, reward_head: nn.Linear | None) -> nn.Linear:
    head = nn.Linear(model.config.get_text_config().hidden_size, 1)
    if init == "reward":
        if reward_head is None:
            raise ModelError(
                "a critic that starts from the policy has no reward head to start from: use zero or normal"
            )
        with torch.no_grad():
            head.weight.copy_(reward_head.weight)
            head.bias.zero_() if reward_head.bias is None else head.bias.copy_(reward_head.bias)
    else:
        initialise_head(head, seed=seed)
        if init == "zero":
            nn.init.zeros_(head.weight)
    return head
