"""Scoring with a reward model: the reward service against what others do.

    make bench-reward TEXTS=pref_hh_harmless_dev.jsonl

- one by one: a transformers classifier, a text at a time.
- padded batches: the same in batches of 32, in the order of arrival, padded to the longest.
- pipeline: transformers' pipeline("text-classification"), batches of 32; it tokenises, too.
- vLLM: its pooling runner's classify, in process, as it is by default: compiled where there is a C++ compiler, and with
  its prefix cache, which is emptied before each turn.
- vLLM HTTP server: the same through its own server, all texts in one request.
- own scorer: what the reward service runs, called in process; tells what gRPC and the runtime cost.
- reward service: through gRPC, in a process of its own.

All in float32 with the same 31 M-parameter Llama classifier. Two loads: texts as they come, and four responses that
share each prompt. Sides take turns (see ``bench.turns``); what they found is compared. Then what callers wait who ask
for one score at a time (see ``bench.reward_latency``). The figures go to bench/out as reward.json and reward.png.
Without TEXTS the texts are made-up words of about the same lengths, which share no beginnings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench import reward_latency
from bench.models import sentence
from bench.outcome import OUTPUT, Verdict, conclude
from bench.reward_servers import SERVICE, VLLM_SERVER, client, running
from bench.turns import Side, compiles, end_at_once, serve_turns, set_threads, set_vllm_environment, start_sides

SCORER = "own scorer"
NAIVE = ("one by one", "padded batches")
_ONCE = (*NAIVE, "pipeline")
"""Far slower than the others, and without anything to warm up: one turn each."""
TARGETS = {"alone": 0.95, "shared": 1.3}
"""Of the best peer's texts/s, by load."""
NAIVE_TARGET = 2.0
OVERHEAD_TARGET = 0.05
AGREEMENT = 1e-4
"""Largest difference of a score in float32 from that of the text alone, by transformers."""
_LONGEST = 512
_BATCH = 32
_VOCABULARY = 8192


@dataclass(frozen=True)
class Text:
    """Token ids, and the same as text."""

    prompt: list[int]
    response: list[int]
    text: str

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response


