"""From an item of a request to what the panel scores: tokens as in training, text for the rule, or a refusal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quartet.reward.v1 import reward_pb2
from quartet.text_tokens import opened
from services.hosting import serving
from services.hosting.model import out_of_range
from services.hosting.serving import ItemRefusedError
from services.reward.hosted import LoadedReward
from services.reward.panel import Candidate
from services.reward.python_scorer import Exchange
from services.reward.scorer import ScorerItem
from services.runtime.errors import FailedPreconditionError

_POLICIES = {
    reward_pb2.TRUNCATION_POLICY_UNSPECIFIED: "refuse",
    reward_pb2.TRUNCATION_POLICY_REFUSE: "refuse",
    reward_pb2.TRUNCATION_POLICY_LEFT: "left",
    reward_pb2.TRUNCATION_POLICY_RIGHT: "right",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One item, ready to be scored."""

    candidate: Candidate
    truncated: bool = False

    @property
    def count(self) -> int:
        """Tokens; 0 without a model."""
        return len(self.candidate.tokens.token_ids)


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of an item of more than ``limit`` tokens: "refuse", or the side that is dropped from."""

    side: str
    limit: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids of prompt and response, and what may not be dropped of them.

    ``segments``: as an encoder's tokenizer tells them. ``head`` and ``tail``: how many special tokens must stay in
    front and at the end. ``response``: how many tokens before the tail are of the response.
    """

    token_ids: list[int]
    response: int
    segments: list[int] | None = None
    head: int = 0
    tail: int = 0

    def cut(self, how: Cut) -> ScorerItem:
        """Without as many tokens on the side as are more than the limit.

        Raises:
            ItemRefusedError: nothing would be left of the response.
        """
        ids, segments = self.token_ids, self.segments
        excess = len(ids) - how.limit
        if how.side == "left":
            start, end = self.head, self.head + excess
        else:
            end = len(ids) - self.tail
            start = end - excess
            if excess >= self.response:
                raise ItemRefusedError(
                    f"prompt has {len(ids) - self.response} tokens, at most {how.limit} are scored: truncation RIGHT "
                    "would leave nothing of the response"
                )
        return ScorerItem(
            [*ids[:start], *ids[end:]], None if segments is None else [*segments[:start], *segments[end:]]
        )


def choose_cut(hosted: LoadedReward, policy: int) -> Cut:
    """What ``policy`` of a request means for this model.

    Raises:
        FailedPreconditionError: it is AS_TRAINED, but how the model was trained is not kept with it.
    """
    limit = hosted.panel.max_sequence_tokens
    if policy == reward_pb2.TRUNCATION_POLICY_AS_TRAINED:
        if hosted.trained.truncation is None:
            raise FailedPreconditionError(
                "truncation is AS_TRAINED, but what the model was trained with is not kept with it; "
                "ask for REFUSE, LEFT or RIGHT",
                field="truncation",
            )
        return Cut(hosted.trained.truncation, min(limit, hosted.trained.max_tokens or limit))
    # An unknown number is of a newer contract: nothing is dropped that was not asked for.
    return Cut(_POLICIES.get(policy, "refuse"), limit)  # type: ignore[call-overload]


def prepare(hosted: LoadedReward, item: reward_pb2.ScoreItem, cut: Cut) -> Prepared | str:
    """What is scored of one item, or why it is refused."""
    try:
        return _prepare(hosted, item, cut)
    except ItemRefusedError as error:
        return str(error)


