"""``make study-sentiment``: SFT, DPO, PPO and PPO with KL off from one start, on film reviews and their edited twins.

The texts are those of the folder that QUARTET_DATA names (sentiment_imdb_cad_train.jsonl); what is made of them is in
sentiment_data.py. A small model learns to write passages of reviews, half of which praise; DPO, and PPO by a reward
model, learn from the same preferences to praise. The judge, a bag of words, knows other reviews alone.

1. How often judge and reward model find the positive one of held-out twins, also by which of the two is longer: what
   likes short answers is right where the positive one is short, and PPO by it makes answers short.
2. One table: every model on the same held-out prompts, with the same seeds; changes are paired by prompt.
3. What the monitors said of PPO with KL off, by step, and of PPO.

Each stage is a quartet command (sentiment_models.py) with its folder below runs/sentiment; what is there is not done
again, and what was broken off goes on. All responses are kept in bench/out/sentiment.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import sentiment_judge
from bench.outcome import OUTPUT, Verdict, conclude
from bench.sentiment_data import longer_by, write_files
from bench.sentiment_models import (
    DATA,
    MODELS,
    PPO,
    PPO_WITHOUT_KL,
    REWARD,
    ROOT,
    WORK,
    evaluation_of,
    stage_seconds,
    train_models,
)
from deploy.demo import title
from trainer.evaluate import EvaluatedSample, Evaluation
from trainer.monitor_alarms import crossings
from trainer.monitor_settings import AlarmSettings
from trainer.monitoring import EVALUATIONS_FOLDER
from trainer.statistics import Interval, mean_interval_of_groups, wilson_interval_of_groups
from trainer.wording import fixed

FILE = "sentiment_imdb_cad_train.jsonl"
SEED = 0

Series = Sequence[tuple[int, Evaluation]]


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    folder = Path(os.environ.get("QUARTET_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / FILE).is_file():
        sys.exit(f"bench.sentiment: {folder} has no {FILE}; QUARTET_DATA names the folder of the data")
    # Models so small gain little by more, and services and trainer take turns.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    WORK.mkdir(parents=True, exist_ok=True)
    if not DATA.is_dir():
        title("reviews and their twins, cut into passages")
        write_files(folder / FILE, DATA, SEED)
    try:
        train_models()
    except subprocess.CalledProcessError as error:
        sys.exit(f"bench.sentiment: stopped in {shlex.join(error.cmd)}; the same command goes on from there")
    report()


def report() -> None:
    """Tables, verdicts and files, from what the runs have left."""
    found = {name: Evaluation.read(evaluation_of(name)) for name in MODELS}
    keep_responses(found)
    judged, reward = judge_accuracy(), reward_accuracy()
    print("\naccuracy on held-out reviews")
    for what, interval in {**judged, **reward}.items():
        print(f"  {what:<52}{interval}")
    sft = found["SFT"]
    print(
        f"\n{sft.n} responses to {sft.prompts} held-out prompts; intervals 95 %, over prompts; changes from SFT paired"
    )
    print("\n".join(table(found)))
    said = {}
    for name in (PPO, PPO_WITHOUT_KL):
        series = read_series(WORK / MODELS[name])
        said[name] = alarms(series, AlarmSettings.model_validate({}))
        print(f"\n{name}: what its monitors saw, {series[0][1].n} responses each time")
        print("\n".join(progress(series)))
        print("\n".join(f"  alarm: {text}" for _, text in said[name]) or "  no alarm")
    seconds = stage_seconds()
    print("\nseconds: " + ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items()))
    print(f"in all {sum(seconds.values()) / 60:.1f} minutes")
    figures = {
        "judge": {what: interval.as_json() for what, interval in judged.items()},
        "reward_model": {what: interval.as_json() for what, interval in reward.items()},
        "models": {
            name: {
                **evaluation.figures(),
                "score_less_sft": paired(sft, evaluation, by_score).as_json(),
                "judge_less_sft": paired(sft, evaluation, by_judge).as_json(),
            }
            for name, evaluation in found.items()
        },
        "alarms": {name: [{"step": step, "text": text} for step, text in texts] for name, texts in said.items()},
        "seconds": seconds,
    }
    conclude("sentiment", verdicts(found, {**judged, **reward}, said), figures)


def verdicts(
    found: Mapping[str, Evaluation], right: Mapping[str, Interval], said: Mapping[str, Sequence[tuple[int, str]]]
) -> list[Verdict]:
    """What the study was to show."""
    made = [Verdict(interval.low > 0.5, f"{what}: {interval} is above .5") for what, interval in right.items()]
    for name in ("DPO", PPO):
        change = paired(found["SFT"], found[name], by_judge)
        made.append(Verdict(change.low > 0, f"the judge finds {name} more positive than SFT by {change}"))
    count = len(said[PPO_WITHOUT_KL])
    made.append(Verdict(count > 0, f"the monitors raise {count} alarms over {PPO_WITHOUT_KL}"))
    return made


# Judge and reward model -----------------------------------------------------------------------------------------------


def judge_accuracy() -> dict[str, Interval]:
    """On real held-out texts: whole reviews, edited passages of about the length that it is asked about, and which of
    two such twins is the positive one. Intervals are of twins."""
    judge = sentiment_judge.fitted(DATA / "judge.jsonl")
    reviews, pairs = read_rows("held_out_reviews"), read_rows("held_out_preferences")
    chosen, rejected = (
        sentiment_judge.probabilities(judge, [row["prompt"] + row[side] for row in pairs])
        for side in ("chosen", "rejected")
    )
    groups = [row["batch_id"] for row in pairs]
    whole = sentiment_judge.probabilities(judge, [row["text"] for row in reviews])
    return {
        "judge, whole reviews": wilson_interval_of_groups(
            [share(p - 0.5 if row["positive"] else 0.5 - p) for p, row in zip(whole, reviews, strict=True)],
            [row["batch_id"] for row in reviews],
        ),
        "judge, edited passages": wilson_interval_of_groups(
            [*(share(p - 0.5) for p in chosen), *(share(0.5 - p) for p in rejected)], [*groups, *groups]
        ),
        **of_two("judge", pairs, [c - r for c, r in zip(chosen, rejected, strict=True)]),
    }


def reward_accuracy() -> dict[str, Interval]:
    """Of the held-out twins, as it was trained, of all and by which of the two is longer."""
    from trainer.comparisons import load_comparisons
    from trainer.config import RewardSettings
    from trainer.encoding import Encoder
    from trainer.models import load_reward_model, load_tokenizer
    from trainer.reward_trainer import RewardTrainer

    settings = RewardSettings.model_validate_json((WORK / "reward" / "settings.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(REWARD)
    trainer = RewardTrainer(load_reward_model(REWARD, tokenizer), tokenizer, settings)
    encoder = Encoder(tokenizer, max_tokens=settings.max_tokens or 0, truncation=settings.truncation)
    scores = trainer.all_scores(encoder.comparisons(load_comparisons(settings.eval_data)))
    return of_two("reward model", read_rows("held_out_preferences"), [float(own[0, 0] - own[1, 0]) for own in scores])


def of_two(who: str, pairs: Sequence[Mapping[str, Any]], differences: Sequence[float]) -> dict[str, Interval]:
    """How often the positive one of two twins is found: of all ``pairs``, and by which of the two has more words.

    Args:
        who: finds it.
        pairs: the twins.
        differences: by how much more it makes of the positive one.
    """
    found = {}
    for where, signs in {"": (-1, 0, 1), ", the shorter": (-1,), ", as long": (0,), ", the longer": (1,)}.items():
        own = [place for place, pair in enumerate(pairs) if np.sign(longer_by(dict(pair))) in signs]
        found[f"{who}, edited passages, of two{where}"] = wilson_interval_of_groups(
            [share(differences[place]) for place in own], [pairs[place]["batch_id"] for place in own]
        )
    return found


def share(difference: float) -> float:
    """1 where it is above 0, .5 of a tie, else 0."""
    return 1.0 if difference > 0 else 0.5 * (difference == 0)


# The table -----------------------------------------------------------------------------------------------------------


def by_score(sample: EvaluatedSample) -> float | None:
    return sample.score


def by_judge(sample: EvaluatedSample) -> float | None:
    return sample.judge


def paired(before: Evaluation, after: Evaluation, of: Callable[[EvaluatedSample], float | None]) -> Interval:
    """By how much ``after`` is above ``before``, response by response to the same prompt; intervals are of prompts."""
    earlier = {(sample.index, sample.prompt): of(sample) for sample in before.samples}
    changes, prompts = [], []
    for sample in after.samples:
        old, new = earlier.get((sample.index, sample.prompt)), of(sample)
        if old is not None and new is not None:
            changes.append(new - old)
            prompts.append(sample.prompt)
    return mean_interval_of_groups(changes, prompts)


def judged_positive(evaluation: Evaluation) -> Interval:
    """Share of the responses of which the judge thinks that they praise."""
    known = [(sample.judge, sample.prompt) for sample in evaluation.samples if sample.judge is not None]
    return wilson_interval_of_groups([share(judge - 0.5) for judge, _ in known], [prompt for _, prompt in known])


def table(found: Mapping[str, Evaluation]) -> list[str]:
    """A row a figure, a column a model."""
    sft = next(iter(found.values()))
    figures: dict[str, Callable[[Evaluation], str]] = {
        "reward": lambda e: around(e.score_mean, e.score_ci95),
        "  change of reward": lambda e: "" if e is sft else str(paired(sft, e, by_score)),
        "judge, P(positive)": lambda e: around(e.judge_mean, e.judge_ci95),
        "  change of judge": lambda e: "" if e is sft else str(paired(sft, e, by_judge)),
        "judged positive": lambda e: str(judged_positive(e)),
        "KL to SFT, exact, nats": lambda e: around(e.kl_exact_mean, e.kl_exact_ci95, 1),
        "entropy, nats a token": lambda e: plain(e.entropy_mean, 2),
        "length, tokens": lambda e: plain(e.length_mean, 1),
        "finished": lambda e: plain(e.finished_share, 2),
        "distinct-1, 2, 3": lambda e: ", ".join(plain(x, 3) for x in (e.distinct_1, e.distinct_2, e.distinct_3)),
        "self-BLEU-4": lambda e: plain(e.self_bleu_4, 3),
        "repeated 4-grams": lambda e: plain(e.repeated_4_share, 3),
        "unique responses": lambda e: plain(e.unique_share, 3),
        "perplexity of demonstrations": lambda e: plain(e.demonstration_perplexity, 1),
    }
    lines = [f"{'':<30}" + "".join(f"{name:<24}" for name in found)]
    lines += [f"{what:<30}" + "".join(f"{show(e):<24}" for e in found.values()) for what, show in figures.items()]
    return [line.rstrip() for line in lines]


def plain(value: float | None, decimals: int) -> str:
    return "" if value is None else fixed(value, decimals)


def around(value: float | None, half: float | None, decimals: int = 3) -> str:
    """A figure with the bounds of its interval."""
    if value is None or half is None:
        return ""
    low, high = value - half, value + half
    return f"{fixed(value, decimals)} [{fixed(low, decimals)}, {fixed(high, decimals)}]"


# The monitors --------------------------------------------------------------------------------------------------------


def read_series(run: Path) -> Series:
    """Steps and evaluations of a PPO run, the one before training first."""
    steps = json.loads((run / "settings.json").read_text(encoding="utf-8"))["steps"]
    between = [(int(path.stem), path) for path in sorted((run / EVALUATIONS_FOLDER).glob("[0-9]*.json"))]
    files = [(0, run / "evaluation_before.json"), *between, (steps, run / "evaluation_after.json")]
    return [(step, Evaluation.read(path)) for step, path in files]


def alarms(series: Series, bounds: AlarmSettings) -> list[tuple[int, str]]:
    """Steps and texts of the alarms that the run's monitor gave on stderr: each when it arises."""
    before = series[0][1].figures()
    said: list[tuple[int, str]] = []
    raised: set[str] = set()
    for step, evaluation in series[1:]:
        broken = crossings(evaluation.figures(), before, bounds)
        said += [
            (step, crossing.text(f"in the held-out evaluation at step {step:,d}"))
            for crossing in broken
            if crossing.rule not in raised
        ]
        raised = {crossing.rule for crossing in broken}
    return said


