"""What autograd keeps of a micro-batch for the gradient, counted before there is a model.

The forward passes are training's own, with its attention, packing, precision, adapters and checkpointing; they run on
torch's fake tensors, which have shapes and a device and no content. What is kept grows by the same bytes with every
sequence of one length, so one and two of them tell the rest.

Shapes: B sequences, S tokens of each, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.errors import ModelError
from trainer.models import chunk_sizes
from trainer.optimisation import Precision, autocast
from trainer.packed_attention import ATTENTION, Piece, Row, go_on, making_row, stop_early

# What the code of a model raises, any of hundreds, that can't be run our way.
_UNFIT = (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError)
# Tensors of the size of a chunk's logits that exist at once in the backward pass.
_LOGIT_COPIES = 4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: ``sequences`` (a mean, so not always whole) of ``length`` tokens, ``asked`` of each used."""

    sequences: float
    length: int
    asked: int
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes: ``kept`` from the forward to the backward pass, and ``anew``, one checkpointed layer's, computed in it."""

    kept: int
    anew: int
    packed: bool


def without_content(model: nn.Module, device: torch.device) -> FakeTensorMode:
    """Gives ``model``, which was made on the meta device, weights on ``device`` without content, tied ones once.

    Returns:
        The mode to run it in.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    replaced = []  # Their numbers must not be given to others meanwhile.
    with mode:
        for module in model.modules():
            for tensors in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers)):
                for name, tensor in list(tensors.items()):
                    if tensor is not None:
                        replaced.append(tensor)
                        tensors[name] = fake(tensor)
    return mode


def kept_of_body(body: Any, mode: FakeTensorMode, batch: Batch, *, packed: bool, checkpointing: bool) -> Kept:
    """What the layers of ``body``, and what stands before them, keep.

    Args:
        body: of a language model or classifier, as it is trained, from ``without_content``.
        mode: its own.
        batch: the micro-batch.
        packed: whether it is to be a row without padding; a body that can't be run so is padded.
        checkpointing: whether one activation a layer is kept.

    Raises:
        ModelError: its code can't be run without content.
    """
    counts = None
    if packed:
        before, layers = body.config._attn_implementation, getattr(body, "layers", None)
        body.set_attn_implementation(ATTENTION)
        last = layers[-1] if isinstance(layers, nn.ModuleList) else None
        if last is not None:
            stop_early(last)
        try:
            counts = _counts(body, mode, batch, packed=True, checkpointing=checkpointing)
        except _UNFIT:
            if last is not None:
                go_on(last)
            body.set_attn_implementation(before)
    packed = counts is not None
    try:
        kept, anew = counts or _counts(body, mode, batch, packed=False, checkpointing=checkpointing)
    except _UNFIT as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"the activations of {type(body).__name__} can't be told without its weights: {reason}"
        ) from error
    return Kept(kept=kept, anew=anew, packed=packed)


def _counts(body: Any, mode: FakeTensorMode, batch: Batch, *, packed: bool, checkpointing: bool) -> tuple[int, int]:
    whole = _for_all(body, mode, batch, packed)
    if not checkpointing:
        return whole, 0
    # Without random states, which a fake tensor can't hold: 5 KiB a layer.
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    body.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    try:
        kept = _for_all(body, mode, batch, packed)
    finally:
        body.gradient_checkpointing_disable()
    return kept, whole // body.config.get_text_config().num_hidden_layers


def _for_all(body: Any, mode: FakeTensorMode, batch: Batch, packed: bool) -> int:
    one, two = (_saved(body, mode, batch, sequences, packed) for sequences in (1, 2))
    return round(one + (batch.sequences - 1) * (two - one))


def _saved(body: Any, mode: FakeTensorMode, batch: Batch, sequences: int, packed: bool) -> int:
    """Bytes that the forward pass of so many whole sequences saves, the model's own weights and buffers not counted."""
    device = next(body.parameters()).device
    own = {id_of(tensor) for tensor in (*body.parameters(), *body.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if (storage := id_of(tensor)) not in own:
            kept[storage] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # Or its storage's place would be taken by another.
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, batch.precision):
        output = _forward(body, device, batch, sequences, packed)
        del output
    return sum(kept.values())


def id_of(tensor: Tensor) -> int:
    """Of the memory of ``tensor``, as long as it lives: what fake tensors have in place of an address."""
    return int(tensor.untyped_storage()._cdata)


def _forward(body: Any, device: torch.device, batch: Batch, sequences: int, packed: bool) -> Tensor:
    length, asked = batch.length, batch.asked
    if packed:
        ids_1N = torch.zeros(1, sequences * length, dtype=torch.long, device=device)
        asked_M = torch.empty(sequences * asked, dtype=torch.long, device=device)
        row = Row(pieces=(Piece(length),) * sequences, asked_M=asked_M)
        with making_row():
            found = body(input_ids=ids_1N, position_ids=ids_1N.clone(), use_cache=False, quartet_row=row)
    else:
        ids_BS = torch.zeros(sequences, length, dtype=torch.long, device=device)
        # As transformers makes it of a batch with padding in it.
        mask_B1SS = torch.ones(sequences, 1, length, length, dtype=torch.bool, device=device)
        found = body(input_ids=ids_BS, attention_mask=mask_B1SS, position_ids=ids_BS.clone(), use_cache=False)
    hidden: Tensor = found.last_hidden_state
    return hidden


@dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """Bytes of an output layer: ``kept`` for its gradient, ``logits`` that exist for a chunk at a time, and ``summed``,
    the gradient of its weights while it is added up beside that of earlier micro-batches."""

    kept: int
    logits: int
    summed: int


def of_vocabulary(policy: Any, batch: Batch, device: torch.device, *, want_entropy: bool) -> HeadMemory:
    """Of the log-probabilities of given tokens, ``models.TokenLogprobs``.

    Args:
        policy: a causal language model, content or not.
        batch: the micro-batch.
        device: that it is trained on.
        want_entropy: whether the gradient of the entropy is wanted, too.
    """
    head = policy.get_output_embeddings()
    vocabulary, width = head.weight.shape
    tokens = round(batch.sequences * batch.asked)
    half = 2 if _is_half(device, batch.precision) else 4
    # Token ids, and float32 numbers of each token.
    per_token = 8 + 4 * (2 if want_entropy else 1)
    if not has_plain_head(policy):
        return HeadMemory(kept=tokens * (3 * 4 * vocabulary + per_token), logits=0, summed=0)
    chunk, part = chunk_sizes(vocabulary, device.type)
    copy_of_weight = vocabulary * width * half if half == 2 else 0
    trained = head.weight.requires_grad
    return HeadMemory(
        kept=tokens * (width * half + per_token) + copy_of_weight + round(batch.sequences * batch.length),
        logits=_LOGIT_COPIES * 4 * min(chunk, max(1, tokens)) * part + tokens * width * 4,
        summed=4 * vocabulary * width if trained else 0,
    )


def of_scores(width: int, batch: Batch) -> HeadMemory:
    """Of a float32 head of scores or values on hidden states of ``width``."""
    return HeadMemory(kept=round(batch.sequences * batch.asked) * width * 4, logits=0, summed=0)


def has_plain_head(policy: Any) -> bool:
    """Whether logits are hidden states times output weights, by what a configuration says of them."""
    config = policy.config.get_text_config()
    odd = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return isinstance(policy.get_output_embeddings(), nn.Linear) and not any(
        getattr(config, name, None) not in (None, 1, 1.0) for name in odd
    )


def _is_half(device: torch.device, precision: Precision) -> bool:
    with autocast(device, precision):
        return torch.is_autocast_enabled(device.type)
