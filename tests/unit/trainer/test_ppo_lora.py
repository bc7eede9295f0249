"""PPO of an adapter: its gradients, its checkpoints, its publication and its reference.

Shapes: N samples, T response tokens, A and B the factors of an adapter, W the weight that it is above.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quartet.client import (
    AdapterInfo,
    CallPolicy,
    Completion,
    FinishReason,
    NotFoundError,
    OverloadedError,
    QuartetError,
    UnavailableError,
)
from quartet.client.adapters import AdapterLoad, Adapters
from quartet.client.types import ServedBy, WorkInterval
from tests.lora import Lora as Given
from tests.lora import merged_model
from trainer.adapter_weights import AdapterWeights
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.critic import Critic
from trainer.encoding import EncodedResponse
from trainer.errors import ServicesError
from trainer.exact_kl import distributions
from trainer.experience import make_experience
from trainer.lora import adapter_of, add_adapter
from trainer.models import load_policy, load_tokenizer
from trainer.ppo import Learner
from trainer.ppo_config import PPOSettings
from trainer.publishing import Publisher, SampledBy
from trainer.rollout import Rollout, Sample
from trainer.saving import export_tensors, save_adapter
from trainer.scale_config import ScaleSettings
from trainer.scaling import prepare

pytest.importorskip("peft")

RANK_4 = ScaleSettings(lora_rank=4, lora_alpha=8.0)


@pytest.fixture(scope="module")
def folder(make_policy: Callable[..., Path]) -> Path:
    return make_policy(seed=3, scale=0.5)


def settings(**changes: Any) -> PPOSettings:
    values = {"model": "m", "prompts": ("p",), "output": "o", "normalise_reward": "off", "lora_rank": 4}
    return PPOSettings(**(values | {"lora_alpha": 8.0, "minibatches": 2, "learning_rate": 1e-2} | changes))


def make_learner(folder: Path, options: PPOSettings, *, far: bool = False) -> Learner:
    """A learner whose models have adapters, both of whose factors are ``far`` from zero."""
    tokenizer = load_tokenizer(folder)
    policy = prepare(load_policy(folder, tokenizer), options, seed=options.seed)
    critic = Critic.from_policy(folder, tokenizer, head="normal")
    prepare(critic.body, options, seed=options.seed)
    if far:
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for model in (policy, critic.body):
                for _, tensor in adapter_of(model).tensors():  # type: ignore[union-attr]
                    tensor.copy_(0.05 * torch.randn(tensor.shape, generator=draw))
    run = SimpleNamespace(
        settings=options,
        device=torch.device("cpu"),
        tokenizer=tokenizer,
        normalisation=None,
        policy=policy,
        critic=critic if options.has_critic else None,
    )
    return Learner(run)  # type: ignore[arg-type]


def make_rollout(seed: int = 1) -> Rollout:
    random = np.random.default_rng(seed)
    samples = []
    for index in range(8):
        response = random.integers(3, 290, 2 + index % 5)
        samples.append(
            Sample(
                index=index,
                prompt_ids=tuple(random.integers(3, 290, 2 + index % 3).tolist()),
                response_ids=tuple(response.tolist()),
                logprobs=tuple(random.normal(-6, 1.0, len(response)).tolist()),
                ref_logprobs=tuple(random.normal(-6, 1.0, len(response)).tolist()),
                score=float(random.normal()),
                finished=index % 2 == 0,
            )
        )
    return Rollout(samples=tuple(samples), failures=(), weights_version=0, duration_s=1.0, service_work_s=0.0)


def of_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_gradients_of_a_and_b_are_those_of_the_merged_weights(kl_in, folder):
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, of a learner that trains the merged weights whole."""
    options = settings(kl_in=kl_in, packing="off")
    learner = make_learner(folder, options, far=True)
    merged = copy.deepcopy(learner.policy)
    for module in merged.modules():
        if hasattr(module, "get_delta_weight"):
            module.merge()  # peft's own.
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(".lora_" not in name)
    experience = make_experience(make_rollout().samples, learner.device)
    targets, _ = learner.shape(experience, learner.evaluate(experience))
    rows = list(range(8))
    learner.accumulate(experience, targets, rows, float(experience.mask_NT.sum()))
    learner.logprobs.policy = learner.policy = merged
    learner.accumulate(experience, targets, rows, float(experience.mask_NT.sum()))
    ours = of_adapter(learner.modules["policy"])
    assert len(ours) == 2 * 2 * 7
    scale = 8.0 / 4
    for name, a in ours.items():
        if ".lora_A." not in name:
            continue
        b = ours[name.replace(".lora_A.", ".lora_B.")]
        weight = merged.get_parameter(name.partition(".lora_A.")[0] + ".base_layer.weight").grad
        assert weight is not None
        for found, exact in ((a.grad, scale * b.T @ weight), (b.grad, scale * weight @ a.T)):
            assert found is not None
            assert float(exact.abs().max()) > 0
            assert float((found - exact).abs().max()) < 1e-3 * float(exact.abs().max()), name


