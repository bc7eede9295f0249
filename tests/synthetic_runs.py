"""Folders of runs that look like real ones, from known curves and a seed: what the report's tests read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


def ppo_record(step: int, steps: int, rng: np.random.Generator, overrides: dict[str, float]) -> dict[str, float]:
    """One step of a healthy PPO run: reward saturates, KL grows, entropy and beta sink, times jitter."""
    done = step / steps
    reward = -0.2 + 1.6 * (1 - math.exp(-3.5 * done)) + 0.06 * rng.normal()
    kl = 7.0 * (1 - math.exp(-3 * done)) + 0.25 * rng.normal()
    slow = 3.0 if step == 1 else 1.0
    service_work_s = slow * (1.9 + 0.15 * rng.random())
    wire_s = 0.02 + 0.01 * rng.random()
    transport_s = 0.01 + 0.005 * rng.random()
    rollout_s = service_work_s + wire_s
    forward_s, update_s, publish_s = 0.5 + 0.02 * rng.random(), 1.6 + 0.1 * rng.random(), transport_s + 0.06
    other_s = 0.02 + 0.01 * rng.random()
    length = 46 - 8 * done + rng.normal()
    record: dict[str, float] = {
        "episodes": 128 * step,
        "elapsed_s": 4.3 * step + 6.0,
        "reward/score_mean": reward,
        "reward/score_std": 0.9 - 0.2 * done,
        "reward/score_ci95": 1.96 * (0.9 - 0.2 * done) / math.sqrt(128),
        "reward/final_mean": reward - 0.1 * (1 - done),
        "reward/missing_eos_share": 0.1 * (1 - done),
        "kl/sequence_mean": kl,
        "kl/token_mean": kl / length,
        "kl/k3_token_mean": abs(kl) / length * 1.02,
        "kl/beta": 0.05 * (1 + 0.2 * math.sin(6 * done)),
        "policy/entropy_mean": 2.9 - 0.9 * done + 0.03 * rng.normal(),
        "policy/loss": -0.01 + 0.004 * rng.normal(),
        "policy/clip_fraction": 0.09 - 0.05 * done + 0.008 * rng.random(),
        "policy/approx_kl": 0.006 + 0.002 * rng.random(),
        "policy/first_ratio_max_abs_log": 2e-6,
        "value/loss": 0.6 * math.exp(-3 * done) + 0.05 + 0.02 * rng.random(),
        "value/clip_fraction": 0.05,
        "value/explained_variance": 0.8 - 3.4 * math.exp(-9 * done) + 0.03 * rng.normal(),
        "response/length_mean": length,
        "response/length_p95": length + 14 + rng.normal(),
        "response/finished_share": min(1.0, 0.88 + 0.11 * done + 0.01 * rng.normal()),
        "rollout/importance_weight_mean": 1 + 0.01 * rng.normal(),
        "rollout/ess": 0.97 + 0.01 * rng.random(),
        "rollout/kl_old": 0.001 * rng.normal(),
        "samples/failed": 0,
        "throughput/generated_tokens_per_s": 128 * length / rollout_s,
        "learning_rate": 1e-4 * (1 - (step - 1) / steps),
        "time/step_s": rollout_s + forward_s + update_s + publish_s + other_s,
        "time/rollout_s": rollout_s,
        "time/forward_s": forward_s,
        "time/update_s": update_s,
        "time/publish_s": publish_s,
        "time/other_s": other_s,
        "time/service_work_s": service_work_s,
        "time/rpc_s": wire_s + transport_s,
        "weights/version": step,
    }
    return record | overrides


def evaluation(prompts: list[str], mean: float, kl: float, seed: int, texts: dict[int, str]) -> dict[str, Any]:
    """Scores drawn around ``mean``, with the statistics of exactly those scores."""
    rng = np.random.default_rng(seed)
    scores, kls = mean + 0.8 * rng.normal(size=len(prompts)), np.abs(kl * (1 + 0.3 * rng.normal(size=len(prompts))))
    mood = "Of course, I am glad to help with that." if mean > 0.5 else "No. Read the manual."
    samples = [
        {
            "prompt": prompt,
            "response": texts.get(index, f"{mood} ({index})"),
            "score": float(scores[index]),
            "kl": float(kls[index]),
            "finished": index % 9 != 4,
        }
        for index, prompt in enumerate(prompts)
    ]

    def half_width(values: np.ndarray) -> float:
        return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))

    return {
        "n": len(prompts),
        "failed": 0,
        "weights_version": 1,
        "score_mean": float(scores.mean()),
        "score_ci95": half_width(scores),
        "score_std": float(scores.std(ddof=1)),
        "kl_sequence_mean": float(kls.mean()),
        "kl_ci95": half_width(kls),
        "length_mean": 41.5,
        "finished_share": float(np.mean([sample["finished"] for sample in samples])),
        "distinct_2": 0.61 if mean < 0.5 else 0.48,
        "unique_share": 0.98 if mean < 0.5 else 0.91,
        "tokens_per_s": 2650.0,
        "samples": samples,
    }


def write_run(
    folder: Path,
    *,
    steps: int = 120,
    total_steps: int = 120,
    prompts: int = 64,
    before_mean: float | None = 0.0,
    after_mean: float | None = 1.4,
    overrides: dict[int, dict[str, float]] | None = None,
    without: tuple[str, ...] = (),
    texts_before: dict[int, str] | None = None,
    texts_after: dict[int, str] | None = None,
    prompt_texts: dict[int, str] | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Writes a PPO run's folder and returns its records. ``overrides`` change figures of single steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        record = ppo_record(step, total_steps, rng, (overrides or {}).get(step, {}))
        records.append({"step": step} | {key: value for key, value in record.items() if key not in without})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [
        (prompt_texts or {}).get(index, f"Customer {index}: my order number {1000 + 7 * index} has not arrived. Agent:")
        for index in range(prompts)
    ]
    for name, mean, kl, written in (
        ("before", before_mean, 0.01, texts_before),
        ("after", after_mean, 6.3, texts_after),
    ):
        if mean is not None:
            content = evaluation(texts, mean, kl, seed + (1 if name == "before" else 2), written or {})
            (folder / f"evaluation_{name}.json").write_text(json.dumps(content))
    chosen = {
        "model": "models/help-desk-sft",
        "policy": "127.0.0.1:50051",
        "steps": total_steps,
        "kl": "adaptive",
        "kl_beta": 0.05,
        "kl_target": 6.0,
        "learning_rate": 1e-4,
        "prompts": ["prompts.jsonl"],
        "score_clip": None,
        "seed": seed,
        "services": {"reward": {"model": "models/help-desk-reward", "engine": "transformers", "dtype": "float32"}},
    }
    (folder / "settings.json").write_text(json.dumps(chosen if settings is None else settings))
    return records


def write_sft_run(folder: Path, *, steps: int = 60, finished: bool = True, seed: int = 0) -> list[dict[str, float]]:
    """Writes an SFT run's folder: a falling loss, evaluated every tenth step, before and after."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        loss = 1.2 + 4.0 * math.exp(-5 * step / steps) + 0.05 * rng.normal()
        record: dict[str, float] = {
            "step": step,
            "loss": loss,
            "perplexity": math.exp(loss),
            "grad_norm": 0.8 + 0.1 * rng.random(),
            "learning_rate": 1e-3 * (1 - (step - 1) / steps),
            "epoch": step / steps,
            "tokens_per_s": 5200 + 200 * rng.normal(),
        }
        if step % 10 == 0 and step < steps:
            record |= {"eval_loss": loss + 0.1, "eval_perplexity": math.exp(loss + 0.1), "eval_tokens": 4100}
        records.append(record)
    evaluation = {
        "held_out_rows": 120,
        "before": {"eval_loss": 5.31, "eval_perplexity": math.exp(5.31), "eval_tokens": 4100},
        "after": {"eval_loss": 1.27, "eval_perplexity": math.exp(1.27), "eval_tokens": 4100},
    }
    _write_supervised(folder, records, evaluation if finished else None, {"model": "models/base", "seed": seed})
    return records


