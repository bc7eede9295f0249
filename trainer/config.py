"""Settings of the stages before PPO. Nothing here imports torch: a wrong flag is refused at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg

from quartet.settings import (
    AdamBeta,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    UnitFloat,
)
from trainer.encoding import Truncation
from trainer.scale_config import FREE, ScaleSettings
from trainer.service_credentials import Address, ServiceCredentials
from trainer.track_settings import TrackSettings

# Whether sequences are trained as one row without padding.
Packing = Literal["auto", "on", "off"]
PACKING = (
    "train sequences as one row without padding, what they begin with in common computed once; auto: where that is "
    "exact for the model; on: refuse other models; off: pad"
)
# Sets some of the rows apart, but never all.
HeldOutFraction = Annotated[UnitFloat, Field(lt=1)]
Smoothing = Annotated[NonNegativeFloat, Field(lt=0.5)]
Dropout = Annotated[UnitFloat, Field(lt=1)]
ShareOfRows = Annotated[UnitFloat, Field(gt=0)]

_OUTPUT = "folder of the run: the model in OUTPUT/model, figures in metrics.jsonl and evaluation.json, checkpoints"


class TrainingSettings(ScaleSettings, TrackSettings):
    """What supervised stages have in common."""

    model: str = Field(description="model to start from: a Hugging Face folder or hub id")
    data: tuple[str, ...] = Field(description="files (.jsonl, .json, .parquet) or hub names (name:split)", min_length=1)
    output: Path = Field(description=_OUTPUT)
    eval_data: tuple[str, ...] = Field((), description="held-out rows, as data; without it some of data are set apart")
    held_out_fraction: HeldOutFraction = Field(0.1, description="share of data's rows that is set apart, by prompt")
    split_by: str | None = Field(None, description="field whose values, instead of prompts, are kept together")
    max_tokens: PositiveInt | None = Field(None, description="longest sequence, end token included; the model's own")
    truncation: Truncation = Field("refuse", description="of longer rows: refuse them, cut left or cut right")
    epochs: PositiveInt = Field(1, description="passes over the rows")
    max_steps: PositiveInt | None = Field(None, description="stop after so many optimiser steps")
    batch_size: PositiveInt = Field(64, description="rows an optimiser step, of all processes together")
    micro_batch_tokens: PositiveInt = Field(
        16384, description="tokens at once on the device; padding, where there is any, included"
    )
    packing: Packing = Field("auto", description=PACKING)
    learning_rate: PositiveFloat = Field(description="peak of the learning rate")
    warmup_fraction: UnitFloat = Field(0.03, description="share of the steps over which the learning rate rises")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's, of matrices alone: not of biases and norms")
    adam_beta1: AdamBeta = Field(0.9, description="Adam's decay of the mean gradient")
    adam_beta2: AdamBeta = Field(0.95, description="Adam's decay of the mean squared gradient; OpenRLHF's")
    max_grad_norm: PositiveFloat = Field(1.0, description="the gradient is scaled down to this norm")
    dropout: Dropout = Field(
        0.0,
        description="probability, in training, wherever the model has dropout (the run says where: Llama has it in "
        "attention alone); evaluation and PPO run without",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products; weights stay float32. auto: bfloat16 on a GPU"
    )
    seed: Seed = Field(0, description="of the split, the order of rows, dropout and new weights")
    eval_every: NonNegativeInt = Field(0, description="steps between evaluations on held-out rows; 0: at the end alone")
    keep_best: bool = Field(
        False,
        description="with --eval-every: OUTPUT/model is the model of the evaluation with the lowest loss and not the "
        "last one; its checkpoint stays beside the newest ones",
    )
    save_every: NonNegativeInt | None = Field(
        None, description="steps between checkpoints; 0: when stopped alone; default: a tenth of the run"
    )
    keep_checkpoints: PositiveInt = Field(2, description="how many of the newest checkpoints stay")
    resume: bool = Field(False, description="go on from the newest checkpoint in OUTPUT")

    @property
    def decisive(self) -> dict[str, object]:
        """The settings that decide the result: a resumed run must have the same."""
        free = {*FREE, *TrackSettings.model_fields, "output", "save_every", "keep_checkpoints", "resume"}
        if not self.keep_best:
            free.add("eval_every")
        return self.model_dump(mode="json", exclude=free)

    @model_validator(mode="after")
    def _best_is_of_evaluations(self) -> Self:
        if self.keep_best and not self.eval_every:
            raise ValueError("--keep-best is set and --eval-every 0: it is the best of evaluations, so say how often")
        if self.keep_best and not self.eval_data and not self.held_out_fraction:
            raise ValueError("--keep-best is set and nothing is held out: give --eval-data or a --held-out-fraction")
        return self


class SftSettings(TrainingSettings):
    """Supervised fine-tuning on demonstrations: the loss is on the responses alone, a mean over their tokens."""

    command: ClassVar[str] = "quartet-train sft"

    held_out_fraction: HeldOutFraction = Field(0.05, description="share of data's rows that is set apart, by prompt")
    learning_rate: PositiveFloat = Field(2e-5, description="peak of the learning rate; TRL's default")
    chat_template: Path | None = Field(None, description="Jinja file: chat template to give the tokenizer")
    train_on: Literal["last-turn", "all-turns"] = Field(
        "last-turn",
        description="of messages: the last answer of the assistant, or every one, each with the end token that the "
        "chat template closes it by",
    )


class RewardSettings(TrainingSettings):
    """A reward model from comparisons of answers, by Bradley-Terry, evaluated beside TF-IDF and length alone."""

    command: ClassVar[str] = "quartet-train reward"

    learning_rate: PositiveFloat = Field(9e-6, description="peak of the learning rate; OpenRLHF's default")
    heads: tuple[str, ...] = Field(
        (),
        description="heads by the attributes of the rows, with their weights in the score: helpfulness=0.7,safety=0.3; "
        "none: one head for all rows",
    )
    annotators: Literal["mean", "majority"] = Field(
        "mean",
        description="of several annotators' labels: their mean, a soft label, or what most of them say (first, second "
        "or tie); where two of these are said as often, it is a tie",
    )
    ranking_loss: Literal["pairwise", "plackett-luce"] = Field(
        "pairwise", description="of ranked lists: mean over all pairs (InstructGPT), or the likelihood of the order"
    )
    label_smoothing: Smoothing = Field(0.0, description="share of preferences believed to be the wrong way round")
    robust: bool = Field(False, description="label smoothing in its unbiased form")
    margin: NonNegativeFloat = Field(
        0.0, description="by how much the preferred answer should win, of rows that have no margin of their own"
    )
    centering: NonNegativeFloat = Field(0.0, description="weight of the squared sum of both scores; .01 is usual")
    score_l2: NonNegativeFloat = Field(0.0, description="weight of the mean squared score; .001 is usual")
    weight_clip: PositiveFloat | None = Field(None, description="every weight is kept within this of 0")
    members: PositiveInt = Field(1, description="models of an ensemble, trained one after the other, served as one")
    member_fraction: ShareOfRows = Field(
        1.0,
        description="share of the prompts that a member trains on; the others are left out evenly: up to 1 - 1/members "
        "each prompt is unseen by some member",
    )
    noise_from: Path | None = Field(
        None, description="run of an ensemble whose disagreement says which labels to doubt; see --noise-..."
    )
    noise_flip: UnitFloat = Field(
        0.0, description="share of the pairs whose label is turned round: where the members most say otherwise"
    )
    noise_drop: UnitFloat = Field(0.0, description="share of the pairs left out: the next ones after those flipped")
    noise_smooth: UnitFloat = Field(
        0.0,
        description="share of the rest whose label is averaged with what the members say: where they are least sure",
    )
    calibrate_on: str = Field(
        "chosen",
        description="where mean and std of the scores come from: chosen (best answers of the held-out rows, of fewer "
        "than 400 those of the training rows), a file or hub name of demonstrations, or none; of more than 4,096 as "
        "many are drawn",
    )
    temperature_fraction: HeldOutFraction = Field(
        0.1, description="share of the training rows set apart to fit the temperature of probabilities on; 0: none"
    )
    golden_items: NonNegativeInt = Field(
        6, description="held-out texts kept with the model, with their scores: the service checks itself by them"
    )
    baselines: bool = Field(True, description="train TF-IDF and length baselines on the same rows, for comparison")

    @property
    def head_weights(self) -> dict[str, float]:
        """Weight of each head in the score, by name and in order; empty for one head without a name."""
        return dict(_read_head(text) for text in self.heads)

    @field_validator("heads")
    @classmethod
    def _heads_have_names_and_weights(cls, heads: tuple[str, ...]) -> tuple[str, ...]:
        names = [_read_head(text)[0] for text in heads]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice")
        return heads

    @model_validator(mode="after")
    def _has_held_out_rows(self) -> Self:
        if not self.eval_data and self.held_out_fraction == 0:
            raise ValueError("a reward model is never trained unevaluated: give --eval-data or a --held-out-fraction")
        if self.weight_clip is not None and self.lora_rank:
            raise ValueError(
                f"--weight-clip is {self.weight_clip:g} and --lora-rank {self.lora_rank}: a bound on an adapter is "
                "none on the model; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _choices_fit_together(self) -> Self:
        if self.ranking_loss == "plackett-luce" and (self.label_smoothing or self.margin or self.noise_from):
            raise ValueError(
                "--ranking-loss is plackett-luce, the likelihood of a whole order: it has no --label-smoothing, "
                "--margin or --noise-from; choose pairwise, or leave them out"
            )
        if self.robust and not self.label_smoothing:
            raise ValueError("--robust is set and --label-smoothing 0: say how many labels are believed to be flipped")
        if self.members > 1 and self.calibrate_on == "none":
            raise ValueError(
                f"--members is {self.members} and --calibrate-on none: raw scores of members lie on different scales, "
                "so they need mean and std to be combined"
            )
        if self.members == 1 and self.member_fraction < 1:
            raise ValueError(f"--member-fraction is {self.member_fraction:g} and --members 1: it is of ensembles")
        shares = self.noise_flip + self.noise_drop + self.noise_smooth
        if shares > 1:
            raise ValueError(f"--noise-flip, --noise-drop and --noise-smooth add up to {shares:g}: at most 1")
        if (shares > 0) != (self.noise_from is not None):
            raise ValueError(
                "--noise-from says which labels to doubt, --noise-flip, --noise-drop and --noise-smooth how many of "
                "them: give both or neither"
            )
        return self


def _read_head(text: str) -> tuple[str, float]:
    """Name and weight of ``name=weight``, or of ``name``, whose weight is 1."""
    name, _, weight = text.partition("=")
    try:
        value = float(weight or "1")
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise ValueError(f"{text!r} must be NAME or NAME=WEIGHT, such as safety=0.3")
    return name, value


class ReferencedSettings(ServiceCredentials, TrainingSettings):
    """What stages have in common that hold the policy near the model that it starts from, or near a served one."""

    learning_rate: PositiveFloat = Field(1e-6, description="peak of the learning rate; TRL's default")
    reference: Address | None = Field(
        None,
        description="reference service that gives the log-probabilities to stay near: host:port, or ip:port,...; "
        "default: the model that training starts from, computed here before it",
    )
    reference_live: bool = Field(
        False, description="ask the reference service at every step instead of once, before the first"
    )
    ready_timeout_s: PositiveFloat = Field(300.0, description="how long the service may take to be ready, seconds")
    call_deadline_s: PositiveFloat = Field(600.0, description="longest that one call may take, seconds")

    @property
    def decisive(self) -> dict[str, object]:
        """Where the reference is served and how it is reached decide nothing."""
        free = {*ServiceCredentials.model_fields, "reference", "ready_timeout_s", "call_deadline_s"}
        return {name: value for name, value in super().decisive.items() if name not in free}

    @model_validator(mode="after")
    def _live_reference_is_a_service(self) -> Self:
        if self.reference_live and self.reference is None:
            raise ValueError("--reference-live is set without --reference: it is the service that is asked")
        return self


class PairLossSettings(Settings):
    """The loss that DPO lays on a pair of answers."""

    beta: PositiveFloat = Field(0.1, description="price of a nat between policy and reference")
    loss: Literal["sigmoid", "robust", "ipo-mean", "ipo-sum"] = Field(
        "sigmoid",
        description="sigmoid (with --label-smoothing: cDPO), robust (unbiased under flipped labels), or IPO over mean "
        "log-probabilities of tokens (its authors' code) or their sums (the paper)",
    )
    label_smoothing: Smoothing = Field(0.0, description="share of preferences believed to be the wrong way round")
    sft_weight: NonNegativeFloat = Field(
        0.0, description="weight of the chosen answers' cross entropy a token beside the loss; RPO's alpha"
    )

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> Self:
        if self.label_smoothing and self.loss.startswith("ipo"):
            raise ValueError(
                f"--label-smoothing is {self.label_smoothing:g} and --loss {self.loss}: IPO has none; choose sigmoid "
                "or robust, or leave it at 0"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("--loss is robust and --label-smoothing 0: say how many labels are believed to be flipped")
        return self


class DpoSettings(PairLossSettings, ReferencedSettings):
    """Direct preference optimisation of a policy from preferences, held near the model that it starts from."""

    command: ClassVar[str] = "quartet-train dpo"


class KtoSettings(ReferencedSettings):
    """KTO: a policy learns from answers judged good or bad one by one, held near the model that it starts from."""

    command: ClassVar[str] = "quartet-train kto"

    batch_size: Annotated[PositiveInt, Field(ge=2)] = Field(
        64, description="rows an optimiser step, over which the reference point is estimated"
    )
    beta: PositiveFloat = Field(0.1, description="price of a nat between policy and reference")
    desirable_weight: NonNegativeFloat = Field(
        1.0, description="of good answers (lambda_D); weights times numbers of the two kinds are best about equal"
    )
    undesirable_weight: NonNegativeFloat = Field(1.0, description="of bad answers (lambda_U)")

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not (self.desirable_weight or self.undesirable_weight):
            raise ValueError("--desirable-weight and --undesirable-weight are 0: there would be nothing to learn from")
        return self


class CheckSettings(Settings):
    """Reads data as the stages would and trains nothing: the first row that doesn't fit is named."""

    command: ClassVar[str] = "quartet-train check"

    data: tuple[str, ...] = Field(description="files (.jsonl, .json, .parquet) or hub names (name:split)", min_length=1)
    kinds: tuple[Literal["demonstrations", "preferences", "comparisons", "judged", "prompts"], ...] = Field(
        ("demonstrations", "preferences", "prompts"),
        description="what each row must be readable as: demonstrations (sft), preferences (dpo, reward), comparisons "
        "(reward), judged (kto), prompts (ppo, online-dpo)",
        min_length=1,
    )


