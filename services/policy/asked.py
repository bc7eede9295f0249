"""What a GenerateRequest asks for, checked: every bound is refused with field, value and bound."""

from __future__ import annotations

import hashlib
import math
import secrets

from quartet.common.v1 import common_pb2
from quartet.fingerprint import derive_seeds
from quartet.policy.v1 import policy_pb2
from quartet.text_tokens import opened
from services.hosting import serving
from services.hosting.model import out_of_range
from services.policy.engine import Sampling
from services.policy.hosted import HostedPolicy
from services.runtime.errors import InvalidArgumentError

MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 256
MOST_STOP_TOKENS = 1024
MOST_BIASES = 1024
LARGEST_BIAS = 100.0
LONGEST_REQUEST_ID = 128
# vLLM raises what lies between to this, and would sample from another distribution than was asked for.
SMALLEST_TEMPERATURE = 0.01
_MOST_QUOTED = 8


def require(fine: bool, name: str, value: object, bound: str) -> None:
    """Refuses a value.

    Raises:
        InvalidArgumentError: it is not fine.
    """
    if not fine:
        raise InvalidArgumentError(f"{name} is {value}, must be {bound}", field=name.partition("[")[0])


def check_request(request: policy_pb2.GenerateRequest) -> int:
    """Refuses what cannot be sampled as a whole; returns n."""
    if not request.prompts:
        raise InvalidArgumentError("prompts is empty: send at least one", field="prompts")
    require(request.n >= 0, "n", request.n, "at least 1 (0 means 1)")
    named, length = request.request_id, len(request.request_id)
    require(
        length <= LONGEST_REQUEST_ID, "request_id", f"{length} characters long", f"at most {LONGEST_REQUEST_ID} long"
    )
    # It stands in logs and metadata.
    require(named.isascii() and (not named or named.isprintable()), "request_id", repr(named), "printable ASCII")
    return request.n or 1


def wanted(request: policy_pb2.GenerateRequest, total: int) -> list[int]:
    """The completions, as prompt_index * n + sample_index, that the client has not received."""
    require(len(request.received) <= total, "received", f"{len(request.received)} long", f"at most {total} long")
    bad = [index for index in request.received if not 0 <= index < total]
    require(not bad, "received", bad[:_MOST_QUOTED], f"in [0, prompts times n {total})")
    received = set(request.received)
    return [index for index in range(total) if index not in received]


def content_of(request: policy_pb2.GenerateRequest) -> bytes:
    """Digest of what request_id stands for: everything but the id itself and what was received."""
    copy = policy_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    copy.ClearField("received")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).digest()


def sampling_of(params: policy_pb2.SamplingParams, hosted: HostedPolicy) -> Sampling:
    """The sampling settings, with defaults in place.

    Raises:
        InvalidArgumentError: one is out of bounds; names it, its value and the bound.
    """
    temperature = params.temperature if params.HasField("temperature") else 1.0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    fine = math.isfinite(temperature) and temperature >= 0
    require(fine, "sampling.temperature", temperature, "a finite number, at least 0")
    require(
        # The float32 that stands for the bound may lie a little below it.
        temperature == 0 or temperature > SMALLEST_TEMPERATURE * (1 - 1e-6),
        "sampling.temperature",
        temperature,
        f"0 (greedy), or at least {SMALLEST_TEMPERATURE}",
    )
    most_hot = hosted.engine.max_temperature
    require(temperature <= most_hot, "sampling.temperature", temperature, f"at most {most_hot:g}, as the engine has it")
    require(0 < top_p <= 1, "sampling.top_p", top_p, "in (0, 1]")
    require(params.top_k >= 0, "sampling.top_k", params.top_k, "at least 0 (0 keeps all)")
    longest, most = hosted.engine.max_sequence_tokens, params.max_new_tokens
    require(1 <= most < longest, "sampling.max_new_tokens", most, f"in [1, {longest - 1}]")
    least = params.min_new_tokens
    require(0 <= least <= most, "sampling.min_new_tokens", least, f"in [0, max_new_tokens {most}]")
    stops = _stop_tokens(params, hosted)
    return Sampling(
        temperature=temperature,
        # Greedy takes the likeliest whatever else is cut off, and tells its log-probability among all.
        top_p=top_p if temperature else 1.0,
        top_k=params.top_k if temperature else 0,
        max_new_tokens=most,
        min_new_tokens=least,
        stop_token_ids=stops,
        logit_bias=_logit_bias(params, hosted.engine.vocab_size),
    )


def _stop_tokens(params: policy_pb2.SamplingParams, hosted: HostedPolicy) -> tuple[int, ...]:
    """The model's own end tokens and those asked for."""
    vocab_size, asked = hosted.engine.vocab_size, params.stop_token_ids
    name = "sampling.stop_token_ids"
    require(len(asked) <= MOST_STOP_TOKENS, name, f"{len(asked)} tokens", f"at most {MOST_STOP_TOKENS}")
    bad = [token for token in asked if not 0 <= token < vocab_size]
    require(not bad, name, bad[:_MOST_QUOTED], f"in the vocabulary, [0, {vocab_size})")
    stops = tuple(dict.fromkeys((*hosted.model.eos_token_ids, *asked)))
    if params.min_new_tokens and len(stops) >= vocab_size:
        raise InvalidArgumentError(
            f"{name} is the whole vocabulary and min_new_tokens is {params.min_new_tokens}: no token is left to sample",
            field=name,
        )
    return stops


