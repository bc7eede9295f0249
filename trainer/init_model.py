"""``quartet-train init``: a small Llama with random weights and a byte-level BPE tokenizer trained on your texts.

For machines without a model hub, and for corpora that a small model can learn from nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.config import InitSettings
from trainer.errors import DataError, OutputError
from trainer.files import require_folder
from trainer.lineage import origin
from trainer.rows import read_rows, row_texts
from trainer.saving import save_model

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

# Each message: its role's token, its text, the end token. So an answer ends like any other response.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main(settings: InitSettings) -> None:
    """Trains the tokenizer, draws the weights, writes the folder.

    Raises:
        DataError: the data can't be read or hold no text.
        OutputError: the folder is taken, or can't be one.
    """
    require_folder("--output", settings.output)
    if settings.output.exists() and any(settings.output.iterdir()):
        raise OutputError(f"--output is {str(settings.output)!r}: the folder is not empty; choose another")
    tokenizer = train_tokenizer(settings)
    model = draw_model(settings, vocab_size=len(tokenizer))
    made = origin("init", settings.model_dump(mode="json"), parent=None, sources=settings.data, digest=None)
    save_model(model, tokenizer, settings.output, origin=made)
    fewer = (
        f" (the texts gave no more than that, of {settings.vocab_size})" if len(tokenizer) < settings.vocab_size else ""
    )
    sys.stdout.write(
        f"{settings.output}: a Llama of {model.num_parameters():,} parameters, {len(tokenizer):,} tokens{fewer}, "
        f"at most {settings.max_positions} in a sequence\n"
    )


def train_tokenizer(settings: InitSettings) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE: any text is encoded and decoded without loss. Pad and end tokens are apart."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN, *_ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(settings.data), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        model_max_length=settings.max_positions,
        additional_special_tokens=list(_ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def draw_model(settings: InitSettings, *, vocab_size: int) -> transformers.LlamaForCausalLM:
    """A Llama of the given size, its weights drawn from the seed."""
    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size or 3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=settings.tie_embeddings,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def _texts(sources: tuple[str, ...]) -> Iterator[str]:
    for source in sources:
        found = False
        for _, fields in read_rows(source):
            for text in row_texts(fields):
                found = True
                yield text
        if not found:
            raise DataError(f"{source}: has no text in any field that training reads")
