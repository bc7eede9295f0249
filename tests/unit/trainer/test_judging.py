"""What the judge is asked, and what becomes of its answers; the service itself is in the integration tests."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from quartet.client import ItemFailure, ScoreItem, ServedBy, Truncation
from quartet.client.reward import Score
from quartet.fingerprint import tokenizer_fingerprint
from trainer.errors import ServicesError
from trainer.judging import JudgeService, open_judge
from trainer.ppo_config import EvaluateSettings
from trainer.rollout import PromptTask, Sample


def settings(**changes: Any) -> EvaluateSettings:
    return EvaluateSettings(model="m", prompts=("p",), output="e.json", **changes)


class Client:
    """Scores the n-th item n, fails those of ``failing``."""

    def __init__(self, served_by: ServedBy, failing: tuple[int, ...] = ()) -> None:
        self.served_by, self.failing = served_by, failing
        self.items: list[ScoreItem] = []
        self.asked: dict[str, Any] = {}

    async def wait_ready(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...

    async def get_model_info(self) -> tuple[Any, None]:
        return SimpleNamespace(served_by=self.served_by), None

    async def score(self, items: list[ScoreItem], **asked: Any) -> Any:
        self.items, self.asked = items, asked
        results = [
            ItemFailure(reason="too long", retryable=False)
            if index in self.failing
            else Score(score=float(index), normalised_score=None, token_count=3, truncated=False)
            for index in range(len(items))
        ]
        return SimpleNamespace(results=tuple(results), served_by=self.served_by)


def samples_and_tasks(tokenizer: Any, count: int) -> tuple[list[Sample], list[PromptTask]]:
    end = tokenizer.eos_token_id
    tasks, samples = [], []
    for index in range(count):
        prompt, response = f"hello {index}", tokenizer(" thanks", add_special_tokens=False).input_ids
        ids = tuple(tokenizer(prompt, add_special_tokens=False).input_ids)
        finished = index % 2 == 0
        tasks.append(PromptTask(prompt=prompt, ids=ids, seed=index))
        samples.append(
            Sample(
                index=index,
                prompt_ids=ids,
                response_ids=(*response, end) if finished else tuple(response),
                logprobs=(),
                ref_logprobs=(),
                score=0.0,
                finished=finished,
            )
        )
    return samples, tasks


async def judge_of(tokenizer: Any, reads: str, failing: tuple[int, ...] = (), **changes: Any) -> Any:
    served_by = ServedBy(model_id="gold", weights_version=0, weights_fingerprint="g", tokenizer_fingerprint=reads)
    judge = JudgeService("127.0.0.1:1", settings(**changes), tokenizer)
    await judge._client.close()
    client = Client(served_by, failing)
    judge._client = client  # type: ignore[assignment]
    await judge.connect()
    return judge, client


async def test_it_is_asked_with_token_ids_where_it_reads_them_and_with_text_elsewhere(tokenizer):
    samples, tasks = samples_and_tasks(tokenizer, 4)
    own = tokenizer_fingerprint(tokenizer)
    judge, client = await judge_of(tokenizer, own)
    assert await judge.scores(samples[1:], tasks) == [0.0, 1.0, 2.0]
    asked = [ScoreItem(prompt=t.ids, response=s.response_ids) for s, t in zip(samples, tasks, strict=True)]
    assert client.items == asked[1:]
    assert (client.asked["tokenizer_fingerprint"], client.asked["truncation"]) == (own, Truncation.REFUSE)
    judge, client = await judge_of(tokenizer, "another", truncation="left")
    await judge.scores(samples, tasks)
    assert client.items == [
        ScoreItem(prompt=f"hello {index}", response=" thanks", finished=index % 2 == 0) for index in range(4)
    ]
    assert (client.asked["tokenizer_fingerprint"], client.asked["truncation"]) == ("", Truncation.LEFT)


async def test_what_it_can_not_score_is_none_and_too_much_of_it_stops_the_evaluation(tokenizer):
    samples, tasks = samples_and_tasks(tokenizer, 20)
    judge, _ = await judge_of(tokenizer, "another", failing=(3, 7))
    scores = await judge.scores(samples, tasks)
    assert [index for index, score in enumerate(scores) if score is None] == [3, 7]
    judge, _ = await judge_of(tokenizer, "another", failing=(3, 7, 9))
    with pytest.raises(ServicesError, match="the judge could not score 3 of 20 responses: too long"):
        await judge.scores(samples, tasks)


async def test_another_model_in_its_place_is_refused(tokenizer):
    samples, tasks = samples_and_tasks(tokenizer, 2)
    judge, client = await judge_of(tokenizer, "another")
    client.served_by = replace(client.served_by, weights_fingerprint="h")
    with pytest.raises(ServicesError, match="the judge service now serves 'gold'"):
        await judge.scores(samples, tasks)


async def test_without_an_address_there_is_none(tokenizer):
    assert await open_judge(settings(), tokenizer) is None