def test_a_step_trains_the_adapters_and_the_head_of_the_critic_alone(folder):
    learner = make_learner(folder, settings())
    before = {
        name: {key: tensor.detach().clone() for key, tensor in module.named_parameters()}
        for name, module in learner.modules.items()
    }
    metrics = learner.step(make_rollout(), 0)
    assert metrics["policy/first_ratio_max_abs_log"] < 1e-4
    for name, module in learner.modules.items():
        moved = {key for key, tensor in module.named_parameters() if not tensor.equal(before[name][key])}
        heads = {"head.weight", "head.bias"} if name == "critic" else set()
        assert moved == {key for key in before[name] if ".lora_" in key} | heads


def test_a_checkpoint_holds_adapters_and_their_moments_alone_and_goes_on_to_the_same_bits(folder, tmp_path):
    whole = make_learner(folder, settings())
    whole.step(make_rollout(1), 0)
    path = save_checkpoint(
        tmp_path, step=1, modules=whole.trained.modules, optimisers=whole.trained.optimisers, state={}
    )
    from safetensors.torch import load_file

    kept = {name: load_file(path / f"{name}.safetensors") for name in ("policy", "critic")}
    assert set(kept["policy"]) == set(of_adapter(whole.policy))
    assert set(kept["critic"]) == {*of_adapter(whole.modules["critic"]), "head.weight", "head.bias"}
    for name, tensors in kept.items():
        optimiser = torch.load(path / f"optimiser-{name}.pt", weights_only=True)
        assert len(optimiser["state"]) == len(tensors)
    whole.step(make_rollout(2), 1)
    resumed = make_learner(folder, settings())
    load_checkpoint(path, modules=resumed.trained.modules, optimisers=resumed.trained.optimisers)
    resumed.step(make_rollout(2), 1)
    for name, module in whole.modules.items():
        theirs = dict(resumed.modules[name].named_parameters())
        assert all(tensor.equal(theirs[key]) for key, tensor in module.named_parameters()), name


def test_the_merged_weights_are_w_plus_s_b_a_in_float64(folder):
    policy = load_policy(folder, load_tokenizer(folder), dtype=torch.float64)
    adapter = add_adapter(policy, RANK_4, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, tensor in adapter.tensors():
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64))
    exact = merged_model(folder, Given(adapter.config, dict(adapter.tensors()))).state_dict()
    merged = dict(export_tensors(policy))
    assert merged.keys() <= exact.keys()
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float64
        assert float((tensor - exact[name]).abs().max()) < 1e-12, name
        changed += not tensor.equal(policy.state_dict().get(name, torch.empty(0)))
    assert changed == 2 * 7


def test_the_exact_kl_of_an_adapter_is_to_the_model_that_it_is_above(folder):
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, tokenizer)
    adapter = add_adapter(policy, RANK_4, seed=1)
    with torch.no_grad():
        for _, tensor in adapter.tensors():
            tensor.add_(0.05)
    draw = np.random.default_rng(0)
    rows = [
        EncodedResponse(ids=draw.integers(3, 290, 12).astype(np.int32), prompt_tokens=3, truncated=False)
        for _ in range(5)
    ]
    options: dict[str, Any] = {"temperature": 0.7, "pad_id": 0, "micro_batch_tokens": 40, "precision": "float32"}
    beside = distributions(policy, load_policy(folder, tokenizer), rows, **options)
    within = distributions(policy, policy, rows, **options, as_reference=adapter.switched_off)
    assert beside.kl is not None
    assert within.kl is not None
    assert min(beside.kl) > 1e-2
    assert within.kl == pytest.approx(beside.kl, rel=1e-4)
    assert within.entropy == pytest.approx(beside.entropy, rel=1e-5)
    # It is switched on again, and trained on.
    assert all(parameter.requires_grad for parameter in of_adapter(policy).values())
    assert distributions(policy, None, rows, **options).entropy == pytest.approx(beside.entropy, rel=1e-5)


