"""Settings of PPO and of evaluation against the services. Nothing here imports torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from quartet.client.channel import split_addresses, target_of
from quartet.settings import (
    AdamBeta,
    Finite,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    UnitFloat,
)
from trainer.config import PACKING, Packing
from trainer.kl_placement import KlEstimator, check_kl_placement
from trainer.monitor_settings import AlarmSettings, JudgeSettings, MonitorSettings
from trainer.scale_config import FREE, ScaleSettings
from trainer.service_credentials import Address, AdminCredentials, ServiceCredentials
from trainer.track_settings import TrackSettings

# Response tokens of a rollout: of fewer, mean and variance would be noise.
LEAST_TOKENS = 8

ClipRange = Annotated[PositiveFloat, Field(lt=1)]


def _named(value: str) -> str:
    name, found, address = value.partition("=")
    if not found or not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name):
        raise ValueError("must be NAME=host:port, with a name of letters, digits, _, . and -")
    if name in ("score", "final"):
        raise ValueError(f"the name {name} is that of the sum in the logs: choose another")
    target_of(address)  # ValueError: it is none.
    return value


NamedAddress = Annotated[str, AfterValidator(_named)]


class ServiceAddresses(ServiceCredentials):
    """Where the services are, and how long to wait for them.

    An address is ``host:port``, several ``ip:port`` with commas between, or any gRPC URI.
    """

    policy: Address = Field("127.0.0.1:50051", description="policy service: host:port, or ip:port,ip:port,...")
    reward: Address = Field("127.0.0.1:50052", description="reward service, likewise")
    rewards: tuple[NamedAddress, ...] = Field(
        (),
        description="several reward services in place of --reward: NAME=host:port each; a sample's score is their "
        "weighted sum, and the name stands in logs",
    )
    reward_weights: tuple[Finite, ...] = Field(
        (), description="of --rewards, in their order; default 1 each. 0: it is logged and not trained on"
    )
    normalise_reward: Literal["auto", "on", "off"] = Field(
        "auto",
        description="by the mean and std kept with the reward model; auto: where it has them. Evaluation shows the "
        "scores of a single service raw",
    )
    reference: Address = Field("127.0.0.1:50053", description="reference service, likewise")
    ready_timeout_s: PositiveFloat = Field(300.0, description="how long a service may take to be ready, seconds")
    call_deadline_s: PositiveFloat = Field(600.0, description="longest that one call may take, seconds")
    otlp_endpoint: str | None = Field(
        None,
        description="collector that traces are sent to, OTLP over gRPC (http://127.0.0.1:4317); default "
        "OTEL_EXPORTER_OTLP_ENDPOINT, and no traces without it. Needs the extra otel",
    )

    @property
    def addresses_of_rewards(self) -> dict[str, str]:
        """Address of each reward service by its name; of a single one, the name is empty."""
        return dict(named.split("=", 1) for named in self.rewards) if self.rewards else {"": self.reward}

    @property
    def weights_of_rewards(self) -> dict[str, float]:
        """Weight of each reward service by its name, 1 unless it was given."""
        names = self.addresses_of_rewards
        return dict(zip(names, self.reward_weights or [1.0] * len(names), strict=True))

    @model_validator(mode="after")
    def _rewards_fit_together(self) -> Self:
        names = [named.split("=", 1)[0] for named in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"--rewards names {', '.join(names)}: each service needs a name of its own")
        if self.reward_weights and len(self.reward_weights) != len(names):
            raise ValueError(
                f"--reward-weights has {len(self.reward_weights)} and --rewards {len(names)}: one weight a service"
            )
        if self.reward_weights and not any(self.reward_weights):
            raise ValueError("--reward-weights are all 0: there would be nothing to learn from")
        return self


class SamplingSettings(Settings):
    """How responses are sampled."""

    max_new_tokens: PositiveInt = Field(64, description="longest response in tokens")
    temperature: PositiveFloat = Field(1.0, description="divides the logits in sampling, reference and update alike")
    stop_token_ids: tuple[NonNegativeInt, ...] = Field(
        (), description="tokens that end a response beside the model's own end tokens"
    )
    truncation: Literal["refuse", "left"] = Field(
        "refuse", description="of prompts that leave no room for a response: refuse them or cut their beginning"
    )


# Settings of how a run is reached, recorded and watched.
_UNDECISIVE = {*AdminCredentials.model_fields, *TrackSettings.model_fields, *MonitorSettings.model_fields, *FREE}


class RunSettings(AdminCredentials, ServiceAddresses, SamplingSettings, TrackSettings, MonitorSettings, ScaleSettings):
    """A run that learns from what its policy samples, against the policy, reward and reference services."""

    title: ClassVar[str]

    policy_admin: tuple[Address, ...] = Field(
        ("127.0.0.1:50061",), description="weight updates: the admin address of every policy replica", min_length=1
    )
    model: str = Field(description="policy to start from (the SFT model): a Hugging Face folder or hub id")
    prompts: tuple[str, ...] = Field(
        description="files (.jsonl, .json, .parquet) or hub names (name:split)", min_length=1
    )
    eval_prompts: tuple[str, ...] = Field(
        (), description="held-out prompts, as prompts; without it some of prompts are set apart"
    )
    held_out_fraction: Annotated[UnitFloat, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the prompts that is set apart where no --eval-prompts are named"
    )
    max_eval_prompts: PositiveInt = Field(
        256, description="held-out prompts evaluated on: the first so many different ones"
    )
    eval_samples: PositiveInt = Field(
        1, description="responses to each; 2 or more also tell the correlation of reward and length within prompts"
    )
    output: Path = Field(description="folder of the run: model, checkpoints, metrics.jsonl, evaluations, report.html")

    steps: PositiveInt = Field(100, description="rollouts, each followed by its epochs of updates")
    prompts_per_step: PositiveInt = Field(64, description="prompts of one rollout")
    samples_per_prompt: PositiveInt = Field(1, description="responses sampled to each prompt")
    staleness: NonNegativeInt = Field(
        0,
        description="by how many steps rollouts are ahead of training: they are sampled while earlier ones are learned "
        "from, with weights of so many steps before; 0: one waits for the other, and every sample is the policy's own",
    )
    top_p: Annotated[UnitFloat, Field(gt=0)] = Field(1.0, description="nucleus; other than 1 needs the flag below")
    top_k: NonNegativeInt = Field(0, description="candidates; other than 0 (all) needs the flag below")
    allow_restricted_sampling: bool = Field(
        False, description="train on top-p or top-k samples, whose log-probabilities the trainer cannot reproduce"
    )

    minibatches: PositiveInt = Field(1, description="optimiser steps an epoch")
    micro_batch_tokens: PositiveInt = Field(
        16384, description="tokens at once on the device; padding, where there is any, included"
    )
    packing: Packing = Field("auto", description=PACKING)
    learning_rate: PositiveFloat = Field(3e-6, description="of the policy at the start; falls linearly to 0")
    warmup_fraction: UnitFloat = Field(0.0, description="share of the steps over which the learning rates rise")
    adam_beta1: AdamBeta = Field(0.9, description="Adam's decay of the mean gradient")
    adam_beta2: AdamBeta = Field(0.95, description="Adam's decay of the mean squared gradient; OpenRLHF's")
    adam_eps: PositiveFloat = Field(1e-5, description="Adam's epsilon; LMHP's")
    weight_decay: NonNegativeFloat = Field(0.0, description="of matrices alone")
    max_grad_norm: PositiveFloat = Field(1.0, description="each model's gradient is scaled down to this norm")
    length_penalty: NonNegativeFloat = Field(
        0.0, description="taken off the score for each response token beyond the next; in scores as used"
    )
    length_penalty_after: NonNegativeInt = Field(0, description="response tokens that cost nothing")
    missing_eos: Literal["none", "subtract", "replace"] = Field(
        "subtract", description="what happens to the score of a response that did not end by itself"
    )
    missing_eos_value: Finite = Field(1.0, description="by how much it falls, or what replaces it; in scores as used")
    max_failed_fraction: UnitFloat = Field(
        0.1,
        description="share of a rollout's samples that may fail (they are dropped and counted) before the run stops",
    )

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products; weights stay float32. auto: bfloat16 on a GPU"
    )
    seed: Seed = Field(0, description="of sampling, the order of prompts and minibatches, and new weights")
    eval_every: NonNegativeInt = Field(0, description="steps between evaluations; 0: before and after alone")
    keep_best: bool = Field(
        True, description="with --eval-every: the model of the best evaluation so far is kept in OUTPUT/best-STEP"
    )
    gold: str = Field(
        "",
        description="name of one of --rewards: it decides which evaluation is the best and when to stop. Best one that "
        "is not trained on (weight 0); default: the score trained on",
    )
    stop_when_worse: bool = Field(
        False,
        description="stop when gold is below its best evaluation (upper 95 % bound of the paired bootstrap below 0) "
        "twice in a row while the score trained on is above it",
    )
    stop_above_kl: PositiveFloat | None = Field(
        None, description="stop when an evaluation's KL to the reference is above so many nats a response"
    )
    stop_below_unique: Annotated[UnitFloat, Field(gt=0)] | None = Field(
        None, description="stop when a smaller share of an evaluation's responses is unique; usual: .9"
    )
    save_every: NonNegativeInt = Field(
        10, description="steps between checkpoints; 0: when stopped and at the end alone"
    )
    keep_checkpoints: PositiveInt = Field(2, description="how many of the newest checkpoints stay")
    resume: bool = Field(
        False, description="go on from the newest checkpoint in OUTPUT; from the start if none is there"
    )

    @property
    def stage(self) -> str:
        """What made the model, in its lineage."""
        return self.command.rpartition(" ")[2]

    @property
    def batch_size(self) -> int:
        """Responses of one rollout."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def may_stop(self) -> bool:
        """Whether evaluations may end the run before its last step."""
        return self.stop_when_worse or self.stop_above_kl is not None or self.stop_below_unique is not None

    @property
    def decisive(self) -> dict[str, object]:
        """The settings that decide the result: a resumed run must have the same."""
        free = {
            "output", "save_every", "keep_checkpoints", "resume", "policy", "policy_admin", "reward", "rewards",
            "reference", "ready_timeout_s", "call_deadline_s", "max_failed_fraction", "otlp_endpoint", "keep_best",
        }  # fmt: skip
        if not self.may_stop:
            free |= {"eval_every", "gold"}
        decisive = self.model_dump(mode="json", exclude=free | _UNDECISIVE)
        return decisive | {"reward_weights": self.weights_of_rewards}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.top_p != 1 or self.top_k != 0) and not self.allow_restricted_sampling:
            raise ValueError(
                f"--top-p is {self.top_p:g} and --top-k {self.top_k}: training samples from the whole distribution "
                "(top-p 1, top-k 0), because the update recomputes log-probabilities of that one; "
                "--allow-restricted-sampling overrides this"
            )
        if self.batch_size < 2:
            raise ValueError("--prompts-per-step is 1 and --samples-per-prompt 1: a rollout needs at least 2 responses")
        if self.batch_size * self.max_new_tokens < LEAST_TOKENS:
            raise ValueError(
                f"--prompts-per-step is {self.prompts_per_step}, --samples-per-prompt {self.samples_per_prompt} and "
                f"--max-new-tokens {self.max_new_tokens}: together at most {self.batch_size * self.max_new_tokens} "
                f"response tokens, a rollout needs at least {LEAST_TOKENS}"
            )
        if len(self.policy_admin) < (replicas := len(split_addresses(self.policy))):
            raise ValueError(
                f"--policy names {replicas} replicas and --policy-admin {len(self.policy_admin)}: every replica needs "
                "its admin address, or it would go on with the weights that it was started with"
            )
        if self.lora_dropout:
            raise ValueError(
                f"--lora-dropout is {self.lora_dropout:g}: {self.title} runs without any dropout, or the probability "
                "of what was sampled would be another one at every look; leave it at 0"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"--minibatches is {self.minibatches}, a rollout has {self.batch_size} responses: at most as many"
            )
        if self.gold and self.gold not in self.addresses_of_rewards:
            raise ValueError(f"--gold is {self.gold!r}: --rewards has no such name")
        if self.may_stop and not self.eval_every:
            raise ValueError("--eval-every is 0: evaluations between steps decide when to stop, so say how often")
        if self.length_penalty_after and not self.length_penalty:
            raise ValueError(f"--length-penalty-after is {self.length_penalty_after} without --length-penalty")
        if self.missing_eos == "subtract" and self.missing_eos_value < 0:
            raise ValueError(f"--missing-eos-value is {self.missing_eos_value:g}: subtracted, it must be at least 0")
        return self


