"""KL to the reference and entropy over the whole vocabulary, at every token of given responses.

Shapes: B sequences, S tokens of prompt and response, N tokens that are looked at, C of them at a time, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.batching import learned_mask, pad_right
from trainer.distributed import collected, own_micro_batches
from trainer.encoding import EncodedResponse
from trainer.kl import exact_kl
from trainer.losses import entropy_from_logits
from trainer.models import TokenLogprobs, hidden_at, own_logits
from trainer.optimisation import Precision, autocast
from trainer.sharding import as_forward

# Logits that exist at once, of one model.
_LOGITS = 2**22


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """Of each response: the sum over its tokens of KL(pi, ref) and of pi's entropy, in nats.

    Every token's distribution counts whole, at the states that the responses pass through: what sampling one token
    from it adds in noise to log pi - log ref is not there.
    """

    kl: tuple[float, ...] | None
    entropy: tuple[float, ...]


@torch.no_grad()
def distributions(
    policy: Any,
    reference: Any | None,
    rows: Sequence[EncodedResponse],
    *,
    temperature: float,
    pad_id: int,
    micro_batch_tokens: int,
    precision: Precision,
    as_reference: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Distributions:
    """Looks at each distribution that a response token was drawn from.

    Args:
        policy, reference: causal language models of one vocabulary, on one device; the latter may be left out.
        rows: prompts with their responses.
        temperature: divides the logits of both, as in sampling.
        pad_id: what padding is filled with.
        micro_batch_tokens: tokens at once, padding included.
        precision: of matrix products.
        as_reference: within it ``reference`` is the reference, such as a policy whose adapter is switched off.
    """
    found: dict[int, tuple[float, float]] = {}
    models = [policy] if reference is None else [policy, reference]
    ways: list[Callable[[], contextlib.AbstractContextManager[None]]] = [contextlib.nullcontext, as_reference]
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        plain = [TokenLogprobs(model).plain_head for model in models]
        for part, weight in own_micro_batches([len(row) for row in rows], micro_batch_tokens, packed=False):
            ids_BS, mask_BS = pad_right([rows[index].ids for index in part], pad_id, policy.device)
            wanted_BS = learned_mask(mask_BS, [rows[index].learned for index in part])
            # The state that a token was drawn in stands one place before it.
            states_BS = torch.zeros_like(wanted_BS)
            states_BS[:, :-1] = wanted_BS[:, 1:]
            owners_N = states_BS.nonzero()[:, 0].tolist()
            chunk = max(1, _LOGITS // policy.config.get_text_config().vocab_size)
            with autocast(policy.device, precision):
                tables = [
                    _logits_at(model, ids_BS, mask_BS, states_BS, chunk, plain_head, way)
                    for model, plain_head, way in zip(models, plain, ways, strict=False)
                ]
                look = functools.partial(_look, tables, temperature)
                for model in dict.fromkeys(models):  # Weights of both are whole where the tables are made.
                    look = functools.partial(as_forward, model, look)
                looked = look()
            for owner, (nats, own) in zip(owners_N, looked if weight else (), strict=False):
                kl, entropy = found.get(part[owner], (0.0, 0.0))
                found[part[owner]] = kl + nats, entropy + own
    found = collected(found)
    ordered = [found.get(row, (0.0, 0.0)) for row in range(len(rows))]
    return Distributions(
        kl=None if reference is None else tuple(kl for kl, _ in ordered),
        entropy=tuple(entropy for _, entropy in ordered),
    )


def _look(tables: Sequence[Iterator[Tensor]], temperature: float) -> list[tuple[float, float]]:
    """KL between two tables of logits (0 where there is one) and entropy of the first, at each of their tokens."""
    found: list[tuple[float, float]] = []
    for logits in zip(*tables, strict=True):
        scaled = [_wide(logits_CV) / temperature for logits_CV in logits]
        entropy_C = entropy_from_logits(scaled[0]).tolist()
        kl_C = exact_kl(*scaled).tolist() if len(scaled) > 1 else [0.0] * len(entropy_C)
        found += zip(kl_C, entropy_C, strict=True)
    return found


def _logits_at(
    model: Any,
    ids_BS: Tensor,
    mask_BS: Tensor,
    states_BS: Tensor,
    chunk: int,
    plain_head: bool,
    way: Callable[[], contextlib.AbstractContextManager[None]],
) -> Iterator[Tensor]:
    """(C, V) logits of the tokens that follow the True ones of ``states_BS``, a chunk of those at a time.

    ``plain_head``: they are hidden states times output weights, which need not be there for all places. ``way``: within
    it the model is what it is asked as.
    """
    if plain_head:
        with way():
            hidden_ND = hidden_at(model, ids_BS, mask_BS, states_BS)
        head = model.get_output_embeddings()
        bias_V = None if head.bias is None else _wide(head.bias)
        for hidden_CD in torch.split(hidden_ND, chunk):
            # In bfloat16 the difference of two near policies would be its rounding.
            with torch.autocast(hidden_CD.device.type, enabled=False):
                logits_CV = functional.linear(_wide(hidden_CD), _wide(head.weight), bias_V)
            yield logits_CV
        return
    with way():
        logits_NV = own_logits(model, ids_BS, mask_BS, states_BS)
    yield from torch.split(logits_NV, chunk)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, the former mode again outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