def write_reward_run(folder: Path, *, steps: int = 50, seed: int = 0) -> list[dict[str, float]]:
    """Writes a reward model's folder: rising accuracy and margin, and an evaluation beside its baselines."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        done = step / steps
        records.append(
            {
                "step": step,
                "loss": 0.25 + 0.44 * math.exp(-4 * done) + 0.02 * rng.normal(),
                "accuracy": min(1.0, 0.93 - 0.4 * math.exp(-4 * done) + 0.02 * rng.normal()),
                "margin_mean": 2.2 * (1 - math.exp(-3 * done)) + 0.05 * rng.normal(),
                "grad_norm": 1.1 + 0.1 * rng.random(),
                "learning_rate": 3e-4 * (1 - (step - 1) / steps),
                "epoch": done,
                "tokens_per_s": 4700 + 200 * rng.normal(),
            }
        )
    evaluation = {
        "held_out_pairs": 342,
        "eval_loss": 0.241,
        "eval_accuracy": 0.9123,
        "eval_brier": 0.071,
        "eval_ece": 0.031,
        "eval_margin_mean": 2.31,
        "eval_margin_ci95": 0.16,
        "eval_score_std": 1.4,
        "accuracy": {"value": 0.9123, "low": 0.8776, "high": 0.9379, "count": 342},
        "baselines": {
            "TF-IDF logistic": {"value": 0.85, "low": 0.8084, "high": 0.8840, "count": 342},
            "length alone": {"value": 0.52, "low": 0.4671, "high": 0.5725, "count": 342},
        },
        "normalisation": {"mean": 0.42, "std": 1.3, "count": 1500},
    }
    _write_supervised(folder, records, evaluation, {"model": "runs/sft/model", "seed": seed})
    return records


def _write_supervised(
    folder: Path, records: list[dict[str, float]], evaluation: dict[str, Any] | None, settings: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "settings.json").write_text(json.dumps(settings))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
