"""How good a policy is on held-out prompts: reward, KL, length, diversity; and ``quartet-train evaluate``."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quartet.model_folder import find_model
from trainer.data import PromptRow, load_prompts
from trainer.encoding import Encoder
from trainer.errors import DataError, OutputError, ServicesError
from trainer.experience import require_finite
from trainer.files import replace_file, require_folder
from trainer.judging import JudgeService, open_judge
from trainer.models import load_tokenizer
from trainer.monitor_alarms import crossings
from trainer.monitors import (
    correlation,
    distinct_n,
    quantile,
    repeated_share,
    self_bleu,
    unique_share,
    within_correlation,
)
from trainer.ppo_config import EvaluateSettings, SamplingSettings
from trainer.rollout import PromptTask, Rollout, ServiceInfo, Services, prompt_seed
from trainer.statistics import Interval, mean_interval_of_groups

# Beyond this share of failed samples the rest would be a selection, not an evaluation.
_MAX_FAILED = 0.1
# Self-BLEU grows with the number of responses, so it is always of as many.
_SELF_BLEU_RESPONSES = 128


@dataclass(frozen=True, kw_only=True)
class EvaluatedSample:
    """One answer, that to the task of place ``index``.

    ``kl`` is log pi - log ref summed over its tokens, at tokens sampled from pi: nats. ``length`` in tokens; ``judge``:
    the score of --judge; ``spread`` of an ensemble's members.
    """

    index: int
    prompt: str
    response: str
    score: float
    kl: float
    finished: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    """Raw, by name, where there are several reward services."""
    length: int = 0
    judge: float | None = None
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """What a policy's own distributions say: of each sample the exact KL and the entropy, summed over its tokens, nats.

    ``kl`` None: the reference is not here. ``demonstration_perplexity`` None: there are no demonstrations.
    """

    kl: tuple[float, ...] | None
    entropy: tuple[float, ...]
    demonstration_perplexity: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over ``n`` answers; ``..._ci95`` are half widths of 95 % intervals, which are over prompts.

    ``kl_sequence_mean`` is sampled, ``kl_exact_mean`` over the whole vocabulary. ``entropy_mean``, nats a token, is
    exact where the policy's weights are here, else the mean of -log pi at sampled tokens. ``..._since_best``: changes,
    paired by prompt, since the evaluation of ``best_step``, which the judge liked best. None: not known here.
    """

    n: int
    failed: int
    weights_version: int
    score_mean: float
    score_ci95: float
    score_std: float
    kl_sequence_mean: float
    kl_ci95: float
    length_mean: float
    finished_share: float
    distinct_2: float
    unique_share: float
    tokens_per_s: float
    prompts: int | None = None
    kl_exact_mean: float | None = None
    kl_exact_ci95: float | None = None
    entropy_mean: float | None = None
    length_p05: float | None = None
    length_p50: float | None = None
    length_p95: float | None = None
    length_correlation: float | None = None
    length_correlation_within: float | None = None
    distinct_1: float | None = None
    distinct_3: float | None = None
    self_bleu_4: float | None = None
    repeated_4_share: float | None = None
    spread_mean: float | None = None
    judge_mean: float | None = None
    judge_ci95: float | None = None
    demonstration_perplexity: float | None = None
    best_step: int | None = None
    judge_since_best: float | None = None
    judge_since_best_ci95: float | None = None
    score_since_best: float | None = None
    score_since_best_ci95: float | None = None
    samples: tuple[EvaluatedSample, ...]

    @property
    def score(self) -> Interval:
        return Interval(
            value=self.score_mean,
            low=self.score_mean - self.score_ci95,
            high=self.score_mean + self.score_ci95,
            count=self.n,
        )

    def figures(self) -> dict[str, float]:
        """Those that are known, by name; not the samples, and not which weights they are of."""
        named = [of.name for of in fields(self) if of.name not in ("samples", "weights_version")]
        return {name: value for name in named if (value := getattr(self, name)) is not None}

    def line(self) -> str:
        """The figures a person wants first."""
        judged = "" if self.judge_mean is None else f"judge {self.judge_mean:.3f} +- {self.judge_ci95:.3f}  "
        return (
            f"reward {self.score_mean:.3f} +- {self.score_ci95:.3f}  {judged}KL {self.kl_sequence_mean:.2f} +- "
            f"{self.kl_ci95:.2f} nats  length {self.length_mean:.1f} tokens  finished {self.finished_share:.0%}"
        )

    def write(self, path: Path) -> None:
        replace_file(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """
        Raises:
            OutputError: the file is not an evaluation.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["samples"] = tuple(EvaluatedSample(**sample) for sample in content["samples"])
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{path} is not an evaluation: {error}") from error


def different_prompts(rows: Sequence[PromptRow], at_most: int) -> list[PromptRow]:
    """The first ``at_most`` different prompts; says how many repeat another one, which would count twice."""
    first = {row.group_key: row for row in reversed(rows)}
    different = [row for row in rows if first[row.group_key] is row]
    if repeated := len(rows) - len(different):
        sys.stderr.write(f"{repeated} of the {len(rows)} held-out prompts repeat another one and are left out\n")
    return different[:at_most]


def make_tasks(rows: Sequence[PromptRow], encoder: Encoder, *, seed: int, samples: int = 1) -> list[PromptTask]:
    """``samples`` tasks a held-out prompt. Seeds depend on seed and place alone, so two evaluations are paired.

    Raises:
        DataError: a prompt is too long, or there are fewer than 2.
    """
    if len(rows) < 2:
        raise DataError(f"there are {len(rows)} held-out prompts: an interval needs at least 2")
    return [
        PromptTask(
            prompt=row.prompt,
            ids=tuple(int(token) for token in ids),
            seed=prompt_seed(seed, "evaluation", 0, index, sample),
            where=row.where,
        )
        for index, (row, ids) in enumerate(zip(rows, encoder.prompts(rows), strict=True))
        for sample in range(samples)
    ]


async def evaluate(
    services: Services,
    tasks: Sequence[PromptTask],
    sampling: SamplingSettings,
    tokenizer: Any,
    *,
    judge: JudgeService | None = None,
) -> Evaluation:
    """Samples, scores and describes one answer a task with the weights that the policy service has.

    Raises:
        ServicesError: more than a tenth of the samples failed.
        RolloutError: a number that a service gave is not finite.
        QuartetError: a service stayed away.
    """
    rollout, judged = await ask(services, tasks, sampling, judge=judge)
    return summarise(rollout, tokenizer, judged=judged)


async def ask(
    services: Services,
    tasks: Sequence[PromptTask],
    sampling: SamplingSettings,
    *,
    judge: JudgeService | None = None,
) -> tuple[Rollout, Sequence[float | None] | None]:
    """One answer a task, scored, and what the judge says of each, where there is one.

    Raises:
        ServicesError, QuartetError: as ``evaluate``.
    """
    rollout = await services.collect(tasks, sampling)
    if len(rollout.failures) > _MAX_FAILED * len(tasks) or len(rollout.samples) < 2:
        raise ServicesError(
            f"{len(rollout.failures)} of {len(tasks)} samples of the evaluation failed, the first one because: "
            f"{rollout.failures[0]}"
        )
    require_finite(rollout.samples)
    return rollout, None if judge is None else await judge.scores(rollout.samples, tasks)


def summarise(
    rollout: Rollout,
    tokenizer: Any,
    *,
    judged: Sequence[float | None] | None = None,
    policy: PolicyFigures | None = None,
) -> Evaluation:
    """The figures of a rollout, its intervals over prompts.

    Args:
        rollout: what the services made of the held-out prompts.
        tokenizer: the policy's.
        judged: the judge's score of each sample; None: there is no judge.
        policy: what the policy's own distributions say; None: its weights are not here.
    """
    samples = rollout.samples
    responses = [sample.response_ids for sample in samples]
    lengths = [float(len(response)) for response in responses]
    scores = [sample.score for sample in samples]
    spreads = [sample.spread for sample in samples if sample.spread is not None]
    prompts = [sample.prompt_ids for sample in samples]
    kls = [math.fsum(sample.logprobs) - math.fsum(sample.ref_logprobs) for sample in samples]
    score = mean_interval_of_groups(scores, prompts)
    exact = None if policy is None or policy.kl is None else mean_interval_of_groups(policy.kl, prompts)
    judgements: list[float | None] = [None] * len(samples) if judged is None else list(judged)
    judge = _mean_of_known(judgements, prompts)
    surprises = [-math.fsum(sample.logprobs) for sample in samples]
    kl = mean_interval_of_groups(kls, prompts)
    deviation = math.sqrt(sum((sample.score - score.value) ** 2 for sample in samples) / (len(samples) - 1))
    return Evaluation(
        n=len(samples),
        failed=len(rollout.failures),
        weights_version=rollout.weights_version,
        score_mean=score.value,
        score_ci95=(score.high - score.low) / 2,
        score_std=deviation,
        kl_sequence_mean=kl.value,
        kl_ci95=(kl.high - kl.low) / 2,
        length_mean=rollout.generated_tokens / len(samples),
        finished_share=sum(sample.finished for sample in samples) / len(samples),
        distinct_1=distinct_n(responses, 1),
        distinct_2=distinct_n(responses, 2),
        distinct_3=distinct_n(responses, 3),
        unique_share=unique_share(responses),
        prompts=len(set(prompts)),
        kl_exact_mean=None if exact is None else exact.value,
        kl_exact_ci95=None if exact is None else (exact.high - exact.low) / 2,
        entropy_mean=math.fsum(surprises if policy is None else policy.entropy) / rollout.generated_tokens,
        length_p05=quantile(lengths, 0.05),
        length_p50=quantile(lengths, 0.5),
        length_p95=quantile(lengths, 0.95),
        length_correlation=correlation(scores, lengths),
        length_correlation_within=within_correlation(scores, lengths, prompts),
        self_bleu_4=self_bleu(responses[:_SELF_BLEU_RESPONSES]),
        repeated_4_share=repeated_share(responses),
        spread_mean=math.fsum(spreads) / len(spreads) if spreads else None,
        judge_mean=None if judge is None else judge.value,
        judge_ci95=None if judge is None else (judge.high - judge.low) / 2,
        demonstration_perplexity=None if policy is None else policy.demonstration_perplexity,
        tokens_per_s=rollout.generated_tokens / rollout.duration_s,
        samples=tuple(
            EvaluatedSample(
                index=sample.index,
                prompt=tokenizer.decode(sample.prompt_ids),
                response=tokenizer.decode(sample.response_ids, skip_special_tokens=True),
                score=sample.score,
                kl=kl_nats,
                finished=sample.finished,
                scores=dict(sample.scores),
                length=len(sample.response_ids),
                judge=judgement,
                spread=sample.spread,
            )
            for sample, kl_nats, judgement in zip(samples, kls, judgements, strict=True)
        ),
    )


def _mean_of_known(values: Sequence[float | None], groups: Sequence[Hashable]) -> Interval | None:
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value is not None]
    if len(known) < 2:
        return None
    return mean_interval_of_groups([value for value, _ in known], [group for _, group in known])


def difference(before: Evaluation, after: Evaluation) -> Interval:
    """Mean difference of the scores, after less before, paired by prompt; a sample that failed in one is left out.

    Raises:
        DataError: they have fewer than 2 prompts in common.
    """
    earlier = {(sample.index, sample.prompt): sample.score for sample in before.samples}
    later = {(sample.index, sample.prompt): sample.score for sample in after.samples}
    both = [place for place in later if place in earlier]
    changes = [later[place] - earlier[place] for place in both]
    if len(changes) < 2:
        raise DataError(f"the two evaluations have {len(changes)} prompts in common: at least 2 are needed to compare")
    return mean_interval_of_groups(changes, [prompt for _, prompt in both])


def longest_prompt(info: ServiceInfo, max_new_tokens: int, *own_limits: int) -> int:
    """Most tokens a prompt may have so that prompt and response fit every model that sees them.

    Raises:
        DataError: the response alone does not fit.
    """
    limits = [info.policy.max_sequence_tokens, info.reference.max_sequence_tokens, *own_limits]
    limits += info.reward_token_limits
    longest = min(limits) - max_new_tokens
    if longest < 1:
        raise DataError(
            f"--max-new-tokens is {max_new_tokens}, and the models take {min(limits)} tokens of prompt and response: "
            "it leaves no room for a prompt"
        )
    return longest


def main(settings: EvaluateSettings) -> None:
    """Evaluates what the policy service serves; prints the figures and writes them."""
    require_folder("the folder of --output", settings.output.parent)
    if settings.output.is_dir():
        raise OutputError(f"--output is {str(settings.output)!r}: it is a folder; name a file")
    tokenizer = load_tokenizer(find_model(settings.model))
    rows = different_prompts(load_prompts(settings.prompts), settings.max_prompts)

    async def run() -> Evaluation:
        async with Services(settings, tokenizer) as services:
            info = await services.connect()
            limit = longest_prompt(info, settings.max_new_tokens)
            encoder = Encoder(
                tokenizer,
                max_tokens=limit,
                truncation=settings.truncation,
                advice=f"lower --max-new-tokens {settings.max_new_tokens}, or choose --truncation left",
            )
            tasks = make_tasks(rows, encoder, seed=settings.seed, samples=settings.samples_per_prompt)
            judge = await open_judge(settings, tokenizer)
            try:
                return await evaluate(services, tasks, settings, tokenizer, judge=judge)
            finally:
                if judge is not None:
                    await judge.close()

    evaluation = asyncio.run(run())
    evaluation.write(settings.output)
    sys.stdout.write(f"weights version {evaluation.weights_version}: {evaluation.line()}\n")
    if settings.against is not None:
        before = Evaluation.read(settings.against)
        for found in crossings(evaluation.figures(), before.figures(), settings):
            sys.stderr.write(f"alarm: {found.text('in this evaluation')}\n")
        change = difference(before, evaluation)
        sys.stdout.write(f"against {settings.against}: reward {change} more, paired by prompt\n")
    sys.stdout.write(f"{settings.output}: figures and samples\n")
