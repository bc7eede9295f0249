"""What a tokenizer puts around text, which trainer and services must agree on: how a prompt begins, how an answer ends.

Texts are encoded without special tokens, so that prompt and response can be joined. Two things are left to be added.
A prompt in plain text begins with what the tokenizer itself puts first, such as Llama's <s>: the model has never seen
text without it. (Chat messages begin as their chat template says.) And an answer to chat messages ends by the token by
which the template ends the assistant's turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A word that no template says itself.
_SAID = "Xyzzy"
_SYSTEM, _USER = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}


def opening_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that the tokenizer puts before a text by itself; none for many models."""
    own = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    # Not any word: some tokenizers know nothing but their own.
    for word in (tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer)) if token not in own):
        plain, whole = (list(tokenizer(word, add_special_tokens=special).input_ids) for special in (False, True))
        places = [at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain]
        if len(places) == 1:  # Else the word is itself what is put around it.
            return tuple(whole[: places[0]])
    return ()


def opened(token_ids: Sequence[int], opening: Sequence[int]) -> list[int]:
    """The tokens of a plain text behind ``opening``, which is not put before a text that says it itself."""
    ids = list(token_ids)
    return ids if ids[: len(opening)] == list(opening) else [*opening, *ids]


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token by which the chat template ends the assistant's turns.

    None without a template, or where it ends them by none: then an answer ends by the end token, as to plain text.
    """
    if not tokenizer.chat_template:
        return None
    import jinja2  # As transformers needs it to render a template.

    for before in ([_USER], [_SYSTEM, _USER]):  # Some templates insist on a system's message.
        talk = [*before, {"role": "assistant", "content": _SAID}]
        try:
            text: str = tokenizer.apply_chat_template(talk, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            continue
        _, said, rest = text.rpartition(_SAID)
        if said:
            special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
            special.update(tokenizer.all_special_ids)
            ids: list[int] = tokenizer(rest, add_special_tokens=False).input_ids
            return next((token for token in ids if token in special), None)
    return None
