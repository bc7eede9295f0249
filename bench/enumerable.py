"""A task so small that all responses can be listed: value and optimum of a policy are sums, in float64.

The language has a few words, ``a``, ``b``, ..., and an end token. A response is what a policy service samples: words up
to the end token, or as many words as --max-new-tokens allows. Every response to every prompt has a reward of its own,
drawn from N(0, 1). Of all policies pi, the value

    J(pi) = E[r] - beta KL(pi, ref)

is largest for pi*(y) = ref(y) exp(r(y) / beta) / Z, where it is beta log Z; and J(pi) = beta log Z - beta KL(pi, pi*).
The same pi* is the optimum of DPO on preferences that follow Bradley-Terry with the rewards r.

A reward service that hosts ``score`` looks the rewards up in the file that the task writes:

    QUARTET_REWARDS=task/rewards.json quartet-reward --scorer bench.enumerable:score

Nothing here imports torch until a model is needed, for that service would.

Shapes: P prompts, Y responses, T response tokens.
Source: Rafailov et al. 2023, "Direct Preference Optimization", equations 4 and 5.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tokens = tuple[int, ...]

END = "<end>"
SILENCE = "."
"""How the response without words is written where data may not be empty; the tokenizer reads it as nothing."""
MODEL, PROMPTS, REWARDS = "model", "prompts.jsonl", "rewards.json"
"""Files of a task."""
_PROMPT_WORDS = 2
# Weights times this: the reference is far from uniform.
_SCALE = 4.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, responses and rewards; ``words`` of the language, ``longest`` response in tokens, ``prompts``."""

    words: int
    longest: int
    prompts: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a prompt would have no words of its own.
        """
        # After two tokens of one kind a layer with rotary positions is in the same state as after one: then no policy
        # could choose differently there. So the words of all prompts differ.
        if not _PROMPT_WORDS * self.prompts <= self.words <= len(string.ascii_lowercase):
            raise ValueError(
                f"words is {self.words}, must be from {_PROMPT_WORDS * self.prompts}, {_PROMPT_WORDS} for each of the "
                f"{self.prompts} prompts, to {len(string.ascii_lowercase)}"
            )

    @property
    def end(self) -> int:
        """Id of the end token, the last of the vocabulary."""
        return self.words

    @property
    def prompt_ids(self) -> tuple[Tokens, ...]:
        """P prompts of two different words."""
        return tuple((first, first + 1) for first in range(0, _PROMPT_WORDS * self.prompts, _PROMPT_WORDS))

    @property
    def max_tokens(self) -> int:
        """Of prompt and response."""
        return _PROMPT_WORDS + self.longest

    @functools.cached_property
    def responses(self) -> tuple[Tokens, ...]:
        """Y responses: those that the end token ends, and those of ``longest`` words."""
        words = range(self.words)
        ended = [
            (*said, self.end) for length in range(self.longest) for said in itertools.product(words, repeat=length)
        ]
        return (*ended, *itertools.product(words, repeat=self.longest))

    @functools.cached_property
    def rewards_PY(self) -> Array:
        """(P, Y)"""
        return np.random.default_rng(self.seed).normal(size=(self.prompts, len(self.responses)))

    def text(self, ids: Tokens) -> str:
        """As the tokenizer decodes it, without the end token."""
        return " ".join(string.ascii_lowercase[token] for token in ids if token != self.end)

    def log_distribution(self, model: Any) -> Array:
        """(P, Y) natural logarithm of the probability that ``model``, a causal language model, gives each response."""
        import torch

        padded = [(*response, *[0] * (self.longest - len(response))) for response in self.responses]
        mask_YT = torch.tensor(
            [[place < len(response) for place in range(self.longest)] for response in self.responses]
        )
        found = []
        with torch.inference_mode():
            for prompt in self.prompt_ids:
                # What stands behind a token, padding included, is not seen by it.
                ids_YS = torch.tensor([[*prompt, *response] for response in padded])
                table_YTV = model(input_ids=ids_YS).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
                logp_YT = table_YTV.gather(2, ids_YS[:, len(prompt) :, None])[:, :, 0]
                found.append(logp_YT.masked_fill(~mask_YT, 0.0).sum(1).numpy())
        return np.stack(found)

    def preferences(self, votes: int) -> list[dict[str, str]]:
        """Rows of any two responses to a prompt, compared ``votes`` times; counts are Bradley-Terry's, rounded.

        DPO's optimum depends neither on which responses are compared nor how often. Drawn at random, it would take
        hundreds of thousands to know rare responses well enough that the optimum is not another one.
        """
        texts = [self.text(response) or SILENCE for response in self.responses]
        rows = []
        for prompt_ids, reward_Y in zip(self.prompt_ids, self.rewards_PY, strict=True):
            prompt = self.text(prompt_ids)
            for (one, r), (other, s) in itertools.combinations(zip(texts, reward_Y, strict=True), 2):
                wins = round(votes / (1 + np.exp(s - r)))
                rows += [{"prompt": prompt, "chosen": one, "rejected": other}] * wins
                rows += [{"prompt": prompt, "chosen": other, "rejected": one}] * (votes - wins)
        return rows

    def write(self, folder: Path, *, width: int, layers: int) -> None:
        """The reference, a Llama of random weights, with its tokenizer; prompts; and rewards, for ``score``."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.words + 1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=self.end,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(_SCALE)
        model.save_pretrained(folder / MODEL)
        self._tokenizer().save_pretrained(folder / MODEL)
        write_rows(folder / PROMPTS, [{"prompt": self.text(prompt)} for prompt in self.prompt_ids])
        rewards = {
            self.text(prompt): {self.text(y): reward for y, reward in zip(self.responses, rewards_Y, strict=True)}
            for prompt, rewards_Y in zip(self.prompt_ids, self.rewards_PY.tolist(), strict=True)
        }
        (folder / REWARDS).write_text(json.dumps(rewards, indent=1) + "\n")

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: token for token, word in enumerate(string.ascii_lowercase[: self.words])} | {END: self.end}
        backend = Tokenizer(models.WordLevel(vocabulary))
        backend.normalizer = normalizers.Replace(SILENCE, "")
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, model_max_length=32)


