"""What other trainers speak: their requests are answered as their own servers would.

None of these shapes has room for the failure of one sample, so where one can't be scored the request fails. A number
that stands for a failure would be learned from.

Sources, each as of 2026: OpenRLHF's remote reward model, slime's ``--rm-type remote_rm``, verl's reward loop (it speaks
vLLM's /classify and SGLang's /v1/embeddings), prime-rl's reference log-probabilities.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from quartet.client import Score, ScoreItem, ServedBy
from services.gateway import exchange, scoring
from services.gateway.access import TheBackends, TheSettings, needs, require_at_most
from services.gateway.api import Prompt, prompt_of
from services.gateway.backends import Backends
from services.gateway.coalescer import Options
from services.gateway.keys import Scope
from services.gateway.problems import documented

router = APIRouter(tags=["other trainers"], dependencies=[needs(Scope.SCORE)])

_OPTIONS = Options()
_EXAMPLES: list[Any] = ["Human: hello\n\nAssistant: Hello! How can I help?"]


class Lenient(BaseModel):
    """A body of somebody else's: what newer clients send besides is theirs, and asks nothing of us."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# OpenRLHF ----------------------------------------------------------------------------------------------------------


class GetRewardBody(Lenient):
    """OpenRLHF's: full texts, special tokens among them."""

    query: list[str] = Field(
        description="prompt and response in one, as the tokenizer decodes them", examples=[["..."]]
    )
    prompts: list[str] | None = Field(None, description="of each; says where the response begins")
    labels: list[JsonValue] | None = Field(None, description="not looked at")

    @model_validator(mode="after")
    def _as_many(self) -> GetRewardBody:
        if self.prompts is not None and len(self.prompts) not in (0, len(self.query)):
            raise ValueError(f"prompts has {len(self.prompts)} entries, query {len(self.query)}: give as many, or none")
        return self


class GetRewardReply(BaseModel):
    """OpenRLHF's."""

    rewards: list[float] = Field(description="raw scores")
    scores: list[float] = Field(
        description="the same in 0 to 1, for filters: sigmoid of the score over the temperature"
    )
    extra_logs: dict[str, list[float]] = Field(description="tokens, and what else the model says of every sample")


@router.post("/get_reward", summary="OpenRLHF: rewards of full texts", responses=documented(404, 409))
async def get_reward(backends: TheBackends, settings: TheSettings, body: GetRewardBody) -> GetRewardReply:
    """As ``--reward.remote_url`` wants it. Texts are encoded as they are: a special token in them is one."""
    require_at_most(len(body.query), settings.max_items, "query")
    if not body.query:
        return GetRewardReply(rewards=[], scores=[], extra_logs={})
    prompts = body.prompts or [""] * len(body.query)
    items = [_item_of(query, prompt) for query, prompt in zip(body.query, prompts, strict=True)]
    fields = [f"query[{index}]" for index in range(len(items))]
    scores, _ = await scoring.require_scores(backends, items, _OPTIONS, fields, None)
    temperature = (await backends.reward_info()).temperature or 1.0
    return GetRewardReply(
        rewards=[score.score for score in scores],
        scores=[scoring.sigmoid(score.score / temperature) for score in scores],
        extra_logs=_logs(scores),
    )


def _item_of(text: str, prompt: str = "") -> ScoreItem:
    """A full text, cut where its prompt ends. Its end token, where it has one, stands in it."""
    if prompt and text.startswith(prompt) and len(text) > len(prompt):
        return ScoreItem(prompt=prompt, response=text[len(prompt) :], finished=False)
    return ScoreItem(prompt="", response=text, finished=False)


def _logs(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Numbers that all samples have, by the same names."""
    found: dict[str, list[float]] = {"tokens": [float(score.token_count) for score in scores]}
    for name in scores[0].attributes:
        if all(name in score.attributes for score in scores):
            found[name] = [score.attributes[name] for score in scores]
    if all(score.spread is not None for score in scores):
        found["spread"] = [score.spread or 0.0 for score in scores]
    return found


# slime -------------------------------------------------------------------------------------------------------------


class SlimeBody(Lenient):
    """slime's: one sample."""

    prompt: Prompt
    response: str
    label: JsonValue = Field(None, description="not looked at")


@router.post("/slime", summary="slime: the reward of one sample", responses=documented(404, 409))
async def slime(
    backends: TheBackends,
    body: SlimeBody,
    reward_key: Annotated[
        str | None, Query(max_length=64, description="as slime's --reward-key: answers with an object that has it")
    ] = None,
) -> float | dict[str, float]:
    """A bare number, as ``--rm-url`` wants it; or an object with the number and the scores of the heads."""
    item = ScoreItem(prompt=prompt_of(body.prompt), response=body.response)
    (score,), _ = await scoring.require_scores(backends, [item], _OPTIONS, ["response"])
    return score.score if reward_key is None else {**score.attributes, reward_key: score.score}


# verl --------------------------------------------------------------------------------------------------------------


class TextsBody(Lenient):
    """Full texts, as vLLM and SGLang take them."""

    model: str | None = Field(None, description="not looked at: there is one")
    input: str | list[str] = Field(description="a text, or several", examples=_EXAMPLES)

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)


