"""``--dry-run``: what a run would take of memory and disk, told before any weights are loaded.

Models are made of their configuration on the meta device, so their tensors have shapes alone; activations are counted
by ``trainer.activations``, for the largest micro-batch that the settings allow. How long sequences are is told by
--max-tokens, or else by the rows.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from quartet.client import QuartetError, RewardClient
from quartet.model_folder import ModelFolderError, find_model
from trainer.activations import Batch, HeadMemory, Kept, kept_of_body, of_scores, of_vocabulary, without_content
from trainer.comparisons import load_comparisons
from trainer.config import DpoSettings, KtoSettings, RewardSettings, SftSettings
from trainer.critic import Critic
from trainer.data import load_demonstrations, load_judged, load_preferences, load_prompts
from trainer.encoding import Encoder
from trainer.errors import DataError, ModelError
from trainer.fast_linear import use_fast_linear
from trainer.memory_plan import Plan, Term, Weights, machine, safetensors_bytes, shown
from trainer.models import embeddings_needed, head_weights, load_tokenizer, longest_sequence, set_dropout
from trainer.online_dpo_config import OnlineDpoSettings
from trainer.optimisation import choose_device
from trainer.ppo_config import PPOSettings, RunSettings
from trainer.runs import token_limit
from trainer.scaling import prepare
from trainer.sft import read_template

_ASK_S = 3.0  # So long is a reward service waited for that says what the critic starts from.

_UPDATE, _CRITICS, _PUBLICATION, _EVALUATION, _LOADING, _EXPORT = (
    "update",
    "update of the critic",
    "publication",
    "evaluation",
    "loading",
    "export",
)
_LORA = "--lora-rank trains a small adapter in place of all weights"

Supervised = SftSettings | RewardSettings | DpoSettings | KtoSettings
Planned = Supervised | PPOSettings | OnlineDpoSettings


def main(settings: Planned) -> None:
    """Prints the plan.

    Raises:
        DoesNotFitError: the machine has less than the run takes.
        TrainerError, ModelFolderError: a setting, a file or a model can't be used; the message says which.
    """
    plan = make_plan(settings)
    sys.stdout.write("\n".join(plan.lines()) + "\n")
    sys.stdout.flush()
    plan.refuse_too_large()
    sys.stdout.write("it fits\n")


def make_plan(settings: Planned) -> Plan:
    """The plan of a stage on this machine.

    Raises:
        TrainerError, ModelFolderError: a setting, a file or a model can't be used; the message says which.
    """
    device = choose_device()
    folder = find_model(settings.model)
    tokenizer = load_tokenizer(folder)
    if isinstance(settings, RunSettings):
        return _of_rollouts(settings, folder, tokenizer, device)
    return _supervised(settings, folder, tokenizer, device)


def _supervised(settings: Supervised, folder: Path, tokenizer: Any, device: torch.device) -> Plan:
    if isinstance(settings, RewardSettings):
        model = empty_reward_model(folder, tokenizer, len(settings.head_weights) or 1)
    else:
        model = empty_policy(folder, tokenizer)
    exported = safetensors_bytes(dict(model.named_parameters()))
    prepare(model, settings, seed=settings.seed)
    micro = micro_batch(settings, model, tokenizer)
    counted = Counted.of("model", model, model.base_model, micro, settings, device, dropout=settings.dropout)
    disk = _on_disk(settings, counted.weights.checkpoint, exported, counted.weights.trained)
    if isinstance(settings, RewardSettings) and settings.members > 1:
        disk = [(f"{what}, {settings.members} members", size * settings.members) for what, size in disk]
    return Plan(
        title=f"{settings.command}, planned; no weights were loaded",
        facts=[_model_fact("model", model), _batch_fact(micro, counted.body.packed, settings, device)],
        terms=[*counted.terms((_UPDATE,), (_UPDATE,)), *_of_weights_at_large(model, exported, device)],
        disk=disk,
        output=settings.output,
        device=device,
        found=machine(device, settings.output),
    )


def _of_rollouts(settings: PPOSettings | OnlineDpoSettings, folder: Path, tokenizer: Any, device: torch.device) -> Plan:
    policy = empty_policy(folder, tokenizer)
    exported = safetensors_bytes(dict(policy.named_parameters()))
    prepare(policy, settings, seed=settings.seed)
    micro = rollout_micro_batch(settings, policy, tokenizer)
    of_policy = Counted.of("policy", policy, policy.base_model, micro, settings, device)
    # The critic's pass begins when the policy's activations are gone; gradients of both are there from one to the next.
    has_critic = isinstance(settings, PPOSettings) and settings.has_critic
    updates = (_UPDATE, _CRITICS) if has_critic else (_UPDATE,)
    terms, facts = of_policy.terms(updates, (_UPDATE,)), [_model_fact("policy", policy)]
    checkpoint = of_policy.weights.checkpoint
    if isinstance(settings, PPOSettings) and settings.has_critic:
        critic, said = empty_critic(settings, folder, tokenizer)
        prepare(critic.body, settings, seed=settings.seed)
        of_critic = Counted.of("critic", critic, critic.body, micro, settings, device)
        terms += of_critic.terms(updates, (_CRITICS,))
        facts += [_model_fact("critic", critic), *said]
        checkpoint += of_critic.weights.checkpoint
    sent, what = (of_policy.weights.trained, "adapter") if settings.lora_rank else (exported, "weights")
    advice = "" if settings.lora_rank else _LORA
    terms += [
        Term(what=f"{what} as published, for replicas that come back", bytes=sent, on_host=True, advice=advice),
        Term(what=f"the next {what}, beside those", bytes=sent, phases=(_PUBLICATION,), on_host=True),
        *_of_weights_at_large(policy, exported, device),
    ]
    if settings.exact_kl and not settings.lora_rank:
        terms.append(
            Term(what="reference, for the exact KL", bytes=exported, phases=(_EVALUATION,), advice="--no-exact-kl")
        )
    disk = _on_disk(settings, checkpoint, exported, of_policy.weights.trained)
    if settings.eval_every and settings.keep_best:
        disk.append(("the best so far, and the next", 2 * sent))
    return Plan(
        title=f"{settings.command}, planned; no weights were loaded",
        facts=[*facts, _batch_fact(micro, of_policy.body.packed, settings, device)],
        terms=terms,
        disk=disk,
        output=settings.output,
        device=device,
        found=machine(device, settings.output),
    )


# Models without content --------------------------------------------------------------------------------------------


def empty_policy(folder: Path, tokenizer: Any) -> Any:
    """``models.load_policy`` on the meta device."""
    return _empty(transformers.AutoModelForCausalLM, folder, tokenizer)


def empty_reward_model(folder: Path, tokenizer: Any, heads: int) -> Any:
    """``models.load_reward_model`` on the meta device."""
    return _empty(transformers.AutoModelForSequenceClassification, folder, tokenizer, num_labels=heads)


def empty_critic(settings: PPOSettings, folder: Path, tokenizer: Any) -> tuple[Critic, list[str]]:
    """The critic on the meta device, and what is to be said of where it starts; ``folder``: the policy's."""
    named: Path | None = None
    said = []
    if settings.critic == "reward":
        named = _hosted_reward_model(settings)
        if named is None:
            said = ["the reward service did not say what it hosts: the critic is counted as if it began as the policy"]
    elif settings.critic != "policy":
        named = find_model(settings.critic)
    if named is None:
        model = empty_policy(folder, tokenizer)
    else:
        model = empty_reward_model(named, tokenizer, len(head_weights(named)) or 1)
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, device="meta")
    return Critic(model.base_model, head).train(), said


