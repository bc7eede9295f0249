"""Steps of SFT, reward models, DPO and PPO: the trainer against TRL and against the same step written naively.

    make bench-trainer PAIRS=pref_hh_harmless_dev.jsonl

- TRL: SFTTrainer, RewardTrainer, DPOTrainer, in the same precision, without gradient checkpointing, which would only
  slow them here, and batches in the same order. DPO is measured as it is by default, with the reference's forward pass
  in every step, and with the reference computed before, as ours is.
- naive: transformers' forward pass over the padded batch, full logits, log_softmax, gather, torch's AdamW.
- padded, packed, compiled: the trainer with --packing off, with it on, and with --compile besides.

The same Llama of 29 M parameters, weights in float32, products in float32 or (autocast) bfloat16, batches of 8 rows of
at most 512 tokens, as they come. Tokens are those of prompts and answers, of each answer with its prompt; padding does
not count. A turn is a few whole steps, optimiser included; sides are processes that take turns (see ``bench.turns``),
and the first turn warms up. The losses of the first turn are compared: all did the same work. Then the memory that
log-probabilities at a vocabulary of 131,072 take, forwards and backwards, above hidden states and weights. Last, a step
of PPO by phase: see ``bench.ppo_step``.

Without PAIRS rows are made-up tokens of the lengths that HH's have. `make bench-trainer` installs TRL; without it its
sides are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import ppo_step
from bench.machine import PRECISIONS, can_compile, native_precisions
from bench.models import END, VOCABULARY, make_larger_policy, save_tokenizer, train_tokenizer
from bench.outcome import Verdict, conclude
from bench.peers import TRL, has_trl, use_trl
from bench.turns import Side, serve_turns, set_threads, start_sides

STAGES = ("sft", "reward", "dpo", "logprobs", "ppo")
TRL_TARGET, PADDED_TARGET, MEMORY_TARGET = 1.5, 1.3, 4.0
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}
"""Largest relative difference of a first loss from the naive one."""
_BATCH = 8
_LONGEST = 512
_BETA = 0.1
# Of the part that makes log-probabilities.
_LARGE_VOCABULARY, _WIDTH, _TOKENS = 131_072, 512, 2048
# Mean and standard deviation of the logarithm of HH harmless's lengths, in tokens of a vocabulary of this size.
_LENGTHS = {"prompt": (4.6, 0.97), "chosen": (3.55, 0.84), "rejected": (3.73, 0.9)}

Pair = dict[str, list[int]]
Work = Callable[[], tuple[float, list[float]]]


def make_pairs(count: int) -> list[Pair]:
    """Random tokens of HH's lengths, the beginning of prompts cut where they are too long."""
    draw = random.Random(0)

    def some(name: str) -> list[int]:
        length = min(_LONGEST // 2, max(2, round(draw.lognormvariate(*_LENGTHS[name]))))
        return [draw.randrange(2, VOCABULARY) for _ in range(length)]

    return [_cut({name: some(name) for name in _LENGTHS}) for _ in range(count)]


def read_pairs(path: Path, count: int, folder: Path) -> list[Pair]:
    """The first rows of prompt, chosen and rejected, by a tokenizer trained on the file and saved with the models."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer([row[name] for row in rows for name in _LENGTHS], VOCABULARY)
    for model in ("policy", "reward"):
        tokenizer.save_pretrained(folder / model)
    return [
        _cut({name: tokenizer(row[name], add_special_tokens=False).input_ids for name in _LENGTHS})
        for row in rows[:count]
    ]


def _cut(pair: Pair) -> Pair:
    """With end tokens, and the beginning of the prompt gone where a row would be too long."""
    answers = {name: [*pair[name][: _LONGEST // 2 - 1], END] for name in ("chosen", "rejected")}
    room = _LONGEST - max(map(len, answers.values()))
    return {"prompt": pair["prompt"][-room:], **answers}


def measure(options: argparse.Namespace) -> dict[str, list[Side]]:
    """The sides of every stage but PPO and of every precision, with their turns."""
    results: dict[str, list[Side]] = {}
    stages = [stage for stage in options.stages if stage != "ppo"]
    if not stages:
        return results
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        count = options.steps * _BATCH
        pairs = make_pairs(count) if options.pairs is None else read_pairs(options.pairs, count, folder)
        (folder / "pairs.json").write_text(json.dumps(pairs))
        for stage in stages:
            for precision in PRECISIONS[:1] if stage == "logprobs" else options.precisions:
                tokens = count_tokens(stage, pairs)
                load = "once" if stage == "logprobs" else f"{options.steps} steps of {_BATCH} rows"
                print(f"\n{stage}, {precision}: {load}, {tokens:,} tokens", flush=True)
                commands = {
                    side: ["-m", "bench.trainer", "--side", side, stage, precision, name] for side in sides_of(stage)
                }
                with start_sides(commands) as sides:
                    for number in range(-1, options.rounds):
                        for side in sides if number % 2 == 0 else reversed(sides):
                            side.turn()
                print("\n".join(table(sides, tokens)), flush=True)
                results[f"{stage} {precision}"] = sides
    return results


def make_models(folder: Path) -> None:
    """A policy and, of the same size, a reward model."""
    import torch
    from transformers import AutoConfig, LlamaForSequenceClassification

    make_larger_policy(folder / "policy")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder / "policy", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    save_tokenizer(folder / "reward")


def sides_of(stage: str) -> list[str]:
    """Names of the sides that can be measured here."""
    if stage == "logprobs":
        return ["naive", "ours"]
    peers = ["TRL", "TRL, reference before"] if stage == "dpo" else ["TRL"]
    if not has_trl(TRL):
        print("TRL is not installed and left out: `make bench-trainer` installs it")
        peers = []
    return [*peers, "naive", "padded", "packed", *(["compiled"] if can_compile() else [])]


def count_tokens(stage: str, pairs: Sequence[Pair]) -> int:
    """Of one turn."""
    if stage == "logprobs":
        return _TOKENS
    answers = ("chosen",) if stage == "sft" else ("chosen", "rejected")
    return sum(len(pair["prompt"]) + len(pair[name]) for pair in pairs for name in answers)


def table(sides: Sequence[Side], tokens: int) -> list[str]:
    """Figures of one stage in one precision."""
    lines = [f"{'':<24}{'tokens/s':>10}{'peak MiB':>10}{'above model':>13}{'first loss':>12}"]
    for side in sides:
        memory = peak_mib(side)
        lines.append(
            f"{side.name:<24}{tokens / seconds(side):>10,.0f}{side.model_mib + memory:>10,.0f}{memory:>13,.0f}"
            f"{side.turns[0].found[0]:>12.5f}"
        )
    return lines


def seconds(side: Side) -> float:
    """Median of the turns after the first, which warms up."""
    return statistics.median(turn.seconds for turn in side.turns[1:])


def peak_mib(side: Side) -> float:
    """Most memory above what the loaded model takes."""
    return max(turn.peak_mib for turn in side.turns)


def verdicts(results: dict[str, list[Side]]) -> Iterator[Verdict]:
    """What is asked of us, and whether it holds."""
    for name, sides in results.items():
        by_name = {side.name: side for side in sides}
        if name.startswith("logprobs"):
            ratio = peak_mib(by_name["naive"]) / peak_mib(by_name["ours"])
            text = f"log-probabilities at {_LARGE_VOCABULARY:,} tokens: naive memory / ours {ratio:.1f}"
            yield Verdict(ratio >= MEMORY_TARGET, f"{text}, target at least {MEMORY_TARGET:.0f}")
        else:
            ours = seconds(by_name["packed"])
            for peer in by_name:
                if peer == "packed":
                    continue
                ratio, text = seconds(by_name[peer]) / ours, f"{name}: tokens/s / {peer}'s"
                if peer in ("naive", "compiled"):
                    yield Verdict(True, f"{text}: {ratio:.2f}")
                else:
                    target = PADDED_TARGET if peer == "padded" else TRL_TARGET
                    yield Verdict(ratio >= target, f"{text}: {ratio:.2f}, target at least {target}")
        truth = by_name["naive"].turns[0].found[0]
        error = max(abs(side.turns[0].found[0] / truth - 1) for side in sides)
        bound = AGREEMENT[name.split()[1]]
        yield Verdict(error <= bound, f"{name}: first losses agree: {error:.1e}, target at most {bound:.0e}")


# Sides -------------------------------------------------------------------------------------------------------------


def _batches(folder: Path) -> list[list[Pair]]:
    pairs = json.loads((folder / "pairs.json").read_text())
    return [pairs[first : first + _BATCH] for first in range(0, len(pairs), _BATCH)]


def _trl(stage: str, precision: str, folder: Path, *, reference_before: bool = False) -> Work:
    use_trl(TRL)
    import datasets
    import transformers
    import trl

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": _BATCH,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": precision == "bfloat16",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": _LONGEST,
    }
    pairs = [pair for batch in _batches(folder) for pair in batch]
    if stage == "sft":
        kind, options = trl.SFTTrainer, trl.SFTConfig(**common)
        rows = [
            {
                "input_ids": pair["prompt"] + pair["chosen"],
                "completion_mask": [0] * len(pair["prompt"]) + [1] * len(pair["chosen"]),
            }
            for pair in pairs
        ]
        options.completion_only_loss = True
    elif stage == "reward":
        kind, options = trl.RewardTrainer, trl.RewardConfig(**common)
        rows = [{f"{name}_ids": pair["prompt"] + pair[name] for name in ("chosen", "rejected")} for pair in pairs]
    else:
        kind = type("DPOTrainer", (trl.DPOTrainer,), {"_prepare_dataset": lambda _, dataset, *__, **___: dataset})
        options = trl.DPOConfig(**common, beta=_BETA, precompute_ref_log_probs=reference_before)
        # Of all three it alone takes no rows of token ids: it is given them as it would have made them.
        rows = [{f"{name}_ids": pair[name] for name in _LENGTHS} for pair in pairs]
    clock = _clock(transformers.TrainerCallback)
    trainer = kind(
        model=_load(stage, folder),
        args=options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[clock],
    )

    def work() -> tuple[float, list[float]]:
        clock.spent_s = 0.0
        trainer.train()
        return clock.spent_s, [log["loss"] for log in trainer.state.log_history if "loss" in log]

    return work


def _clock(base: Any) -> Any:
    """A callback that adds up the time of steps, from the batch at hand to the optimiser's end."""

    class Clock(base):  # type: ignore[misc]
        spent_s = start_s = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start_s = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.spent_s += time.perf_counter() - self.start_s

    return Clock()


def _load(stage: str, folder: Path) -> Any:
    import torch
    import transformers

    kind = "reward" if stage == "reward" else "policy"
    auto = transformers.AutoModelForSequenceClassification if kind == "reward" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder / kind, dtype=torch.float32)


