"""Request ids say what a call belongs to."""

from __future__ import annotations

import asyncio

import pytest

from quartet.client.channel import new_request_id, request_ids


async def test_calls_within_belong_together_also_those_of_tasks_and_threads_and_others_do_not():
    async def one() -> str:
        await asyncio.sleep(0)
        return new_request_id()

    with request_ids("ppo.step7"):
        inside = [await one(), await asyncio.create_task(one()), await asyncio.to_thread(new_request_id)]
        with request_ids("inner"):
            assert new_request_id().startswith("inner.")
    assert [name.rpartition(".")[0] for name in inside] == ["ppo.step7"] * 3
    assert len(set(inside)) == 3
    assert len(new_request_id()) == 32


@pytest.mark.parametrize("prefix", ["", "a b", "x" * 65, "a/b", "a\n"])
def test_a_prefix_that_logs_could_not_be_searched_for_is_refused(prefix):
    with pytest.raises(ValueError, match="must be 1 to 64 letters, digits"), request_ids(prefix):
        pass
