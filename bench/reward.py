"""Scoring with a reward model: the reward service against what others do.

    make bench-reward TEXTS=pref_hh_harmless_dev.jsonl

The sides are those of ``bench.reward_sides``: transformers one by one, in padded batches and as a pipeline, vLLM in
process and through its HTTP server, our scorer in process and the reward service through gRPC.

All in one precision with the same 31 M-parameter Llama classifier. Two loads: texts as they come, and four responses
that share each prompt. Sides take turns (see ``bench.turns``); what they found is compared. The first three are several
times slower than the others, and compute nothing once for several texts: they take two turns with a sample, whose
lengths are distributed as those of all, every eighth of the texts in order of length. So tokens a second are compared.
The others take two turns with all texts, and more while those of a side differ by more than 5 %. How fast the layers'
matrix products alone would be says what the processor allows. Then what callers wait who ask for one score at a time
(see ``bench.reward_latency``). The figures go to bench/out as reward.json and reward.png; broken off, it judges what is
finished. Without TEXTS the texts are made-up words of about the same lengths, which share no beginnings.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import reward_latency
from bench.models import sentence
from bench.outcome import OUTPUT, Verdict, conclude
from bench.reward_servers import SERVICE
from bench.reward_sides import NAIVE, SAMPLED, SCORER, SIDES, WARM_UP, Text, sample, write_loads
from bench.turns import Side, Turn, set_threads, start_sides

_ONLINE = 1024
"""Texts for the latencies, at least: more than a turn takes, so that no prefix cache knows one that comes twice."""
_LEAST_ROUNDS, _TIGHT = 2, 0.05
"""So many rounds, and another while a side's turns differ by more than this share of the quickest."""
TARGETS = {"alone": 0.95, "shared": 1.3}
"""Of the best peer's texts/s, by load."""
NAIVE_TARGET = 2.0
OVERHEAD_TARGET = 0.05
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest difference of a score from that of the text alone, by transformers, by precision."""
_WIDTH, _INNER, _LAYERS, _HEADS = 512, 1536, 8, 8
_LONGEST = 512
_VOCABULARY = 8192


def make_model(folder: Path, texts: Sequence[str]) -> Path:
    """A Llama classifier of 31 M parameters and a tokenizer trained on ``texts``."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from bench.models import train_tokenizer

    tokenizer = train_tokenizer(texts, _VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=_INNER,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=_LONGEST,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.model_max_length = _LONGEST
    tokenizer.save_pretrained(folder)
    (folder / "quartet.json").write_text(json.dumps({"kind": "reward", "append_eos": True}))
    return folder


def read_pairs(path: Path | None, count: int) -> list[tuple[str, str]]:
    """(prompt, response) from the file's first rows, or made-up words of about the same lengths."""
    if path is None:
        draw = random.Random(0)
        lengths = [int(draw.lognormvariate(3.3, 0.9)) + 4 for _ in range(count)]
        return [(sentence(draw, 2 * length), " " + sentence(draw, length)) for length in lengths]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [(row["prompt"], row["chosen"]) for row in rows]


def make_loads(folder: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, list[Text]]:
    """Texts as they are, and every fourth prompt with the responses of four."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(prompt: str, response: str) -> Text:
        ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, response)]
        room = max(1, _LONGEST - 1 - len(ids[1]))
        prompt_ids, response_ids = ids[0][-room:], [*ids[1][: _LONGEST - 2], 1]
        return Text(prompt_ids, response_ids, tokenizer.decode(prompt_ids + response_ids))

    quartets = [pairs[first : first + 4] for first in range(0, len(pairs) - 3, 4)]
    return {
        "alone": [encode(prompt, response) for prompt, response in pairs],
        "shared": [encode(four[0][0], response) for four in quartets for _, response in four],
    }


@dataclass
class Found:
    """What a side did with the texts of a load that lie at ``places``, which are all or a sample."""

    name: str
    model_mib: float
    places: Sequence[int]
    tokens: int
    turns: list[Turn] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Texts a second."""
        return len(self.places) / statistics.median(turn.seconds for turn in self.turns)

    @property
    def token_rate(self) -> float:
        """Tokens a second: what is compared, since a sample's texts are not quite as long as all."""
        return self.tokens / statistics.median(turn.seconds for turn in self.turns)

    @property
    def tight(self) -> bool:
        """Whether another turn would tell nothing new."""
        seconds = [turn.seconds for turn in self.turns]
        return max(seconds) <= (1 + _TIGHT) * min(seconds)


Results = dict[str, list[Found]]
"""By load, in the order of the sides."""


def measure(
    results: Results, latencies: reward_latency.Results, texts: Path | None, count: int, rounds: int, dtype: str
) -> None:
    """Both loads, and latencies. Breaking it off leaves in ``results`` and ``latencies`` what is finished."""
    pairs = read_pairs(texts, count)
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "model", [part for pair in pairs for part in pair])
        loads = make_loads(model, pairs)
        write_loads(loads, Path(name))
        with start_sides(
            {side: ["-m", "bench.reward_sides", side, str(model), name, dtype] for side in SIDES}
        ) as sides:
            for side in sides:
                if side.name not in SAMPLED:
                    side.turn(WARM_UP)
            for load, content in loads.items():
                print(f"\n{load}: {len(content)} texts, {sum(len(text.ids) for text in content):,} tokens", flush=True)
                results[load] = _take_turns(load, content, sides, rounds)
                print("\n".join(table(results[load])))
        print("\nlatency")
        online = [(t.prompt, t.response) for t in make_loads(model, read_pairs(texts, max(count, _ONLINE)))["alone"]]
        reward_latency.measure(latencies, model, online, dtype=dtype, rounds=min(rounds, 2))
        print("\n".join(reward_latency.table(latencies)))


