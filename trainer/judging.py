"""A second reward service as the judge of held-out responses: nothing is trained on what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quartet.client import (
    CallPolicy,
    ItemFailure,
    ModelInfo,
    RewardClient,
    ServedBy,
    Truncation,
)
from quartet.fingerprint import tokenizer_fingerprint
from trainer.errors import ServicesError
from trainer.ppo_config import EvaluateSettings, RunSettings
from trainer.rollout import PromptTask, Sample, require_same_judge, score_item
from trainer.service_checks import deadline_explained

# Beyond this share of failed items the rest would be a selection.
_MAX_FAILED = 0.1


class JudgeService:
    """The reward service of --judge. Make it in the event loop that it is used in."""

    def __init__(self, address: str, settings: RunSettings | EvaluateSettings, tokenizer: Any) -> None:
        """
        Args:
            address: of the service.
            settings: credentials, deadlines and what becomes of texts that are too long for it.
            tokenizer: the policy's.
        """
        self._settings = settings
        self._tokenizer = tokenizer
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        policy = CallPolicy(deadline_s=settings.call_deadline_s, patience_s=settings.ready_timeout_s)
        self._client = RewardClient(address, policy=policy, security=settings.security)
        self._info: ModelInfo | None = None

    async def close(self) -> None:
        await self._client.close()

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise RuntimeError("the judge was not connected to")
        return self._info

    @property
    def served_by(self) -> ServedBy:
        """The model that judges, as it was at the start."""
        return self.info.served_by

    async def connect(self) -> None:
        """Waits until it is ready.

        Raises:
            NotReadyError: it did not become ready in time.
        """
        await self._client.wait_ready(self._settings.ready_timeout_s)
        self._info, _ = await self._client.get_model_info()

    async def scores(self, samples: Sequence[Sample], tasks: Sequence[PromptTask]) -> list[float | None]:
        """The score of each sample, None where it could not be scored.

        Raises:
            ServicesError: it can't score more than a tenth of them, serves another model by now, or takes too long.
            QuartetError: it stayed away.
        """
        takes_tokens = self.served_by.tokenizer_fingerprint == self._fingerprint
        items = [
            score_item(tasks[sample.index], sample.response_ids, sample.finished, self._tokenizer, takes_tokens)
            for sample in samples
        ]
        with deadline_explained(self._settings.call_deadline_s):
            reply = await self._client.score(
                items,
                tokenizer_fingerprint=self._fingerprint if takes_tokens else "",
                truncation=Truncation(self._settings.truncation),
            )
        require_same_judge("judge service", reply.served_by, self.served_by)
        failed = [result for result in reply.results if isinstance(result, ItemFailure)]
        if len(failed) > _MAX_FAILED * len(items) or len(items) - len(failed) < 2:
            raise ServicesError(
                f"the judge could not score {len(failed)} of {len(items)} responses: {failed[0].reason}"
            )
        return [None if isinstance(result, ItemFailure) else result.score for result in reply.results]


async def open_judge(settings: RunSettings | EvaluateSettings, tokenizer: Any) -> JudgeService | None:
    """The judge that the settings name, connected; None: they name none."""
    if settings.judge is None:
        return None
    judge = JudgeService(settings.judge, settings, tokenizer)
    try:
        await judge.connect()
    except BaseException:
        await judge.close()
        raise
    return judge
