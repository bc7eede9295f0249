"""Proximal policy optimisation against three services: the loop stands in ``train``, one step in ``Learner.step``.

    rollout      the policy service samples; reward and reference service judge each response as it arrives
    rewards      score on the last token, less beta times KL on every token
    advantages   generalised advantage estimation over the critic's values, or a comparison of samples without one
    update       epochs of clipped losses for policy and critic
    publish      the new weights go to the policy service, when no rollout is under way: see trainer.ahead

Shapes: B sequences of a micro-batch, T response tokens, N samples of a rollout.
Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ziegler et al. 2019, "Fine-Tuning Language
Models from Human Preferences", and its code, openai/lm-human-preferences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quartet import tracing
from quartet.client import QuartetError
from trainer.batching import minibatches
from trainer.checkpoint import StopRequest, latest_checkpoint, stop_on_signal
from trainer.distributed import FirstFailedError, add_up, anywhere, largest, own_micro_batches, total
from trainer.divergence import diverged
from trainer.errors import DivergedError, RolloutError, ServicesError
from trainer.experience import Experience, Padded, check_rollout, make_experience
from trainer.kl import AdaptiveKlController, FixedKlController, kl_loss
from trainer.loop_thread import LoopThread
from trainer.lora import adapter_of
from trainer.losses import policy_loss, value_loss
from trainer.models import TokenLogprobs, padding_id
from trainer.optimisation import apply_gradients, autocast, linear_schedule, make_adamw, set_learning_rate
from trainer.packing import pack
from trainer.ppo_config import PPOSettings
from trainer.ppo_run import PPORun, Trained
from trainer.publishing import Weights
from trainer.reward_services import means_by_name
from trainer.rollout import Rollout
from trainer.saving import export_tensors
from trainer.scaling import settle
from trainer.shaping import Evaluated, Shaping, Targets
from trainer.sharding import finite_everywhere, in_turn
from trainer.tracking import run_tracker

WATCHED = (
    "reward/score_mean",
    "kl/sequence_mean",
    "throughput/generated_tokens_per_s",
    "response/length_mean",
    "response/finished_share",
    "policy/entropy_mean",
    "policy/clip_fraction",
    "value/loss",
    "kl/beta",
)


def main(settings: PPOSettings) -> None:
    """Trains, evaluates before and after, and leaves model, figures and report in the run's folder.

    Raises:
        TrainerError: a setting, a file, a model or a service can't be used; the message says which.
    """
    # Until the run stands there is nothing to save: a signal ends it at once.
    with LoopThread() as loop, PPORun(settings, loop) as run, stop_on_signal() as stop:
        train(run, stop)
        run.finish()


class Learns(Protocol):
    """What learns from rollouts. ``watched``: the figures of a step to show."""

    policy: Any

    @property
    def watched(self) -> Sequence[str]: ...

    @property
    def trained(self) -> Trained: ...

    def step(self, rollout: Rollout, step: int) -> dict[str, float]: ...


def train(run: PPORun[Any], stop: StopRequest, make_learner: Callable[[Any], Learns] | None = None) -> None:
    """The loop: one rollout and its update a step. ``make_learner``: of the run; default: PPO's."""
    settings = run.settings
    learner = (make_learner or Learner)(run)
    run.restore(learner.trained)
    watched, title = learner.watched, settings.title
    with run_tracker(settings.output, settings.steps, watched, title, run.resumed_step, settings=settings) as tracker:
        try:
            publish(run, learner)
            if not anywhere(stop.requested):
                tracker.also(0, run.evaluations.before(run.step))
            saving_s = 0.0
            while run.step < settings.steps and not (anywhere(stop.requested) or run.stop_rule.reason):
                start_s = time.perf_counter() - saving_s
                with tracker.recording() as metrics:  # A step once learned is logged, whatever becomes of the rest.
                    with run.as_step():
                        rollout, waited_s = collect(run)
                        metrics |= learner.step(rollout, run.step)
                        metrics |= run.advance(rollout)  # At once: what is saved after this belongs to the new step.
                        waited_s += run.finish_rollout()
                        publish_s = publish(run, learner)
                    step_s = time.perf_counter() - start_s
                    metrics |= time_metrics(rollout, metrics, waited_s, publish_s, step_s)
                    metrics |= run.evaluations.between(run.step)
                saving_s = run.save_when_due(learner.trained)
            run.save(learner.trained)
            if anywhere(stop.requested) and run.step < settings.steps and not run.stop_rule.reason:
                raise stop.stopped(
                    step=run.step, total_steps=settings.steps, checkpoint=latest_checkpoint(settings.output)
                )
            tracker.also(run.step, run.evaluations.after(run.step))
        except (QuartetError, ServicesError, RolloutError) as error:
            raise run.interrupted(error, learner.trained) from error
        except FirstFailedError as error:
            # It saves what is done, for which it needs the others.
            if error.was(QuartetError, ServicesError, RolloutError):
                run.interrupted(error, learner.trained)
            raise