def _take_turns(load: str, texts: Sequence[Text], sides: Sequence[Side], rounds: int) -> list[Found]:
    results = []
    for side in sides:
        places = sample(texts) if side.name in SAMPLED else range(len(texts))
        results.append(Found(side.name, side.model_mib, places, sum(len(texts[place].ids) for place in places)))
    pairs = list(zip(sides, results, strict=True))
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and all(found.tight for found in results if found.name not in SAMPLED):
            break
        for side, found in pairs if number % 2 == 0 else reversed(pairs):
            if side.name not in SAMPLED or number < _LEAST_ROUNDS:
                found.turns.append(side.turn(load))
                rate = len(found.places) / found.turns[-1].seconds
                print(f"round {number + 1}: {side.name:<16} {rate:>8,.1f} texts/s", flush=True)
    return results


def table(results: Sequence[Found]) -> list[str]:
    """Figures of one load."""
    lines = [f"{'':<18}{'texts':>7}{'texts/s':>9}{'tokens/s':>10}{'peak MiB':>10}{'above model':>13}{'difference':>12}"]
    for found, error in zip(results, _errors(results), strict=True):
        memory = max(turn.peak_mib for turn in found.turns)
        lines.append(
            f"{found.name:<18}{len(found.places):>7}{found.rate:>9,.1f}{found.token_rate:>10,.0f}"
            f"{found.model_mib + memory:>10,.0f}{memory:>13,.0f}{error:>12.1e}"
        )
    return lines


def _errors(results: Sequence[Found]) -> list[float]:
    """Largest difference of each side's scores from those of the texts alone, where those were computed."""
    truth, places = results[0].turns[0].found, results[0].places

    def error(found: Found) -> float:
        wanted = [found.places.index(place) for place in places]
        return max(abs(turn.found[i] - true) for turn in found.turns for i, true in zip(wanted, truth, strict=True))

    return [error(found) for found in results]


def products_rate(dtype: str) -> float:
    """Tokens/s if the model were nothing but the matrix products of its layers: what this processor allows.

    The best of some tries, for the machine may do other things as well.
    """
    import torch

    set_threads()
    tokens, precision = 2048, getattr(torch, dtype)
    shapes = [(_WIDTH, _WIDTH)] * 4 + [(_WIDTH, _INNER)] * 2 + [(_INNER, _WIDTH)]
    products = [(torch.randn(tokens, m, dtype=precision), torch.randn(n, m, dtype=precision)) for m, n in shapes]
    seconds = []
    with torch.inference_mode():
        for _ in range(12):
            start_s = time.perf_counter()
            for inputs, weights in products:
                torch.nn.functional.linear(inputs, weights)
            seconds.append(time.perf_counter() - start_s)
    return tokens / (_LAYERS * min(seconds))


