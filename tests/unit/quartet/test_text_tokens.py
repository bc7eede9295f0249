"""How plain text begins and how answers to messages end, by tokenizers of many kinds."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quartet.text_tokens import opened, opening_ids, turn_end_id

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(single: str | None = None, template: str | None = None) -> Any:
    """A byte-level BPE; ``single``: what its post-processor makes of a text, such as "<s> $A"."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["hello world"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if single is not None:
        bpe.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("single", "opening"),
    [(None, ()), ("$A", ()), ("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("$A </s>", ()), ("</s> $A", (1,))],
)
def test_what_the_tokenizer_puts_before_a_text_is_found_whatever_stands_behind_it(single, opening):
    tokenizer = byte_level(single)
    assert opening_ids(tokenizer) == opening
    plain = tokenizer("hello world", add_special_tokens=False).input_ids
    end = [1] if single and single.endswith("</s>") else []
    assert [*opened(plain, opening), *end] == tokenizer("hello world").input_ids


def test_a_tokenizer_that_knows_its_own_words_alone_tells_it_too():
    words = {"[BOS]": 0, "up": 1, "down": 2}
    backend = Tokenizer(models.WordLevel(words))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    assert opening_ids(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[BOS]")) == (0,)
    assert opening_ids(PreTrainedTokenizerFast(tokenizer_object=backend)) == (0,)


def test_a_text_that_says_the_beginning_itself_is_given_no_second_one():
    assert opened([0, 7, 8], (0,)) == [0, 7, 8]
    assert opened([7, 0, 8], (0,)) == [0, 7, 0, 8]
    assert opened([], (0,)) == [0]
    assert opened([7], ()) == [7]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        (CHATML, 3),
        (CHATML.replace("<|im_end|>", "</s>"), 1),
        (CHATML.replace("<|im_end|>", ""), None),
        # As Phi-3's: turns end by one token, the whole by another, which no model writes between turns.
        (CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add"), 3),
        (CHATML.replace("{% for", "{{ raise_exception('no system') if messages[0].role != 'system' }}{% for", 1), 3),
        ("{{ raise_exception('never') }}", None),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", None),
    ],
)
def test_the_token_that_ends_the_assistants_turns_is_the_templates(template, end):
    assert turn_end_id(byte_level(template=template)) == end