def _naive(stage: str, precision: str, folder: Path) -> Work:
    import torch
    from torch.nn import functional

    model, batches = _load(stage, folder), _batches(folder)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def outputs(batch: Sequence[Pair], names: Sequence[str]) -> Any:
        """Scores, or sums of log-probabilities of answers."""
        rows = [pair["prompt"] + pair[name] for name in names for pair in batch]
        starts = [len(pair["prompt"]) for _ in names for pair in batch]
        longest = max(map(len, rows))
        ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask_BS = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(input_ids=ids_BS, attention_mask=mask_BS).logits
        if stage == "reward":
            return logits[:, 0].float()
        logprobs_BS = logits[:, :-1].float().log_softmax(-1).gather(2, ids_BS[:, 1:, None])[..., 0]
        answer_BS = torch.arange(1, longest) >= torch.tensor(starts)[:, None]
        return (logprobs_BS * (mask_BS[:, 1:] * answer_BS)).sum(dim=1)

    with torch.no_grad():
        known = [outputs(batch, ("chosen", "rejected")) for batch in batches] if stage == "dpo" else []

    def loss_of(number: int) -> Any:
        batch = batches[number]
        if stage == "sft":
            return -outputs(batch, ("chosen",)).sum() / sum(len(pair["chosen"]) for pair in batch)
        found = outputs(batch, ("chosen", "rejected"))
        chosen, rejected = (_BETA * (found - known[number]) if stage == "dpo" else found).chunk(2)
        return -functional.logsigmoid(chosen - rejected).mean()

    def work() -> tuple[float, list[float]]:
        start_s, losses = time.perf_counter(), []
        for number in range(len(batches)):
            loss = loss_of(number)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        return time.perf_counter() - start_s, losses

    return work