class ClassifyBody(TextsBody):
    """vLLM's."""

    use_activation: bool | None = Field(
        None, description="false: the raw score; else its sigmoid, as vLLM does where it is not told"
    )


class Usage(BaseModel):
    """OpenAI's."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Classified(BaseModel):
    """vLLM's."""

    index: int
    label: str | None = "LABEL_0"
    probs: list[float]
    num_classes: int = 1


class ClassifyReply(BaseModel):
    """vLLM's."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class Embedded(BaseModel):
    """SGLang's."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float]


class EmbeddingsReply(BaseModel):
    """SGLang's."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedded]
    usage: Usage


async def _scores_of(backends: Backends, texts: Sequence[str], most: int) -> tuple[tuple[Score, ...], ServedBy, Usage]:
    require_at_most(len(texts), most, "input")
    fields = ["input"] if len(texts) == 1 else [f"input[{index}]" for index in range(len(texts))]
    scores, by = await scoring.require_scores(backends, [_item_of(text) for text in texts], _OPTIONS, fields, None)
    tokens = sum(score.token_count for score in scores)
    return scores, by, Usage(prompt_tokens=tokens, total_tokens=tokens)


@router.post("/classify", summary="verl, as vLLM: scores of full texts", responses=documented(404, 409))
async def classify(backends: TheBackends, settings: TheSettings, body: ClassifyBody) -> ClassifyReply:
    """The score of each text as the probability of its one class; with ``use_activation`` false as it is."""
    scores, by, usage = await _scores_of(backends, body.texts, settings.max_items)
    probabilities = [score.score if body.use_activation is False else scoring.sigmoid(score.score) for score in scores]
    return ClassifyReply(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=by.model_id,
        data=[Classified(index=index, probs=[value]) for index, value in enumerate(probabilities)],
        usage=usage,
    )


@router.post("/v1/embeddings", summary="verl, as SGLang: scores of full texts", responses=documented(404, 409))
async def embeddings(backends: TheBackends, settings: TheSettings, body: TextsBody) -> EmbeddingsReply:
    """The raw score of each text as an embedding of one number."""
    scores, by, usage = await _scores_of(backends, body.texts, settings.max_items)
    return EmbeddingsReply(
        model=by.model_id,
        data=[Embedded(index=index, embedding=[score.score]) for index, score in enumerate(scores)],
        usage=usage,
    )


# prime-rl ----------------------------------------------------------------------------------------------------------


class SamplingBody(Lenient):
    """Of vLLM's, what matters to log-probabilities of a prompt."""

    temperature: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False, description="logits are divided by it")
    prompt_logprobs: Literal[0, 1] | None = Field(1, description="of the tokens themselves; 1 is all that there is")


class ReferenceBody(Lenient):
    """prime-rl's: a sequence whose log-probabilities are asked for."""

    model: str | None = Field(None, description="not looked at: there is one")
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=2, examples=[[5, 6, 7]])
    sampling_params: SamplingBody = Field(default_factory=lambda: SamplingBody.model_validate({}))


class TokenLogprob(BaseModel):
    """vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class ReferenceReply(BaseModel):
    """vLLM's, without what would have been generated."""

    request_id: str
    choices: list[JsonValue] = Field(default=[], description="always empty: nothing is generated")
    prompt_logprobs: list[dict[str, TokenLogprob] | None] = Field(
        description="of every token by its id, given those before it; null of the first"
    )


@router.post(
    "/inference/v1/generate", summary="prime-rl: log-probabilities of a sequence", responses=documented(404, 409)
)
async def reference(backends: TheBackends, body: ReferenceBody) -> ReferenceReply:
    """By the reference service. Token ids must be of its tokenizer: nothing here tells whose they are."""
    own = exchange.current()
    found = await backends.logprobs(body.token_ids, body.sampling_params.temperature)
    own.items += 1
    own.tokens += len(body.token_ids)
    after: list[dict[str, TokenLogprob] | None] = [
        {str(token): TokenLogprob(logprob=value)}
        for token, value in zip(body.token_ids[1:], found.logprobs, strict=True)
    ]
    return ReferenceReply(request_id=own.request_id, prompt_logprobs=[None, *after])