def _hosted_reward_model(settings: PPOSettings) -> Path | None:
    async def ask() -> str:
        address = next(iter(settings.addresses_of_rewards.values()))
        async with RewardClient(address, security=settings.security) as client:
            await client.wait_ready(_ASK_S)
            return (await client.get_model_info())[0].served_by.model_id

    try:
        return find_model(asyncio.run(ask()))
    except (QuartetError, ModelFolderError):
        return None


def _empty(auto: Any, folder: Path, tokenizer: Any, **changes: Any) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
            if (needed := embeddings_needed(tokenizer)) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(needed, mean_resizing=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {str(folder)!r} can't be made of its configuration: {error}") from error
    use_fast_linear(model.base_model)
    return model.train()


# The largest micro-batch -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Micro:
    """``tokens`` in sequences of ``length``, of each of which ``asked`` are used."""

    tokens: int
    length: int
    asked: int


def micro_batch(settings: Supervised, model: Any, tokenizer: Any) -> Micro:
    """The largest that the settings allow, of sequences as long as --max-tokens, or as the longest row.

    Raises:
        DataError: a row can't be used.
    """
    if isinstance(settings, SftSettings) and settings.chat_template is not None:
        tokenizer.chat_template = read_template(settings)
    encoder = Encoder(tokenizer, max_tokens=token_limit(settings, model), truncation=settings.truncation)
    sources, split_by, given = settings.data, settings.split_by, settings.max_tokens
    together = 1  # Sequences of a row.
    if isinstance(settings, RewardSettings):
        comparisons = load_comparisons(sources, split_by=split_by)
        together = max(len(row.answers) for row in comparisons)
        length = given or max(map(len, encoder.comparisons(comparisons)))
    elif isinstance(settings, DpoSettings):
        together = 2
        pairs = [] if given else encoder.preferences(load_preferences(sources, split_by=split_by))
        length = given or max(len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected))
    elif isinstance(settings, KtoSettings):
        length = given or max(map(len, encoder.demonstrations(load_judged(sources, split_by=split_by))))
    else:
        every_turn = settings.train_on == "all-turns"
        demonstrations = [] if given else load_demonstrations(sources, split_by=split_by)
        length = given or max(map(len, encoder.demonstrations(demonstrations, every_turn=every_turn)))
    asked = 1 if isinstance(settings, RewardSettings) else max(1, length - 1)
    most = settings.batch_size * together * length
    return Micro(tokens=min(max(settings.micro_batch_tokens, together * length), most), length=length, asked=asked)