def collect(run: PPORun[Any]) -> tuple[Rollout, float]:
    """The next rollout, and the seconds it was waited for."""
    start_s = time.perf_counter()
    return run.collect(), time.perf_counter() - start_s


def publish(run: PPORun[Any], learner: Learns) -> float:
    """Brings the trainer's weights, or its adapter alone, to every policy replica; returns the seconds it took."""
    start_s = time.perf_counter()
    adapter = adapter_of(learner.policy)
    run.publish(Weights.of(export_tensors(learner.policy)) if adapter is None else run.adapter_weights(adapter))
    return time.perf_counter() - start_s


class Learner:
    """Policy, critic (where the advantages need one) and what optimises them."""

    def __init__(self, run: PPORun[PPOSettings]) -> None:
        settings = self.settings = run.settings
        self.device = run.device
        self.pad_id = padding_id(run.tokenizer)
        self.policy = run.policy.to(run.device)
        self.critic = None if run.critic is None else run.critic.to(run.device)
        bodies = [self.policy] if self.critic is None else [self.policy, self.critic.body]
        packed = [pack(model, settings.packing, settings.precision) for model in bodies]
        self.packed = all(packed)  # They see the same micro-batches.
        self.logprobs = TokenLogprobs(self.policy)
        for model in (self.policy, self.critic):
            if model is not None:
                settle(model, settings, settings.precision)
        self.shaping = Shaping(settings, run.normalisation)
        self._kept: tuple[list[int], tuple[Tensor, Tensor | None]] | None = None
        self.rates = {"policy": settings.learning_rate}
        self.modules: dict[str, nn.Module] = {"policy": self.policy}
        if self.critic is not None:
            self.rates["critic"], self.modules["critic"] = settings.critic_learning_rate, self.critic
        self.optimisers = {
            name: make_adamw(
                model,
                learning_rate=self.rates[name],
                betas=(settings.adam_beta1, settings.adam_beta2),
                weight_decay=settings.weight_decay,
                eps=settings.adam_eps,
            )
            for name, model in self.modules.items()
        }

    @property
    def kl(self) -> FixedKlController | AdaptiveKlController:
        """The price of KL."""
        return self.shaping.kl

    @property
    def watched(self) -> Sequence[str]:
        """Figures to show."""
        return [name for name in WATCHED if self.settings.has_critic or not name.startswith("value/")]

    @property
    def trained(self) -> Trained:
        """What a checkpoint keeps of it."""
        states = {"kl": self.kl, "score_scale": self.shaping.scale}
        return Trained(modules=self.modules, optimisers=self.optimisers, states=states)

    @tracing.traced("learn")
    def step(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Learns from one rollout and returns the figures of the step, times in seconds among them.

        Args:
            rollout: of the policy as it is now, or was --staleness steps before.
            step: steps done before, for the learning rate and the order of minibatches.

        Raises:
            RolloutError: there is too little to learn from, or a number of a service is none; nothing was learned.
            DivergedError: a log-probability, a value, an advantage, a loss or a gradient of the trainer's own models
                is not finite; names the prompts.
        """
        settings = self.settings
        check_rollout(rollout.samples)
        share = linear_schedule(step, settings.steps, settings.warmup_fraction)
        for name, rate in self.rates.items():
            set_learning_rate(self.optimisers[name], share * rate)
        start_s = time.perf_counter()
        experience = make_experience(rollout.samples, self.device)
        # One minibatch: the first to be learned is the rollout as it is evaluated, of the same weights.
        before = self.evaluate(experience, keep_first=settings.minibatches == 1)
        if not finite_everywhere(before.logprobs_NT, before.values_NT):
            alone = [self.evaluate(make_experience([sample], self.device)) for sample in rollout.samples]
            bad = [row for row, own in enumerate(alone) if not finite_everywhere(own.logprobs_NT, own.values_NT)]
            raise self._diverged(experience, step, "a log-probability or a value is not finite", bad, len(alone))
        forward_s = time.perf_counter() - start_s
        targets, metrics = self.shape(experience, before)
        if not finite_everywhere(targets.advantages_NT, targets.returns_NT):
            bad_N = ~(targets.advantages_NT + targets.returns_NT).isfinite().all(dim=1)
            bad = bad_N.nonzero()[:, 0].tolist()
            raise self._diverged(experience, step, "an advantage or a return is not finite", bad, len(bad_N))
        metrics |= means_by_name([sample.scores for sample in rollout.samples], "reward")
        metrics |= self.update(experience, targets, step)
        metrics["learning_rate"] = share * settings.learning_rate
        metrics["time/forward_s"] = forward_s
        metrics["time/update_s"] = time.perf_counter() - start_s - forward_s
        return metrics

    @tracing.traced("forward")
    def evaluate(self, experience: Experience, *, keep_first: bool = False) -> Evaluated:
        """Log-probabilities, entropies and values of every response token under the present weights.

        Args:
            experience: of the rollout.
            keep_first: whether the policy's pass over the first micro-batch is kept for ``accumulate``, with all that
                its gradient needs: as much memory as learning from it takes anyhow.
        """
        self._kept = None
        grids = [torch.zeros_like(experience.ref_logprobs_NT) for _ in range(3)]
        parts = own_micro_batches(experience.lengths, self.settings.micro_batch_tokens, packed=self.packed)
        for place, (rows, weight) in reversed([*enumerate(parts)]):
            batch = experience.pad(rows, self.pad_id)
            with torch.no_grad(), autocast(self.device, self.settings.precision):
                values_BS = None if self.critic is None else self.critic(batch.ids_BS, batch.mask_BS, batch.before_BS)
            kept = keep_first and place == 0
            with torch.set_grad_enabled(kept):
                logprobs_BS, entropies_BS = self._pass(batch, want_entropy=True)
            if kept:
                self._kept = rows, (logprobs_BS, entropies_BS)
            assert entropies_BS is not None
            width = batch.response_mask_BT.shape[1]
            found = [batch.of_tokens(logprobs_BS.detach()), batch.of_tokens(entropies_BS.detach())]
            found += [] if values_BS is None else [batch.of_states(values_BS)]
            for grid_NT, found_BT in zip(grids, found if weight else (), strict=False):
                grid_NT[rows, :width] = found_BT
        add_up(*grids)  # Of each row one process has written something.
        return Evaluated(logprobs_NT=grids[0], entropies_NT=grids[1], values_NT=grids[2])

    def _pass(self, batch: Padded, *, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(B, S) log-probabilities of the policy, and entropies where they are wanted."""
        with autocast(self.device, self.settings.precision):
            found: tuple[Tensor, Tensor | None] = self.logprobs(
                batch.ids_BS, batch.mask_BS, batch.wanted_BS, self.settings.temperature, want_entropy=want_entropy
            )
        return found

    def shape(self, experience: Experience, before: Evaluated) -> tuple[Targets, dict[str, float]]:
        """``Shaping.targets``: rewards, advantages and returns, and their figures."""
        return self.shaping.targets(experience, before)

    @tracing.traced("update")
    def update(self, experience: Experience, targets: Targets, step: int) -> dict[str, float]:
        """Epochs over the rollout: every sample once an epoch, in minibatches of a fresh permutation each.

        They end before a minibatch at which the policy has gone further than --max-update-kl.
        """
        budget = self.settings.max_update_kl
        measured: list[dict[str, float]] = []
        norms: list[dict[str, float]] = []
        first_ratio = 0.0
        for rows_of_minibatch in self.minibatches(len(experience.sequences), step):
            tokens = float(experience.mask_NT[rows_of_minibatch].sum())
            lengths = [experience.lengths[row] for row in rows_of_minibatch]
            sums: dict[str, float] = {}
            parts = own_micro_batches(lengths, self.settings.micro_batch_tokens, packed=self.packed)
            for part, weight in in_turn(parts, self.settings.gradient_sync, self.policy, self.critic):
                rows = [rows_of_minibatch[index] for index in part]
                figures, ratio = self.accumulate(experience, targets, rows, tokens, weight)
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + value
                if weight and not measured:
                    first_ratio = max(first_ratio, ratio)
            sums = total(sums)
            if odd := [name for name, value in sums.items() if not math.isfinite(value)]:
                bad = [row for row in rows_of_minibatch if not self._is_finite(experience, targets, row, tokens)]
                raise self._diverged(experience, step, f"{odd[0]} is {sums[odd[0]]}", bad, len(rows_of_minibatch))
            measured.append(sums)
            if budget is not None and sums["policy/approx_kl"] > budget:
                for optimiser in self.optimisers.values():
                    optimiser.zero_grad(set_to_none=True)
                break
            try:
                norms.append(
                    {
                        f"{name}/grad_norm": apply_gradients(optimiser, self.settings.max_grad_norm)
                        for name, optimiser in self.optimisers.items()
                    }
                )
            except DivergedError as error:
                bad = [row for row in rows_of_minibatch if not self._is_finite(experience, targets, row, tokens)]
                raise self._diverged(experience, step, str(error), bad, len(rows_of_minibatch)) from error
        return {
            **means(measured),
            **means(norms),
            "policy/first_ratio_max_abs_log": largest(first_ratio),
            "policy/optimiser_steps": len(norms),
            "policy/stopped_early": float(len(norms) < len(measured)),
        }

    def accumulate(
        self, experience: Experience, targets: Targets, rows: list[int], tokens: float, weight: float = 1.0
    ) -> tuple[dict[str, float], float]:
        """Adds the gradients of one micro-batch, scaled by the whole minibatch's tokens, and by its ``weight``.

        Returns:
            Figures that add up over the micro-batches of a minibatch, and the largest absolute log ratio.
        """
        settings = self.settings
        batch = experience.pad(rows, self.pad_id)
        mask_BT = batch.response_mask_BT
        width = mask_BT.shape[1]

        def cut(grid_NT: Tensor) -> Tensor:
            return grid_NT[rows, :width]

        kept, self._kept = self._kept, None
        wants_entropy = settings.entropy_coefficient > 0
        if kept is not None and kept[0] == rows:
            logprobs_BS, entropies_BS = kept[1]
        else:
            logprobs_BS, entropies_BS = self._pass(batch, want_entropy=wants_entropy)
        del kept
        logprobs_BT = batch.of_tokens(logprobs_BS)
        old_logprobs_BT = cut(targets.old_logprobs_NT)
        weights_BT = None if targets.weights is None else cut(targets.weights.weights_BT)
        actor = policy_loss(
            logprobs_BT,
            old_logprobs_BT,
            cut(targets.advantages_NT),
            mask_BT,
            settings.clip_range,
            weights_BT=weights_BT,
            denominator=tokens,
            dual_clip=settings.dual_clip,
        )
        loss = actor.loss
        figures = {
            "policy/loss": float(actor.loss.detach()),
            "policy/clip_fraction": float(actor.clip_fraction),
            "policy/approx_kl": float(actor.approx_kl),
        }
        if settings.kl_placement == "loss":
            paid = kl_loss(
                settings.kl_used,
                logprobs_BT,
                cut(experience.ref_logprobs_NT),
                old_logprobs_BT,
                mask_BT,
                denominator=tokens,
                weights_BT=weights_BT,
                ratio_cap=settings.importance_cap,
            )
            loss = loss + targets.kl_price * paid
            figures["policy/kl_loss"] = float(paid.detach())
        if wants_entropy and entropies_BS is not None:
            entropy = batch.of_tokens(entropies_BS).sum() / tokens
            loss = loss - settings.entropy_coefficient * entropy
            figures["policy/entropy_bonus"] = settings.entropy_coefficient * float(entropy.detach())
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        if self.critic is not None:
            with autocast(self.device, settings.precision):
                values_BS = self.critic(batch.ids_BS, batch.mask_BS, batch.before_BS)
            critic = value_loss(
                batch.of_states(values_BS),
                cut(targets.old_values_NT),
                cut(targets.returns_NT),
                mask_BT,
                settings.value_clip_range,
                denominator=tokens,
            )
            (weight * settings.value_coefficient * critic.loss).backward()  # type: ignore[no-untyped-call]
            figures |= {"value/loss": float(critic.loss.detach()), "value/clip_fraction": float(critic.clip_fraction)}
        figures = {name: weight * value for name, value in figures.items()}
        return figures, float((logprobs_BT.detach() - old_logprobs_BT).abs().max())

    def _is_finite(self, experience: Experience, targets: Targets, row: int, tokens: float) -> bool:
        """Whether losses and gradients of one row by itself are finite."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)
        figures, _ = self.accumulate(experience, targets, [row], tokens)
        gradients = [p.grad for module in self.modules.values() for p in module.parameters() if p.grad is not None]
        return all(map(math.isfinite, figures.values())) and finite_everywhere(*gradients)

    def _diverged(self, experience: Experience, step: int, what: str, rows: list[int], of: int) -> DivergedError:
        """What is not finite after ``step`` steps, in which ``rows`` of so many."""
        names = [experience.where[row] for row in rows]
        return diverged(f"step {step + 1}: {what}", names, of, self.settings.output)

    def minibatches(self, count: int, step: int) -> Iterator[list[int]]:
        """Row indices of every optimiser step."""
        options = self.settings
        return minibatches(count, epochs=options.epochs, parts=options.minibatches, seed=options.seed, step=step)


def means(records: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure; of no records, none."""
    return {name: sum(record[name] for record in records) / len(records) for name in (records or [{}])[0]}


def time_metrics(
    rollout: Rollout, metrics: dict[str, float], waited_s: float, publish_s: float, step_s: float
) -> dict[str, float]:
    """Where the step's time went: what a rollout took while the trainer itself was at work takes none of it.

    ``rpc_s``: what was neither a model's work, here or in a service, nor bookkeeping.
    """
    known_s = waited_s + metrics["time/forward_s"] + metrics["time/update_s"] + publish_s
    service_work_s = max(0.0, rollout.service_work_s - max(0.0, rollout.duration_s - waited_s))
    return {
        "throughput/generated_tokens_per_s": rollout.generated_tokens / rollout.duration_s,
        "time/step_s": step_s,
        "time/rollout_s": waited_s,
        "time/publish_s": publish_s,
        "time/other_s": max(0.0, step_s - known_s),
        "time/service_work_s": service_work_s,
        "time/rpc_s": max(0.0, waited_s - service_work_s) + publish_s,
    }
