"""Online DPO: the policy answers each prompt several times, and learns to prefer its best answer to its worst.

    rollout   the policy service samples; reward and reference service judge each response as it arrives, as for PPO
    pairs     the best and the worst response to each prompt; where all have one score there is none
    update    epochs of DPO's loss on the pairs
    publish   the new weights go to the policy service

The loop is PPO's, ``trainer.ppo.train``, and the loss that of ``trainer.dpo``.

Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"; the best and the worst of several:
Yuan et al. 2024, "Self-Rewarding Language Models".
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from quartet import tracing
from trainer import rewards
from trainer.batching import minibatches
from trainer.checkpoint import stop_on_signal
from trainer.divergence import diverged
from trainer.dpo import DpoTrainer, Pair
from trainer.encoding import EncodedResponse
from trainer.errors import DivergedError, RolloutError
from trainer.experience import check_rollout, make_experience
from trainer.loop_thread import LoopThread
from trainer.online_dpo_config import OnlineDpoSettings
from trainer.optimisation import apply_gradients, linear_schedule, make_adamw, set_learning_rate
from trainer.ppo import means, train
from trainer.ppo_run import PPORun, Trained
from trainer.reward_services import means_by_name
from trainer.rollout import Rollout, Sample
from trainer.scaling import settle
from trainer.shaping import penalised, score_metrics
from trainer.sharding import finite_everywhere

WATCHED = (
    "reward/score_mean",
    "kl/sequence_mean",
    "throughput/generated_tokens_per_s",
    "response/length_mean",
    "loss",
    "accuracy",
    "pairs/tied_share",
)


def main(settings: OnlineDpoSettings) -> None:
    """Trains, evaluates before and after, and leaves model, figures and report in the run's folder.

    Raises:
        TrainerError: a setting, a file, a model or a service can't be used; the message says which.
    """
    with LoopThread() as loop, PPORun(settings, loop) as run, stop_on_signal() as stop:
        train(run, stop, OnlineDpoLearner)
        run.finish()


class Ties:
    """Counts the steps in a row, up to the last, that taught nothing."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is not one of ties.
        """
        try:
            self.steps = int(state["steps"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the saved number of tied steps can't be read: {error}") from error


class OnlineDpoLearner:
    """The policy and what optimises it."""

    watched: Sequence[str] = WATCHED

    def __init__(self, run: PPORun[OnlineDpoSettings]) -> None:
        settings = self.settings = run.settings
        self.device = run.device
        self.policy = run.policy.to(run.device)
        self.normalisation = run.normalisation
        self.dpo = DpoTrainer(self.policy, run.tokenizer, settings, None, settings.temperature)
        settle(self.policy, settings, settings.precision)
        self.ties = Ties()
        self.optimiser = make_adamw(
            self.policy,
            learning_rate=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            eps=settings.adam_eps,
        )

    @property
    def trained(self) -> Trained:
        """What a checkpoint keeps of it."""
        return Trained(
            modules={"policy": self.policy}, optimisers={"policy": self.optimiser}, states={"ties": self.ties}
        )

    @tracing.traced("learn")
    def step(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Learns from one rollout and returns the figures of the step, times in seconds among them.

        KL is the sampled one of the policy that sampled, to the reference; ``rollout/logprob_difference`` is how far
        the engine's log-probabilities of whole answers are from the trainer's, in nats, on the first minibatch.

        Args:
            rollout: of the policy as it is now, or was --staleness steps before.
            step: steps done before, for the learning rate and the order of minibatches.

        Raises:
            RolloutError: there is too little to learn from, or a number of a service is none, or every prompt has been
                tied for --max-tied-steps in a row; nothing was learned.
            DivergedError: a loss or a gradient is not finite; names the prompts.
        """
        settings, samples = self.settings, rollout.samples
        check_rollout(samples)
        rate = settings.learning_rate * linear_schedule(step, settings.steps, settings.warmup_fraction)
        set_learning_rate(self.optimiser, rate)
        start_s = time.perf_counter()
        experience = make_experience(samples, self.device)
        scores_N = experience.scores_N
        if self.normalisation is not None:
            scores_N = rewards.normalise(scores_N, self.normalisation.mean, self.normalisation.std)
        scores = penalised(scores_N, experience, settings).tolist()
        prompts = [sample.index // settings.samples_per_prompt for sample in samples]
        places, tied, alone = best_and_worst(prompts, scores)
        self._count_ties(tied, len(places), step)
        gains = [sum(sample.logprobs) - sum(sample.ref_logprobs) for sample in samples]
        metrics = {
            **score_metrics(experience),
            **means_by_name([sample.scores for sample in samples], "reward"),
            "reward/final_mean": float(np.mean(scores)),
            "kl/sequence_mean": float(np.mean(gains)),
            "pairs/count": len(places),
            "pairs/tied": tied,
            "pairs/alone": alone,
            "pairs/tied_share": tied / (tied + len(places)) if tied else 0.0,
        }
        if places:
            metrics["pairs/score_difference_mean"] = float(np.mean([scores[b] - scores[w] for b, w in places]))
            metrics |= self.update([(samples[best], samples[worst]) for best, worst in places], step)
        metrics |= {"learning_rate": rate, "time/forward_s": 0.0, "time/update_s": time.perf_counter() - start_s}
        return metrics

    @tracing.traced("update")
    def update(self, sampled: Sequence[tuple[Sample, Sample]], step: int) -> dict[str, float]:
        """Epochs over the pairs, in minibatches of a fresh permutation each."""
        settings = self.settings
        pairs = [make_pair(best, worst) for best, worst in sampled]
        measured: list[dict[str, float]] = []
        apart = 0.0
        for rows in minibatches(
            len(pairs), epochs=settings.epochs, parts=settings.minibatches, seed=settings.seed, step=step
        ):
            figures = self.dpo.accumulate([pairs[row] for row in rows])
            if not math.isfinite(figures["loss"]):
                raise self._diverged(f"the loss is {figures['loss']}", sampled, pairs, rows, step)
            del figures["tokens"]
            if not measured:
                engine = np.mean([[sum(sample.logprobs) for sample in sampled[row]] for row in rows], axis=0)
                trainer = np.array([figures["chosen_logprob_mean"], figures["rejected_logprob_mean"]])
                apart = float(np.abs(engine - trainer).max())
            try:
                figures["policy/grad_norm"] = apply_gradients(self.optimiser, settings.max_grad_norm)
            except DivergedError as error:
                raise self._diverged(str(error), sampled, pairs, rows, step) from error
            measured.append(figures)
        return means(measured) | {"rollout/logprob_difference": apart, "policy/optimiser_steps": len(measured)}

    def _diverged(
        self, what: str, sampled: Sequence[tuple[Sample, Sample]], pairs: Sequence[Pair], rows: Sequence[int], step: int
    ) -> DivergedError:
        """The error that says ``what`` of a minibatch of ``rows`` is not finite, and in which of its pairs."""
        bad = []
        for row in rows:
            self.policy.zero_grad(set_to_none=True)
            loss = self.dpo.accumulate([pairs[row]])["loss"]
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            if not (math.isfinite(loss) and finite_everywhere(*gradients)):
                bad.append(sampled[row][0].where or f"sample {sampled[row][0].index + 1} of the rollout")
        return diverged(f"step {step + 1}: {what}", bad, len(rows), self.settings.output)

    def _count_ties(self, tied: int, pairs: int, step: int) -> None:
        if pairs:
            self.ties.steps = 0
            return
        what = (
            f"step {step + 1} teaches nothing: to each of its prompts all responses have one score "
            f"({tied} are tied, the others have no two responses left)"
        )
        if self.ties.steps + 1 >= self.settings.max_tied_steps:
            raise RolloutError(
                f"{what}; that is {self.ties.steps + 1} steps in a row, --max-tied-steps is "
                f"{self.settings.max_tied_steps}: see whether the reward tells answers apart, raise "
                "--samples-per-prompt or --temperature, or begin with a model whose answers differ"
            )
        self.ties.steps += 1
        sys.stderr.write(f"warning: {what}\n")


def best_and_worst(prompts: Sequence[int], scores: Sequence[float]) -> tuple[list[tuple[int, int]], int, int]:
    """Places of the best and the worst response to each prompt, the first ones of those that are equal.

    Args:
        prompts: of each response, which prompt it is to.
        scores: of each response.

    Returns:
        The pairs in the order of the prompts; prompts whose responses all have one score; prompts with one response.
    """
    members: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(place)
    pairs: list[tuple[int, int]] = []
    tied = alone = 0
    for places in members.values():
        best = max(places, key=scores.__getitem__)
        worst = min(places, key=scores.__getitem__)
        if len(places) == 1:
            alone += 1
        elif scores[best] == scores[worst]:
            tied += 1
        else:
            pairs.append((best, worst))
    return pairs, tied, alone


def make_pair(best: Sample, worst: Sample) -> Pair:
    """Both responses with what the reference service said of them."""

    def encoded(sample: Sample) -> EncodedResponse:
        ids = np.array((*sample.prompt_ids, *sample.response_ids), dtype=np.int32)
        return EncodedResponse(ids=ids, prompt_tokens=len(sample.prompt_ids), truncated=False)

    return Pair(
        chosen=encoded(best),
        rejected=encoded(worst),
        reference_chosen=sum(best.ref_logprobs),
        reference_rejected=sum(worst.ref_logprobs),
    )
