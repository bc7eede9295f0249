"""Which figures stand together in the report's plots. A panel is shown as far as the run logged its figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure over the steps. ``band`` is the key of a half width drawn around it."""

    key: str
    label: str
    band: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair of axes: lines of the same unit.

    ``floor`` is in sight whatever the values; below ``cut_below`` values are out of sight; ``share`` writes percents,
    and ``whole`` shows all of 0 to 100 of them.
    """

    unit: str
    lines: tuple[Line, ...]
    floor: float | None = None
    cut_below: float | None = None
    share: bool = False
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of the report, of one or two rows that share their steps."""

    name: str
    title: str
    rows: tuple[Row, ...]


PANELS = (
    Panel(
        name="reward",
        title="Reward",
        rows=(
            Row(
                unit="score",
                lines=(
                    Line(key="reward/score_mean", label="mean score", band="reward/score_ci95"),
                    Line(key="eval/score_mean", label="held out", band="eval/score_ci95"),
                ),
            ),
        ),
    ),
    Panel(
        name="kl",
        title="KL to the reference",
        rows=(
            Row(
                unit="nats per response",
                lines=(
                    Line(key="kl/sequence_mean", label="KL"),
                    Line(key="eval/kl_sequence_mean", label="held out"),
                    Line(key="eval/kl_exact_mean", label="held out, exact"),
                ),
                floor=0.0,
            ),
            Row(unit="beta, reward per nat", lines=(Line(key="kl/beta", label="beta"),)),
        ),
    ),
    Panel(
        name="judge",
        title="Judge and reward on held-out prompts",
        rows=(
            Row(unit="score of the judge", lines=(Line(key="eval/judge_mean", label="judge", band="eval/judge_ci95"),)),
            Row(
                unit="correlation with length",
                lines=(
                    Line(key="eval/length_correlation", label="reward and length"),
                    Line(key="eval/length_correlation_within", label="within prompts"),
                ),
            ),
        ),
    ),
    Panel(
        name="variety",
        title="Variety of held-out responses",
        rows=(
            Row(
                unit="share",
                lines=(
                    Line(key="eval/unique_share", label="unique responses"),
                    Line(key="eval/distinct_2", label="distinct pairs of tokens"),
                    Line(key="eval/repeated_4_share", label="repeated 4-grams"),
                ),
                share=True,
                whole=True,
            ),
            Row(unit="self-BLEU-4", lines=(Line(key="eval/self_bleu_4", label="self-BLEU-4"),), floor=0.0),
        ),
    ),
    Panel(
        name="loss",
        title="Loss",
        rows=(
            Row(
                unit="loss",
                lines=(Line(key="loss", label="training loss"), Line(key="eval_loss", label="held-out loss")),
            ),
        ),
    ),
    Panel(
        name="accuracy",
        title="Pairs ranked as annotated",
        rows=(
            Row(
                unit="share of pairs",
                lines=(
                    Line(key="accuracy", label="training accuracy"),
                    Line(key="eval_accuracy", label="held-out accuracy"),
                ),
                share=True,
                whole=True,
            ),
            Row(unit="margin, score", lines=(Line(key="margin_mean", label="margin"),)),
        ),
    ),
    Panel(
        name="preferences",
        title="Chosen and rejected answers",
        rows=(
            Row(
                unit="nats an answer",
                lines=(
                    Line(key="chosen_logprob_mean", label="log-probability, chosen"),
                    Line(key="rejected_logprob_mean", label="rejected"),
                    Line(key="eval_chosen_logprob_mean", label="chosen, held out"),
                    Line(key="eval_rejected_logprob_mean", label="rejected, held out"),
                ),
            ),
            Row(
                unit="implicit reward",
                lines=(
                    Line(key="chosen_reward_mean", label="reward, chosen"),
                    Line(key="rejected_reward_mean", label="rejected"),
                ),
            ),
        ),
    ),
    Panel(
        name="judged",
        title="Good and bad answers",
        rows=(
            Row(
                unit="share of answers",
                lines=(
                    Line(key="label_accuracy", label="on their side of the reference point"),
                    Line(key="eval_label_accuracy", label="held out"),
                ),
                share=True,
                whole=True,
            ),
            Row(
                unit="implicit reward",
                lines=(
                    Line(key="good_reward_mean", label="good answers"),
                    Line(key="bad_reward_mean", label="bad answers"),
                ),
            ),
        ),
    ),
    Panel(
        name="reference_point",
        title="Reference point",
        rows=(
            Row(
                unit="nats per response",
                lines=(
                    Line(key="reference_point", label="mean gain of answers to other prompts"),
                    Line(key="eval_reference_point", label="held out"),
                ),
                floor=0.0,
            ),
        ),
    ),
    Panel(
        name="perplexity",
        title="Perplexity",
        rows=(
            Row(
                unit="perplexity",
                lines=(
                    Line(key="perplexity", label="perplexity"),
                    Line(key="eval_perplexity", label="held-out perplexity"),
                    Line(key="eval/demonstration_perplexity", label="held-out demonstrations"),
                ),
            ),
        ),
    ),
    Panel(
        name="entropy",
        title="Entropy",
        rows=(
            Row(
                unit="nats per token",
                lines=(
                    Line(key="policy/entropy_mean", label="entropy"),
                    Line(key="eval/entropy_mean", label="held out"),
                ),
                floor=0.0,
            ),
        ),
    ),
    Panel(
        name="length",
        title="Responses",
        rows=(
            Row(
                unit="length, tokens",
                lines=(
                    Line(key="response/length_mean", label="mean length"),
                    Line(key="response/length_p95", label="95th percentile"),
                ),
                floor=0.0,
            ),
            Row(
                unit="finished",
                lines=(Line(key="response/finished_share", label="finished share"),),
                share=True,
                whole=True,
            ),
        ),
    ),
    Panel(
        name="value",
        title="Critic",
        rows=(
            Row(unit="value loss", lines=(Line(key="value/loss", label="value loss"),), floor=0.0),
            Row(
                unit="explained variance",
                lines=(Line(key="value/explained_variance", label="explained variance"),),
                # An untrained critic can be at -50; what matters is whether it explains anything.
                cut_below=-1.0,
            ),
        ),
    ),
    Panel(
        name="update",
        title="Size of the policy's updates",
        rows=(
            Row(
                unit="clip fraction",
                lines=(Line(key="policy/clip_fraction", label="clip fraction"),),
                floor=0.0,
                share=True,
            ),
            Row(
                unit="approximate KL, nats",
                lines=(Line(key="policy/approx_kl", label="approximate KL"),),
                floor=0.0,
            ),
        ),
    ),
    Panel(
        name="rollout",
        title="Engine against trainer",
        rows=(
            Row(
                unit="importance weight, sample size",
                lines=(
                    Line(key="rollout/importance_weight_mean", label="mean importance weight"),
                    Line(key="rollout/ess", label="effective sample size"),
                ),
                floor=0.0,
            ),
            Row(unit="KL, nats per token", lines=(Line(key="rollout/kl_old", label="KL of engine and trainer"),)),
        ),
    ),
    Panel(
        name="speed",
        title="Speed and learning rate",
        rows=(
            Row(
                unit="tokens per second",
                lines=(
                    Line(key="throughput/generated_tokens_per_s", label="generated tokens/s"),
                    Line(key="tokens_per_s", label="tokens/s"),
                ),
                floor=0.0,
            ),
            Row(unit="learning rate", lines=(Line(key="learning_rate", label="learning rate"),), floor=0.0),
        ),
    ),
)