def _ours(stage: str, precision: str, folder: Path, side: str) -> Work:
    import numpy as np

    from trainer.answers import Answers
    from trainer.comparisons import Judgement
    from trainer.config import DpoSettings, RewardSettings, SftSettings
    from trainer.dpo import DpoTrainer, with_reference
    from trainer.encoding import EncodedComparison, EncodedPreference, EncodedResponse
    from trainer.models import load_policy, load_reward_model, load_tokenizer
    from trainer.optimisation import apply_gradients, make_adamw
    from trainer.references import ModelReference
    from trainer.reward_trainer import RewardTrainer
    from trainer.scaling import settle
    from trainer.sft import SftTrainer

    common: dict[str, Any] = {"model": "m", "data": ("d",), "output": folder, "precision": precision}
    common |= {"packing": "off" if side == "padded" else "on", "compile": side == "compiled"}
    tokenizer = load_tokenizer(folder / "policy")

    def encode(pair: Pair) -> EncodedPreference:
        chosen, rejected = (
            EncodedResponse(
                ids=np.array(pair["prompt"] + pair[name], dtype=np.int32),
                prompt_tokens=len(pair["prompt"]),
                truncated=False,
            )
            for name in ("chosen", "rejected")
        )
        return EncodedPreference(chosen=chosen, rejected=rejected)

    batches: list[list[Any]] = [[encode(pair) for pair in batch] for batch in _batches(folder)]
    trainer: Any
    if stage == "reward":
        model = load_reward_model(folder / "reward", tokenizer)
        trainer = RewardTrainer(model, tokenizer, RewardSettings(**common))
        first_wins = (Judgement(first=0, second=1),)
        batches = [
            [
                EncodedComparison(answers=(pair.chosen, pair.rejected), judgements=first_wins, ranked=False)
                for pair in batch
            ]
            for batch in batches
        ]
    else:
        model = load_policy(folder / "policy", tokenizer)
        if stage == "sft":
            trainer = SftTrainer(model, tokenizer, SftSettings(**common))
            batches = [[pair.chosen for pair in batch] for batch in batches]
        else:
            settings = DpoSettings(**common, beta=_BETA)
            answers = Answers(model, tokenizer, settings.precision, settings.packing)
            reference = ModelReference(answers, settings.micro_batch_tokens, "the start")
            trainer = DpoTrainer(model, tokenizer, settings, reference)
            batches = [
                with_reference(batch, reference.sums([a for pair in batch for a in (pair.chosen, pair.rejected)]))
                for batch in batches
            ]
    settle(model, trainer.settings, trainer.settings.precision)
    model.train()
    optimiser = make_adamw(model, learning_rate=1e-6)

    def work() -> tuple[float, list[float]]:
        start_s, losses = time.perf_counter(), []
        for batch in batches:
            losses.append(trainer.accumulate(batch)["loss"])
            apply_gradients(optimiser, 1.0)
        return time.perf_counter() - start_s, losses

    return work


