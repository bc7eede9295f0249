"""Our own routes: scores, rankings, and what is hosted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from quartet.client import ItemFailure, ModelInfo, RewardInfo, Score, ScoreItem, ServedBy, Truncation
from services.gateway import scoring
from services.gateway.access import TheBackends, TheSettings, needs, require_at_most
from services.gateway.backends import Backends
from services.gateway.coalescer import Options
from services.gateway.keys import Scope
from services.gateway.problems import ProblemError, documented

router = APIRouter(prefix="/v1")

# Whatever is larger is refused by its field's name, and not by what Python makes of it.
Weight = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Strict(BaseModel):
    """A body in which every field is known: nothing that a caller asks for is dropped unread."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(Strict):
    """One turn of a conversation."""

    role: str = Field(min_length=1, max_length=64, examples=["user"], description="as the model's template knows it")
    content: str = Field(examples=["How do I reset my password?"], description="text of the turn")


def _form(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "tagged-text"
    return "tagged-turns" if isinstance(prompt, list) else None


Prompt = Annotated[
    Annotated[str, Tag("tagged-text")]
    | Annotated[list[Turn], Field(min_length=1, max_length=1024), Tag("tagged-turns")],
    Discriminator(_form, custom_error_type="prompt", custom_error_message="must be text, or a list of turns"),
    Field(description="text, or the turns of a conversation, which the model's chat template renders"),
]


def prompt_of(prompt: str | list[Turn]) -> str | list[dict[str, str]]:
    """As the clients take it."""
    return prompt if isinstance(prompt, str) else [{"role": turn.role, "content": turn.content} for turn in prompt]


class Item(Strict):
    """A response to score."""

    prompt: Prompt
    response: str = Field(description="what is scored")
    finished: bool = Field(True, description="it ended by itself: the end token is appended, as in training")

    def item(self) -> ScoreItem:
        return ScoreItem(prompt=prompt_of(self.prompt), response=self.response, finished=self.finished)


class ScoringOptions(Strict):
    """How to score."""

    truncation: Truncation = Field(Truncation.REFUSE, description="of what is longer than the model takes")
    head_weights: dict[str, Weight] = Field(
        {}, max_length=64, description="weights of heads by name, in place of the model's own"
    )

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        return tuple(sorted(self.head_weights.items()))


class ScoreOptions(ScoringOptions):
    """How to score, and in which unit."""

    normalise: bool = Field(False, description="also (score - mean) / std, with the statistics kept with the model")

    def options(self) -> Options:
        return Options(normalise=self.normalise, truncation=self.truncation, head_weights=self.weights)


class ScoreOne(Item, ScoreOptions):
    """One response."""


class ScoreMany(ScoreOptions):
    """Several responses."""

    items: list[Item] = Field(min_length=1, description="what to score; at most --max-items")


def _one_or_many(body: Any) -> str:
    return "many" if isinstance(body, ScoreMany) or (isinstance(body, Mapping) and "items" in body) else "one"


ScoreBody = Annotated[
    Annotated[ScoreOne, Tag("tagged-one")] | Annotated[ScoreMany, Tag("tagged-many")],
    Discriminator(lambda body: f"tagged-{_one_or_many(body)}"),
]


class Scored(BaseModel):
    """A score."""

    score: float = Field(description="raw: what the model says, of several heads their weighted sum")
    normalised_score: float | None = Field(None, description="where it was asked for")
    heads: dict[str, float] = Field({}, description="of each named head")
    spread: float | None = Field(None, description="standard deviation of the scores of an ensemble's members")
    member_scores: list[float] = Field([], description="of an ensemble's members")
    tokens: int = Field(description="scored, prompt and response")
    truncated: bool = Field(description="whether some were dropped")

    @classmethod
    def of(cls, score: Score) -> Scored:
        return cls(
            score=score.score,
            normalised_score=score.normalised_score,
            heads=dict(score.attributes),
            spread=score.spread,
            member_scores=list(score.member_scores),
            tokens=score.token_count,
            truncated=score.truncated,
        )


class Failed(BaseModel):
    """An item without a score."""

    error: str = Field(description="why: field, value and bound")
    retryable: bool = Field(description="whether the same item may succeed later")


class Served(BaseModel):
    """Who answered."""

    model: str = Field(description="the model's name")
    weights_version: int = Field(description="rises with every new set of weights")
    fingerprint: str = Field(description="of all that decides a score: results of two that differ can't be compared")

    @classmethod
    def served(cls, by: ServedBy) -> dict[str, Any]:
        return {"model": by.model_id, "weights_version": by.weights_version, "fingerprint": by.result_fingerprint}


class OneScore(Scored, Served):
    """The answer to one response."""


class ManyScores(Served):
    """The answer to several, in their order."""

    results: list[Scored | Failed]


_SCORE_EXAMPLES: Any = {
    "one": {
        "summary": "one response",
        "value": {"prompt": "How do I reset my password?", "response": "Open settings and choose reset."},
    },
    "chat": {
        "summary": "a conversation",
        "value": {"prompt": [{"role": "user", "content": "hello"}], "response": "Hello! How can I help?"},
    },
    "many": {
        "summary": "several at once",
        "value": {
            "items": [
                {"prompt": "hello", "response": "Hello!"},
                {"prompt": "hello", "response": "Go away."},
            ]
        },
    },
}


@router.post(
    "/score",
    summary="Score one response, or several",
    responses=documented(404, 409),
    dependencies=[needs(Scope.SCORE)],
    response_model_exclude_none=True,
)
async def score(
    backends: TheBackends, settings: TheSettings, body: Annotated[ScoreBody, Body(openapi_examples=_SCORE_EXAMPLES)]
) -> OneScore | ManyScores:
    """Of one response its score. Of several, in ``items``, a result each: a score, or why there is none."""
    if isinstance(body, ScoreOne):
        (found,), served_by = await scoring.require_scores(backends, [body.item()], body.options(), ["response"])
        return OneScore(**Scored.of(found).model_dump(), **Served.served(served_by))
    require_at_most(len(body.items), settings.max_items, "items")
    many = await scoring.score(backends, [item.item() for item in body.items], body.options())
    results = [
        Failed(error=result.reason, retryable=result.retryable)
        if isinstance(result, ItemFailure)
        else Scored.of(result)
        for result in many.results
    ]
    return ManyScores(results=results, **Served.served(many.served_by))


class RankBody(ScoringOptions):
    """Responses to one prompt."""

    prompt: Prompt
    responses: list[str] = Field(
        min_length=1, description="candidates; at most --max-candidates", examples=[["Hello!", "Go away.", "Hi."]]
    )
    finished: list[bool] | None = Field(None, description="of each, whether it ended by itself; default: all did")

    @model_validator(mode="after")
    def _as_many(self) -> RankBody:
        if self.finished is not None and len(self.finished) != len(self.responses):
            raise ValueError(
                f"finished has {len(self.finished)} entries, responses {len(self.responses)}: give as many"
            )
        return self


class Candidate(Scored):
    """A response in the ranking."""

    index: int = Field(description="its place in the request")
    preferred_to_next: float | None = Field(
        None, description="probability that it is preferred to the one after it; none of the last"
    )


class Ranking(Served):
    """Candidates, best first."""

    best: int = Field(description="place of the best in the request")
    ranking: list[Candidate]
    preferences: list[list[float]] = Field(
        description="probability that the response of the row is preferred to that of the column"
    )


@router.post(
    "/rank",
    summary="Rank responses to one prompt",
    responses=documented(404, 409),
    dependencies=[needs(Scope.SCORE)],
    response_model_exclude_none=True,
)
async def rank(backends: TheBackends, settings: TheSettings, body: RankBody) -> Ranking:
    """Best first, with scores and how likely people prefer one to another. Fails where one can't be scored."""
    require_at_most(len(body.responses), settings.max_candidates, "responses")
    finished = body.finished or [True] * len(body.responses)
    options = Options(truncation=body.truncation, head_weights=body.weights)
    found = await scoring.rank(backends, prompt_of(body.prompt), body.responses, finished, options)
    following = dict(zip(found.order, found.order[1:], strict=False))
    return Ranking(
        best=found.order[0],
        ranking=[
            Candidate(
                index=index,
                preferred_to_next=found.preferred[index][following[index]] if index in following else None,
                **Scored.of(found.scores[index]).model_dump(),
            )
            for index in found.order
        ],
        preferences=[list(row) for row in found.preferred],
        **Served.served(found.served_by),
    )


class Model(BaseModel):
    """A hosted model, in OpenAI's shape and with what we know of it."""

    id: str = Field(description="its name")
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="always 0")
    owned_by: Literal["quartet"] = "quartet"
    kind: str = Field(description="of the service that hosts it: reward, policy or reference")
    weights_version: int
    engine: str
    dtype: str
    max_sequence_tokens: int = Field(description="prompt and response together; 0 where there is no bound")
    heads: dict[str, float] | None = Field(None, description="of a reward model: weights of its named heads")
    ensemble: int | None = Field(None, description="of a reward model: how many members it has")
    normalises: bool | None = Field(None, description="of a reward model: whether normalised scores can be asked for")

    @classmethod
    def of(cls, kind: str, info: ModelInfo, reward: RewardInfo | None) -> Model:
        by = info.served_by
        members = () if reward is None or reward.ensemble is None else reward.ensemble.members
        return cls(
            id=by.model_id,
            kind=kind,
            weights_version=by.weights_version,
            engine=info.engine,
            dtype=info.dtype,
            max_sequence_tokens=info.max_sequence_tokens,
            heads=None if reward is None else {head.name: head.weight for head in reward.heads},
            ensemble=len(members) or None,
            normalises=None
            if reward is None
            else reward.normalisation is not None or any(member.normalisation for member in members),
        )


class Models(BaseModel):
    """What is hosted."""

    object: Literal["list"] = "list"
    data: list[Model]


async def _models(backends: Backends) -> list[Model]:
    return [
        Model.of(kind, await backends.model_info(kind), await backends.reward_info() if kind == "reward" else None)
        for kind in backends.kinds
    ]


@router.get(
    "/models",
    summary="What is hosted",
    responses=documented(),
    dependencies=[needs(Scope.SCORE, Scope.GENERATE)],
    response_model_exclude_none=True,
)
async def models(backends: TheBackends) -> Models:
    """One of each service behind this gateway."""
    return Models(data=await _models(backends))


@router.get(
    "/models/{name:path}",
    summary="One of them",
    responses=documented(404),
    dependencies=[needs(Scope.SCORE, Scope.GENERATE)],
    response_model_exclude_none=True,
)
async def model(backends: TheBackends, name: str) -> Model:
    """By its name."""
    found = await _models(backends)
    for one in found:
        if one.id == name:
            return one
    raise ProblemError(404, f"no model {name[:200]!r} is hosted here: there are {', '.join(one.id for one in found)}")
