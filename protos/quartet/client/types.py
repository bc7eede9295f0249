"""Plain values of the clients: protobuf stops here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quartet.client.errors import ServiceFailedError
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


def prompt_message(prompt: PromptLike) -> common_pb2.Prompt:
    """The wire form of a prompt, told apart by its type.

    Raises:
        TypeError: neither text, messages nor token ids.
    """
    if isinstance(prompt, str):
        return common_pb2.Prompt(text=prompt)
    items = list(prompt)
    if items and all(isinstance(item, dict) for item in items):
        turns = [common_pb2.ChatMessage(role=m["role"], content=m["content"]) for m in items]  # type: ignore[index]
        return common_pb2.Prompt(messages=common_pb2.ChatMessages(messages=turns))
    try:
        return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=items))  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"a prompt must be text, chat messages or token ids, got a list of {type(items[0]).__name__}"
        ) from error


def holds_token_ids(prompt: PromptLike) -> bool:
    """Whether it would cross the wire as token ids."""
    return not isinstance(prompt, str) and not (len(prompt) > 0 and isinstance(prompt[0], dict))
