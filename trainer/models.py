"""The trainer's models: loading and forward passes.

Shapes: B sequences, S tokens of prompt and response, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from quartet.model_folder import find_model, read_metadata
from trainer.errors import ModelError
from trainer.fast_linear import use_fast_linear
from trainer.losses import chunked_selective_logprobs, entropy_from_logits, selective_logprobs
from trainer.packing import is_packed, packed_outputs
from trainer.sharding import as_forward, is_sharded

# Where a configuration says how long a sequence may be.
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# Bytes of logits that exist at once: what stays in a processor's cache, and what a GPU needs to be busy.
_LOGIT_BYTES = {"cpu": 2**22, "cuda": 2**28}
# On a processor: logits of so many tokens of the vocabulary at a time.
_CPU_PART = 4096
# Largest difference between a model's own logits and hidden states times output weights that is rounding.
_HEAD_TOLERANCE = 1e-3
# Where a policy keeps what was found.
_PLAIN_HEAD = "_quartet_plain_head"


# Loading -----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer as it is, so that it is the one that services load from the same folder.

    It may have no pad token, or the end token for one: padding is filled with ``padding_id``.

    Raises:
        ModelError: it doesn't load or has no end token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {str(folder)!r}: its tokenizer does not load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model {str(folder)!r}: its tokenizer has no end token (eos_token), so no response could end")
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """The id that padding is filled with. Masks alone say where padding is, so any token but the end token does."""
    return 1 if tokenizer.eos_token_id == 0 else 0


def load_policy(model: str | Path, tokenizer: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model in train mode without dropout, on the CPU, its embeddings fitting ``tokenizer``.

    Raises:
        ModelFolderError: there is no such model.
        ModelError: it doesn't load as a causal language model, or its checkpoint lacks weights.
    """
    folder = find_model(str(model))
    policy, missing = _from_pretrained(transformers.AutoModelForCausalLM, folder, dtype=dtype)
    if missing:
        raise ModelError(
            f"model {str(folder)!r} is not a whole causal language model: its checkpoint lacks {', '.join(missing[:3])}"
        )
    _fit(policy, tokenizer)
    if policy.generation_config is not None:
        policy.generation_config.pad_token_id = policy.config.pad_token_id
        if policy.generation_config.eos_token_id is None:
            policy.generation_config.eos_token_id = tokenizer.eos_token_id
    disable_dropout(policy)
    use_fast_linear(policy.base_model)
    return policy.train()


def load_reward_model(
    model: str | Path,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
    new_head_seed: int | None = None,
    heads: int | None = None,
) -> Any:
    """A sequence classifier with a label for each head in train mode without dropout, with float32 heads, on the CPU.

    Args:
        model: folder or hub id of a reward model, or of a causal language model whose body it starts from.
        tokenizer: of ``load_tokenizer``.
        dtype: of the body.
        new_head_seed: for the heads of a model that has none yet, drawn from N(0, 1 / (D + 1)); None refuses such.
        heads: how many there are; None: as many as its quartet.json names, or 1.

    Raises:
        ModelFolderError: there is no such model.
        ModelError: it doesn't load as a decoder with so many labels, or its checkpoint lacks weights.
    """
    folder = find_model(str(model))
    labels = heads or len(head_weights(folder)) or 1
    reward_model, missing = _from_pretrained(
        transformers.AutoModelForSequenceClassification, folder, dtype=dtype, num_labels=labels
    )
    head = getattr(reward_model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"model {str(folder)!r} is a {type(reward_model).__name__}: reward models are trained from decoders, whose "
            "classifier is a linear layer named 'score'"
        )
    new_head = "score.weight" in missing
    body_missing = [name for name in missing if not name.startswith("score.")]
    if body_missing or (new_head and new_head_seed is None):
        lacking = ", ".join((body_missing or missing)[:3])
        raise ModelError(
            f"model {str(folder)!r} is not a reward model: its checkpoint lacks {lacking}; "
            "train one with quartet-train reward"
        )
    reward_model.score = head.float()
    if new_head:
        initialise_head(reward_model.score, seed=new_head_seed or 0)
    _fit(reward_model, tokenizer)
    disable_dropout(reward_model)
    use_fast_linear(reward_model.base_model)
    return reward_model.train()


def head_weights(folder: Path) -> dict[str, float]:
    """Weight in the score of each head that quartet.json names, in their order; empty where it names none."""
    return {head["name"]: float(head["weight"]) for head in read_metadata(folder).get("heads") or ()}