def make_model(folder: Path, texts: Sequence[str]) -> Path:
    """A Llama classifier of 31 M parameters and a tokenizer trained on ``texts``."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from bench.models import train_tokenizer

    tokenizer = train_tokenizer(texts, _VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
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


def measure(texts: Path | None, count: int, rounds: int) -> tuple[dict[str, list[Side]], reward_latency.Results]:
    """Both loads, and latencies; the first turn of each side warms it up and is not kept."""
    pairs = read_pairs(texts, count)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "model", [part for pair in pairs for part in pair])
        for load, content in make_loads(model, pairs).items():
            file = Path(name) / f"{load}.json"
            file.write_text(json.dumps([[text.prompt, text.response, text.text] for text in content]))
            tokens = sum(len(text.ids) for text in content)
            print(f"\n{load}: {len(content)} texts, {tokens:,} tokens", flush=True)
            commands = {side: ["-m", "bench.reward", "--side", side, str(model), str(file)] for side in _SIDES}
            with start_sides(commands) as sides:
                for number in range(-1, rounds):
                    for side in sides if number % 2 == 0 else reversed(sides):
                        if side.name in _ONCE and number != 0:
                            continue
                        turn = side.turn()
                        if number < 0:
                            side.turns.clear()
                        else:
                            rate = len(content) / turn.seconds
                            print(f"round {number + 1}: {side.name:<16} {rate:>8,.1f} texts/s", flush=True)
            print("\n".join(table(sides, len(content), tokens)))
            results[load] = sides
        print("\nlatency")
        online = [(text.prompt, text.response) for text in make_loads(model, pairs)["alone"]]
        latencies = reward_latency.measure(model, online, min(rounds, 2))
        print("\n".join(reward_latency.table(latencies)))
    return results, latencies


def _seconds(side: Side) -> float:
    return statistics.median(turn.seconds for turn in side.turns)


def table(sides: Sequence[Side], texts: int, tokens: int) -> list[str]:
    """Figures of one load."""
    found = [f"{'':<18}{'texts/s':>9}{'tokens/s':>10}{'peak MiB':>10}{'above model':>13}{'largest difference':>20}"]
    for side, error in _errors(sides).items():
        memory = max(turn.peak_mib for turn in side.turns)
        found.append(
            f"{side.name:<18}{texts / _seconds(side):>9,.1f}{tokens / _seconds(side):>10,.0f}"
            f"{side.model_mib + memory:>10,.0f}{memory:>13,.0f}{error:>20.1e}"
        )
    return found


def _errors(sides: Sequence[Side]) -> dict[Side, float]:
    """Largest difference of each side's scores from the first one's."""
    truth = sides[0].turns[0].found
    return {
        side: max(abs(a - b) for turn in side.turns for a, b in zip(turn.found, truth, strict=True)) for side in sides
    }


def verdicts(results: dict[str, list[Side]]) -> list[Verdict]:
    """What is asked of us, and whether it holds."""
    found = []

    def judge(held: bool, text: str) -> None:
        found.append(Verdict(held, text))

    for load, sides in results.items():
        seconds = {side.name: _seconds(side) for side in sides}
        best = min((s, name) for name, s in seconds.items() if name not in (SERVICE, SCORER))
        ratio = best[0] / seconds[SERVICE]
        judge(
            ratio >= TARGETS[load], f"{load}: texts/s / {best[1]}'s: {ratio:.2f}, target at least {TARGETS[load]:.2f}"
        )
        naive = min(seconds[name] for name in NAIVE) / seconds[SERVICE]
        judge(naive >= NAIVE_TARGET, f"{load}: / the better naive one's: {naive:.2f}, target at least {NAIVE_TARGET}")
        overhead = seconds[SERVICE] / seconds[SCORER] - 1
        judge(
            overhead <= OVERHEAD_TARGET,
            f"{load}: gRPC and runtime above the scorer in process: {overhead:.1%}, target at most "
            f"{OVERHEAD_TARGET:.0%}",
        )
        error = max(_errors(sides).values())
        judge(error <= AGREEMENT, f"{load}: all scores agree: {error:.1e}, target at most {AGREEMENT:.0e}")
    return found


def figures(results: dict[str, list[Side]], latencies: reward_latency.Results) -> dict[str, Any]:
    """What a program wants to know of it."""
    return {
        "seconds_and_peak_mib": {
            load: {side.name: [[turn.seconds, side.model_mib + turn.peak_mib] for turn in side.turns] for side in sides}
            for load, sides in results.items()
        },
        "rate_p50_ms_p99_ms": {
            name: {count: [w.rate, w.percentile_ms(50), w.percentile_ms(99)] for count, w in by_count.items()}
            for name, by_count in latencies.items()
        },
    }


def draw(results: dict[str, list[Side]], latencies: reward_latency.Results) -> None:
    """The figures as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    OUTPUT.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(1, len(results) + 1, figsize=(5 * len(results) + 5, 3.6), layout="constrained")
    for axis, (load, sides) in zip(axes, results.items(), strict=False):
        rates = [len(side.turns[0].found) / _seconds(side) for side in sides]
        colours = ["tab:green" if side.name == SERVICE else "tab:gray" for side in sides]
        bars = axis.barh([side.name for side in sides], rates, color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title({"alone": "texts as they come", "shared": "four responses share a prompt"}[load])
        axis.set_xlabel("texts/s")
    for name, by_count in latencies.items():
        counts = list(by_count)
        (line,) = axes[-1].plot(counts, [by_count[c].percentile_ms(50) for c in counts], marker="o", label=name)
        p99 = [by_count[c].percentile_ms(99) for c in counts]
        axes[-1].plot(counts, p99, marker="o", linestyle=":", color=line.get_color())
    axes[-1].set(xscale="log", yscale="log", xlabel="callers at once", ylabel="ms", title="latency: p50, dotted p99")
    axes[-1].legend()
    figure.savefig(OUTPUT / "reward.png", dpi=110)


# Sides -------------------------------------------------------------------------------------------------------------


def _classifier(model: Path) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    set_threads()
    return AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()


def _batches(model: Path, texts: list[Text], size: int) -> None:
    import torch

    classifier = _classifier(model)

    @torch.inference_mode()
    def work() -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        found: list[float] = []
        for first in range(0, len(texts), size):
            rows = [text.ids for text in texts[first : first + size]]
            longest = max(map(len, rows))
            ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask_BS = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            found += classifier(input_ids=ids_BS, attention_mask=mask_BS).logits[:, 0].tolist()
        return time.perf_counter() - start_s, found

    serve_turns(work)


def _pipeline(model: Path, texts: list[Text]) -> None:
    import torch
    import transformers

    set_threads()
    scorer = transformers.pipeline("text-classification", model=str(model), dtype=torch.float32, device="cpu")

    def work() -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        rows = [text.text for text in texts]
        found = scorer(rows, batch_size=_BATCH, function_to_apply="none", truncation=True)
        return time.perf_counter() - start_s, [one["score"] for one in found]

    serve_turns(work)


def _vllm(model: Path, texts: list[Text]) -> None:
    set_vllm_environment()
    from vllm import LLM, PoolingParams

    engine = LLM(
        str(model),
        runner="pooling",
        dtype="float32",
        enforce_eager=not compiles(),
    )
    params = PoolingParams(use_activation=False)

    def work() -> tuple[float, list[float]]:
        engine.reset_prefix_cache()
        start_s = time.perf_counter()
        prompts: Any = [{"prompt_token_ids": text.ids} for text in texts]
        outputs = engine.classify(prompts, pooling_params=params, use_tqdm=False)
        return time.perf_counter() - start_s, [float(output.outputs.probs[0]) for output in outputs]

    serve_turns(work)
    end_at_once()


def _scorer(model: Path, texts: list[Text]) -> None:
    import torch

    from services.hosting.model import Hosting, load_tokenizer
    from services.reward.scorer import ScorerItem, TransformersScorer
    from services.runtime import allocator

    set_threads()
    allocator.keep_freed()  # As the service has it.
    hosting = Hosting(device=torch.device("cpu"), dtype=torch.float32)
    scorer = TransformersScorer(model, hosting=hosting, tokenizer=load_tokenizer(model))
    rows = [ScorerItem(text.ids) for text in texts]

    def work() -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        found = [score for first in range(0, len(rows), 256) for (score,) in scorer.score(rows[first : first + 256])]
        return time.perf_counter() - start_s, found

    serve_turns(work)


def _server(name: str) -> Callable[[Path, list[Text]], None]:
    def serve(model: Path, texts: list[Text]) -> None:
        pairs = [(text.prompt, text.response) for text in texts]

        async def ask() -> tuple[float, list[float]]:
            async with client(name, port) as asks:
                start_s = time.perf_counter()
                found = await asks(pairs)
                return time.perf_counter() - start_s, found

        def work() -> tuple[float, list[float]]:
            return asyncio.run(ask())

        with running(name, model) as (process, port):
            serve_turns(work, psutil.Process(process.pid))

    return serve


_SIDES: dict[str, Callable[[Path, list[Text]], None]] = {
    NAIVE[0]: lambda model, texts: _batches(model, texts, 1),
    NAIVE[1]: lambda model, texts: _batches(model, texts, _BATCH),
    "pipeline": _pipeline,
    "vLLM": _vllm,
    VLLM_SERVER: _server(VLLM_SERVER),
    SCORER: _scorer,
    SERVICE: _server(SERVICE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="JSON Lines with prompt and chosen; made-up words without it")
    parser.add_argument("--count", type=int, default=512, help="texts: the first so many rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        name, model, file = options.side
        _SIDES[name](Path(model), [Text(*row) for row in json.loads(Path(file).read_text())])
        return
    results, latencies = measure(options.texts, options.count, options.rounds)
    draw(results, latencies)
    source = "made-up words" if options.texts is None else options.texts.name
    judged = verdicts(results) + reward_latency.verdicts(latencies)
    conclude("reward", judged, {"texts": source} | figures(results, latencies))


if __name__ == "__main__":
    main()
