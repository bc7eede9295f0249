"""A reward model, or an ensemble of them, from comparisons of answers, beside the simplest models of the same rows."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from quartet.fingerprint import derive_seed
from quartet.model_folder import METADATA_FILE, find_model, read_metadata
from trainer.calibration import Temperature, fit_temperature
from trainer.comparisons import Comparison, load_comparisons, refuse_strange_attributes
from trainer.config import RewardSettings
from trainer.data import load_demonstrations, split_held_out
from trainer.distributed import led
from trainer.divergence import finite
from trainer.encoding import EncodedComparison, EncodedResponse, Encoder
from trainer.errors import CheckpointError, DataError, ModelError
from trainer.golden import golden_items
from trainer.label_noise import NOISE_FILE, treat, write_disagreements
from trainer.lora import plain_state_dict
from trainer.models import head_weights, load_reward_model, load_tokenizer
from trainer.optimisation import choose_device
from trainer.reward_ensemble import (
    MemberScores,
    disagreements,
    evaluate_ensemble,
    member_name,
    member_settings,
    rows_of_member,
    save_ensemble,
)
from trainer.reward_evaluation import JudgedPairs, baselines, describe, judged_pairs, refuse_collapsed, report
from trainer.reward_trainer import RewardTrainer
from trainer.runs import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    Stage,
    fit,
    open_output,
    rows_digest,
    stage_origin,
    token_limit,
    train_and_held_out,
    write_json,
)
from trainer.saving import save_model
from trainer.scaling import prepare, settle
from trainer.sharding import is_sharded
from trainer.statistics import Interval

T = TypeVar("T")

WATCHED = ("loss", "accuracy", "margin_mean", "tokens_per_s", "learning_rate")
# At most so many samples the mean and standard deviation are taken from, which are then right to 2 % of the latter.
_CALIBRATION_SAMPLES = 4096
# So many held-out rows are enough for that (to 5 %); of fewer the training rows are taken, which the model has learned.
_CALIBRATION_HELD_OUT = 400
# Of at most so many held-out rows all scores are kept with the model, for the service to see drift by.
_BASELINE_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class RewardRows:
    """Rows to train on, to fit the temperature on, and to evaluate on; no prompt is in two of them.

    ``noise``: what was done to doubtful labels of the first; empty where nothing was asked for.
    """

    train: Sequence[Comparison]
    temperature: Sequence[Comparison]
    held_out: Sequence[Comparison]
    noise: dict[str, Any]


def main(settings: RewardSettings) -> None:
    """Trains, evaluates, calibrates, and writes OUTPUT/model; of an ensemble, each member in OUTPUT/model/member-0...

    Raises:
        CollapsedError: the model gives every answer the same score; it is not exported.
        TrainerError: a setting, a file or a model can't be used; the message says which.
    """
    if settings.members == 1:
        checkpoint = open_output(settings.output, resume=settings.resume, decisive=settings.decisive)
        rows = read_rows(settings)
        Run(settings, rows, settings.output / MODEL_FOLDER).train(checkpoint)
        return
    if not settings.resume:
        # Before any row is read: what it would write over.
        open_output(settings.output / member_name(0), resume=False, decisive=settings.decisive)
    rows = read_rows(settings)
    for number in range(settings.members):
        sys.stdout.write(f"member {number} of {settings.members}:\n")
        own = member_settings(settings, number)
        part = RewardRows(
            train=rows_of_member(rows.train, settings, number),
            temperature=rows.temperature,
            held_out=rows.held_out,
            noise=rows.noise,
        )
        run = Run(own, part, settings.output / MODEL_FOLDER / member_name(number))
        if not run.is_finished():
            run.train(open_output(own.output, resume=settings.resume, decisive=own.decisive))
    finish_ensemble(settings, rows)


def read_rows(settings: RewardSettings) -> RewardRows:
    """The rows in their parts, doubtful labels treated, and every part fit for what it is for.

    Raises:
        DataError: a row can't be used, or too few are held out; the message says which.
    """
    load = functools.partial(load_comparisons, annotators=settings.annotators)
    train, held_out = train_and_held_out(settings, load)
    heads = list(settings.head_weights)
    for part in (train, held_out):
        refuse_strange_attributes(part, heads)
    if settings.ranking_loss == "plackett-luce":
        _refuse_partial_orders(train)
    each: list[str | None] = [*heads] if heads else [None]
    for head in each:
        decided = sum(j.decided and j.attribute in (None, head) for row in held_out for j in row.judgements)
        if decided < 2:
            what = f" for head {head!r}" if head is not None and len(heads) > 1 else ""
            raise DataError(
                f"{decided} held-out pairs{what} of which one is better: at least 2 are needed; raise "
                "--held-out-fraction"
            )
    temperature: list[Comparison] = []
    if settings.temperature_fraction:
        train, temperature = split_held_out(
            train, settings.temperature_fraction, seed=derive_seed("temperature", settings.seed)
        )
    noise: dict[str, Any] = {}
    if settings.noise_from is not None:
        treated = treat(train, settings)
        train, noise = treated.rows, treated.figures
        led(treated.write)(settings.output)
        sys.stdout.write(
            f"of {noise['pairs']:,} labels {noise['contradicted']:,} are contradicted by the ensemble: "
            f"{noise['flipped']:,} turned round, {noise['dropped']:,} left out; {noise['smoothed']:,} unsure ones "
            f"smoothed ({settings.output / NOISE_FILE})\n"
        )
    return RewardRows(train=train, temperature=temperature, held_out=held_out, noise=noise)


class Run:
    """One model from its rows to its folder: alone, or as a member of an ensemble."""

    def __init__(self, settings: RewardSettings, rows: RewardRows, folder: Path) -> None:
        """``folder``: where the model is written."""
        self.settings = settings
        self.rows = rows
        self.folder = folder
        self.heads = settings.head_weights
        base = find_model(settings.model)
        require_same_heads(base, self.heads)
        self.tokenizer = load_tokenizer(base)
        self.model = prepare(self._load(), settings, seed=settings.seed)
        self.limit = token_limit(settings, self.model)
        self.encoder = Encoder(self.tokenizer, max_tokens=self.limit, truncation=settings.truncation)
        self.train_rows, self.temperature_rows, self.held_out = (
            self.encoder.comparisons(part) for part in (rows.train, rows.temperature, rows.held_out)
        )
        self.digest = comparisons_digest(self.train_rows, self.temperature_rows, self.held_out)
        self.trainer = RewardTrainer(self.model, self.tokenizer, settings)
        settle(self.model, settings, settings.precision)

    @led
    def is_finished(self) -> bool:
        """Whether an earlier run has written this very model.

        Raises:
            CheckpointError: it was written under other settings or with other rows.
        """
        output = self.settings.output
        if not (self.folder / METADATA_FILE).is_file() or not (output / EVALUATION_FILE).is_file():
            return False
        saved = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
        decisive = self.settings.decisive
        if other := [name for name in decisive if saved.get(name) != decisive[name]]:
            named = "; ".join(f"--{n.replace('_', '-')} was {saved.get(n)!r}, is {decisive[n]!r}" for n in other)
            raise CheckpointError(f"{output} was written under other settings: {named}")
        if json.loads((output / EVALUATION_FILE).read_text(encoding="utf-8"))["data"] != self.digest:
            raise CheckpointError(f"{output} was written with other rows than --data or --eval-data holds now")
        return True

    def train(self, checkpoint: Any) -> None:
        """Trains, evaluates, calibrates and writes the model and what is said of it.

        Args:
            checkpoint: of ``open_output``.
        """
        settings, trainer = self.settings, self.trainer
        samples, calibrated_on = calibration_samples(settings, self.encoder, self.train_rows, self.held_out)
        origin = stage_origin("reward", settings, self.digest)
        write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
        cut = sum(any(answer.truncated for answer in row.answers) for row in self.train_rows)
        sys.stdout.write(
            f"reward model of {self.model.num_parameters():,} parameters on {_count(self.train_rows)} ({cut:,} rows "
            f"cut to {self.limit} tokens), {_count(self.temperature_rows)} for the temperature, "
            f"{_count(self.held_out)} held out\n"
        )

        def evaluate() -> dict[str, float]:
            scores = trainer.all_scores(self.held_out)
            finite(
                {"a score": float(sum(scores_KH.sum() for scores_KH in scores))},
                lambda place: float(trainer.all_scores([self.held_out[place]])[0].sum()),
                [row.where for row in self.rows.held_out],
                settings.output,
            )
            return trainer.evaluate(self.held_out, scores)

        stage = Stage(
            name="reward",
            model=self.model,
            data=self.digest,
            where=[row.where for row in self.rows.train],
            accumulate=lambda indices: trainer.accumulate([self.train_rows[index] for index in indices]),
            evaluate=evaluate,
            watch=WATCHED,
            after_step=trainer.after_step,
        )
        fitted = fit(settings, stage, checkpoint)
        evaluation = fitted.evaluation
        held_out_scores = trainer.all_scores(self.held_out)
        refuse_collapsed(self._held_out_pairs(held_out_scores), list(self.heads))
        normalisation = trainer.calibrate(samples)
        baseline = drawn(held_out_scores, _BASELINE_ROWS, derive_seed("baseline", settings.seed))
        metadata: dict[str, Any] = {
            "kind": "reward",
            "append_eos": True,
            "max_tokens": self.limit,
            "truncation": settings.truncation,
            # Raw scores, to seven digits: what float32 holds.
            "baseline": {"scores": [float(f"{x:.7g}") for x in trainer.combined(baseline)]},
        }
        if self.heads:
            metadata["heads"] = [{"name": name, "weight": weight} for name, weight in self.heads.items()]
        if normalisation is not None:
            metadata["normalisation"] = normalisation
        spread = float(trainer.combined(held_out_scores).std(ddof=1))
        if items := self._golden_items():
            metadata["golden"] = {"score_std": spread if self.heads else evaluation["eval_score_std"], "items": items}
        described, temperature = self.describe(held_out_scores)
        if temperature is not None:
            metadata["calibration"] = temperature.as_json()
        save_model(self.model, self.tokenizer, self.folder, metadata=metadata, origin=origin, step=fitted.step)
        write_json(
            settings.output / EVALUATION_FILE,
            {
                "held_out_pairs": sum(len(row.judgements) for row in self.held_out),
                **evaluation,
                **described,
                "normalisation": normalisation and {**normalisation, "of": calibrated_on},
                "data": self.digest,
                **({"noise": self.rows.noise} if self.rows.noise else {}),
            },
        )
        from trainer.report import write_report  # Plots are slow to import.

        sys.stdout.write(f"model: {self.folder}\nreport: {led(write_report)(settings.output)}\n")

    def _golden_items(self) -> list[dict[str, Any]]:
        """What the model says, in float32: of one that is split among processes, the first says it by a whole one."""
        state = plain_state_dict(self.model) if is_sharded(self.model) else None

        def score() -> list[dict[str, Any]]:
            model = self.model if state is None else self._load()
            if state is not None:
                model.load_state_dict(state)
            return golden_items(
                model,
                self.rows.held_out,
                self.held_out,
                self.encoder,
                self.settings.golden_items,
                self.heads or None,
            )

        return led(score)()

    def _load(self) -> Any:
        base = find_model(self.settings.model)
        model = load_reward_model(base, self.tokenizer, new_head_seed=self.settings.seed, heads=len(self.heads) or 1)
        return model.to(choose_device())

    def _held_out_pairs(self, held_out_scores: Sequence[Any]) -> JudgedPairs:
        groups = [row.group_key for row in self.rows.held_out]
        return judged_pairs(self.held_out, groups, held_out_scores, list(self.heads))

    def describe(self, held_out_scores: Sequence[Any]) -> tuple[dict[str, Any], Temperature | None]:
        """What the model says of held-out pairs, printed and for evaluation.json; and its temperature.

        A model of several heads has a temperature of each, which are told and not served: what is served is one score.
        """
        names = list(self.heads)
        pairs = self._held_out_pairs(held_out_scores)
        spare = [""] * len(self.temperature_rows)
        fitted_on = judged_pairs(self.temperature_rows, spare, self.trainer.all_scores(self.temperature_rows), names)
        if len(names) < 2:
            return self._describe_head(pairs, fitted_on, None)
        by_head = {}
        for place, name in enumerate(names):
            own = fitted_on.where(fitted_on.heads_N == place)
            by_head[name], _ = self._describe_head(pairs.where(pairs.heads_N == place), own, name)
        return {**describe(pairs, None), "heads": by_head}, None

    def _describe_head(
        self, pairs: JudgedPairs, fitted_on: JudgedPairs, head: str | None
    ) -> tuple[dict[str, Any], Temperature | None]:
        temperature = fit_temperature(fitted_on.difference_N, fitted_on.label_N) if len(fitted_on) else None
        described = describe(pairs, temperature)
        others = baselines(self.rows.train, self.rows.held_out, head) if self.settings.baselines else {}
        described["baselines"] = {name: interval.as_json() for name, interval in others.items()}
        report(head or "", {"this reward model": Interval(**described["accuracy"]), **others}, described)
        return described, temperature


def finish_ensemble(settings: RewardSettings, rows: RewardRows) -> None:
    """Evaluates the members together, says where they disagree, and makes them one model."""
    everything = [*rows.train, *rows.temperature]
    part = RewardRows(train=everything, temperature=[], held_out=rows.held_out, noise={})
    members = []
    for number in range(settings.members):
        folder = settings.output / MODEL_FOLDER / member_name(number)
        # The member as it will be served: its own folder, read anew.
        own = member_settings(settings, number).model_copy(update={"model": str(folder)})
        run = Run(own, part, folder)
        members.append(
            MemberScores.of(
                folder,
                held_out=run.trainer.all_scores(run.held_out),
                trained=run.trainer.all_scores(run.train_rows),
                weights_H=run.trainer.weights_H,
            )
        )
    heads = list(settings.head_weights)
    described = evaluate_ensemble(run.held_out, [row.group_key for row in rows.held_out], members, heads)
    of_heads = described.get("heads", {"": described})
    for head, of_head in of_heads.items():
        others = baselines(rows.train, rows.held_out, head or None) if settings.baselines else {}
        of_head["baselines"] = {name: interval.as_json() for name, interval in others.items()}
        reductions = of_head.get("reductions", {"mean": of_head["accuracy"]})
        own_accuracies = {f"this ensemble, {name}": Interval(**found) for name, found in reductions.items()}
        report(head, {**own_accuracies, **others}, of_head)
    led(write_disagreements)(
        settings.output, disagreements(everything, run.train_rows, members, settings, len(rows.temperature))
    )
    write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
    pairs = sum(len(row.judgements) for row in rows.held_out)
    noise = {"noise": rows.noise} if rows.noise else {}
    write_json(settings.output / EVALUATION_FILE, {"held_out_pairs": pairs, **described, **noise})
    save_ensemble(settings.output / MODEL_FOLDER, settings.members)
    sys.stdout.write(f"ensemble of {settings.members}: {settings.output / MODEL_FOLDER}\n")


def comparisons_digest(*parts: Sequence[EncodedComparison]) -> str:
    """SHA-256 of token ids, of where responses begin, and of what was said of them."""
    digest = hashlib.sha256(rows_digest(*([a for row in part for a in row.answers] for part in parts)).encode())
    for part in parts:
        said = [[asdict(judgement) for judgement in row.judgements] + [row.ranked] for row in part]
        digest.update(json.dumps(said).encode())
    return digest.hexdigest()


def require_same_heads(folder: Path, heads: dict[str, float]) -> None:
    """A reward model that training goes on from has the heads that it is trained for.

    Raises:
        ModelError: it has others.
    """
    if read_metadata(folder).get("kind") == "reward" and list(head_weights(folder)) != list(heads):
        kept = ",".join(head_weights(folder)) or "none"
        raise ModelError(
            f"model {str(folder)!r} is a reward model with heads {kept}, and --heads names "
            f"{','.join(heads) or 'none'}: go on with the same ones, or start from a language model"
        )


def calibration_samples(
    settings: RewardSettings,
    encoder: Encoder,
    train: Sequence[EncodedComparison],
    held_out: Sequence[EncodedComparison],
) -> tuple[Sequence[EncodedResponse], str]:
    """The samples whose scores normalisation brings to mean 0 and standard deviation 1, and what they are, in words.

    Where there are more than are needed, they are drawn: rows of a file may be in any order.
    """
    if settings.calibrate_on == "none":
        return [], ""
    seed = derive_seed("calibration", settings.seed)
    if settings.calibrate_on == "chosen":
        rows, of = (held_out, "held-out") if len(held_out) >= _CALIBRATION_HELD_OUT else (train, "training")
        some = drawn(rows, _CALIBRATION_SAMPLES, seed)
        return [row.answers[row.judgements[0].first] for row in some], f"best answers of {of} rows"
    samples = drawn(encoder.demonstrations(load_demonstrations((settings.calibrate_on,))), _CALIBRATION_SAMPLES, seed)
    if len(samples) < 2:
        raise DataError(f"--calibrate-on {settings.calibrate_on}: a standard deviation needs at least 2 rows")
    return samples, f"demonstrations of {settings.calibrate_on}"


def drawn(items: Sequence[T], count: int, seed: int) -> list[T]:
    """At most ``count`` of ``items``, by ``seed``, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), count))]


def _refuse_partial_orders(rows: Sequence[Comparison]) -> None:
    for row in rows:
        if len(row.answers) > 2 and not row.ranked:
            raise DataError(
                f"{row.where}: {len(row.answers)} answers that are not all in one order: --ranking-loss plackett-luce "
                "takes 'ranking', or 'ranks' without ties; choose pairwise"
            )


def _count(rows: Sequence[EncodedComparison]) -> str:
    pairs = sum(len(row.judgements) for row in rows)
    return f"{pairs:,} pairs" if pairs == len(rows) else f"{pairs:,} pairs of {len(rows):,} rows"