def _prepare(hosted: LoadedReward, item: reward_pb2.ScoreItem, cut: Cut) -> Prepared:
    form = item.prompt.WhichOneof("content")
    if form is None:
        raise ItemRefusedError("prompt is not set: give text, token_ids or messages")
    response_form = item.WhichOneof("response")
    if response_form is None:
        raise ItemRefusedError("response is not set: give response_text or response_token_ids")
    if (form == "token_ids") != (response_form == "response_token_ids"):
        raise ItemRefusedError(f"prompt is {form} but response is {response_form}: both must be token ids, or neither")
    if form == "token_ids" and not item.response_token_ids.ids:
        raise ItemRefusedError("response_token_ids is empty: there is nothing to score")
    if not hosted.panel.members:
        return Prepared(Candidate(exchange=_exchange(hosted, item)))
    if form == "token_ids":
        response = list(item.response_token_ids.ids)
        encoded = _Encoded([*item.prompt.token_ids.ids, *response], len(response))
    else:
        if not item.response_text and item.response_unfinished:
            raise ItemRefusedError("response_text is empty and unfinished: there is nothing to score")
        encoded = _encode(hosted, item, cut)
    count = len(encoded.token_ids)
    if not count:
        raise ItemRefusedError("prompt and response have no tokens: there is nothing to score")
    if (reason := out_of_range(encoded.token_ids, hosted.panel.vocab_size)) is not None:
        raise ItemRefusedError(reason)
    if truncated := count > cut.limit:
        if cut.side == "refuse":
            raise ItemRefusedError(_too_long(hosted, f"{count} tokens", cut))
        tokens = encoded.cut(cut)
    else:
        tokens = ScorerItem(encoded.token_ids, encoded.segments)
    exchange = _exchange(hosted, item) if hosted.panel.rule is not None else None
    return Prepared(Candidate(tokens, exchange), truncated=truncated)


def _too_long(hosted: LoadedReward, size: str, cut: Cut) -> str:
    takes = "takes" if cut.limit == hosted.panel.max_sequence_tokens else "was trained with at most"
    return f"prompt and response have {size}, the model {takes} {cut.limit}; shorten them, or ask for truncation LEFT"


def _encode(hosted: LoadedReward, item: reward_pb2.ScoreItem, cut: Cut) -> _Encoded:
    """
    Raises:
        ItemRefusedError: the chat template refuses the messages, or they are longer than so many tokens can be.
    """
    is_chat = item.prompt.WhichOneof("content") == "messages"
    prompt = serving.chat_text(hosted.tokenizer, item.prompt.messages.messages) if is_chat else item.prompt.text
    assert hosted.encoding is not None
    most = hosted.encoding.characters_per_token
    if cut.side == "refuse" and most is not None:
        # A second's work for each MiB, and hundreds of MiB, for a text that can't fit.
        least = sum(math.ceil(len(text) / most) for text in (prompt, item.response_text))
        if least > cut.limit:
            size = f"{len(prompt) + len(item.response_text)} characters, which are {least} tokens or more"
            raise ItemRefusedError(_too_long(hosted, size, cut))
    response = _plain_ids(hosted, item.response_text)
    if hosted.encoding.pair:
        pair = hosted.tokenizer(prompt, item.response_text, return_special_tokens_mask=True)
        mask = pair["special_tokens_mask"]
        # An encoder reads its score off the first token: it stays, whatever is dropped.
        head, tail = (found.index(0) if 0 in found else len(found) for found in (mask, mask[::-1]))
        return _Encoded(list(pair["input_ids"]), len(response), pair.get("token_type_ids"), head, tail)
    end_id = hosted.encoding.end_of(is_chat=is_chat)
    if end_id is not None and not item.response_unfinished:
        response.append(end_id)
    before = _plain_ids(hosted, prompt)
    return _Encoded((before if is_chat else opened(before, hosted.encoding.opening)) + response, len(response))


def _plain_ids(hosted: LoadedReward, text: str) -> list[int]:
    return list(hosted.tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _exchange(hosted: LoadedReward, item: reward_pb2.ScoreItem) -> Exchange:
    """The text that a rule sees: all of it, whatever of it a model would drop."""
    form = item.prompt.WhichOneof("content")
    if form == "messages":
        return Exchange(serving.turns_of(item.prompt.messages.messages), item.response_text)
    if form == "text":
        return Exchange(item.prompt.text, item.response_text)
    encoding = hosted.encoding
    prompt, response = list(item.prompt.token_ids.ids), list(item.response_token_ids.ids)
    if response[-1] in hosted.model.eos_token_ids or (encoding and response[-1] == encoding.turn_end_id):
        response.pop()
    if encoding and prompt[: len(encoding.opening)] == list(encoding.opening):
        del prompt[: len(encoding.opening)]  # As text, it would have come without.
    return Exchange(*(hosted.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (prompt, response)))