def progress(series: Series) -> list[str]:
    """What every evaluation of a run saw, a line each."""
    columns: dict[str, Callable[[Evaluation], str]] = {
        "reward": lambda e: plain(e.score_mean, 2),
        "judge": lambda e: plain(e.judge_mean, 3),
        "KL": lambda e: plain(e.kl_exact_mean, 1),
        "entropy": lambda e: plain(e.entropy_mean, 2),
        "length": lambda e: plain(e.length_mean, 1),
        "distinct-2": lambda e: plain(e.distinct_2, 3),
        "self-BLEU": lambda e: plain(e.self_bleu_4, 3),
        "unique": lambda e: plain(e.unique_share, 3),
        "perplexity": lambda e: plain(e.demonstration_perplexity, 1),
    }
    lines = [f"  {'step':>4}" + "".join(f"{name:>12}" for name in columns)]
    return lines + [f"  {step:>4}" + "".join(f"{show(e):>12}" for show in columns.values()) for step, e in series]


# Files ---------------------------------------------------------------------------------------------------------------


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def keep_responses(found: Mapping[str, Evaluation]) -> None:
    """All responses of all models, a line each."""
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / "sentiment.jsonl").open("w", encoding="utf-8") as file:
        for name, evaluation in found.items():
            for sample in evaluation.samples:
                file.write(json.dumps({"model": name, **asdict(sample)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
