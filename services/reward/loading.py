"""From settings to what is hosted: models loaded, compared with each other and with what was kept with them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from quartet.common.v1 import common_pb2
from quartet.model_folder import find_model
from services.reward.combining import Combination, Head, Member, Reduction
from services.reward.config import RewardSettings
from services.reward.drift import Baseline
from services.reward.hosted import HostedReward, LoadedReward, Trained
from services.reward.metadata import RewardMetadata, ensemble_members, read_reward_metadata
from services.reward.panel import Panel
from services.reward.python_scorer import PythonScorer
from services.runtime.batcher import Batcher
from services.runtime.errors import StartError
from services.runtime.telemetry import ServiceMetrics

if TYPE_CHECKING:
    from services.hosting.model import Hosting
    from services.reward.scorer import Encoding, TransformersScorer

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Model:
    """One loaded reward model."""

    name: str
    metadata: RewardMetadata
    scorer: TransformersScorer
    tokenizer: Any
    encoding: Encoding
    info: common_pb2.ModelInfo

    @property
    def trained(self) -> Trained:
        return Trained(truncation=self.metadata.truncation, max_tokens=self.metadata.max_tokens)


def load(
    settings: RewardSettings,
    rule: PythonScorer | None,
    metrics: ServiceMetrics,
    on_death: Callable[[str], None] = lambda reason: None,
) -> HostedReward:
    """Loads and checks the models that ``settings`` name, and scores once to warm each up.

    Args:
        rule: what ``settings.scorer`` names. Not closed with the model, for the next one goes on with it.
        on_death: of its Batcher.

    Raises:
        StartError, ModelFolderError: it cannot be hosted; the message says why.
    """
    models = _load_models(settings) if settings.model else []
    for model in models[1:]:
        _require_alike(models[0], model)
    combination = _combination(settings, models, rule)
    heads = [head.name for head in combination.heads]
    panel = Panel([model.scorer for model in models], rule, heads=heads, alone=settings.deterministic)
    first = models[0] if models else None
    loaded = LoadedReward(
        panel=panel,
        encoding=first.encoding if first is not None else None,
        tokenizer=first.tokenizer if first is not None else None,
        model=_describe(settings, models, rule, combination),
        combination=combination,
        trained=first.trained if first is not None and len({model.trained for model in models}) == 1 else Trained(),
        member_infos=tuple(model.info for model in models),
        baseline=_baseline(models, rule),
    )
    loaded = replace(loaded, golden=tuple(_check_golden(settings, loaded, model) for model in models))
    if models:
        from services.hosting.memory import watch_gpu

        watch_gpu(metrics, panel.device)
    # Last: it has a thread, and the metrics look at it from now on.
    limits = settings.batch_limits(panel.device, padded=panel.padded)
    return HostedReward(**vars(loaded), batcher=Batcher(panel, limits=limits, metrics=metrics, on_death=on_death))


def _load_models(settings: RewardSettings) -> list[_Model]:
    """The one model, or the members of the ensemble."""
    names = ensemble_members(settings.model) or (settings.model,)
    # All folders before the first of them is loaded, so that what is wrong is said at once.
    folders = [find_model(name, revision=settings.revision, with_code=settings.trust_remote_code) for name in names]
    metadata = [read_reward_metadata(folder) for folder in folders]
    with_statistics = [kept.statistics is not None for kept in metadata]
    if any(with_statistics) and not all(with_statistics):
        lacking = names[with_statistics.index(False)]
        raise StartError(
            f"ensemble {settings.model!r}: {lacking!r} has no normalisation statistics and others have: their scores "
            "would lie on different scales; calibrate all of them or none"
        )
    import torch

    from services.hosting.model import choose_hosting

    if settings.threads:
        torch.set_num_threads(settings.threads)
    hosting = choose_hosting(settings)
    return [
        _load_model(settings, name, folder, kept, hosting)
        for name, folder, kept in zip(names, folders, metadata, strict=True)
    ]


def _load_model(
    settings: RewardSettings, name: str, folder: Path, metadata: RewardMetadata, hosting: Hosting
) -> _Model:
    from services.hosting import model as hosting_model
    from services.hosting.warm_up import warm_up
    from services.reward.scorer import ScorerItem, TransformersScorer

    tokenizer = hosting_model.load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    scorer = TransformersScorer(folder, hosting=hosting, tokenizer=tokenizer, heads=metadata.heads)
    encoding = scorer.encoding(folder, tokenizer)
    warm_up(
        lambda sequences: scorer.score([ScorerItem(ids) for ids in sequences]),
        device=scorer.device,
        limits=settings.batch_limits(scorer.device, padded=scorer.padded),
        longest=scorer.max_sequence_tokens,
        vocabulary=scorer.vocab_size,
        together=1 if settings.deterministic else 2,  # Two responses to compare are one pass.
    )
    return _Model(
        name=name,
        metadata=metadata,
        scorer=scorer,
        tokenizer=tokenizer,
        encoding=encoding,
        info=hosting_model.describe(
            model_id=name,
            folder=folder,
            engine=hosting.engine,
            dtype=hosting.dtype_name,
            tokenizer=tokenizer,
            max_sequence_tokens=scorer.max_sequence_tokens,
            vocab_size=scorer.vocab_size,
            eos_token_ids=hosting_model.end_tokens(folder, scorer.model.config, tokenizer),
            deterministic=settings.deterministic,
        ),
    )


def _require_alike(first: _Model, other: _Model) -> None:
    """
    Raises:
        StartError: the two cannot be members of one ensemble.
    """
    of_both = {
        "tokenizer": [model.info.served_by.tokenizer_fingerprint[:12] for model in (first, other)],
        "chat template": [model.tokenizer.chat_template for model in (first, other)],
        "encoding (append_eos)": [model.encoding for model in (first, other)],
        "heads": [[(head.name, head.weight) for head in model.metadata.heads] for model in (first, other)],
    }
    for what, (one, another) in of_both.items():
        if one != another:
            raise StartError(
                f"{first.name!r} and {other.name!r} cannot be members of one ensemble: they differ in {what}, "
                f"{one!r} and {another!r}; all members must see the same tokens and have the same heads"
            )


def _combination(settings: RewardSettings, models: Sequence[_Model], rule: PythonScorer | None) -> Combination:
    heads = models[0].metadata.heads if models else ()
    members = tuple(
        Member(statistics=model.metadata.statistics, temperature=model.metadata.temperature) for model in models
    )
    declared = rule.declared if rule is not None else ()
    if rule is not None:
        rule.require_other_names(head.name for head in heads)
    return Combination(
        heads=heads,
        members=members,
        rule=tuple(Head(name=head.name, weight=head.weight * settings.scorer_weight) for head in declared),
        rule_name=rule.name if rule is not None and not declared else None,
        rule_weight=settings.scorer_weight,
        reduction=Reduction(settings.ensemble_reduction),
        penalty=settings.ensemble_lambda,
    )


def _baseline(models: Sequence[_Model], rule: PythonScorer | None) -> Baseline | str:
    """Scores of held-out texts: those kept with the model, where what serves scores as it was trained."""
    if len(models) != 1 or rule is not None or models[0].metadata.heads:
        return "scores are compared with a baseline where one model of one head scores alone"
    return models[0].metadata.baseline


def _describe(
    settings: RewardSettings, models: Sequence[_Model], rule: PythonScorer | None, combination: Combination
) -> common_pb2.ModelInfo:
    """What answers, as one: of an ensemble what holds for all members."""
    scoring = _scoring_fingerprint(models, rule, combination)
    if not models:
        assert rule is not None
        served_by = common_pb2.ServedBy(
            model_id=rule.spec, weights_fingerprint=rule.fingerprint, scoring_fingerprint=scoring
        )
        return common_pb2.ModelInfo(served_by=served_by, engine="python", deterministic=settings.deterministic)
    info = common_pb2.ModelInfo()
    info.CopyFrom(models[0].info)
    info.served_by.model_id = settings.model
    info.served_by.scoring_fingerprint = scoring
    info.vocab_size = min(model.info.vocab_size for model in models)
    info.max_sequence_tokens = min(model.info.max_sequence_tokens for model in models)
    if len(models) > 1:
        of_members = "\n".join(model.info.served_by.weights_fingerprint for model in models)
        info.served_by.weights_fingerprint = hashlib.sha256(of_members.encode()).hexdigest()
    if rule is not None:
        info.engine += " and python"
    return info


def _scoring_fingerprint(models: Sequence[_Model], rule: PythonScorer | None, combination: Combination) -> str:
    """Of everything that decides a raw score: two services that tell the same one score alike."""
    first = models[0] if models else None
    decides = {
        "weights": [model.info.served_by.weights_fingerprint for model in models],
        "tokenizer": first.info.served_by.tokenizer_fingerprint if first else "",
        "chat template": first.tokenizer.chat_template if first else None,
        "encoding": [e.pair, e.end_token_id, e.opening, e.turn_end_id] if first and (e := first.encoding) else None,
        "rule": rule.fingerprint if rule else "",
        "addends": [[head.name, head.weight] for head in combination.addends],
    }
    if combination.is_ensemble:  # Members with statistics are normalised before they are combined.
        scales = [member.statistics for member in combination.members]
        decides["ensemble"] = [
            combination.reduction,
            combination.penalty,
            [scale and [scale.mean, scale.std] for scale in scales],
        ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _check_golden(settings: RewardSettings, loaded: LoadedReward, model: _Model) -> str:
    """What came of it, for people."""
    golden = model.metadata.golden
    if golden is None:
        log.info("golden_items_missing", model=model.name)
        return "none kept with the model"
    if settings.golden_check == "off":
        log.warning("golden_check_skipped", model=model.name, items=len(golden.items))
        return f"{len(golden.items)} items, not checked (--golden-check off)"
    from services.reward.golden import check_golden

    start_s = time.monotonic()
    report = check_golden(
        loaded,
        model.scorer,
        golden,
        name=model.name,
        trained=model.trained,
        weights=loaded.combination.weights({}),
        dtype=model.info.dtype,
    )
    seconds = round(time.monotonic() - start_s, 3)
    log.info("golden_checked", model=model.name, items=report.items, worst_stds=report.worst, seconds=seconds)
    return f"{report.items} items as in training, within {report.worst:.1e} standard deviations of the scores"
