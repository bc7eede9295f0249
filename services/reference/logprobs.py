"""Log-probabilities of response tokens without the full logits.

The hidden states of the response positions alone are projected on the vocabulary, some positions and a part of the
vocabulary at a time: the tensor [B, T, V] never exists. The log-sum-exp is gathered over the parts, so that each part's
logits are made and used up while they are in the processor's cache; on a GPU one part is the whole vocabulary.

Shapes: B sequences, N response positions of the batch, C positions of a chunk, D hidden size,
V vocabulary, U a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from services.hosting.model import Hosting, longest_sequence
from services.hosting.packed import HiddenStates, last_hidden_state
from services.hosting.prepacking import PackedLinear, can_prepack, float32_linear
from services.runtime.errors import StartError

# On a processor: logits of so many tokens of the vocabulary at a time. 4 MiB of them for 256 positions.
_CPU_PART = 4096
# Largest difference to the model's own logits that the check at start lets pass, by precision and relative to the
# largest of them: the model rounds them, up to three times.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


@dataclass(frozen=True, slots=True)
class ReferenceItem:
    """Prompt and response tokens, and where the response begins."""

    token_ids: list[int]
    response_start: int
    temperature: float
    entropy: bool


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """Log-probabilities and, if asked for, entropies of the response tokens; nats."""

    logprobs: list[float]
    entropies: list[float]


class Head:
    """The projection on the vocabulary, as parts that make some of the logits each, in float32.

    The weights stay as precise as they are. On a processor those of one part at a time are copied to float32.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        on_cpu = weight_VD.device.type == "cpu"
        self.longest_part = min(_CPU_PART, len(weight_VD)) if on_cpu else len(weight_VD)
        pack = on_cpu and weight_VD.dtype == torch.float32 and can_prepack(torch.float32)
        self.parts: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        for first in range(0, len(weight_VD), self.longest_part):
            weight_UD = weight_VD[first : first + self.longest_part]
            bias_U = None if bias_V is None else bias_V[first : first + self.longest_part]
            plain = partial(float32_linear, weight_OC=weight_UD, bias_O=bias_U)
            self.parts.append((first, PackedLinear(weight_UD, bias_U) if pack else plain))


