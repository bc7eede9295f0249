"""Plain values of the clients: protobuf stops here."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quartet.client.arguments import message
from quartet.client.errors import InvalidInputError, ServiceFailedError
from quartet.common.v1 import common_pb2

# A prompt as a caller gives it: text, chat messages ({"role", "content"}), or token ids.
Messages = Sequence[dict[str, str]]
PromptLike = str | Messages | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ServedBy:
    """Who answered: model, monotonic version of its weights, content fingerprints of weights and tokenizer.

    ``scoring_fingerprint``: of a reward service, of everything that decides a raw score; empty elsewhere.
    """

    model_id: str
    weights_version: int
    weights_fingerprint: str
    tokenizer_fingerprint: str
    scoring_fingerprint: str = ""

    @property
    def result_fingerprint(self) -> str:
        """Of everything that decides a result, besides the request: results of two that differ can't be compared."""
        return self.scoring_fingerprint or self.weights_fingerprint


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a service hosts. Lengths in tokens, prompt and response together."""

    served_by: ServedBy
    engine: str
    dtype: str
    max_sequence_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    deterministic: bool


@dataclass(frozen=True, kw_only=True)
class ItemFailure:
    """One item of a batch failed. ``retryable``: the same item may succeed later."""

    reason: str
    retryable: bool


@dataclass(frozen=True, kw_only=True)
class WorkInterval:
    """When the model worked for a reply, Unix nanoseconds on the service's clock."""

    start_unix_ns: int
    end_unix_ns: int


def served_by(message: common_pb2.ServedBy) -> ServedBy:
    return ServedBy(
        model_id=message.model_id,
        weights_version=message.weights_version,
        weights_fingerprint=message.weights_fingerprint,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        scoring_fingerprint=message.scoring_fingerprint,
    )


def model_info(message: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        served_by=served_by(message.served_by),
        engine=message.engine,
        dtype=message.dtype,
        max_sequence_tokens=message.max_sequence_tokens,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        deterministic=message.deterministic,
    )


def work_interval(message: common_pb2.WorkInterval) -> WorkInterval:
    return WorkInterval(start_unix_ns=message.start_unix_ns, end_unix_ns=message.end_unix_ns)


def failure(status: common_pb2.ItemStatus) -> ItemFailure | None:
    """None when the item is OK."""
    if status.code == common_pb2.ITEM_STATUS_CODE_OK:
        return None
    return ItemFailure(
        reason=status.reason or "the service gave no reason",
        retryable=status.code == common_pb2.ITEM_STATUS_CODE_RETRYABLE,
    )


def require_results(results: Sequence[object], items: Sequence[object], service: str) -> None:
    """Refuses a reply that does not answer every item: what answers which could not be told.

    Raises:
        ServiceFailedError: their numbers differ.
    """
    if len(results) != len(items):
        raise ServiceFailedError(f"the reply has {len(results)} results for {len(items)} items", service=service)


def prompt_message(prompt: PromptLike, name: str) -> common_pb2.Prompt:
    """The wire form of a prompt, told apart by its type; ``name``: of the argument.

    Raises:
        InvalidInputError: neither text, messages nor token ids, or something in it does not fit.
    """
    if isinstance(prompt, str):
        return message(name, common_pb2.Prompt, text=prompt)
    try:
        items: list[Any] = list(prompt)
    except TypeError:
        raise _no_prompt(name, reprlib.repr(prompt)) from None
    if items and all(isinstance(item, dict) for item in items):
        turns = [_turn(item, f"{name}[{index}]") for index, item in enumerate(items)]
        return common_pb2.Prompt(messages=common_pb2.ChatMessages(messages=turns))
    # A number of Python, numpy or torch.
    if items and not hasattr(items[0], "__index__"):
        raise _no_prompt(name, f"a list of {type(items[0]).__name__}")
    return common_pb2.Prompt(token_ids=token_ids_message(items, name))


def token_ids_message(ids: Sequence[int], name: str) -> common_pb2.TokenIds:
    """
    Raises:
        InvalidInputError: one does not fit.
    """
    return message(name, common_pb2.TokenIds, ids=ids)


def _turn(turn: dict[str, str], name: str) -> common_pb2.ChatMessage:
    missing = [key for key in ("role", "content") if key not in turn]
    if missing:
        raise InvalidInputError(f"{name} has no {missing[0]!r}, must have role and content", field=name)
    return message(f"{name}.", common_pb2.ChatMessage, role=turn["role"], content=turn["content"])


def _no_prompt(name: str, found: str) -> InvalidInputError:
    return InvalidInputError(f"{name} is {found}, must be text, chat messages or token ids", field=name)


def holds_token_ids(prompt: PromptLike) -> bool:
    """Whether it would cross the wire as token ids."""
    return not isinstance(prompt, str) and not (len(prompt) > 0 and isinstance(prompt[0], dict))
