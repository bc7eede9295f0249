"""A reward model by Bradley-Terry from preferences, beside the simplest models of the same rows.

Shapes: B pairs, N held-out pairs, S tokens of prompt and response.
Source: Stiennon et al. 2020, "Learning to summarize from human feedback"; Ouyang et al. 2022 (InstructGPT).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quartet.model_folder import find_model
from trainer.batching import micro_batches, pad_right
from trainer.config import RewardSettings
from trainer.data import Preference, load_demonstrations, load_preferences
from trainer.encoding import EncodedPreference, EncodedResponse, Encoder
from trainer.errors import CollapsedError, DataError
from trainer.golden import golden_items
from trainer.losses import bradley_terry, centering
from trainer.models import load_reward_model, load_tokenizer, padding_id, save_model, score_tokens
from trainer.optimisation import autocast, choose_device, clip_weights
from trainer.packing import pack, pair_micro_batches
from trainer.runs import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    Stage,
    fit,
    open_output,
    rows_digest,
    token_limit,
    train_and_held_out,
    write_json,
)
from trainer.statistics import Interval, mean_interval, wilson_interval

WATCHED = ("loss", "accuracy", "margin_mean", "tokens_per_s", "learning_rate")
_CALIBRATION_BINS = 10
# At most so many samples the mean and standard deviation are taken from: 1 % of a standard deviation.
_CALIBRATION_SAMPLES = 4096
# Of at most so many held-out pairs both scores are kept with the model, for the service to see drift by.
_BASELINE_PAIRS = 500
# A model that tells nothing apart: its loss is that of a coin and its scores are all alike.
_COLLAPSED_LOSS, _COLLAPSED_STD = 1e-3, 1e-3


def main(settings: RewardSettings) -> None:
    """Trains, evaluates, calibrates, and writes OUTPUT/model.

    Raises:
        CollapsedError: the model gives every answer the same score; it is not exported.
        TrainerError: a setting, a file or a model can't be used; the message says which.
    """
    checkpoint = open_output(settings.output, resume=settings.resume, decisive=settings.decisive)
    rows, held_out_rows = train_and_held_out(settings, load_preferences)
    if len(held_out_rows) < 2:
        raise DataError(f"{len(held_out_rows)} held-out pairs: at least 2 are needed; raise --held-out-fraction")
    folder = find_model(settings.model)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, new_head_seed=settings.seed).to(choose_device())
    encoder = Encoder(tokenizer, max_tokens=token_limit(settings, model), truncation=settings.truncation)
    train, held_out = encoder.preferences(rows), encoder.preferences(held_out_rows)
    calibration = calibration_samples(settings, encoder, train)
    trainer = RewardTrainer(model, tokenizer, settings)
    write_json(settings.output / SETTINGS_FILE, settings.model_dump(mode="json"))
    cut = sum(pair.chosen.truncated or pair.rejected.truncated for pair in train)
    sys.stdout.write(
        f"reward model of {model.num_parameters():,} parameters on {len(train):,} pairs ({cut:,} of them cut to "
        f"{token_limit(settings, model)} tokens), {len(held_out):,} held out\n"
    )
    stage = Stage(
        name="reward",
        model=model,
        lengths=[len(pair) for pair in train],
        data=rows_digest(*([a for pair in part for a in (pair.chosen, pair.rejected)] for part in (train, held_out))),
        accumulate=lambda indices: trainer.accumulate([train[index] for index in indices]),
        evaluate=lambda: trainer.evaluate(held_out),
        watch=WATCHED,
        after_step=trainer.after_step,
    )
    fit(settings, stage, checkpoint)
    evaluation = trainer.evaluate(held_out)
    refuse_collapsed(evaluation)
    accuracy = wilson_interval(evaluation["eval_accuracy"] * len(held_out), len(held_out))
    others = baselines(rows, held_out_rows) if settings.baselines else {}
    normalisation = trainer.calibrate(calibration)
    write_json(
        settings.output / EVALUATION_FILE,
        {
            "held_out_pairs": len(held_out),
            **evaluation,
            "accuracy": accuracy.as_json(),
            "baselines": {name: interval.as_json() for name, interval in others.items()},
            "normalisation": normalisation,
        },
    )
    metadata: dict[str, Any] = {
        "kind": "reward",
        "append_eos": True,
        "max_tokens": token_limit(settings, model),
        "truncation": settings.truncation,
    }
    if items := golden_items(model, held_out_rows, held_out, settings.golden_items):
        metadata["golden"] = {"score_std": evaluation["eval_score_std"], "items": items}
    if normalisation is not None:
        metadata["normalisation"] = normalisation
    metadata["baseline"] = {"scores": trainer.baseline(held_out[:_BASELINE_PAIRS])}
    save_model(model, tokenizer, settings.output / MODEL_FOLDER, metadata=metadata)
    report(accuracy, others, evaluation, settings)
    from trainer.report import write_report  # Plots are slow to import.

    sys.stdout.write(f"report: {write_report(settings.output)}\n")


class RewardTrainer:
    """The loss, its gradient, and what is measured on held-out pairs."""

    def __init__(self, model: Any, tokenizer: Any, settings: RewardSettings) -> None:
        self.settings = settings
        self.device = model.device
        self.pad_id = padding_id(tokenizer)
        self.model = model
        self.packed = pack(model, settings.packing, settings.precision)

    def accumulate(self, pairs: Sequence[EncodedPreference]) -> dict[str, float]:
        """Adds the gradient of the mean loss over ``pairs``, however they are cut."""
        settings = self.settings
        loss_sum = right = margin = 0.0
        for part in pair_micro_batches(pairs, settings.micro_batch_tokens, packed=self.packed):
            chosen_B, rejected_B = self.scores([pairs[index] for index in part])
            loss = bradley_terry(
                chosen_B, rejected_B, settings.margin or None, settings.label_smoothing, settings.robust
            )
            if settings.centering:
                loss = loss + settings.centering * centering(chosen_B, rejected_B)
            if settings.score_l2:
                loss = loss + settings.score_l2 * torch.cat([chosen_B, rejected_B]).square().mean()
            (loss * len(part) / len(pairs)).backward()  # type: ignore[no-untyped-call]
            difference_B = (chosen_B - rejected_B).detach()
            loss_sum += float(loss.detach()) * len(part)
            right += float((difference_B > 0).sum()) + 0.5 * float((difference_B == 0).sum())
            margin += float(difference_B.sum())
        return {
            "loss": loss_sum / len(pairs),
            "accuracy": right / len(pairs),
            "margin_mean": margin / len(pairs),
            "tokens": sum(len(pair.chosen) + len(pair.rejected) for pair in pairs),
        }

    def after_step(self) -> None:
        """Weight clipping, where it is asked for."""
        if self.settings.weight_clip is not None:
            clip_weights(self.model.parameters(), self.settings.weight_clip)

    def scores(self, pairs: Sequence[EncodedPreference]) -> tuple[Tensor, Tensor]:
        """(B,) scores of the chosen and of the rejected answers, in one forward pass."""
        sequences = [pair.chosen.ids for pair in pairs] + [pair.rejected.ids for pair in pairs]
        ids_BS, mask_BS = pad_right(sequences, self.pad_id, self.device)
        with autocast(self.device, self.settings.precision):
            scores = score_tokens(self.model, ids_BS, mask_BS)
        return scores[: len(pairs)], scores[len(pairs) :]

    def evaluate(self, pairs: Sequence[EncodedPreference]) -> dict[str, float]:
        """Held-out figures; the loss is Bradley-Terry's, whatever was trained with. Ties count .5."""
        return pair_figures(*self.all_scores(pairs))

    def baseline(self, pairs: Sequence[EncodedPreference]) -> list[float]:
        """Raw scores of all answers, chosen and rejected, to seven digits: what float32 holds."""
        return [float(f"{score:.7g}") for score in np.concatenate(self.all_scores(pairs))]

    @torch.no_grad()
    def all_scores(self, pairs: Sequence[EncodedPreference]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(N,) scores of the chosen and of the rejected answers, in evaluation mode, batch by batch."""
        self.model.eval()
        chosen, rejected = np.zeros(len(pairs)), np.zeros(len(pairs))
        for part in pair_micro_batches(pairs, self.settings.micro_batch_tokens, packed=self.packed):
            chosen_B, rejected_B = self.scores([pairs[index] for index in part])
            chosen[part], rejected[part] = chosen_B.cpu().numpy(), rejected_B.cpu().numpy()
        return chosen, rejected

    @torch.no_grad()
    def calibrate(self, samples: Sequence[EncodedResponse]) -> dict[str, float] | None:
        """Mean and standard deviation of the scores of ``samples``; None without any.

        Raises:
            CollapsedError: all of them score the same.
        """
        if not samples:
            return None
        self.model.eval()
        scores = np.zeros(len(samples))
        lengths = [len(sample) for sample in samples]
        for part in micro_batches(lengths, self.settings.micro_batch_tokens, packed=self.packed):
            ids_BS, mask_BS = pad_right([samples[index].ids for index in part], self.pad_id, self.device)
            with autocast(self.device, self.settings.precision):
                scores[part] = score_tokens(self.model, ids_BS, mask_BS).cpu().numpy()
        std = float(scores.std(ddof=1))
        if not std > 0:
            raise CollapsedError("the reward model gives all calibration samples the same score")
        return {"mean": float(scores.mean()), "std": std, "count": len(scores)}


def pair_figures(chosen: np.ndarray[Any, Any], rejected: np.ndarray[Any, Any]) -> dict[str, float]:
    """What (N,) scores of chosen and rejected answers say: accuracy, loss, calibration, spread."""
    difference = chosen - rejected
    probability = 1.0 / (1.0 + np.exp(-difference))
    return {
        "eval_loss": float(np.logaddexp(0.0, -difference).mean()),
        "eval_accuracy": float(((difference > 0) + 0.5 * (difference == 0)).mean()),
        "eval_brier": float(((1.0 - probability) ** 2).mean()),
        "eval_ece": expected_calibration_error(probability),
        "eval_margin_mean": float(difference.mean()),
        "eval_margin_ci95": (lambda x: (x.high - x.low) / 2)(mean_interval(difference)),
        "eval_score_std": float(np.concatenate([chosen, rejected]).std(ddof=1)),
    }


def expected_calibration_error(probability: np.ndarray[Any, Any], bins: int = _CALIBRATION_BINS) -> float:
    """Mean distance between confidence and accuracy over bins of equal width, by their share of pairs.

    ``probability`` is that of the annotated winner, so the confidence is max(p, 1 - p) and the model is right where
    p > .5. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    confidence = np.maximum(probability, 1.0 - probability)
    right = (probability > 0.5) + 0.5 * (probability == 0.5)
    place = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in np.unique(place)
    ]
    return float(sum(gaps))