def rollout_micro_batch(settings: PPOSettings | OnlineDpoSettings, policy: Any, tokenizer: Any) -> Micro:
    """The same of rollouts: of the longest prompt, with as many tokens behind it as a response may have.

    Raises:
        DataError: a prompt can't be used.
    """
    longest = longest_sequence(policy) - settings.max_new_tokens
    if longest < 1:
        raise DataError(
            f"--max-new-tokens is {settings.max_new_tokens}, and the policy takes {longest_sequence(policy)} tokens of "
            "prompt and response: it leaves no room for a prompt"
        )
    advice = f"lower --max-new-tokens {settings.max_new_tokens}, or choose --truncation left"
    encoder = Encoder(tokenizer, max_tokens=longest, truncation=settings.truncation, advice=advice)
    prompts = encoder.prompts(load_prompts((*settings.prompts, *settings.eval_prompts)))
    length = max(map(len, prompts)) + settings.max_new_tokens
    # Of online DPO, pairs of answers, which stay together.
    together = 2 if isinstance(settings, OnlineDpoSettings) else 1
    rows = settings.batch_size if together == 1 else settings.prompts_per_step
    most = -(-rows // settings.minibatches) * together * length
    tokens = min(max(settings.micro_batch_tokens, together * length), most)
    return Micro(tokens=tokens, length=length, asked=settings.max_new_tokens)


# Terms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One trained module and what its passes keep. ``advice``: for what comes with its weights, and with its tokens."""

    name: str
    weights: Weights
    body: Kept
    head: HeadMemory
    advice: tuple[str, str]

    @classmethod
    def of(
        cls,
        name: str,
        module: Any,
        body: Any,
        micro: Micro,
        settings: Planned,
        device: torch.device,
        *,
        dropout: float = 0.0,
    ) -> Counted:
        """Counts ``module`` on the meta device, whose layers ``body`` has; it is of no use for anything else then."""
        weights = Weights.of(module)
        batch = Batch(
            sequences=micro.tokens / micro.length,
            length=micro.length,
            asked=micro.asked,
            precision=settings.precision,
        )
        if isinstance(module, Critic) or isinstance(settings, RewardSettings):
            head = of_scores(body.config.get_text_config().hidden_size, batch)
        else:
            entropy = isinstance(settings, PPOSettings) and settings.entropy_coefficient > 0
            head = of_vocabulary(module, batch, device, want_entropy=entropy)
        body.gradient_checkpointing_disable()
        set_dropout(body, dropout)
        mode = without_content(body, device)
        checkpointing = settings.activation_checkpointing
        kept = kept_of_body(body, mode, batch, packed=settings.packing != "off", checkpointing=checkpointing)
        return cls(name=name, weights=weights, body=kept, head=head, advice=_advice(settings, micro))

    def terms(self, updates: tuple[str, ...], own: tuple[str, ...]) -> list[Term]:
        """``updates``: phases in which gradients are there; ``own``: those of its passes."""
        name, weights, (of_weights, of_tokens) = self.name, self.weights, self.advice
        return [
            Term(what=f"{name}: trained weights, float32 masters", bytes=weights.trained, advice=of_weights),
            Term(what=f"{name}: frozen weights, float32", bytes=weights.frozen, advice="a smaller --model"),
            Term(what=f"{name}: Adam's moments", bytes=weights.moments, advice=of_weights),
            Term(what=f"{name}: gradients", bytes=weights.gradients, phases=updates, advice=of_weights),
            Term(what=f"{name}: activations", bytes=self.body.kept + self.head.kept, phases=own, advice=of_tokens),
            Term(what=f"{name}: activations of one layer, computed anew", bytes=self.body.anew, phases=own),
            Term(what=f"{name}: logits of a chunk of tokens", bytes=self.head.logits, phases=own),
            Term(
                what=f"{name}: gradient of the output weights, being summed",
                bytes=self.head.summed,
                phases=own,
                advice=of_weights,
            ),
        ]


def _advice(settings: Planned, micro: Micro) -> tuple[str, str]:
    of_tokens = [] if settings.activation_checkpointing else ["--activation-checkpointing"]
    if micro.tokens > micro.length:
        of_tokens.append(f"--micro-batch-tokens below {micro.tokens:,}")
    elif isinstance(settings, RunSettings):
        of_tokens.append(f"--max-new-tokens below {settings.max_new_tokens:,}, or shorter prompts")
    else:
        of_tokens.append(f"--max-tokens below {micro.length:,}")
    return ("" if settings.lora_rank else _LORA), "; ".join(of_tokens)


def _of_weights_at_large(model: Any, exported: int, device: torch.device) -> list[Term]:
    """Copies of a model's weights that come and go."""
    adapted = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    merged = sum(module.base_layer.weight.numel() * module.base_layer.weight.element_size() for module in adapted)
    terms = [Term(what="weights with the adapter merged into them", bytes=merged, phases=(_EXPORT,))]
    if device.type != "cpu":
        terms.append(Term(what="weights on their way to the GPU", bytes=exported, phases=(_LOADING,), on_host=True))
    return terms


def _on_disk(settings: Planned, checkpoint: int, exported: int, trained: int) -> list[tuple[str, int]]:
    """While the newest checkpoint is written there is one more than are kept."""
    count = 1 if settings.save_every == 0 else settings.keep_checkpoints + 1
    if settings.keep_best and not isinstance(settings, RunSettings):
        count = max(count, 2) + 1
    disk = [(f"{count} of {shown(checkpoint)}: checkpoints", count * checkpoint), ("the model", exported)]
    return [*disk, ("its adapter", trained)] if settings.lora_rank else disk


def _model_fact(name: str, module: nn.Module) -> str:
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in module.parameters())
    return f"{name}: {whole:,} parameters, {'all' if trained == whole else f'{trained:,}'} of them trained"


def _batch_fact(micro: Micro, packed: bool, settings: Planned, device: torch.device) -> str:
    half = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
    kept = "one activation a layer" if settings.activation_checkpointing else "every activation"
    return (
        f"at most {micro.tokens:,} tokens at once, in sequences of at most {micro.length:,}, "
        f"{'packed' if packed else 'padded'}; products in {'bfloat16' if half else 'float32'}; {kept} is kept"
    )