class ReferenceModel:
    """A frozen causal language model of any architecture that transformers loads."""

    def __init__(self, folder: Path, *, hosting: Hosting, tokenizer: Any, chunk_bytes: int) -> None:
        """Loads the model and checks the chunked projection against the model's own logits.

        Raises:
            StartError: it does not load, gives no last hidden states, or its logits are not a linear projection of them
                that this class can chunk.
        """
        self.hosting = hosting
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **hosting.loading
            )
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise StartError(f"model {str(folder)!r} does not load as a causal language model: {error}") from error
        if missing := sorted(loading["missing_keys"]):
            raise StartError(
                f"model {str(folder)!r} is not a language model: its checkpoint lacks {', '.join(missing[:3])}"
            )
        self.model = model.to(hosting.device).eval().requires_grad_(False)
        head = model.get_output_embeddings()
        self.vocab_size = int(head.weight.shape[0])
        self.max_sequence_tokens = longest_sequence(model.config, tokenizer)
        text_config = model.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        multiplier = getattr(text_config, "logit_scale", None)
        divisor = getattr(text_config, "logits_scaling", None)
        self.logit_scale = float(multiplier) if multiplier else 1.0 / float(divisor) if divisor else 1.0
        self.head = Head(head.weight, getattr(head, "bias", None))
        # float32 logits, and as much again for what is made of them.
        self.chunk_positions = max(1, chunk_bytes // (2 * 4 * self.head.longest_part))
        self._check(folder)
        model.set_output_embeddings(torch.nn.Identity())  # Unless it is tied to the embedding, the plain head is freed.
        self.hidden_states = HiddenStates(self.model, pad_id=int(tokenizer.pad_token_id or 0))

    @torch.inference_mode()
    def logprobs(self, items: Sequence[ReferenceItem]) -> list[ReferenceResult]:
        """Results of a batch, in order."""
        # Position t predicts token t + 1.
        predicting = [range(item.response_start - 1, len(item.token_ids) - 1) for item in items]
        hidden_ND = self.hidden_states([item.token_ids for item in items], predicting)
        targets_N = torch.tensor([token for item in items for token in item.token_ids[item.response_start :]])
        targets_N = targets_N.to(hidden_ND.device)
        counts = [len(item.token_ids) - item.response_start for item in items]
        temperature_N = torch.repeat_interleave(
            torch.tensor([item.temperature for item in items]), torch.tensor(counts)
        ).to(hidden_ND.device)
        want_entropy = any(item.entropy for item in items)
        logprobs_N, entropies_N = self._project(hidden_ND, targets_N, temperature_N, want_entropy)
        logprobs = torch.split(logprobs_N.cpu(), counts)
        entropies = torch.split(entropies_N.cpu(), counts) if want_entropy else [torch.empty(0)] * len(items)
        return [
            ReferenceResult(logprobs=lp.tolist(), entropies=h.tolist() if item.entropy else [])
            for item, lp, h in zip(items, logprobs, entropies, strict=True)
        ]

    def _project(
        self, hidden_ND: Tensor, targets_N: Tensor, temperature_N: Tensor, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities and, if wanted, entropies."""
        logprobs, entropies = [], []
        for start in range(0, len(hidden_ND), self.chunk_positions):
            chunk = slice(start, start + self.chunk_positions)
            logprobs_C, entropies_C = self._chunk(
                hidden_ND[chunk], targets_N[chunk], temperature_N[chunk, None], want_entropy
            )
            logprobs.append(logprobs_C)
            entropies.append(entropies_C)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(
        self, hidden_CD: Tensor, targets_C: Tensor, temperature_C1: Tensor, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """One pass over the vocabulary: the sums are kept relative to the largest logit so far, so none overflows."""
        largest_C1 = torch.full_like(temperature_C1, -torch.inf)
        total_C1, weighted_C1, chosen_C1 = (torch.zeros_like(temperature_C1) for _ in range(3))
        hot = bool((temperature_C1 != 1).any())
        for first, logits_CU in self._parts(hidden_CD):
            if hot:
                logits_CU.div_(temperature_C1)
            place_C1 = targets_C[:, None] - first
            inside_C1 = (place_C1 >= 0) & (place_C1 < logits_CU.shape[1])
            found_C1 = logits_CU.gather(1, place_C1.clamp(0, logits_CU.shape[1] - 1))
            chosen_C1 = torch.where(inside_C1, found_C1, chosen_C1)
            before_C1, largest_C1 = largest_C1, torch.maximum(largest_C1, logits_CU.amax(1, keepdim=True))
            shrink_C1 = (before_C1 - largest_C1).exp_()
            if want_entropy:
                weights_CU = (logits_CU - largest_C1).exp_()
                weighted_C1 = weighted_C1 * shrink_C1 + logits_CU.mul_(weights_CU).sum(1, keepdim=True)
            else:
                weights_CU = logits_CU.sub_(largest_C1).exp_()
            total_C1 = total_C1 * shrink_C1 + weights_CU.sum(1, keepdim=True)
        normaliser_C1 = largest_C1 + total_C1.log()
        # H = log Z - E[logit].
        entropies_C1 = normaliser_C1 - weighted_C1 / total_C1 if want_entropy else weighted_C1[:0]
        return (chosen_C1 - normaliser_C1).squeeze(1), entropies_C1.squeeze(1)

    def _parts(self, hidden_CD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """float32 logits of some positions, those of the model but for its rounding, part by part; free to change."""
        for first, part in self.head.parts:
            logits_CU = part(hidden_CD)
            if self.logit_scale != 1.0:
                logits_CU.mul_(self.logit_scale)
            if self.softcap:
                logits_CU.div_(self.softcap).tanh_().mul_(self.softcap)
            yield first, logits_CU

    @torch.inference_mode()
    def _check(self, folder: Path) -> None:
        ids_BS = torch.arange(min(8, self.vocab_size), device=self.hosting.device)[None, :]
        own_SV = self.model(input_ids=ids_BS).logits[0].float()
        hidden_SD = last_hidden_state(self.model.base_model, input_ids=ids_BS)[0]
        ours_SV = torch.cat([logits_SU for _, logits_SU in self._parts(hidden_SD)], dim=1)
        difference = float((own_SV - ours_SV).abs().max())
        largest = float(own_SV.abs().max())
        if not difference <= _TOLERANCE[self.hosting.dtype] * largest:
            raise StartError(
                f"model {str(folder)!r}: its logits are not a plain projection of its last hidden state "
                f"(difference {difference:.3g}, largest logit {largest:.3g}); this architecture is not supported as a "
                "reference"
            )
