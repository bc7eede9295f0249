"""The sides of ``bench.ppo_step``, processes that take turns: ``python -m bench.ppo_sides SIDE PRECISION FOLDER``.

Settings that differ between trainers are set alike: one learning rate for policy and critic, no clipping of gradients,
no price on a missing end, one minibatch of all samples, and a critic that keeps the reward model's head.

Shapes: B samples, S tokens of prompt and response, T response tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from bench.peers import TRL_PPO, use_trl
from bench.ppo_step import COMPILED, NAIVE, OURS, TRL, Found, Load
from bench.turns import serve_turns, set_threads

Work = Callable[[], tuple[float, list[float]]]
Known = dict[tuple[int, ...], list[int]]
"""The first turn's responses, by the token ids of their prompt."""

LEARNING_RATE = 1e-5
KL_BETA, CLIP, VALUE_CLIP, VALUE_COEFFICIENT, LAM = 0.05, 0.2, 0.2, 0.1, 0.95
BETAS, EPS = (0.9, 0.95), 1e-5
NO_CLIPPING = 1e9


def read(folder: Path) -> Known:
    """Prompts as token ids, in their order, with their responses."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    encoded = tokenizer(prompts, add_special_tokens=False).input_ids
    responses = json.loads((folder / "responses.json").read_text())
    return {tuple(ids): response for ids, response in zip(encoded, responses, strict=True)}


def _load(folder: Path, name: str) -> Any:
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM if name == "policy" else transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder / name, dtype=torch.float32)


# TRL ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def trl(precision: str, folder: Path) -> Iterator[Work]:
    """TRL's trainer as it is: its functions and methods are looked in upon, by the clock."""
    use_trl(TRL_PPO)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision == "bfloat16" else "no"
    import datasets
    import torch
    import transformers

    module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    load, known = Load.read(folder), read(folder)
    real_tokens = sum(map(len, known)) + load.prompts * load.new_tokens
    rows = datasets.Dataset.from_list([{"input_ids": list(prompt)} for prompt in known])
    trainer = module.PPOTrainer(
        args=module.PPOConfig(
            output_dir=str(folder / f"trl-{precision}"),
            per_device_train_batch_size=load.prompts,
            local_rollout_forward_batch_size=load.prompts,
            total_episodes=load.prompts,
            num_ppo_epochs=load.epochs,
            response_length=load.new_tokens,
            temperature=1.0,
            kl_coef=KL_BETA,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
            vf_coef=VALUE_COEFFICIENT,
            lam=LAM,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            use_cpu=True,
            bf16=precision == "bfloat16",
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        model=_load(folder, "policy"),
        ref_model=_load(folder, "policy"),
        reward_model=_load(folder, "reward"),
        value_model=_load(folder, "reward"),
        train_dataset=rows,
        eval_dataset=rows,
    )
    at: dict[str, float] = {}
    scoring_s = [0.0]
    statistics: list[Any] = []
    forward, generate, reward = module.forward, module.batch_generation, module.get_reward

    def watched_generate(model: Any, queries: Any, *arguments: Any) -> Any:
        at["begin"] = time.perf_counter()
        found = generate(model, queries, *arguments)
        if known:
            responses = torch.tensor([known[tuple(query[query != 0].tolist())] for query in queries])
            both = torch.cat([queries, responses], dim=1)
            found = both, forward(model, both, 0).logits[:, queries.shape[1] - 1 : -1]
            known.clear()
        at["generated"] = time.perf_counter()
        return found

    def watched_forward(model: Any, *arguments: Any) -> Any:
        start_s = time.perf_counter()
        if model is not trainer.ref_model:
            at.setdefault("update", start_s)
        found = forward(model, *arguments)
        scoring_s[0] += time.perf_counter() - start_s if model is trainer.ref_model else 0.0
        return found

    def watched_reward(model: Any, *arguments: Any) -> Any:
        start_s = time.perf_counter()
        found = reward(model, *arguments)
        scoring_s[0] += time.perf_counter() - start_s if model is trainer.reward_model else 0.0
        return found

    def gathered(value: Any) -> Any:
        if value.ndim == 3:  # (epochs, minibatches, micro-batches)
            statistics.append(value)
        return value

    module.forward, module.batch_generation, module.get_reward = watched_forward, watched_generate, watched_reward
    trainer.accelerator.gather_for_metrics = gathered
    trainer.log = lambda *_, **__: at.setdefault("end", time.perf_counter())

    def work() -> tuple[float, list[float]]:
        at.clear()
        statistics.clear()
        scoring_s[0] = 0.0
        trainer.train()
        rollout_s, update_s = at["generated"] - at["begin"], at["end"] - at["update"]
        values_s = at["update"] - at["generated"] - scoring_s[0]
        # In the order in which they are logged: approximate KL, clip fraction, losses of policy and critic.
        policy_losses, value_losses = (values.flatten().tolist() for values in statistics[2:4])
        found = Found(
            phases_s=(rollout_s, scoring_s[0], values_s, update_s),
            tokens=real_tokens,
            policy_losses=policy_losses,
            value_losses=value_losses,
        )
        return at["end"] - at["begin"], found.numbers

    yield work


# Naive -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naive(precision: str, folder: Path) -> Iterator[Work]:
    """The step as a first program would have it."""
    import torch
    from torch import Tensor

    load, known = Load.read(folder), read(folder)
    prompts = list(known)
    policy, reference, critic, reward = (_load(folder, name) for name in ("policy", "policy", "reward", "reward"))
    optimisers = [torch.optim.AdamW(m.parameters(), LEARNING_RATE, BETAS, EPS, 0.0) for m in (policy, critic)]
    width = max(map(len, prompts))
    query_BS = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def inputs(ids_BS: Tensor) -> dict[str, Tensor]:
        mask_BS = (ids_BS != 0).long()
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "position_ids": (mask_BS.cumsum(1) - mask_BS).clamp(min=0),
        }

    def logprobs_of(model: Any, ids_BS: Tensor) -> Tensor:
        logits_BTV = model(**inputs(ids_BS)).logits[:, width - 1 : -1].float()
        logprobs_BTV: Tensor = logits_BTV.log_softmax(-1)
        return logprobs_BTV.gather(2, ids_BS[:, width:, None])[..., 0]

    def values_of(ids_BS: Tensor) -> Tensor:
        states_BSD = critic.model(**inputs(ids_BS)).last_hidden_state
        values_BS: Tensor = critic.score(states_BSD)[..., 0].float()
        return values_BS[:, width - 1 : -1]

    def work() -> tuple[float, list[float]]:
        at_s = [time.perf_counter()]

        def lap() -> None:
            at_s.append(time.perf_counter())

        with torch.no_grad():
            ids_BS = policy.generate(
                input_ids=query_BS, attention_mask=(query_BS != 0).long(), max_new_tokens=load.new_tokens,
                do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            ids_BS[:, width:].masked_fill_(ids_BS[:, width:] == 0, 2)  # A sampled pad token would be none of the mask.
            if known:
                ids_BS = torch.cat([query_BS, torch.tensor(list(known.values()))], dim=1)
                known.clear()
            lap()
            with autocast():
                scores_B = reward(**inputs(ids_BS)).logits[:, 0].float()
                ref_BT = logprobs_of(reference, ids_BS)
                lap()
                old_BT, old_values_BT = logprobs_of(policy, ids_BS), values_of(ids_BS)
            lap()
            rewards_BT = -KL_BETA * (old_BT - ref_BT)
            rewards_BT[:, -1] += scores_B
            advantages_BT, tail_B = torch.zeros_like(rewards_BT), torch.zeros(len(prompts))
            for t in reversed(range(load.new_tokens)):
                following_B = old_values_BT[:, t + 1] if t + 1 < load.new_tokens else 0.0
                tail_B = rewards_BT[:, t] + following_B - old_values_BT[:, t] + LAM * tail_B
                advantages_BT[:, t] = tail_B
            returns_BT = advantages_BT + old_values_BT
            advantages_BT = (advantages_BT - advantages_BT.mean()) / advantages_BT.std()
        policy_losses, value_losses = [], []
        for _ in range(load.epochs):
            rows = torch.randperm(len(prompts))
            ids, advantages = ids_BS[rows], advantages_BT[rows]
            with autocast():
                new_BT, values_BT = logprobs_of(policy, ids), values_of(ids)
            ratio_BT = (new_BT - old_BT[rows]).exp()
            clipped_BT = ratio_BT.clamp(1 - CLIP, 1 + CLIP)
            policy_loss = torch.maximum(-advantages * ratio_BT, -advantages * clipped_BT).mean()
            near_BT = old_values_BT[rows] + (values_BT - old_values_BT[rows]).clamp(-VALUE_CLIP, VALUE_CLIP)
            errors_BT = [(v - returns_BT[rows]).square() for v in (values_BT, near_BT)]
            value_loss = 0.5 * torch.maximum(*errors_BT).mean()
            (policy_loss + VALUE_COEFFICIENT * value_loss).backward()  # type: ignore[no-untyped-call]
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            policy_losses.append(policy_loss.item())
            value_losses.append(value_loss.item())
        lap()
        found = Found(
            phases_s=tuple(after - before for before, after in itertools.pairwise(at_s)),
            tokens=sum(map(len, prompts)) + ids_BS[:, width:].numel(),
            policy_losses=tuple(policy_losses),
            value_losses=tuple(value_losses),
        )
        return at_s[-1] - at_s[0], found.numbers

    yield work


# Ours --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(precision: str, folder: Path, *, compiled: bool = False) -> Iterator[Work]:
    """A run of the trainer, its steps taken one by one; the policy's stream is looked in upon."""
    from trainer.loop_thread import LoopThread
    from trainer.ppo import Learner, publish
    from trainer.ppo_config import PPOSettings
    from trainer.ppo_run import PPORun

    load, known = Load.read(folder), read(folder)
    addresses = json.loads((folder / "services.json").read_text())
    values: dict[str, Any] = {
        "model": str(folder / "policy"),
        "critic": str(folder / "reward"),
        "critic_head": "reward",
        "prompts": (str(folder / "prompts.jsonl"),),
        "eval_prompts": (str(folder / "held_out.jsonl"),),
        "output": folder / f"ours-{precision}-{compiled}",
        "compile": compiled,
        "policy": addresses["policy"],
        "policy_admin": (addresses["policy_admin"],),
        "reward": addresses["reward"],
        "reference": addresses["reference"],
        "steps": 10**6,  # So that the learning rate stays.
        "prompts_per_step": load.prompts,
        "max_new_tokens": load.new_tokens,
        "epochs": load.epochs,
        "precision": "bfloat16" if precision == "bfloat16" else "float32",
        "learning_rate": LEARNING_RATE,
        "critic_learning_rate": LEARNING_RATE,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_eps": EPS,
        "max_grad_norm": NO_CLIPPING,
        "clip_range": CLIP,
        "value_clip_range": VALUE_CLIP,
        "value_coefficient": VALUE_COEFFICIENT,
        "lam": LAM,
        "kl_beta": KL_BETA,
        "missing_eos": "none",
        "save_every": 0,
    }
    at: dict[str, float] = {}
    losses: list[dict[str, float]] = []
    with LoopThread() as loop, PPORun(PPOSettings(**values), loop) as run:
        learner, services = Learner(run), run._services
        generate, accumulate = services.policy.generate, learner.accumulate

        async def watched_generate(prompts: Any, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
            replaced = await _first_turn(services, prompts, known) if known else {}
            async with contextlib.aclosing(generate(prompts, *arguments, **named)) as stream:
                async for item in stream:
                    yield dataclasses.replace(item, **replaced.get(item.prompt_index, {}))
            at["generated"] = time.perf_counter()

        def watched_accumulate(
            experience: Any, targets: Any, rows: list[int], tokens: float, weight: float = 1.0
        ) -> Any:
            figures, ratio = accumulate(experience, targets, rows, tokens, weight)
            epoch = int(seen[0] // load.prompts)
            seen[0] += len(rows)
            for name in ("policy/loss", "value/loss"):
                losses[epoch][name] = losses[epoch].get(name, 0.0) + figures[name]
            return figures, ratio

        services.policy.generate = watched_generate  # type: ignore[method-assign,assignment]
        learner.accumulate = watched_accumulate  # type: ignore[method-assign]
        seen = [0]

        def work() -> tuple[float, list[float]]:
            losses[:], seen[0] = [{} for _ in range(load.epochs)], 0
            begin_s = time.perf_counter()
            publish(run, learner)
            rollout = run.collect()
            collected_s = time.perf_counter()
            metrics = learner.step(rollout, run.step)
            end_s = time.perf_counter()
            run.advance(rollout)
            known.clear()
            own_s = metrics["time/forward_s"], metrics["time/update_s"]
            found = Found(
                phases_s=(at["generated"] - begin_s, collected_s - at["generated"], *own_s),
                tokens=sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in rollout.samples),
                policy_losses=tuple(epoch["policy/loss"] for epoch in losses),
                value_losses=tuple(epoch["value/loss"] for epoch in losses),
            )
            return end_s - begin_s, found.numbers

        yield work


async def _first_turn(services: Any, prompts: Any, known: Known) -> dict[int, dict[str, Any]]:
    """What stands in each completion's place, by its prompt: the policy is still the reference, which gives the
    log-probabilities."""
    from quartet.client import FinishReason, TokenSequence

    responses = [tuple(known[tuple(prompt)]) for prompt in prompts]
    found = await services.reference.logprobs(
        [
            TokenSequence(token_ids=(*prompt, *response), response_start=len(prompt))
            for prompt, response in zip(prompts, responses, strict=True)
        ],
        tokenizer_fingerprint=services.tokenizer_fingerprint,
    )
    return {
        index: {"token_ids": response, "logprobs": result.logprobs, "finish_reason": FinishReason.LENGTH}
        for index, (response, result) in enumerate(zip(responses, found.results, strict=True))
    }


def main() -> None:
    side, precision, folder = sys.argv[1:]
    set_threads()
    sides: dict[str, Any] = {TRL: trl, NAIVE: naive, OURS: ours, COMPILED: functools.partial(ours, compiled=True)}
    with sides[side](precision, Path(folder)) as work:
        serve_turns(lambda task: work())


if __name__ == "__main__":
    main()
