"""The judge of ``bench.sentiment``: a bag of words, and reviews that nothing else was trained on.

QUARTET_SENTIMENT_JUDGE=runs/sentiment/data/judge.jsonl quartet-reward --scorer bench.sentiment_judge:score
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = "QUARTET_SENTIMENT_JUDGE"
"""Names the file of its rows: ``text`` and whether it is ``positive``."""


def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The probability that prompt and response together praise the film."""
    judge = fitted(Path(os.environ[ROWS]))
    return probabilities(judge, [prompt + response for prompt, response in pairs])


def probabilities(judge: Any, texts: Sequence[str]) -> list[float]:
    """That each text is positive."""
    found: list[float] = judge.predict_proba(texts)[:, 1].tolist()
    return found


@functools.lru_cache(maxsize=1)
def fitted(path: Path) -> Any:
    """Logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    judge = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    return judge.fit([row["text"] for row in rows], [row["positive"] for row in rows])
