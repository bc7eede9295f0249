"""The services behind the gateway, and what they host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Self, TypeVar

from quartet.client import (
    CallPolicy,
    LogProbs,
    ModelInfo,
    PolicyClient,
    ReferenceClient,
    RewardClient,
    RewardInfo,
    ScoreItem,
    Scores,
    TokenSequence,
)
from quartet.client.channel import ServiceClient
from quartet.client.errors import QuartetError
from services.gateway.coalescer import Coalescer, Options
from services.gateway.config import GatewaySettings
from services.gateway.metrics import GatewayMetrics
from services.gateway.problems import ProblemError

Client = TypeVar("Client", bound=ServiceClient)

# What a service hosts changes with a swap, which takes seconds.
_INFO_S = 5.0
_READY_S = 2.0


class Backends:
    """Clients of the services that there are. To be made within the event loop that serves."""

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        """
        Raises:
            CredentialsError: a file of credentials can't be used.
        """
        # The gateway ends what takes longer, by leaving: then the services drop it.
        policy = CallPolicy(deadline_s=settings.deadline_s, patience_s=settings.patience_s)

        def made(kind: type[Client], address: str | None) -> Client | None:
            return None if address is None else kind(address, policy=policy, security=settings.service_security)

        self._reward = made(RewardClient, settings.reward)
        self._policy = made(PolicyClient, settings.policy)
        self._reference = made(ReferenceClient, settings.reference)
        self._reward_info: tuple[float, RewardInfo] | None = None
        self._infos: dict[str, tuple[float, ModelInfo]] = {}
        self.single = Coalescer(self.score, metrics)

    @property
    def reward(self) -> RewardClient:
        """Raises ProblemError: there is none."""
        return _there(self._reward, "reward")

    @property
    def policy(self) -> PolicyClient:
        """Raises ProblemError: there is none."""
        return _there(self._policy, "policy")

    @property
    def reference(self) -> ReferenceClient:
        """Raises ProblemError: there is none."""
        return _there(self._reference, "reference")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for client in self._all:
            await client.close()

    async def score(self, items: Sequence[ScoreItem], options: Options) -> Scores:
        """One call to the reward service."""
        return await self.reward.score(
            items,
            normalise=options.normalise,
            truncation=options.truncation,
            head_weights=dict(options.head_weights) or None,
        )

    async def logprobs(self, token_ids: Sequence[int], temperature: float) -> LogProbs:
        """Of every token but the first, by the reference service, whose own tokenizer is taken for theirs.

        Raises:
            ProblemError: the tokens are refused.
        """
        info = await self.model_info("reference")
        found = await self.reference.logprobs(
            [TokenSequence(token_ids=tuple(token_ids), response_start=1)],
            tokenizer_fingerprint=info.served_by.tokenizer_fingerprint,
            temperature=temperature,
        )
        result = found.results[0]
        if not isinstance(result, LogProbs):
            raise ProblemError.of_item(result, self.reference.name, field="token_ids")
        return result

    async def reward_info(self) -> RewardInfo:
        """What the reward service hosts, or did some seconds ago."""
        now_s = time.monotonic()
        if self._reward_info is None or now_s - self._reward_info[0] > _INFO_S:
            self._reward_info = now_s, await self.reward.get_reward_info()
        return self._reward_info[1]

    async def model_info(self, kind: str) -> ModelInfo:
        """The same of the service of that kind."""
        if kind == "reward":
            return (await self.reward_info()).model
        now_s = time.monotonic()
        if kind not in self._infos or now_s - self._infos[kind][0] > _INFO_S:
            client = self.policy if kind == "policy" else self.reference
            self._infos[kind] = now_s, await client.get_model_info()
        return self._infos[kind][1]

    @property
    def kinds(self) -> list[str]:
        """Of the services that there are."""
        every = {"reward": self._reward, "policy": self._policy, "reference": self._reference}
        return [kind for kind, client in every.items() if client is not None]

    async def away(self) -> dict[str, str]:
        """Services that are not ready now, and why."""
        found: dict[str, str] = {}

        async def ask(client: ServiceClient) -> None:
            try:
                await client.wait_ready(_READY_S)
            except QuartetError as error:
                found[client.name] = error.message

        await asyncio.gather(*map(ask, self._all))
        return found

    @property
    def _all(self) -> list[ServiceClient]:
        return [client for client in (self._reward, self._policy, self._reference) if client is not None]


def _there(client: Client | None, kind: str) -> Client:
    if client is None:
        raise ProblemError(404, f"this gateway has no {kind} service (--{kind})", service=f"{kind} service")
    return client