def _logprobs(side: str) -> Work:
    import torch
    from torch.nn import functional

    from trainer.logprobs import chunked_selective_logprobs
    from trainer.models import chunk_sizes

    torch.manual_seed(0)
    hidden_ND = torch.randn(_TOKENS, _WIDTH, requires_grad=True)
    weight_VD = (torch.randn(_LARGE_VOCABULARY, _WIDTH) / math.sqrt(_WIDTH)).requires_grad_()
    ids_N = torch.randint(_LARGE_VOCABULARY, (_TOKENS,))

    def work() -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        if side == "naive":
            table_NV = functional.linear(hidden_ND, weight_VD).log_softmax(-1)
            loss = -table_NV.gather(1, ids_N[:, None]).mean()
        else:
            chunk, part = chunk_sizes(_LARGE_VOCABULARY, "cpu")
            logprobs_N, _ = chunked_selective_logprobs(
                hidden_ND, weight_VD, None, ids_N, chunk_tokens=chunk, part_size=part
            )
            loss = -logprobs_N.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        hidden_ND.grad = weight_VD.grad = None
        return time.perf_counter() - start_s, [float(loss.detach())]

    return work


def serve(side: str, stage: str, precision: str, folder: Path) -> None:
    """A side's process."""
    set_threads()
    if stage == "logprobs":
        work = _logprobs(side)
    elif side.startswith("TRL"):
        work = _trl(stage, precision, folder, reference_before=side != "TRL")
    elif side == "naive":
        work = _naive(stage, precision, folder)
    else:
        work = _ours(stage, precision, folder, side)
    serve_turns(lambda task: work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSON Lines of prompt, chosen, rejected; default: made-up tokens")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: those that the processor has instructions for"
    )
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ppo-rounds", type=int, default=2, help="rounds of the PPO step, which takes longest")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        side, stage, precision, folder = options.side
        serve(side, stage, precision, Path(folder))
        return
    options.precisions = options.precisions or native_precisions()
    start_s = time.perf_counter()
    results = measure(options)
    judged = list(verdicts(results))
    figures: dict[str, Any] = {}
    if "ppo" in options.stages:
        ppo = ppo_step.measure(ppo_step.Load(), options.pairs, options.precisions, options.ppo_rounds)
        judged += ppo_step.verdicts(ppo)
        results["ppo"] = ppo
        figures["ppo_phases"] = ppo_step.figures(ppo)
    figures["seconds_and_mib_of_model_and_above"] = {
        name: {side.name: [[turn.seconds, side.model_mib, turn.peak_mib] for turn in side.turns] for side in sides}
        for name, sides in results.items()
    }
    print(f"\n{(time.perf_counter() - start_s) / 60:.1f} minutes")
    conclude("trainer", judged, figures)


if __name__ == "__main__":
    main()
