"""All that scores a response: the models of an ensemble, or the one there is, and a rule. Called by the batcher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from services.reward.combining import Marks
from services.reward.python_scorer import Exchange, PythonScorer
from services.reward.scorer import Scorer, ScorerItem
from services.runtime.batcher import ItemError


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response: its tokens for the models, its text for the rule. Either is there when somebody asks for it."""

    tokens: ScorerItem = field(default_factory=lambda: ScorerItem(()))
    exchange: Exchange | None = None


# What is scored in one forward pass whatever else is: one response, or two to be compared, whose prompt is shared.
Work = tuple[Candidate, ...]
Answers = tuple[Marks | ItemError, ...]


class Panel:
    """Models with the same tokenizer and heads, and a rule; at least one of these.

    Args:
        members: the models; two or more are an ensemble.
        rule: the Python scorer, which other panels may share.
        heads: names of the models' heads, which the rule may not give to its own scores.
        alone: every response is a forward pass of its own, so that no companion changes its score, not in one bit.
    """

    def __init__(
        self,
        members: Sequence[Scorer],
        rule: PythonScorer | None = None,
        *,
        heads: Iterable[str] = (),
        alone: bool = False,
    ) -> None:
        self.members = tuple(members)
        self.rule = rule
        self.heads = frozenset(heads)
        self.alone = alone

    @property
    def vocab_size(self) -> int:
        """Token ids that every model knows; 0 without a model."""
        return min((member.vocab_size for member in self.members), default=0)

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens that every model takes; 0 without a model."""
        return min((member.max_sequence_tokens for member in self.members), default=0)

    @property
    def padded(self) -> bool:
        """Whether a model's batches are."""
        return any(member.padded for member in self.members)

    @property
    def device(self) -> str:
        """Type of the device that scores; all models share it."""
        return next((member.device for member in self.members), "cpu")

    def __call__(self, works: Sequence[Work]) -> list[Answers]:
        """What is said of each response, in order."""
        answers = iter(self.score([candidate for work in works for candidate in work]))
        return [tuple(next(answers) for _ in work) for work in works]

    def score(self, candidates: Sequence[Candidate]) -> list[Marks | ItemError]:
        """What is said of each, in order. The rule goes first: what it refuses costs no forward pass."""
        ruled = self._rule(candidates)
        wanted = [c.tokens for c, attributes in zip(candidates, ruled, strict=True) if not _failed(attributes)]
        scores = list(zip(*(self._member(member, wanted) for member in self.members), strict=True))
        rows: Iterator[tuple[Sequence[float], ...]] = iter(scores or [()] * len(wanted))
        return [
            attributes if isinstance(attributes, ItemError) else Marks(next(rows), attributes) for attributes in ruled
        ]

    def _rule(self, candidates: Sequence[Candidate]) -> Sequence[dict[str, float] | ItemError]:
        if self.rule is None:
            return [{}] * len(candidates)
        exchanges = []
        for candidate in candidates:
            assert candidate.exchange is not None
            exchanges.append(candidate.exchange)
        ruled = self.rule.score(exchanges, taken=self.heads)
        return [found if isinstance(found, ItemError) else dict(found) for found in ruled]

    def _member(self, member: Scorer, items: Sequence[ScorerItem]) -> list[Sequence[float]]:
        if not self.alone:
            return list(member.score(items)) if items else []
        return [scores for item in items for scores in member.score([item])]


def _failed(attributes: dict[str, float] | ItemError) -> bool:
    return isinstance(attributes, ItemError)
