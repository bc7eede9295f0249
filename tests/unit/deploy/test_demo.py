"""What the demo says at its end."""

from __future__ import annotations

import json

import pytest

from deploy.demo import has_risen


@pytest.mark.parametrize(("after", "risen"), [((3.0, 0.9), True), ((3.0, 1.1), False), ((0.0, 0.1), False)])
def test_the_reward_has_risen_where_the_intervals_are_disjoint_and_the_later_one_is_above(after, risen, tmp_path):
    for name, (mean, half_width) in (("before", (1.0, 1.0)), ("after", after)):
        figures = {"score_mean": mean, "score_ci95": half_width}
        (tmp_path / f"evaluation_{name}.json").write_text(json.dumps(figures))
    assert has_risen(tmp_path) is risen