def test_dropout_of_the_adapter_is_refused():
    with pytest.raises(ValueError, match=r"--lora-dropout is 0\.1: PPO runs without any dropout"):
        settings(lora_dropout=0.1)


# Publication -------------------------------------------------------------------------------------------------------


def version(folder: Path, number: int, *, stem: str = "run-1", change: float = 0.0) -> AdapterWeights:
    policy = load_policy(folder, load_tokenizer(folder))
    adapter = add_adapter(policy, RANK_4, seed=1)
    with torch.no_grad():
        adapter.tensors()[0][1].add_(change)
    return AdapterWeights.of(adapter, stem=stem, version=number, base="base")


def test_a_version_is_a_snapshot_and_its_name_says_step_and_content(folder, tmp_path):
    policy = load_policy(folder, load_tokenizer(folder))
    adapter = add_adapter(policy, RANK_4, seed=1)
    first = AdapterWeights.of(adapter, stem="run-1", version=7, base="base")
    content = [bytes(tensor.data) for tensor in first.tensors]
    with torch.no_grad():
        adapter.tensors()[0][1].add_(1.0)
    assert [bytes(tensor.data) for tensor in first.tensors] == content
    second = AdapterWeights.of(adapter, stem="run-1", version=7, base="base")
    assert first.name != second.name
    assert first.name == f"run-1.{first.fingerprint[:12]}@7"
    assert (first.config.rank, first.config.alpha) == (4, 8.0)
    # What peft saves of it is the same content.
    save_adapter(policy, load_tokenizer(folder), tmp_path / "adapter")
    from quartet.client.adapters import read_adapter
    from quartet.fingerprint import adapter_fingerprint

    config, tensors = read_adapter(tmp_path / "adapter")
    assert adapter_fingerprint([tensor.digest() for tensor in tensors], **vars(config)) == second.fingerprint
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