class LineageSettings(Settings):
    """Prints where a model comes from: what made it, of which data and settings, and the models before it."""

    command: ClassVar[str] = "quartet-train lineage"

    model: CliPositionalArg[str] = Field(description="model folder that a stage has written")
    as_json: bool = Field(False, description="print the whole chain as JSON")


class InitSettings(Settings):
    """A small Llama with random weights and a byte-level BPE tokenizer trained on the data named."""

    command: ClassVar[str] = "quartet-train init"

    data: tuple[str, ...] = Field(
        description="files or hub names whose texts the tokenizer is trained on", min_length=1
    )
    output: Path = Field(description="model folder to write")
    vocab_size: Annotated[int, Field(ge=300)] = Field(1024, description="tokens, special ones included")
    hidden_size: PositiveInt = Field(128, description="width")
    layers: PositiveInt = Field(3, description="decoder layers")
    heads: PositiveInt = Field(4, description="attention heads; vLLM takes widths of 32, 64, 80, 96, 112, 128 a head")
    intermediate_size: PositiveInt | None = Field(
        None, description="width of the feed-forward part; default 3 x hidden"
    )
    max_positions: PositiveInt = Field(512, description="longest sequence in tokens")
    tie_embeddings: bool = Field(True, description="one matrix for input and output embeddings")
    seed: Seed = Field(0, description="of the weights")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"--hidden-size is {self.hidden_size} and --heads {self.heads}: each head must have an even whole width"
            )
        return self


class HelpdeskSettings(Settings):
    """Writes the demonstration corpus: questions to a help desk with courteous and curt answers."""

    command: ClassVar[str] = "quartet-train helpdesk"

    output: Path = Field(description="folder for the five files")
    demonstrations: PositiveInt = Field(6000, description="rows of sft.jsonl, about half of them courteous")
    preferences: PositiveInt = Field(3000, description="rows of preferences.jsonl")
    held_out: PositiveInt = Field(300, description="rows of each held-out file")
    seed: Seed = Field(0, description="of everything drawn")