def verdicts(results: Results, dtype: str, products: float) -> list[Verdict]:
    """What is asked of us, and whether it holds. ``products``: tokens/s of matrix products alone."""
    verdicts = []

    def judge(held: bool, text: str) -> None:
        verdicts.append(Verdict(held, text))

    for load, sides in results.items():
        rates = {found.name: found.token_rate for found in sides}
        best = max((rate, name) for name, rate in rates.items() if name not in (SERVICE, SCORER))
        ratio = rates[SERVICE] / best[0]
        judge(
            ratio >= TARGETS[load], f"{load}: tokens/s / {best[1]}'s: {ratio:.2f}, target at least {TARGETS[load]:.2f}"
        )
        naive = max(rates[name] for name in NAIVE)
        told = "" if load == "shared" else f"; the processor's matrix products alone would be at {products / naive:.2f}"
        judge(
            rates[SERVICE] >= NAIVE_TARGET * naive,
            f"{load}: / the better naive one's: {rates[SERVICE] / naive:.2f}, target at least {NAIVE_TARGET}{told}",
        )
        overhead = rates[SCORER] / rates[SERVICE] - 1
        judge(
            overhead <= OVERHEAD_TARGET,
            f"{load}: gRPC and runtime above the scorer in process: {overhead:.1%}, target at most "
            f"{OVERHEAD_TARGET:.0%}",
        )
        error, bound = max(_errors(sides)), AGREEMENT[dtype]
        judge(error <= bound, f"{load}: all scores agree: {error:.1e}, target at most {bound:.0e}")
    return verdicts


def figures(results: Results, latencies: reward_latency.Results) -> dict[str, Any]:
    """What a program wants to know of it."""
    return {
        "seconds_and_peak_mib": {
            load: {side.name: [[turn.seconds, side.model_mib + turn.peak_mib] for turn in side.turns] for side in sides}
            for load, sides in results.items()
        },
        "texts_and_tokens": {
            load: {side.name: [len(side.places), side.tokens] for side in sides} for load, sides in results.items()
        },
        "rate_p50_ms_p99_ms": {
            name: {
                count: [waits.rate, waits.percentile_ms(50), waits.percentile_ms(99)]
                for count, waits in by_count.items()
                if waits.seconds
            }
            for name, by_count in latencies.items()
        },
    }


def draw(results: Results, latencies: reward_latency.Results) -> None:
    """The figures as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    OUTPUT.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(1, len(results) + 1, figsize=(5 * len(results) + 5, 3.6), layout="constrained")
    for axis, (load, sides) in zip(axes, results.items(), strict=False):
        rates = [side.token_rate for side in sides]
        colours = ["tab:green" if side.name == SERVICE else "tab:gray" for side in sides]
        bars = axis.barh([side.name for side in sides], rates, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title({"alone": "texts as they come", "shared": "four responses share a prompt"}[load])
        axis.set_xlabel("tokens/s")
    for name, by_count in latencies.items():
        counts = [count for count, waits in by_count.items() if waits.seconds]
        (line,) = axes[-1].plot(counts, [by_count[c].percentile_ms(50) for c in counts], marker="o", label=name)
        p99 = [by_count[c].percentile_ms(99) for c in counts]
        axes[-1].plot(counts, p99, marker="o", linestyle=":", color=line.get_color())
    axes[-1].set(xscale="log", yscale="log", xlabel="callers at once", ylabel="ms", title="latency: p50, dotted p99")
    axes[-1].legend()
    figure.savefig(OUTPUT / "reward.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="JSON Lines with prompt and chosen; made-up words without it")
    parser.add_argument("--count", type=int, default=256, help="texts: the first so many rows")
    parser.add_argument("--rounds", type=int, default=4, help="at most")
    parser.add_argument("--dtype", choices=list(AGREEMENT), default="float32", help="of all sides")
    options = parser.parse_args()
    products = products_rate(options.dtype)
    print(f"matrix products alone: {products:,.0f} tokens/s")
    results: Results = {}
    latencies: reward_latency.Results = {}
    try:
        measure(results, latencies, options.texts, options.count, options.rounds, options.dtype)
    except KeyboardInterrupt:
        broken_off = True
        print("\nbroken off: what is finished is judged")
    else:
        broken_off = False
        draw(results, latencies)
    source = "made-up words" if options.texts is None else options.texts.name
    judged = verdicts(results, options.dtype, products) + reward_latency.verdicts(latencies)
    told = {"texts": source, "dtype": options.dtype, "broken_off": broken_off, "products_tokens_per_s": products}
    conclude("reward", judged, told | figures(results, latencies))
    if broken_off:
        sys.exit(1)


if __name__ == "__main__":
    main()
