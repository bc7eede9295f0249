"""Typed asyncio clients of the quartet services.

async with RewardClient("127.0.0.1:50052") as reward:
    scores = await reward.score([ScoreItem(prompt="How are you?", response="Fine, thanks.")])
"""

from quartet.client.adapters import AdapterClient, AdapterConfig, AdapterInfo, AdapterLoad, Adapters
from quartet.client.channel import CallPolicy, request_ids
from quartet.client.errors import (
    AlreadyExistsError,
    CredentialsError,
    DamagedError,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PreconditionError,
    QuartetError,
    ServiceFailedError,
    UnavailableError,
)
from quartet.client.policy import (
    Completion,
    FailedCompletion,
    FinishReason,
    InFlightPolicy,
    PolicyClient,
    Sampling,
    TokenDelta,
    WeightsClient,
    WeightsUpdate,
    WireTensor,
)
from quartet.client.reference import LogProbs, LogProbsBatch, ReferenceClient, TokenSequence
from quartet.client.reward import (
    Comparison,
    ComparisonItem,
    Comparisons,
    Normalisation,
    RewardClient,
    RewardInfo,
    Score,
    ScoreItem,
    Scores,
    Truncation,
)
from quartet.client.reward_admin import DriftReport, ModelSwap, RewardAdminClient, ScoreDrift, ScoreWindow
from quartet.client.security import Security
from quartet.client.types import ItemFailure, ModelInfo, ServedBy, WorkInterval

__all__ = [
    "AdapterClient",
    "AdapterConfig",
    "AdapterInfo",
    "AdapterLoad",
    "Adapters",
    "AlreadyExistsError",
    "CallPolicy",
    "Comparison",
    "ComparisonItem",
    "Comparisons",
    "Completion",
    "CredentialsError",
    "DamagedError",
    "DeadlineError",
    "DriftReport",
    "FailedCompletion",
    "FinishReason",
    "InFlightPolicy",
    "InvalidInputError",
    "ItemFailure",
    "LogProbs",
    "LogProbsBatch",
    "ModelInfo",
    "ModelSwap",
    "Normalisation",
    "NotFoundError",
    "NotReadyError",
    "OverloadedError",
    "PolicyClient",
    "PreconditionError",
    "QuartetError",
    "ReferenceClient",
    "RewardAdminClient",
    "RewardClient",
    "RewardInfo",
    "Sampling",
    "Score",
    "ScoreDrift",
    "ScoreItem",
    "ScoreWindow",
    "Scores",
    "Security",
    "ServedBy",
    "ServiceFailedError",
    "TokenDelta",
    "TokenSequence",
    "Truncation",
    "UnavailableError",
    "WeightsClient",
    "WeightsUpdate",
    "WireTensor",
    "WorkInterval",
    "request_ids",
]
