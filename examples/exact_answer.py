"""A verifiable reward: 1 when the last number of a response is the right answer, else 0.

    QUARTET_ANSWERS=answers.jsonl quartet-reward --scorer examples.exact_answer:score

The file has a row a question, ``{"prompt": "What is 6 x 7?", "answer": "42"}``. Numbers are compared as numbers, not as
text: "1,000.50", "$1000.5" and "2001/2" are one answer. A response without a number is wrong; a question that the file
does not have gets no score at all, rather than a wrong one.

Beside a model (``--model runs/reward/model --scorer-weight 2``) it is one more attribute of the score.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from fractions import Fraction

Prompt = str | list[dict[str, str]]

# A whole or decimal number, with or without thousands separators, or a fraction of two whole numbers.
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/[1-9]\d*)?(?!\w)")


def score(pairs: Sequence[tuple[Prompt, str]]) -> list[float | None]:
    """1.0 or 0.0 for each (prompt, response), None where the answer is not known."""
    answers = known_answers(os.environ["QUARTET_ANSWERS"])
    scores: list[float | None] = []
    for prompt, response in pairs:
        expected = answers.get(question(prompt))
        scores.append(None if expected is None else float(last_number(response) == expected))
    return scores


@functools.lru_cache(maxsize=1)
def known_answers(path: str) -> dict[str, Fraction]:
    """Answers by question."""
    answers = {}
    with open(path, encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            row = json.loads(text)
            answer = last_number(str(row["answer"]))
            if answer is None:
                raise ValueError(f"{path}, line {line}: answer is {row['answer']!r}, must have a number")
            answers[row["prompt"].strip()] = answer
    return answers


def question(prompt: Prompt) -> str:
    """The prompt itself, or the last message of its user."""
    if isinstance(prompt, str):
        return prompt.strip()
    return next((turn["content"].strip() for turn in reversed(prompt) if turn["role"] == "user"), "")


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly."""
    found = _NUMBER.findall(text)
    return Fraction(re.sub(r"[$,]", "", found[-1])) if found else None