def score(pairs: Sequence[tuple[Any, str]]) -> list[float | None]:
    """Reward of each (prompt, response) by the file that QUARTET_REWARDS names; None where it has none."""
    known = _known(os.environ["QUARTET_REWARDS"])
    return [known.get(prompt, {}).get(response) for prompt, response in pairs]


@functools.lru_cache(maxsize=1)
def _known(path: str) -> dict[str, dict[str, float]]:
    content: dict[str, dict[str, float]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return content


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Policies as tables ------------------------------------------------------------------------------------------------


def optimum(ref_PY: Array, rewards_PY: Array, beta: float) -> tuple[Array, Array]:
    """(P, Y) log pi*, and (P,) beta log Z, its value."""
    exponents_PY = ref_PY + rewards_PY / beta
    log_Z_P = np.logaddexp.reduce(exponents_PY, axis=1)
    return exponents_PY - log_Z_P[:, None], beta * log_Z_P


def value(logp_PY: Array, ref_PY: Array, rewards_PY: Array, beta: float) -> Array:
    """(P,) J of a policy."""
    found: Array = (np.exp(logp_PY) * (rewards_PY - beta * (logp_PY - ref_PY))).sum(axis=1)
    return found


def gap_closed(logp_PY: Array, ref_PY: Array, rewards_PY: Array, beta: float) -> float:
    """Share of the way from J(ref) to beta log Z, of means over prompts: 0 for the reference, 1 for pi*."""
    start = value(ref_PY, ref_PY, rewards_PY, beta).mean()
    best = optimum(ref_PY, rewards_PY, beta)[1].mean()
    return float((value(logp_PY, ref_PY, rewards_PY, beta).mean() - start) / (best - start))


def total_variation(logp_PY: Array, logq_PY: Array) -> float:
    """Half the sum of |p - q| over all responses, in the mean over prompts."""
    return float(np.abs(np.exp(logp_PY) - np.exp(logq_PY)).sum(axis=1).mean() / 2)