class PPOSettings(RunSettings):
    """Trains a policy by PPO against the policy, reward and reference services."""

    command: ClassVar[str] = "quartet-train ppo"
    title: ClassVar[str] = "PPO"

    critic: str = Field(
        "reward",
        description="where the critic starts: reward (the model that the reward service, or the first of --rewards, "
        "hosts), policy, or a folder or hub id of a reward model",
    )
    critic_head: Literal["zero", "normal", "reward"] = Field("zero", description="the value head's first weights")

    epochs: PositiveInt = Field(4, description="passes over each rollout; LMHP's default")
    critic_learning_rate: PositiveFloat = Field(9e-6, description="of the critic at the start; falls linearly to 0")
    clip_range: ClipRange = Field(0.2, description="of the policy's ratio around 1")
    dual_clip: Annotated[PositiveFloat, Field(gt=1)] | None = Field(
        None, description="where the advantage is negative, the loss is at most so many times it; usual: 3"
    )
    entropy_coefficient: NonNegativeFloat = Field(
        0.0, description="of the mean entropy a token, which the loss is less"
    )
    max_update_kl: PositiveFloat | None = Field(
        None,
        description="nats a token that a step's update may go from the policy it began with (approx_kl of a "
        "minibatch): beyond it the step's epochs end before that minibatch is learned; none: all epochs are taken",
    )
    value_clip_range: PositiveFloat = Field(0.2, description="of the value around the old one, in reward units")
    value_coefficient: PositiveFloat = Field(0.1, description="of the value loss")
    advantage: Literal["gae", "rloo", "grpo", "reinforce++", "reinforce++-baseline"] = Field(
        "gae",
        description="what a token's reward is compared with: a critic's values (gae), the mean of the other samples "
        "of the prompt (rloo), the mean and standard deviation of all of them (grpo), nothing (reinforce++), or "
        "their mean (reinforce++-baseline); all but gae have no critic",
    )
    group_std: bool = Field(True, description="of grpo: divide by the standard deviation; without, it is Dr. GRPO")
    gamma: UnitFloat = Field(1.0, description="discount, of gae and reinforce++")
    lam: UnitFloat = Field(0.95, description="lambda of generalised advantage estimation")
    whiten_rewards: bool = Field(False, description="scale the rewards to variance 1, keeping their mean")
    whiten_advantages: Literal["auto", "on", "off"] = Field(
        "auto", description="shift and scale the advantages to mean 0 and variance 1; auto: of all but rloo and grpo"
    )
    advantage_clip: PositiveFloat | None = Field(
        None, description="advantages are kept within this of 0, after whitening; part of MOSS's PPO-max"
    )
    correction: Literal["decoupled", "bypass"] = Field(
        "decoupled",
        description="how the difference between engine and trainer is corrected: truncated importance weights, or "
        "the engine's log-probabilities as the old policy's",
    )
    importance_cap: PositiveFloat = Field(
        2.0, description="largest importance weight: of decoupled, and of KL in the loss"
    )

    kl_in: Literal["auto", "reward", "loss"] = Field(
        "auto",
        description="where KL to the reference is paid: in the reward of each token, or in the loss beside it, where a "
        "token pays for its own KL and not for that of what it leads to. auto: in the loss of grpo, else in the reward",
    )
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        "auto",
        description="k1 in the reward; in the loss k2, whose gradient is that of KL(policy, reference), or GRPO's k3, "
        "which follows KL(reference, policy); other pairings are refused. auto: k1 in the reward, in the loss k3 of "
        "grpo, else k2",
    )
    kl: Literal["fixed", "adaptive"] = Field("fixed", description="whether the price of KL follows a target")
    kl_beta: NonNegativeFloat = Field(0.05, description="price of a nat of KL, in reward; the first one of adaptive")
    kl_target: PositiveFloat = Field(6.0, description="of adaptive: nats a response")
    kl_horizon: PositiveFloat = Field(10_000.0, description="of adaptive: episodes over which the price follows")
    scale_scores: bool = Field(
        False, description="divide scores by the standard deviation of all so far; MOSS's PPO-max, with --score-clip 10"
    )
    score_clip: PositiveFloat | None = Field(None, description="scores are kept within this of 0; MOSS's PPO-max: 10")

    @property
    def kl_placement(self) -> Literal["reward", "loss"]:
        """Where KL is paid; of GRPO as Shao et al. 2024, "DeepSeekMath", eq. 3, has it."""
        if self.kl_in != "auto":
            return self.kl_in
        return "loss" if self.advantage == "grpo" else "reward"

    @property
    def kl_used(self) -> KlEstimator:
        """The estimator of the KL that is paid for."""
        if self.kl_estimator != "auto":
            return KlEstimator(self.kl_estimator)
        if self.kl_placement == "reward":
            return KlEstimator.K1
        return KlEstimator.K3 if self.advantage == "grpo" else KlEstimator.K2

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a critic's values."""
        return self.advantage == "gae"

    @property
    def compares_samples(self) -> bool:
        """Whether advantages come from the other samples of the prompt."""
        return self.advantage in ("rloo", "grpo", "reinforce++-baseline")

    @property
    def whitens_advantages(self) -> bool:
        by_itself = self.advantage not in ("rloo", "grpo")
        return by_itself if self.whiten_advantages == "auto" else self.whiten_advantages == "on"

    @model_validator(mode="after")
    def _estimates_fit_together(self) -> Self:
        try:
            check_kl_placement(self.kl_used, self.kl_placement)
        except ValueError as error:
            raise ValueError(
                f"--kl-estimator is {self.kl_estimator} and --kl-in {self.kl_placement}: {error}"
            ) from None
        if self.advantage == "grpo" and self.group_std and self.kl_placement == "reward" and self.kl_beta:
            raise ValueError(
                "--kl-in is reward and --advantage grpo: divided by the deviation of a group whose scores are alike, "
                "the KL alone would be advantages of full size, whatever --kl-beta; choose --kl-in loss, as GRPO has "
                "it, or --no-group-std"
            )
        if self.compares_samples and self.samples_per_prompt < 2:
            raise ValueError(
                f"--samples-per-prompt is {self.samples_per_prompt}: --advantage {self.advantage} compares the samples "
                "of a prompt with each other, so it must be at least 2; of one, every advantage would be 0"
            )
        if self.compares_samples and self.gamma != 1:
            raise ValueError(
                f"--gamma is {self.gamma:g}: --advantage {self.advantage} judges whole responses, it must be 1"
            )
        if not self.has_critic and self.whiten_rewards:
            raise ValueError(f"--whiten-rewards is set: it is of --advantage gae, not of {self.advantage}")
        if self.kl == "adaptive" and self.kl_beta == 0:
            raise ValueError("--kl-beta is 0: an adaptive price is multiplied, so it must start above 0")
        if self.kl == "adaptive" and 0.2 * self.batch_size >= self.kl_horizon:
            raise ValueError(
                f"--kl-horizon is {self.kl_horizon:g}: it must be above .2 times the {self.batch_size} responses of a "
                "rollout, or one step could bring the price to 0"
            )
        return self


class EvaluateSettings(ServiceAddresses, SamplingSettings, JudgeSettings, AlarmSettings):
    """Evaluates the weights that the policy service serves now on held-out prompts: reward, KL, length, diversity."""

    command: ClassVar[str] = "quartet-train evaluate"

    model: str = Field(description="folder or hub id of the policy's tokenizer")
    prompts: tuple[str, ...] = Field(description="files or hub names of prompts", min_length=1)
    max_prompts: PositiveInt = Field(256, description="the first so many different ones are used")
    samples_per_prompt: PositiveInt = Field(1, description="responses to each")
    output: Path = Field(description="JSON file to write")
    against: Path | None = Field(
        None,
        description="an earlier evaluation of the same prompts to compare with; alarms take it for that of the start",
    )
    seed: Seed = Field(0, description="of sampling")