def _logit_bias(params: policy_pb2.SamplingParams, vocab_size: int) -> tuple[tuple[int, float], ...]:
    name = "sampling.logit_bias"
    require(len(params.logit_bias) <= MOST_BIASES, name, f"{len(params.logit_bias)} tokens", f"at most {MOST_BIASES}")
    biases = tuple(sorted(params.logit_bias.items()))
    for token, bias in biases:
        require(0 <= token < vocab_size, name, f"of token {token}", f"of one in the vocabulary, [0, {vocab_size})")
        inside = -LARGEST_BIAS <= bias <= LARGEST_BIAS  # Not of NaN.
        require(inside, f"{name}[{token}]", bias, f"in [{-LARGEST_BIAS:g}, {LARGEST_BIAS:g}]")
    return biases


def stop_strings_of(params: policy_pb2.SamplingParams, hosted: HostedPolicy) -> tuple[str, ...]:
    """The stop strings, each once.

    Raises:
        InvalidArgumentError: they are too many, too long, empty, or can never stand in a text.
    """
    name, asked = "sampling.stop_strings", params.stop_strings
    require(len(asked) <= MOST_STOP_STRINGS, name, f"{len(asked)} strings", f"at most {MOST_STOP_STRINGS}")
    special = {str(token) for token in hosted.tokenizer.added_tokens_decoder.values() if token.special} if asked else ()
    for place, stop in enumerate(asked):
        require(
            1 <= len(stop) <= LONGEST_STOP_STRING,
            f"{name}[{place}]",
            f"{len(stop)} characters long",
            f"1 to {LONGEST_STOP_STRING} long",
        )
        if (token := next((token for token in special if token in stop), None)) is not None:
            raise InvalidArgumentError(
                f"{name}[{place}] is {stop!r}, but the special token {token!r} never stands in the text: give its id, "
                f"{hosted.tokenizer.convert_tokens_to_ids(token)}, in sampling.stop_token_ids",
                field=name,
            )
    return tuple(dict.fromkeys(asked))


def seeds_of(params: policy_pb2.SamplingParams, prompts: int, n: int, drawn: int) -> list[int]:
    """One seed a completion, by prompt and then sample. ``drawn``: the request's seed where it names none."""
    if params.prompt_seeds:
        return derive_seeds([("prompt", seed, s) for seed in params.prompt_seeds for s in range(n)])
    seed = params.seed if params.HasField("seed") else drawn
    return derive_seeds([("request", seed, p, s) for p in range(prompts) for s in range(n)])


def check_seeds(params: policy_pb2.SamplingParams, prompts: int) -> None:
    """Refuses prompt_seeds that are neither empty nor as long as prompts."""
    if params.prompt_seeds and len(params.prompt_seeds) != prompts:
        raise InvalidArgumentError(
            f"sampling.prompt_seeds has {len(params.prompt_seeds)} values, must have none or {prompts}, one a prompt",
            field="sampling.prompt_seeds",
        )


def draw_seed() -> int:
    """A fresh seed for a request that names none."""
    return secrets.randbits(62)


def prompt_ids(hosted: HostedPolicy, prompt: common_pb2.Prompt, sampling: Sampling) -> list[int] | str:
    """The token ids of a prompt, or why it is refused."""
    form = prompt.WhichOneof("content")
    if form is None:
        return "prompt is not set: give text, token_ids or messages"
    room = hosted.engine.max_sequence_tokens - sampling.max_new_tokens
    if form == "token_ids":
        if len(prompt.token_ids.ids) > room:
            return _too_long(f"{len(prompt.token_ids.ids)} tokens", sampling, hosted)
        token_ids = list(prompt.token_ids.ids)
    else:
        if form == "text":
            text = prompt.text
        elif not prompt.messages.messages:
            return "prompt.messages is empty: give at least one message"
        else:
            try:
                text = serving.chat_text(hosted.tokenizer, prompt.messages.messages)
            except serving.ItemRefusedError as error:
                return str(error)
        # Tokenising what is far too long would take a minute of a processor.
        if hosted.characters_per_token and len(text) > room * hosted.characters_per_token:
            return _too_long(f"{len(text)} characters, more than {room} tokens", sampling, hosted)
        token_ids = list(hosted.tokenizer(text, add_special_tokens=False).input_ids)
        if form == "text":
            token_ids = opened(token_ids, hosted.opening)
    if not token_ids:
        return "prompt has no tokens: there is nothing to continue"
    if (reason := out_of_range(token_ids, hosted.engine.vocab_size)) is not None:
        return reason
    if len(token_ids) > room:
        return _too_long(f"{len(token_ids)} tokens", sampling, hosted)
    return token_ids


def _too_long(has: str, sampling: Sampling, hosted: HostedPolicy) -> str:
    return (
        f"prompt has {has} and max_new_tokens is {sampling.max_new_tokens}, together more than "
        f"the {hosted.engine.max_sequence_tokens} that the model takes"
    )
