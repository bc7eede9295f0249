"""``quartet-reward --check MODEL``: loads, verifies, scores once, and says what it found. Opens no port."""

from __future__ import annotations

import asyncio
import math
import sys
import time

import transformers

from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2
from services.reward.combining import Marks, Member
from services.reward.config import RewardSettings
from services.reward.hosted import HostedReward
from services.reward.loading import load
from services.reward.preparing import Cut, prepare
from services.reward.python_scorer import load_python_scorer
from services.reward.scorer import TransformersScorer
from services.runtime.batcher import ItemError
from services.runtime.errors import StartError
from services.runtime.telemetry import ServiceMetrics

# What is scored once; short enough for every model.
_PROMPT, _RESPONSE = "How are you?", " Fine, thank you."


async def check(settings: RewardSettings) -> int:
    """Prints the report and returns 0.

    Raises:
        StartError, ModelFolderError: what ``settings.check`` names cannot be hosted; the message says why.
    """
    settings = settings.model_copy(update={"model": settings.check, "check": ""})
    transformers.logging.disable_progress_bar()  # The report is what is to be read.
    rule = await asyncio.to_thread(load_python_scorer, settings.scorer) if settings.scorer else None
    hosted = await asyncio.to_thread(load, settings, rule, ServiceMetrics("reward"))
    try:
        lines = [*_described(hosted), ("one text", await asyncio.to_thread(_score_once, hosted))]
    finally:
        await asyncio.to_thread(hosted.close)
        if rule is not None:
            await asyncio.to_thread(rule.close)
    for name, text in lines:
        sys.stdout.write(f"{name:<16} {text}\n" if text else f"{name}\n")
    sys.stdout.write("ok\n")
    return 0


def _described(hosted: HostedReward) -> list[tuple[str, str]]:
    """Names and texts of the report's lines."""
    lines: list[tuple[str, str]] = []
    combination, info = hosted.combination, hosted.model
    for index, scorer in enumerate(hosted.panel.members):
        lines.append((f"model {hosted.member_infos[index].served_by.model_id}", ""))
        if isinstance(scorer, TransformersScorer):
            kind = type(scorer.model).__name__
            lines.append(("  kind", f"{kind}, {scorer.parameters:,} parameters"))
        lines.append(("  normalisation", _normalisation(combination.members[index])))
        lines.append(("  golden", hosted.golden[index]))
    if hosted.panel.members:
        trained = hosted.trained
        told = [f"at most {trained.max_tokens} in training"] if trained.max_tokens else []
        told += [f"truncation {trained.truncation}"] if trained.truncation else []
        lines += [
            ("computed", f"{info.engine}, {info.dtype}"),
            ("tokens", ", ".join([f"at most {info.max_sequence_tokens}", *told])),
            ("end token", _end_token(hosted)),
        ]
        named = ", ".join(f"{head.name} (weight {head.weight:g})" for head in combination.heads)
        lines.append(("heads", named or "one, without a name"))
    if combination.is_ensemble:
        how = "normalised" if combination.members_normalised else "raw"
        price = f", lambda {combination.penalty:g}" if combination.reduction == "uncertainty" else ""
        lines.append(("ensemble", f"{combination.reduction.value} of {how} scores{price}"))
    if hosted.panel.rule is not None:
        added = combination.addends[len(combination.heads) :]
        named = ", ".join(f"{head.name} (weight {head.weight:g})" for head in added)
        lines.append(("scorer", f"{hosted.panel.rule.spec}: {named}"))
    return lines


def _normalisation(member: Member) -> str:
    kept = member.statistics
    found = f"mean {kept.mean:.4g}, std {kept.std:.4g} of {kept.count:,} samples" if kept else "no statistics kept"
    return found if member.temperature == 1.0 else f"{found}; temperature {member.temperature:g}"


def _end_token(hosted: HostedReward) -> str:
    assert hosted.encoding is not None
    if hosted.encoding.end_token_id is None:
        return "none is appended" + (": prompt and response are a pair" if hosted.encoding.pair else "")
    token = hosted.encoding.end_token_id
    text = hosted.tokenizer.convert_ids_to_tokens(token)
    end = hosted.encoding.turn_end_id
    if end is None or end == token:
        return f"{text!r} ({token}) closes finished responses"
    to_messages = hosted.tokenizer.convert_ids_to_tokens(end)
    return f"{text!r} ({token}) closes finished responses to text, {to_messages!r} ({end}) those to messages"


def _score_once(hosted: HostedReward) -> str:
    """
    Raises:
        StartError: the text can't be scored.
    """
    item = reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text=_PROMPT), response_text=_RESPONSE)
    what = f"{_PROMPT!r}, {_RESPONSE!r}"
    start_s = time.perf_counter()
    prepared = prepare(hosted, item, Cut("left", hosted.panel.max_sequence_tokens))
    if isinstance(prepared, str):
        raise StartError(f"{what}: {prepared}")
    (marks,) = hosted.panel.score([prepared.candidate])
    milliseconds = (time.perf_counter() - start_s) * 1000
    if isinstance(marks, ItemError):
        if marks.retryable:
            raise StartError(f"{what}: {marks.reason}")
        # A rule may well have nothing to say of this text.
        return f"{what}: {marks.reason}; {milliseconds:.1f} ms"
    found = _combined(hosted, marks)
    if not math.isfinite(found):
        raise StartError(f"{what}: the model's score is {found}, not a finite number")
    return f"{found:.6g} for {what} ({prepared.count} tokens), {milliseconds:.1f} ms"


def _combined(hosted: HostedReward, marks: Marks) -> float:
    return hosted.combination.combine(marks, hosted.combination.weights({})).score