def refuse_collapsed(evaluation: dict[str, float]) -> None:
    """
    Raises:
        CollapsedError: the model tells nothing apart, whatever its accuracy.
    """
    loss, spread = evaluation["eval_loss"], evaluation["eval_score_std"]
    if abs(loss - math.log(2)) < _COLLAPSED_LOSS and spread < _COLLAPSED_STD:
        raise CollapsedError(
            f"the reward model has collapsed: its scores have a standard deviation of {spread:.1e} and its held-out "
            f"loss is {loss:.4f}, a coin's (ln 2); it is not saved. Lower --learning-rate, or check the data"
        )


def calibration_samples(
    settings: RewardSettings, encoder: Encoder, train: Sequence[EncodedPreference]
) -> Sequence[EncodedResponse]:
    """The samples whose scores normalisation brings to mean 0 and standard deviation 1."""
    if settings.calibrate_on == "none":
        return []
    if settings.calibrate_on == "chosen":
        return [pair.chosen for pair in train[:_CALIBRATION_SAMPLES]]
    samples = encoder.demonstrations(load_demonstrations((settings.calibrate_on,)))[:_CALIBRATION_SAMPLES]
    if len(samples) < 2:
        raise DataError(f"--calibrate-on {settings.calibrate_on}: a standard deviation needs at least 2 rows")
    return samples