def _from_pretrained(auto: Any, folder: Path, **arguments: Any) -> tuple[Any, list[str]]:
    """The model and the names of the weights that its checkpoint lacks."""
    try:
        # A head that is missing or left over is expected here, and checked by the callers.
        with quiet_transformers():
            # No code that comes with the model, and no pickles, which are code too.
            model, loading = auto.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **arguments
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model {str(folder)!r} does not load with {auto.__name__}: {error}") from error
    return model, sorted(loading["missing_keys"])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without warnings and progress bars, which would stand between the lines of ours."""
    verbosity, had_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if had_bars:
            transformers.logging.enable_progress_bar()


def _fit(model: Any, tokenizer: Any) -> None:
    """Makes room for added tokens and tells the model its pad and end tokens."""
    pad = tokenizer.pad_token_id
    needed = embeddings_needed(tokenizer)
    if needed > model.get_input_embeddings().weight.shape[0]:
        # The mean of the others, so that the new token is not suddenly the likeliest.
        # Drawn from one seed, so that it is the same model whenever it is loaded.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(needed, mean_resizing=True)
    embeddings = model.get_input_embeddings()
    # Transformers' own classifiers look for the last token that is no pad: with the end token for one they would score
    # another than the last. Without one they refuse batches.
    own = pad is not None and pad != tokenizer.eos_token_id and pad < embeddings.weight.shape[0]
    model.config.pad_token_id = pad if own else None
    # PyTorch gives this row no gradient, and it may be the end token's, which stands in every chat.
    embeddings.padding_idx = None
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_token_id


def embeddings_needed(tokenizer: Any) -> int:
    """Rows that the embeddings of a model must have for every token that a text may become."""
    # No text becomes a pad token: for that alone the model keeps the shape that it is served in.
    pad = tokenizer.pad_token_id
    largest: int = max(token for token in tokenizer.get_vocab().values() if token != pad)
    return 1 + largest


def initialise_head(head: nn.Linear, *, seed: int) -> None:
    """Weights from N(0, 1 / (D + 1)), bias 0.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.1: a reward head is drawn
    from N(0, 1 / (d_model + 1)), read as a variance, as its code has it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scale = 1.0 / math.sqrt(head.in_features + 1)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * scale)
        if head.bias is not None:
            head.bias.zero_()


def longest_sequence(model: Any) -> int:
    """Longest sequence in tokens, prompt and response together, by the model's configuration.

    Raises:
        ModelError: the configuration doesn't say.
    """
    config = model.config.get_text_config()
    for name in _LENGTH_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(f"the configuration of {type(model).__name__} doesn't say how long a sequence may be")


def set_dropout(model: nn.Module, probability: float) -> dict[str, int]:
    """Sets every dropout of ``model``, leaving its saved configuration alone. Returns how many there are, by name."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            continue  # It has a setting of its own, and evaluation mode is without it.
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
            found[name.rpartition(".")[2]] += 1
        # Attention implementations keep a plain number, such as LlamaAttention.attention_dropout.
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(module, attribute, probability)
                found[attribute] += 1
    return dict(found)


def disable_dropout(model: nn.Module) -> None:
    """Without it two forward passes of the same weights differ, and the first ratio of PPO is not 1."""
    set_dropout(model, 0.0)


# Forward passes ----------------------------------------------------------------------------------------------------


def positions(mask_BS: Tensor) -> Tensor:
    """(B, S) position of each real token in its sequence, wherever the padding stands; padding behind repeats."""
    counts_BS = mask_BS.long().cumsum(dim=1)
    return (counts_BS - mask_BS.long()).clamp(max=mask_BS.shape[1] - 1)


def last_hidden(model: Any, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, S, D) last hidden states of the model's body, without any head. Padding may stand on either side.

    Args:
        model: a causal language model or a sequence classifier with a decoder body.
        ids_BS: (B, S) token ids.
        mask_BS: (B, S) True on real tokens.
    """
    hidden_BSD: Tensor = model.base_model(
        input_ids=ids_BS, attention_mask=mask_BS.long(), position_ids=positions(mask_BS), use_cache=False
    ).last_hidden_state
    return hidden_BSD


def hidden_at(model: Any, ids_BS: Tensor, mask_BS: Tensor, wanted_BS: Tensor) -> Tensor:
    """(M, D) last hidden states at the true places of ``wanted_BS``, in order; packed where ``model`` is.

    Args:
        model, ids_BS, mask_BS: as ``last_hidden`` takes them.
        wanted_BS: (B, S) True where hidden states are wanted, on real tokens alone.
    """
    if is_packed(model):
        return packed_outputs(model.base_model, ids_BS, mask_BS, wanted_BS)
    return last_hidden(model, ids_BS, mask_BS)[wanted_BS]


