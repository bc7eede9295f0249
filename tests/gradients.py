"""Gradients of one minibatch in every stage, in as many processes as they are asked for in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.conftest import WORDS
from trainer.answers import Answers
from trainer.comparisons import load_comparisons
from trainer.config import DpoSettings, KtoSettings, RewardSettings, SftSettings
from trainer.critic import Critic
from trainer.data import JudgedAnswer, load_demonstrations, load_preferences
from trainer.dpo import DpoTrainer, with_reference
from trainer.encoding import Encoder
from trainer.kto import KtoTrainer, encode, mismatched
from trainer.kto import with_reference as with_sums
from trainer.models import load_policy, load_reward_model, load_tokenizer
from trainer.online_dpo import OnlineDpoLearner
from trainer.online_dpo_config import OnlineDpoSettings
from trainer.ppo import Learner
from trainer.ppo_config import PPOSettings
from trainer.reward_trainer import RewardTrainer
from trainer.rollout import Rollout, Sample
from trainer.runs import training_mode
from trainer.scaling import prepare, settle
from trainer.sft import SftTrainer
from trainer.sharding import whole_optimiser

Gradients = dict[str, Tensor]


def write_preferences(path: Path, count: int) -> str:
    """Rows of many lengths, prompts all different; returns the path."""
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(3, 12))) + f" {i}",
            "chosen": " " + " ".join(draw.choices(WORDS[:9], k=draw.randint(1, 8))),
            "rejected": " " + " ".join(draw.choices(WORDS[9:], k=draw.randint(1, 8))),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gradients(stage: str, folder: Path, data: str, rows: int, **options: Any) -> tuple[Gradients, dict[str, float]]:
    """Of one minibatch of ``rows`` rows, whole, and its figures; in as many processes as this is called in."""
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, max_tokens=128)
    dtype = options.pop("dtype", torch.float64)
    common: dict[str, Any] = {"model": str(folder), "output": folder, "micro_batch_tokens": 70, **options}
    if stage in ("ppo", "online-dpo"):
        return of_rollout(stage, folder, rows, common)
    common |= {"data": (data,)}
    model: Any
    trainer: Any
    if stage == "sft":
        sft = SftSettings(**common)
        model = prepare(load_policy(folder, tokenizer, dtype=dtype), sft, seed=0)
        trainer, batch = SftTrainer(model, tokenizer, sft), encoder.demonstrations(load_demonstrations([data])[:rows])
    elif stage == "reward":
        reward = RewardSettings(**common, centering=0.1)
        model = prepare(load_reward_model(folder, tokenizer, new_head_seed=1).to(dtype), reward, seed=0)
        trainer, batch = RewardTrainer(model, tokenizer, reward), encoder.comparisons(load_comparisons([data])[:rows])
    elif stage == "kto":
        kto = KtoSettings(**common, beta=0.3)
        model = prepare(load_policy(folder, tokenizer, dtype=dtype), kto, seed=0)
        answers = Answers(model, tokenizer, kto.precision, kto.packing)
        trainer = KtoTrainer(answers, kto, None)  # type: ignore[arg-type]
        judged = encode(judged_rows(data, rows), encoder)
        own, others = (with_sums(some, iter(-np.arange(9.0, 9 + rows))) for some in (judged, mismatched(judged, 128)))
        settle(model, kto, kto.precision)
        with training_mode(model, 0.0):
            figures = trainer.accumulate(own, others)
        return whole_gradients(model), figures
    else:
        dpo = DpoSettings(**common, beta=0.3, sft_weight=0.2)
        model = prepare(load_policy(folder, tokenizer, dtype=dtype), dpo, seed=0)
        trainer = DpoTrainer(model, tokenizer, dpo, None)  # type: ignore[arg-type]
        known = -np.arange(2.0 * rows)
        batch = with_reference(encoder.preferences(load_preferences([data])[:rows]), known)
    settle(model, trainer.settings, options.get("precision", "float32"))
    with training_mode(model, 0.0):
        figures = trainer.accumulate(batch)
    return whole_gradients(model), figures


def judged_rows(data: str, count: int) -> list[JudgedAnswer]:
    """The chosen answers of some preferences, found good, and the rejected ones of others, found bad."""
    return [
        JudgedAnswer(
            prompt=row.prompt,
            completion=row.rejected if place % 2 else row.chosen,
            desirable=not place % 2,
            where=row.where,
        )
        for place, row in enumerate(load_preferences([data])[:count])
    ]


def of_rollout(stage: str, folder: Path, rows: int, common: dict[str, Any]) -> tuple[Gradients, dict[str, float]]:
    """As Adam's mean has them after one step, of policy and critic; and the figures of two epochs."""
    tokenizer = load_tokenizer(folder)
    common |= {"learning_rate": 1e-3, "max_grad_norm": 1e9, "minibatches": 1, "prompts": ("p",)}
    found: Gradients = {}
    metrics: dict[str, float] = {}
    for epochs in (1, 2):
        settings: Any
        if stage == "ppo":
            fixed = {"critic_learning_rate": 1e-3, "normalise_reward": "off", "kl_beta": 0.2}
            settings = PPOSettings(**common, **fixed, entropy_coefficient=0.05, epochs=epochs)
        else:
            settings = OnlineDpoSettings(**common, samples_per_prompt=2, beta=0.3, epochs=epochs)
        policy = prepare(load_policy(folder, tokenizer), settings, seed=0)
        critic = Critic.from_policy(folder, tokenizer, head="normal")
        prepare(critic.body, settings, seed=0)
        run: Any = SimpleNamespace(
            settings=settings,
            device=policy.device,
            tokenizer=tokenizer,
            normalisation=None,
            policy=policy,
            critic=critic,
        )
        learner: Any = Learner(run) if stage == "ppo" else OnlineDpoLearner(run)
        metrics = learner.step(made_up_rollout(rows), 0)
        if epochs == 1:
            for name, optimiser in learner.trained.optimisers.items():
                for index, own in whole_optimiser(optimiser)["state"].items():
                    if own["exp_avg"] is not None:
                        found[f"{name}.{index}"] = own["exp_avg"]
    return found, {name: value for name, value in metrics.items() if not name.startswith("time/")}


def made_up_rollout(count: int) -> Rollout:
    draw = np.random.default_rng(1)
    samples = []
    for index in range(count):
        prompt, response = draw.integers(3, 300, 2 + index % 3), draw.integers(3, 300, 4 + 3 * (index % 4))
        samples.append(
            Sample(
                index=index,
                prompt_ids=tuple(prompt.tolist()),
                response_ids=tuple(response.tolist()),
                logprobs=tuple(draw.normal(-6, 1.5, len(response)).tolist()),
                ref_logprobs=tuple(draw.normal(-6, 1.5, len(response)).tolist()),
                score=float(draw.normal()),
                finished=index % 2 == 0,
            )
        )
    return Rollout(samples=tuple(samples), failures=(), weights_version=0, duration_s=1.0, service_work_s=0.5)


def whole_gradients(model: nn.Module) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found