def baselines(train: Sequence[Preference], held_out: Sequence[Preference]) -> dict[str, Interval]:
    """Held-out accuracy of two logistic models of the difference between the answers: their words, their length."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, lowercase=True)
    try:
        vectorizer.fit([text for row in train for text in (row.chosen, row.rejected)])
    except ValueError as error:
        # Too few words in common, or a script without blanks. The model that was trained is worth more than this.
        sys.stderr.write(f"warning: no baselines: TF-IDF can't be fitted on these texts ({error})\n")
        return {}

    def words(rows: Sequence[Preference]) -> Any:
        return vectorizer.transform([r.chosen for r in rows]) - vectorizer.transform([r.rejected for r in rows])

    def lengths(rows: Sequence[Preference]) -> Any:
        return np.array([[math.log(len(r.chosen.split()) + 1) - math.log(len(r.rejected.split()) + 1)] for r in rows])

    found = {}
    for name, features, stack in (("TF-IDF logistic", words, vstack), ("length alone", lengths, np.vstack)):
        difference = features(train)
        # Both orders of each pair, so that nothing is learned but the difference.
        x, y = stack([difference, -difference]), np.repeat([1, 0], len(train))
        model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(x, y)
        margin = model.decision_function(features(held_out))
        right = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
        found[name] = wilson_interval(right, len(held_out))
    return found


def report(
    accuracy: Interval, others: dict[str, Interval], evaluation: dict[str, float], settings: RewardSettings
) -> None:
    """Prints the held-out accuracies side by side, with 95 % intervals."""
    lines = {"this reward model": accuracy, **others}
    width = max(map(len, lines))
    sys.stdout.write(f"held-out pairs ranked as annotated ({accuracy.count:,} pairs, 95 % intervals):\n")
    for name, interval in lines.items():
        sys.stdout.write(f"  {name:<{width}}  {interval}\n")
    sys.stdout.write(
        f"held-out loss {evaluation['eval_loss']:.4f} (a coin: {math.log(2):.4f}), calibration error "
        f"{evaluation['eval_ece']:.3f}, score std {evaluation['eval_score_std']:.2f}\n"
        f"model: {settings.output / MODEL_FOLDER}\n"
    )