class Replica:
    """The weights and the adapters of a replica with room for ``room``; loading fails as ``script`` says."""

    def __init__(self, room: int = 2, rank: int = 8, base: str = "base") -> None:
        self.room, self.rank = room, rank
        self.loaded: dict[str, str] = {}
        self.done: list[str] = []
        self.script: list[QuartetError] = []
        self.served = ServedBy(model_id="m", weights_version=0, weights_fingerprint=base, tokenizer_fingerprint="t")

    async def wait_ready(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...

    async def get_info(self) -> ServedBy:
        return self.served

    async def list_adapters(self) -> Adapters:
        infos = [
            AdapterInfo(name=name, fingerprint=found, config=None, running_requests=0, unloading=False)  # type: ignore[arg-type]
            for name, found in self.loaded.items()
        ]
        return Adapters(adapters=tuple(infos), max_adapters=self.room, max_rank=self.rank)

    async def load_adapter(self, name: str, adapter: Any) -> AdapterLoad:
        if self.script:
            raise self.script.pop(0)
        if len(self.loaded) >= self.room:
            raise OverloadedError("unload one first")
        self.loaded[name] = "f"
        self.done.append(f"+{name.rpartition('@')[2]}")
        return None  # type: ignore[return-value]

    async def unload_adapter(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise NotFoundError("gone")
        self.done.append(f"-{name.rpartition('@')[2]}")


def publisher(*replicas: Replica) -> Publisher:
    made = Publisher([], CallPolicy(), 2.0)
    made._clients = made._adapters = list(replicas)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(("room", "done"), [(2, ["+0", "+1", "-0", "+2", "-1"]), (1, ["+0", "-0", "+1", "-1", "+2"])])
async def test_each_version_is_loaded_once_and_the_one_before_is_taken_out(room, done, folder):
    replicas = [Replica(room=room), Replica(room=room)]
    of_run = publisher(*replicas)
    for number in range(3):
        weights = version(folder, number, change=number / 8)
        assert await of_run.publish(weights) == number
        await of_run.ensure()
        assert of_run.sampled_by == SampledBy(
            version=number, weights="base", adapter=weights.name, adapter_fingerprint=weights.fingerprint
        )
    assert [replica.done for replica in replicas] == [done, done]
    assert of_run.updates == 6
    # A replica that was restarted has none, and gets the newest alone.
    replicas[1].loaded.clear()
    await of_run.ensure()
    assert replicas[1].done == [*done, "+2"]


async def test_adapters_of_others_stay_and_those_of_a_killed_run_go(folder):
    replica = Replica(room=3)
    left_behind = version(folder, 5, change=0.5).name
    replica.loaded = {"helpful@1": "f", version(folder, 5, stem="run-10").name: "f", left_behind: "f"}
    await publisher(replica).publish(version(folder, 4))
    assert left_behind not in replica.loaded
    assert len(replica.loaded) == 3
    assert {"helpful@1", version(folder, 4).name} < set(replica.loaded)
    full = Replica(room=1)
    full.loaded = {"helpful@1": "f"}
    with pytest.raises(OverloadedError, match="unload one first"):
        await publisher(full).publish(version(folder, 4))


async def test_a_replica_that_goes_away_in_the_middle_is_given_the_adapter_when_it_is_back(folder):
    well, back = Replica(), Replica()
    back.script = [UnavailableError("gone"), UnavailableError("gone")]
    assert await publisher(well, back).publish(version(folder, 3)) == 3
    assert (well.done, back.done) == (["+3"], ["+3"])


@pytest.mark.parametrize(
    ("replica", "message"),
    [
        (Replica(room=0), r"--lora-rank is 4, and in the policy service LoRA is off: start it with --max-adapters 2"),
        (Replica(rank=2), r"adapters may have rank 2 \(--max-lora-rank\): start it with .* --max-lora-rank 4"),
        (Replica(base="other"), r"serves 'm' with weights other\.\.\., and the adapter that is trained belongs to"),
    ],
)
async def test_a_service_that_can_not_have_the_adapter_is_named_with_what_to_do(replica, message, folder):
    with pytest.raises(ServicesError, match=message):
        await publisher(replica).publish(version(folder, 0))
    assert replica.loaded == {}


def test_only_what_the_published_adapter_sampled_on_its_own_weights_counts():
    expected = SampledBy(version=3, weights="base", adapter="a@3", adapter_fingerprint="f3")

    def completion(
        weights: str = "base", spans: Any = ((0, 2),), adapter: str = "a@3", content: str = "f3"
    ) -> Completion:
        served = ServedBy(model_id="m", weights_version=0, weights_fingerprint=weights, tokenizer_fingerprint="t")
        return Completion(
            prompt_index=0,
            sample_index=0,
            token_ids=(5, 1),
            logprobs=(-1.0, -1.0),
            finish_reason=FinishReason.STOP,
            version_spans=spans,
            text="",
            prompt_token_ids=(),
            served_by=served,
            work=WorkInterval(start_unix_ns=0, end_unix_ns=0),
            adapter=adapter,
            adapter_fingerprint=content,
        )

    assert expected.has_sampled(completion())
    assert expected.has_sampled(completion(spans=((7, 2),)))  # A restarted replica, with the same weights.
    assert not expected.has_sampled(completion(weights="other"))
    assert not expected.has_sampled(completion(spans=((0, 1), (1, 1))))
    assert not expected.has_sampled(completion(adapter="a@2"))
    assert not expected.has_sampled(completion(content="f2"))
    assert not expected.has_sampled(completion(adapter="", content=""))
    whole = SampledBy(version=3, weights="base")
    assert whole.has_sampled(completion(adapter="", content="", spans=((3, 2),)))
    assert not whole.has_sampled(completion(adapter="", content="", spans=((2, 1), (3, 1))))
    assert not whole.has_sampled(completion(spans=((3, 2),)))
