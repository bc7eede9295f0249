"""A rollout as tensors, on the grid of response tokens.

Shapes: B sequences, S tokens of prompt and response, T response tokens, right-padded. N samples of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.batching import pad_right
from trainer.encoding import Ids
from trainer.errors import RolloutError
from trainer.ppo_config import LEAST_TOKENS
from trainer.rollout import Sample

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What a step learns from. Tensors are on the trainer's device; padding holds 0."""

    sequences: tuple[Ids, ...]
    """N sequences of prompt and response token ids."""
    prompt_tokens: tuple[int, ...]
    """N lengths of the prompts."""
    mask_NT: Tensor  # True on response tokens, the end token among them.
    rollout_logprobs_NT: Tensor  # As the engine sampled.
    ref_logprobs_NT: Tensor  # Of the reference.
    scores_N: Tensor  # Of the reward model, raw.
    finished_N: Tensor  # Whether a stop token ended the response.
    where: tuple[str, ...] = ()
    """File and line of each sample's prompt, for messages."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence) for sequence in self.sequences]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of each sequence's prompt."""
        return [tuple(ids[:count].tolist()) for ids, count in zip(self.sequences, self.prompt_tokens, strict=True)]

    @property
    def groups_N(self) -> Tensor:
        """(N,) int64, equal for samples of one prompt."""
        places: dict[tuple[int, ...], int] = {}
        groups = [places.setdefault(prompt, len(places)) for prompt in self.prompts]
        return torch.tensor(groups, device=self.mask_NT.device)

    def pad(self, rows: Sequence[int], pad_id: int) -> Padded:
        """The sequences of ``rows`` as a batch for the models."""
        device = self.mask_NT.device
        ids_BS, mask_BS = pad_right([self.sequences[row] for row in rows], pad_id, device)
        starts_B = torch.tensor([self.prompt_tokens[row] for row in rows], device=device)
        longest = max(len(self.sequences[row]) - self.prompt_tokens[row] for row in rows)
        return Padded(ids_BS=ids_BS, mask_BS=mask_BS, starts_B=starts_B, response_mask_BT=self.mask_NT[rows, :longest])


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Sequences as a model takes them, and where their responses are."""

    ids_BS: Tensor
    mask_BS: Tensor
    starts_B: Tensor
    response_mask_BT: Tensor

    @property
    def wanted_BS(self) -> Tensor:
        """(B, S) True on response tokens."""
        places_S = torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device)
        return self.mask_BS & (places_S[None, :] >= self.starts_B[:, None])

    @property
    def before_BS(self) -> Tensor:
        """(B, S) True one place before each response token: in the states that response tokens are chosen in."""
        return functional.pad(self.wanted_BS[:, 1:], (0, 1))

    def of_tokens(self, x_BS: Tensor) -> Tensor:
        """(B, T) what stands at the place of each response token; 0 on padding."""
        return self._gather(x_BS, 0)

    def of_states(self, x_BS: Tensor) -> Tensor:
        """(B, T) what stands one place before: the state in which the token was chosen; 0 on padding."""
        return self._gather(x_BS, -1)

    def _gather(self, x_BS: Tensor, shift: int) -> Tensor:
        offsets_T = torch.arange(self.response_mask_BT.shape[1], device=x_BS.device)
        places_BT = (self.starts_B[:, None] + offsets_T[None, :] + shift).clamp(max=x_BS.shape[1] - 1)
        return x_BS.gather(1, places_BT).masked_fill(~self.response_mask_BT, 0.0)


def check_rollout(samples: Sequence[Sample]) -> None:
    """
    Raises:
        RolloutError: the responses have fewer than 8 tokens together, or as ``require_finite``.
    """
    tokens = sum(len(sample.response_ids) for sample in samples)
    if tokens < LEAST_TOKENS:
        raise RolloutError(
            f"the {len(samples)} responses of the rollout have {tokens} tokens together, at least {LEAST_TOKENS} are "
            "needed: raise --prompts-per-step; or the policy has come to end its responses at once: then go back to an "
            "earlier model, and raise --kl-beta or lower --learning-rate"
        )
    require_finite(samples)


def require_finite(samples: Sequence[Sample]) -> None:
    """
    Raises:
        RolloutError: a score or log-probability is not finite in float32; names the service and the prompt.
    """
    for sample in samples:
        for service, what, values in (
            ("policy", "log-probability", sample.logprobs),
            ("reference", "log-probability", sample.ref_logprobs),
            ("reward", "score", (sample.score,)),
        ):
            # As they are learned from: what float32 can't hold is infinite in it.
            if odd := [value for value in values if not abs(value) <= _LARGEST]:
                raise RolloutError(
                    f"the {service} service gave the {what} {odd[0]:g} for a response of {len(sample.response_ids)} "
                    f"tokens{f' to {sample.where}' if sample.where else ''}: it must be finite; see whether its model "
                    "holds NaN, and serve it in float32 or bfloat16"
                )


def make_experience(samples: Sequence[Sample], device: torch.device) -> Experience:
    """Lays the samples of a rollout out; at least one."""
    lengths = [len(sample.response_ids) for sample in samples]
    longest = max(lengths)

    def grid(rows: Sequence[Sequence[float]]) -> Tensor:
        values = np.zeros((len(rows), longest), dtype=np.float32)
        for index, row in enumerate(rows):
            values[index, : len(row)] = row
        return torch.from_numpy(values).to(device)

    mask_NT = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    return Experience(
        sequences=tuple(np.array((*sample.prompt_ids, *sample.response_ids), dtype=np.int32) for sample in samples),
        prompt_tokens=tuple(len(sample.prompt_ids) for sample in samples),
        mask_NT=mask_NT.to(device),
        rollout_logprobs_NT=grid([sample.logprobs for sample in samples]),
        ref_logprobs_NT=grid([sample.ref_logprobs for sample in samples]),
        scores_N=torch.tensor([sample.score for sample in samples], dtype=torch.float32, device=device),
        finished_N=torch.tensor([sample.finished for sample in samples], device=device),
        where=tuple(sample.where or f"sample {sample.index + 1} of the rollout" for sample in samples),
    )
