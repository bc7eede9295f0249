"""Models to measure with: small enough for two cores, from fixed seeds, in plain Hugging Face folders."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 4096
END = 1
"""Id of the end token."""
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "ai", "ou")]


def sentence(draw: random.Random, words: int) -> str:
    """Words that mean nothing, of the lengths that words have."""
    return " ".join("".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(words))


def make_models(folder: Path, *, larger: bool = False) -> tuple[Path, Path]:
    """A Llama of 5 M parameters (``larger``: 29 M) and a reward model of the same size; returns both folders."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        kind(_config(larger=larger)).save_pretrained(folder / name)
        save_tokenizer(folder / name)
    return folder / "policy", folder / "reward"


def make_larger_policy(folder: Path) -> Path:
    """A Llama of 29 M parameters with the same tokenizer; returns its folder."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(_config(larger=True)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _config(*, larger: bool) -> Any:
    from transformers import LlamaConfig

    # Heads are 64 wide: on a CPU vLLM takes 32, 64, 80 and a few more.
    width, inner, layers = (512, 1536, 8) if larger else (256, 1024, 4)
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
        num_labels=1,
    )


def write_prompts(path: Path, count: int, words: int) -> None:
    """JSON Lines of prompts of ``words`` words."""
    draw = random.Random(1)
    path.write_text("".join(json.dumps({"prompt": sentence(draw, words)}) + "\n" for _ in range(count)))


def save_tokenizer(folder: Path) -> None:
    """The tokenizer of all models here, into a model's folder."""
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    draw = random.Random(0)
    return train_tokenizer([sentence(draw, 50) for _ in range(400)], VOCABULARY)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE of at most ``vocabulary`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=512)
