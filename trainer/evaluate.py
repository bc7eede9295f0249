"""How good a policy is on held-out prompts: reward, KL, length, diversity; and ``quartet-train evaluate``."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quartet.model_folder import find_model
from trainer.data import PromptRow, load_prompts
from trainer.encoding import Encoder
from trainer.errors import DataError, OutputError, ServicesError
from trainer.files import replace_file, require_folder
from trainer.models import load_tokenizer
from trainer.ppo_config import EvaluateSettings, SamplingSettings
from trainer.rollout import PromptTask, Rollout, ServiceInfo, Services, prompt_seed
from trainer.statistics import Interval, mean_interval_of_groups

# Beyond this share of failed samples the rest would be a selection, not an evaluation.
_MAX_FAILED = 0.1


@dataclass(frozen=True, kw_only=True)
class EvaluatedSample:
    """One answer to the prompt of place ``index``.

    ``kl`` is log pi - log ref summed over its tokens, at tokens sampled from pi: nats.
    """

    index: int
    prompt: str
    response: str
    score: float
    kl: float
    finished: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    """Raw, by name, where there are several reward services."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over ``n`` prompts, one answer each; ``..._ci95`` are half widths of 95 % intervals."""

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
    samples: tuple[EvaluatedSample, ...]

    @property
    def score(self) -> Interval:
        return Interval(
            value=self.score_mean,
            low=self.score_mean - self.score_ci95,
            high=self.score_mean + self.score_ci95,
            count=self.n,
        )

    def line(self) -> str:
        """The figures a person wants first."""
        return (
            f"reward {self.score_mean:.3f} +- {self.score_ci95:.3f}  KL {self.kl_sequence_mean:.2f} +- "
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


def make_tasks(rows: Sequence[PromptRow], encoder: Encoder, *, seed: int) -> list[PromptTask]:
    """One task a held-out prompt. Seeds depend on seed and place alone, so two evaluations are paired.

    Raises:
        DataError: a prompt is too long, or there are fewer than 2.
    """
    if len(rows) < 2:
        raise DataError(f"there are {len(rows)} held-out prompts: an interval needs at least 2")
    return [
        PromptTask(
            prompt=row.prompt, ids=tuple(int(token) for token in ids), seed=prompt_seed(seed, "evaluation", 0, index, 0)
        )
        for index, (row, ids) in enumerate(zip(rows, encoder.prompts(rows), strict=True))
    ]


async def evaluate(
    services: Services, tasks: Sequence[PromptTask], sampling: SamplingSettings, tokenizer: Any
) -> Evaluation:
    """Samples, scores and describes one answer a task with the weights that the policy service has.

    Raises:
        ServicesError: more than a tenth of the samples failed.
        QuartetError: a service stayed away.
    """
    rollout = await services.collect(tasks, sampling)
    if len(rollout.failures) > _MAX_FAILED * len(tasks) or len(rollout.samples) < 2:
        raise ServicesError(
            f"{len(rollout.failures)} of {len(tasks)} samples of the evaluation failed, the first one because: "
            f"{rollout.failures[0]}"
        )
    return summarise(rollout, tokenizer)


def summarise(rollout: Rollout, tokenizer: Any) -> Evaluation:
    """The figures of a rollout, its intervals over prompts."""
    samples = rollout.samples
    prompts = [sample.prompt_ids for sample in samples]
    kls = [math.fsum(sample.logprobs) - math.fsum(sample.ref_logprobs) for sample in samples]
    score = mean_interval_of_groups([sample.score for sample in samples], prompts)
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
        distinct_2=distinct_n([sample.response_ids for sample in samples], 2),
        unique_share=len({sample.response_ids for sample in samples}) / len(samples),
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
            )
            for sample, kl_nats in zip(samples, kls, strict=True)
        ),
    )


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams as a share of all, over all responses together; 1 where none is long enough.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    grams = [tuple(response[i : i + n]) for response in responses for i in range(len(response) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


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
            return await evaluate(services, make_tasks(rows, encoder, seed=settings.seed), settings, tokenizer)

    evaluation = asyncio.run(run())
    evaluation.write(settings.output)
    sys.stdout.write(f"weights version {evaluation.weights_version}: {evaluation.line()}\n")
    if settings.against is not None:
        change = difference(Evaluation.read(settings.against), evaluation)
        sys.stdout.write(f"against {settings.against}: reward {change} more, paired by prompt\n")
    sys.stdout.write(f"{settings.output}: figures and samples\n")
