"""A world in which a policy is trained in a minute: a corpus, a gold reward, a policy, proxies of the gold.

The corpus is a Markov chain. The gold is a transformer with frozen random weights: what people would want, known
without error. The policy is fine-tuned on the corpus, and proxies learn from pairs of its responses that the gold has
judged, some of the labels turned round. All responses have the same length, and nothing is padded.

Everything follows from a protocol and a seed. Losses, optimisers and schedules are the trainer's.

Shapes: N sequences, P prompt tokens, T response tokens, S of both, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

from quartet.fingerprint import derive_seed
from trainer.encoding import EncodedResponse
from trainer.exact_kl import distributions
from trainer.losses import bradley_terry
from trainer.models import TokenLogprobs, score_tokens
from trainer.optimisation import apply_gradients, linear_schedule, make_adamw, set_learning_rate
from trainer.rewards import normalise

# Sequences scored or looked at together.
_AT_ONCE = 512
# Probability of what all but never follows, where likeness to the corpus is told.
_RAREST = 1e-4
# Of a model's config: nothing is padded and nothing ends early.
_EVERY_TOKEN_IS_A_WORD: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that decides the figures, besides the seed and the code."""

    vocabulary: int = 32
    prompt_tokens: int = 4
    response_tokens: int = 16
    concentration: float = 0.3
    """Of the Dirichlet distribution of what follows a token: the lower, the fewer tokens may follow."""

    layers: int = 2
    width: int = 64
    inner_width: int = 128
    """Of the policy's layers; of the rewards' it is ``reward_inner_width``."""
    reward_inner_width: int = 256
    heads: int = 2
    weight_std: float = 0.06
    """Of new weights."""
    gold_scale: float = 3.0
    """The gold network's weights over new ones: the larger, the less of it does a model of its size find out."""
    fluency: float = 0.25
    """What a standard deviation of likeness to the corpus is worth in the gold over one of the network's."""

    sft_steps: int = 150
    sft_batch: int = 128
    sft_learning_rate: float = 3e-3

    pairs: int = 2000
    flipped_share: float = 0.25
    reward_epochs: int = 2
    reward_batch: int = 64
    """Pairs."""
    reward_learning_rate: float = 1e-3
    members: int = 4
    """Of the ensembles: proxies that differ by their first weights and the order of the pairs."""
    test_pairs: int = 2000
    """Without wrong labels, for the proxies' accuracy."""
    normalised_on: int = 2000
    """Responses of the policy before PPO, whose scores have mean 0 and standard deviation 1."""

    updates: int = 120
    batch: int = 128
    """Responses of an update."""
    epochs: int = 4
    learning_rate: float = 1.5e-3
    """Of policy and critic at the start; falls linearly to 0."""
    held_out: int = 1024
    """Prompts of the last evaluation."""

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def digest(self) -> str:
        """The same for equal protocols alone."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def generator(*parts: int | str) -> torch.Generator:
    """A source of random numbers that follows from its name."""
    return torch.Generator().manual_seed(derive_seed("small world", *parts))


class Corpus:
    """Sequences of a Markov chain, each row of its transitions drawn from a Dirichlet distribution."""

    def __init__(self, protocol: Protocol, seed: int) -> None:
        draw = np.random.default_rng(derive_seed("small world", "corpus", seed))
        alpha_V = np.full(protocol.vocabulary, protocol.concentration)
        self.transitions_VV = torch.from_numpy(draw.dirichlet(alpha_V, size=protocol.vocabulary)).float()

    def sample(self, count: int, tokens: int, source: torch.Generator) -> Tensor:
        """(count, tokens) ids; the first of each is any token, with equal probability."""
        ids_NS = torch.empty(count, tokens, dtype=torch.long)
        ids_NS[:, 0] = torch.randint(len(self.transitions_VV), (count,), generator=source)
        for place in range(1, tokens):
            next_N1 = torch.multinomial(self.transitions_VV[ids_NS[:, place - 1]], 1, generator=source)
            ids_NS[:, place] = next_N1[:, 0]
        return ids_NS

    def likeness(self, ids_NS: Tensor) -> Tensor:
        """(N,) log-probability of all tokens but the first, none of which counts as rarer than once in 10,000."""
        return self.transitions_VV[ids_NS[:, :-1], ids_NS[:, 1:]].clamp(min=_RAREST).log().sum(dim=1)


# Models ------------------------------------------------------------------------------------------------------------


def new_policy(protocol: Protocol, scale: float, *name: int | str) -> Any:
    """A Llama with random weights, ``scale`` times as large as those that training starts from."""
    config = LlamaConfig(
        vocab_size=protocol.vocabulary,
        hidden_size=protocol.width,
        intermediate_size=protocol.inner_width,
        num_hidden_layers=protocol.layers,
        num_attention_heads=protocol.heads,
        num_key_value_heads=protocol.heads,
        max_position_embeddings=protocol.sequence_tokens,
        initializer_range=scale * protocol.weight_std,
        tie_word_embeddings=False,
        **_EVERY_TOKEN_IS_A_WORD,
    )
    return _drawn(LlamaForCausalLM, config, *name)


def new_reward_model(protocol: Protocol, scale: float, *name: int | str) -> Any:
    """A GPT-2 with random weights, ``scale`` times as large as those that training starts from.

    What it says of a token depends on where the token stands, for each place has a vector of its own. There is more to
    be found out about it than about a Llama's, of which a proxy is right far beyond what it has seen.
    """
    config = GPT2Config(
        vocab_size=protocol.vocabulary,
        n_embd=protocol.width,
        n_inner=protocol.reward_inner_width,
        n_layer=protocol.layers,
        n_head=protocol.heads,
        n_positions=protocol.sequence_tokens,
        initializer_range=scale * protocol.weight_std,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=1,
        **_EVERY_TOKEN_IS_A_WORD,
    )
    return _drawn(GPT2ForSequenceClassification, config, *name)


def _drawn(kind: Any, config: Any, *name: int | str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("small world", *name))
        return kind(config)


def freeze(model: Any) -> Any:
    return model.requires_grad_(False).eval()


@torch.no_grad()
def sample(policy: Any, prompts_NP: Tensor, tokens: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, S) ids of prompts and responses, and (N, T) log-probabilities as sampled; keys and values are kept.

    In this process and without a service: at this size a call over the wire would cost more than the model.
    """
    ids_NS = new_NS = prompts_NP
    cache: Any = None
    logprobs: list[Tensor] = []
    for _ in range(tokens):
        answer = policy(input_ids=new_NS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = answer.past_key_values
        table_NV = answer.logits[:, -1].log_softmax(dim=-1)
        new_NS = torch.multinomial(table_NV.exp(), 1, generator=source)
        logprobs.append(table_NV.gather(1, new_NS))
        ids_NS = torch.cat([ids_NS, new_NS], dim=1)
    return ids_NS, torch.cat(logprobs, dim=1)


def response_logprobs(logprobs: TokenLogprobs, ids_NS: Tensor, prompt_tokens: int) -> Tensor:
    """(N, T) log-probabilities of the responses by a whole forward pass."""
    everywhere_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    wanted_NS = everywhere_NS.clone()
    wanted_NS[:, :prompt_tokens] = False
    found_NS: Tensor = logprobs(ids_NS, everywhere_NS, wanted_NS)[0]
    return found_NS[:, prompt_tokens:]


def scores(model: Any, ids_NS: Tensor) -> Tensor:
    """(N,) raw scores, each read at the last token."""
    return score_tokens(model, ids_NS, torch.ones_like(ids_NS, dtype=torch.bool))


def exact_kl(policy: Any, reference: Any, ids_NS: Tensor, prompt_tokens: int) -> Tensor:
    """(N,) sum over each response's tokens of KL(policy, reference) over the whole vocabulary, in nats.

    Its mean over the policy's own responses is an unbiased estimate of the KL of whole responses.
    """
    rows = [EncodedResponse(ids=ids, prompt_tokens=prompt_tokens, truncated=False) for ids in ids_NS.int().numpy()]
    found = distributions(
        policy,
        reference,
        rows,
        temperature=1.0,
        pad_id=0,
        micro_batch_tokens=_AT_ONCE * ids_NS.shape[1],
        precision="float32",
    )
    return torch.tensor(found.kl)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A frozen reward in units of its standard deviation over what the policy said before PPO, whose mean is 0."""

    model: Any
    mean: float
    std: float

    @torch.no_grad()
    def __call__(self, ids_NS: Tensor) -> Tensor:
        """(N,) normalised scores."""
        raw_N = torch.cat([scores(self.model, part_NS) for part_NS in torch.split(ids_NS, _AT_ONCE)])
        return normalise(raw_N, self.mean, self.std)


def standardised(model: Any, ids_NS: Tensor) -> Scorer:
    """Freezes ``model`` and takes the statistics of its scores of ``ids_NS``."""
    raw_N = Scorer(model=freeze(model), mean=0.0, std=1.0)(ids_NS).double()
    return Scorer(model=model, mean=float(raw_N.mean()), std=float(raw_N.std()))


@dataclass(frozen=True, kw_only=True)
class Gold:
    """What people would want: what a random network says, and that a response is like the corpus, of which it knows.

    Normalised as a ``Scorer`` is.
    """

    network: Scorer
    corpus: Corpus
    fluency: float
    """What a standard deviation of likeness is worth over one of the network's."""
    usual: tuple[float, float]
    """Mean and standard deviation of the likeness of what the policy said before PPO."""
    mean: float = 0.0
    std: float = 1.0
    """Of the sum of both."""

    def __call__(self, ids_NS: Tensor) -> Tensor:
        """(N,) normalised scores."""
        likeness_N = normalise(self.corpus.likeness(ids_NS), *self.usual)
        return normalise(self.network(ids_NS) + self.fluency * likeness_N, self.mean, self.std)


def make_gold(network: Any, corpus: Corpus, fluency: float, ids_NS: Tensor) -> Gold:
    """Freezes ``network`` and takes all statistics of ``ids_NS``."""
    likeness_N = corpus.likeness(ids_NS).double()
    usual = float(likeness_N.mean()), float(likeness_N.std())
    raw = Gold(network=standardised(network, ids_NS), corpus=corpus, fluency=fluency, usual=usual)
    raw_N = raw(ids_NS).double()
    return replace(raw, mean=float(raw_N.mean()), std=float(raw_N.std()))


# Training ----------------------------------------------------------------------------------------------------------


def fine_tune(policy: Any, corpus: Corpus, protocol: Protocol, seed: int) -> None:
    """Cross entropy of all tokens but the first, on sequences that never repeat."""
    logprobs = TokenLogprobs(policy)
    optimiser = make_adamw(policy, learning_rate=protocol.sft_learning_rate)
    source = generator("sft", seed)
    for step in range(protocol.sft_steps):
        set_learning_rate(optimiser, linear_schedule(step, protocol.sft_steps, 0.05) * protocol.sft_learning_rate)
        ids_NS = corpus.sample(protocol.sft_batch, protocol.sequence_tokens, source)
        loss = -response_logprobs(logprobs, ids_NS, prompt_tokens=1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        apply_gradients(optimiser, 1.0)


def prefer(
    first_NS: Tensor, second_NS: Tensor, gold: Gold, flipped_share: float, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Chosen and rejected ones of some pairs, as the gold has it but for the share of labels that is turned round."""
    first_wins_N = gold(first_NS) > gold(second_NS)
    flipped_N = torch.rand(len(first_NS), generator=source) < flipped_share
    first_wins_N = (first_wins_N != flipped_N)[:, None]
    return torch.where(first_wins_N, first_NS, second_NS), torch.where(first_wins_N, second_NS, first_NS)


def train_proxy(chosen_NS: Tensor, rejected_NS: Tensor, protocol: Protocol, seed: int, member: int) -> Any:
    """A reward model of random first weights, trained by Bradley-Terry's loss."""
    model = new_reward_model(protocol, 1.0, "proxy", seed, member)
    optimiser = make_adamw(model, learning_rate=protocol.reward_learning_rate)
    source = generator("order", seed, member)
    batches = [
        rows
        for _ in range(protocol.reward_epochs)
        for rows in torch.split(torch.randperm(len(chosen_NS), generator=source), protocol.reward_batch)
    ]
    for step, rows in enumerate(batches):
        set_learning_rate(optimiser, linear_schedule(step, len(batches), 0.05) * protocol.reward_learning_rate)
        both_N = scores(model, torch.cat([chosen_NS[rows], rejected_NS[rows]]))
        bradley_terry(both_N[: len(rows)], both_N[len(rows) :]).backward()  # type: ignore[no-untyped-call]
        apply_gradients(optimiser, 1.0)
    return model


def accuracy(scorer: Scorer, chosen_NS: Tensor, rejected_NS: Tensor) -> float:
    """Share of the pairs that ``scorer`` ranks as they are."""
    return float((scorer(chosen_NS) > scorer(rejected_NS)).double().mean())


@dataclass(frozen=True, kw_only=True)
class World:
    """What a seed's runs share. Nothing in it is trained any more."""

    protocol: Protocol
    seed: int
    corpus: Corpus
    policy: Any
    """Fine-tuned on the corpus: where PPO starts, and its reference."""
    gold: Gold
    members: tuple[Scorer, ...]
    """The proxies; the first one is the single proxy."""
    accuracies: tuple[float, ...]
    """Of the proxies, on pairs with right labels."""

    def prompts(self, count: int, *name: int | str) -> Tensor:
        """(count, P) prompts."""
        return self.corpus.sample(count, self.protocol.prompt_tokens, generator("prompts", self.seed, *name))

    def respond(self, policy: Any, prompts_NP: Tensor, *name: int | str) -> tuple[Tensor, Tensor]:
        """``sample`` of ``policy``, the same for the same name."""
        source = generator("responses", self.seed, *name)
        return sample(policy, prompts_NP, self.protocol.response_tokens, source)


def make_world(protocol: Protocol, seed: int) -> World:
    """Draws the corpus and the gold, fine-tunes the policy, trains the proxies."""
    corpus = Corpus(protocol, seed)
    policy = new_policy(protocol, 1.0, "policy", seed)
    fine_tune(policy, corpus, protocol, seed)
    freeze(policy)

    def responses(count: int, name: str) -> Tensor:
        prompts_NP = corpus.sample(count, protocol.prompt_tokens, generator("prompts", seed, name))
        return sample(policy, prompts_NP, protocol.response_tokens, generator("responses", seed, name))[0]

    def pairs(count: int, name: str, flipped_share: float) -> tuple[Tensor, Tensor]:
        prompts_NP = corpus.sample(count, protocol.prompt_tokens, generator("prompts", seed, name))
        first_NS, second_NS = (
            sample(policy, prompts_NP, protocol.response_tokens, generator("responses", seed, name, place))[0]
            for place in ("first", "second")
        )
        return prefer(first_NS, second_NS, gold, flipped_share, generator("flips", seed, name))

    usual_NS = responses(protocol.normalised_on, "usual")
    network = new_reward_model(protocol, protocol.gold_scale, "gold", seed)
    gold = make_gold(network, corpus, protocol.fluency, usual_NS)
    judged = pairs(protocol.pairs, "train", protocol.flipped_share)
    members = tuple(
        standardised(train_proxy(*judged, protocol, seed, member), usual_NS) for member in range(protocol.members)
    )
    test = pairs(protocol.test_pairs, "test", 0.0)
    return World(
        protocol=protocol,
        seed=seed,
        corpus=corpus,
        policy=policy,
        gold=gold,
        members=members,
        accuracies=tuple(accuracy(member, *test) for member in members),
    )