def score_tokens(model: Any, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(B,) score of each sequence by a model of one head; see ``score_heads``."""
    return score_heads(model, ids_BS, mask_BS)[:, 0]


def score_heads(model: Any, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, H) scores of each sequence: the H heads on the last hidden state at the last real token, in float32.

    Padding may stand on either side: the position is read from the mask, never from ids, side or the last column.
    """
    places_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = (mask_BS * places_S).argmax(dim=1)
    is_last_BS = places_S[None, :] == last_B[:, None]
    return as_forward(model, lambda: linear_float32(hidden_at(model, ids_BS, mask_BS, is_last_BS), model.score))


def linear_float32(hidden: Tensor, head: nn.Linear) -> Tensor:
    # Autocast would make the product bfloat16 again, and scores that differ by less than 1 % equal.
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return functional.linear(hidden.float(), head.weight.float(), bias)


class TokenLogprobs(nn.Module):
    """A policy's log-probabilities of given tokens, without logits of the tokens that nobody asks for.

    Where the model's logits are its hidden states times its output weights, they exist for a few tokens at a time.
    Some architectures do more (Gemma's soft capping, Cohere's scale): then the model's own logits are used. Which of
    the two holds is measured once, on the model itself.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        # Of a split policy what was measured when it was whole.
        self.plain_head: bool = vars(policy)[_PLAIN_HEAD] if is_sharded(policy) else _has_plain_head(policy)
        setattr(policy, _PLAIN_HEAD, self.plain_head)

    def forward(
        self,
        ids_BS: Tensor,
        mask_BS: Tensor,
        wanted_BS: Tensor,
        temperature: float = 1.0,
        want_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            ids_BS: (B, S) token ids.
            mask_BS: (B, S) True on real tokens, on either side padded.
            wanted_BS: (B, S) True on tokens whose log-probability is asked for; never the first, which nothing
                stands before.
            temperature: divides the logits.
            want_entropy: whether the entropy of the distribution each token came from is asked for, too.

        Returns:
            logprobs_BS and entropy_BS (None unless wanted), float32, at the place of their own token (not the one
            before it) and 0 where they were not asked for.

        Raises:
            ValueError: the first token of a row is wanted.
        """
        if wanted_BS[:, 0].any():
            raise ValueError("the first token of a sequence has no log-probability: nothing stands before it")
        # What predicts a token is the state before it.
        before_BS = functional.pad(wanted_BS[:, 1:], (0, 1))
        ids_M = ids_BS[wanted_BS]
        entropy_M: Tensor | None = None
        if self.plain_head:
            logprobs_M, entropy_M = as_forward(
                self.policy, self._by_hidden_states, ids_BS, mask_BS, before_BS, ids_M, temperature, want_entropy
            )
        else:
            logits_MV = own_logits(self.policy, ids_BS, mask_BS, before_BS)
            logprobs_M = selective_logprobs(logits_MV, ids_M, temperature)
            entropy_M = entropy_from_logits(logits_MV / temperature) if want_entropy else None

        def laid_out(x_M: Tensor) -> Tensor:
            return x_M.new_zeros(ids_BS.shape).masked_scatter(wanted_BS, x_M)

        return laid_out(logprobs_M), None if entropy_M is None else laid_out(entropy_M)

    def _by_hidden_states(
        self,
        ids_BS: Tensor,
        mask_BS: Tensor,
        before_BS: Tensor,
        ids_M: Tensor,
        temperature: float,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        head = self.policy.get_output_embeddings()
        chunk, part = chunk_sizes(head.weight.shape[0], ids_BS.device.type)
        return chunked_selective_logprobs(
            hidden_at(self.policy, ids_BS, mask_BS, before_BS),
            head.weight,
            head.bias,
            ids_M,
            temperature,
            chunk_tokens=chunk,
            part_size=part,
            want_entropy=want_entropy,
        )


def chunk_sizes(vocabulary: int, device: str) -> tuple[int, int]:
    """Of how many tokens, and for how many of the vocabulary, logits exist at a time on a ``device`` of that type."""
    part = min(_CPU_PART, vocabulary) if device == "cpu" else vocabulary
    return max(64, _LOGIT_BYTES.get(device, 2**28) // (4 * part)), part


def own_logits(policy: Any, ids_BS: Tensor, mask_BS: Tensor, wanted_BS: Tensor) -> Tensor:
    """(M, V) of the model's own head at the true places of ``wanted_BS``."""
    if is_packed(policy):
        return packed_outputs(policy, ids_BS, mask_BS, wanted_BS)
    logits_BSV: Tensor = policy(
        input_ids=ids_BS, attention_mask=mask_BS.long(), position_ids=positions(mask_BS), use_cache=False
    ).logits
    return logits_BSV[wanted_BS]


@torch.no_grad()
def _has_plain_head(policy: Any) -> bool:
    head = policy.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    device = head.weight.device
    ids_BS = torch.arange(1, 9, device=device)[None, :] % head.weight.shape[0]
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    was_training = policy.training
    policy.eval()
    expected_MV = own_logits(policy, ids_BS, mask_BS, mask_BS).float()
    logits_MV = head(hidden_at(policy, ids_BS, mask_BS, mask_BS)).float()
    policy.train(was_training)
    scale = max(1.0, float(expected_MV.abs().max()))
    return bool((logits_MV - expected_MV).abs().max() <= _HEAD_TOLERANCE * scale)
