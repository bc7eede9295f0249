"""Log-probabilities of response tokens without the full logits.

The hidden states of the response positions alone are projected on the vocabulary, in chunks sized by bytes: the tensor
[B, T, V] never exists. Shapes: B sequences, S tokens, N response positions of the batch, C of a chunk, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from services.hosting.model import Hosting, longest_sequence, pad_right
from services.runtime.errors import StartError

# Largest difference to the model's own logits that the check at start lets pass, by precision.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


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


class ReferenceModel:
    """A frozen causal language model of any architecture that transformers loads."""

    def __init__(self, folder: Path, *, hosting: Hosting, tokenizer: Any, chunk_bytes: int) -> None:
        """Loads the model and checks the chunked projection against the model's own logits.

        Raises:
            StartError: it does not load, or its logits are not a linear projection that this class can chunk.
        """
        self.hosting = hosting
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **hosting.loading
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise StartError(f"model {str(folder)!r} does not load as a causal language model: {error}") from error
        if missing := sorted(loading["missing_keys"]):
            raise StartError(
                f"model {str(folder)!r} is not a language model: its checkpoint lacks {', '.join(missing[:3])}"
            )
        self.model = model.to(hosting.device).eval().requires_grad_(False)
        self.head = model.get_output_embeddings()
        self.vocab_size = int(self.head.weight.shape[0])
        self.max_sequence_tokens = longest_sequence(model.config, tokenizer)
        self.pad_id = int(tokenizer.pad_token_id or 0)
        # float32 logits, and as much again for the log-sum-exp over them.
        self.chunk_positions = max(1, chunk_bytes // (2 * 4 * self.vocab_size))
        text_config = model.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        multiplier = getattr(text_config, "logit_scale", None)
        divisor = getattr(text_config, "logits_scaling", None)
        self.logit_scale = float(multiplier) if multiplier else 1.0 / float(divisor) if divisor else 1.0
        self._check(folder)

    @torch.inference_mode()
    def logprobs(self, items: Sequence[ReferenceItem]) -> list[ReferenceResult]:
        """Results of a batch, in order."""
        ids_BS, mask_BS = pad_right([item.token_ids for item in items], self.pad_id, self.hosting.device)
        hidden_BSD = self.model.base_model(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state
        # Position t predicts token t + 1.
        starts_B = [item.response_start for item in items]
        ends_B = [len(item.token_ids) for item in items]
        hidden_ND = torch.cat(
            [hidden_BSD[b, start - 1 : end - 1] for b, (start, end) in enumerate(zip(starts_B, ends_B, strict=True))]
        )
        targets_N = torch.cat([ids_BS[b, s:e] for b, (s, e) in enumerate(zip(starts_B, ends_B, strict=True))])
        counts = [end - start for start, end in zip(starts_B, ends_B, strict=True)]
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
        logprobs, entropies = [], []
        for start in range(0, len(hidden_ND), self.chunk_positions):
            chunk = slice(start, start + self.chunk_positions)
            logits_CV = self._logits(hidden_ND[chunk]) / temperature_N[chunk, None]
            normaliser_C = logits_CV.logsumexp(-1)
            chosen_C = logits_CV.gather(-1, targets_N[chunk, None]).squeeze(-1)
            logprobs.append(chosen_C - normaliser_C)
            if want_entropy:
                # H = log Z - E[logit]; softmax weights are made in place of the logits' own memory.
                expected_C = (logits_CV.sub(normaliser_C[:, None]).exp_() * logits_CV).sum(-1)
                entropies.append(normaliser_C - expected_C)
        return torch.cat(logprobs), torch.cat(entropies) if want_entropy else torch.empty(0)

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        """float32 logits of some positions, as the model itself would give them."""
        bias = getattr(self.head, "bias", None)
        logits_CV = F.linear(hidden_CD, self.head.weight, bias).float()
        if self.logit_scale != 1.0:
            logits_CV = logits_CV * self.logit_scale
        if self.softcap:
            logits_CV = torch.tanh(logits_CV / self.softcap) * self.softcap
        return logits_CV

    @torch.inference_mode()
    def _check(self, folder: Path) -> None:
        ids_BS = torch.arange(min(8, self.vocab_size), device=self.hosting.device)[None, :]
        own_SV = self.model(input_ids=ids_BS).logits[0].float()
        ours_SV = self._logits(self.model.base_model(input_ids=ids_BS).last_hidden_state[0])
        difference = float((own_SV - ours_SV).abs().max())
        if not difference <= _TOLERANCE[self.hosting.dtype]:
            raise StartError(
                f"model {str(folder)!r}: its logits are not a plain projection of its last hidden state "
                f"(difference {difference:.3g}); this architecture is not supported as a reference"
            )
