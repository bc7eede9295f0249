"""The reward model is replaced while clients score: live services, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from quartet.client import (
    CallPolicy,
    CredentialsError,
    DeadlineError,
    InvalidInputError,
    PreconditionError,
    QuartetError,
    RewardAdminClient,
    RewardClient,
    Score,
    ScoreItem,
    Scores,
    Security,
    UnavailableError,
)
from quartet.fingerprint import safetensors_fingerprint, tokenizer_fingerprint
from quartet.model_folder import write_metadata
from services.runtime.probe import probe
from tests.conftest import LiveService, llama_config, train_tokenizer

ONCE = CallPolicy(patience_s=0.0, deadline_s=30.0)
SERVICE = RewardClient.health_service
# The model's own code, imported when it is loaded: it takes as long as the file that it waits for is there.
SLOW_MODEL = """
import os, time
from transformers import LlamaForSequenceClassification

open({begun!r}, "w").close()
while os.path.exists({gate!r}):
    time.sleep(0.02)


class SlowModel(LlamaForSequenceClassification):
    pass
"""


def events(service: LiveService, name: str) -> list[dict[str, object]]:
    lines = [line for line in service.log.read_text().splitlines() if line.startswith("{")]
    return [event for event in map(json.loads, lines) if event["event"] == name]


async def until(condition, timeout_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not come to pass in time"
        await asyncio.sleep(0.02)


def metric(service: LiveService, name: str) -> float:
    text = urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=5).read().decode()
    (value,) = re.findall(rf"^quartet_reward_{name} (\S+)$", text, flags=re.MULTILINE)
    return float(value)


@pytest.fixture(scope="module")
def models(make_reward_model, tmp_path_factory) -> Path:
    """A folder with the models a and b, which have the same tokenizer, c with another, and some that are no good."""
    top = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 1), ("b", 2)):
        shutil.copytree(make_reward_model(seed=seed), top / name)
    other = train_tokenizer(vocab_size=280)
    shutil.copytree(make_reward_model(seed=3, save_tokenizer=other), top / "c")
    shutil.copytree(top / "a", top / "two_labels")
    shutil.copytree(make_reward_model(num_labels=2), top / "two_labels", dirs_exist_ok=True)
    shutil.copytree(top / "a", top / "bad_baseline")
    write_metadata(top / "bad_baseline", baseline={"scores": [1.0, float("nan")]})
    (top / "empty").mkdir()
    return top


def slow_model(models: Path, number: int) -> tuple[Path, Path]:
    """A model that loads for as long as the file ``gate`` exists: the gate, and a file that says when it has begun."""
    folder = models / f"slow{number}"
    shutil.copytree(models / "b", folder)
    gate, begun = models / f"gate{number}", models / f"begun{number}"
    gate.touch()
    (folder / "modeling_slow.py").write_text(SLOW_MODEL.format(gate=str(gate), begun=str(begun)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_slow.SlowModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return gate, begun


@pytest.fixture(scope="module")
def start(start_service, models, tmp_path_factory):  # type: ignore[no-untyped-def]
    """start(*flags) serves model a, and lets all of the folder take over."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hub"))

    def start(*flags: str) -> LiveService:
        return start_service("reward", models / "a", "--models-dir", str(models), "--log-format", "json", *flags)

    yield start
    del os.environ["HF_HOME"]


@pytest.fixture(scope="module")
def live(start) -> LiveService:  # type: ignore[no-untyped-def]
    return start("--trust-remote-code")


@pytest.fixture
async def admin(live) -> AsyncIterator[RewardAdminClient]:
    async with RewardAdminClient(live.admin_address, policy=ONCE) as client:
        yield client


def pieces(seed: int, count: int) -> list[ScoreItem]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 60, count)
    ids = [draw.integers(3, 300, n).tolist() for n in lengths]
    return [ScoreItem(prompt=x[: len(x) // 2], response=x[len(x) // 2 :]) for x in ids]


def direct(folder: Path, items: list[ScoreItem]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([[*i.prompt, *i.response]])).logits[0, 0].item() for i in items]


async def test_every_request_of_many_clients_is_answered_whole_by_the_model_it_names_while_models_are_swapped(
    live, admin, models, tokenizer
):
    fingerprint = tokenizer_fingerprint(tokenizer)
    batches = [pieces(seed, 12) for seed in range(6)]
    by_weights = {
        safetensors_fingerprint(models / name): [direct(models / name, batch) for batch in batches] for name in "ab"
    }
    # The models tell themselves apart on every single text.
    apart = [abs(x - y) for a, b in zip(*by_weights.values(), strict=True) for x, y in zip(a, b, strict=True)]
    assert min(apart) > 1e-3
    done = asyncio.Event()
    answers: list[tuple[int, Scores]] = []
    health: set[str] = set()
    first = (await admin.get_drift()).served_by.weights_version

    async def score(number: int) -> None:
        # Nothing is repeated: what is lost shows.
        async with RewardClient(live.address, policy=ONCE) as client:
            while not done.is_set():
                batch = batches[number]
                answers.append((number, await client.score(batch, tokenizer_fingerprint=fingerprint)))

    async def watch() -> None:
        while not done.is_set():
            health.add(await asyncio.to_thread(probe, live.address, SERVICE))

    async def swap() -> list[tuple[int, str]]:
        served = []
        for name in "babababa":
            swapped = await admin.swap_model(name)
            served.append((swapped.model.served_by.weights_version, swapped.model.served_by.weights_fingerprint))
            assert swapped.replaced.weights_version == swapped.model.served_by.weights_version - 1
            before = len(answers)
            await until(lambda before=before: len(answers) > before + 12)
        done.set()
        return served

    *_, served = await asyncio.gather(*(score(number) for number in range(6)), watch(), swap())
    assert [version for version, _ in served] == list(range(first + 1, first + 9))
    of_version = {first: safetensors_fingerprint(models / "a")} | dict(served)
    seen = set()
    for number, reply in answers:
        by = reply.served_by
        assert by.weights_fingerprint == of_version[by.weights_version]
        assert all(isinstance(result, Score) for result in reply.results)
        scores = [result.score for result in reply.results]
        assert scores == pytest.approx(by_weights[by.weights_fingerprint][number], abs=2e-5)
        seen.add(by.weights_version)
    assert seen == set(of_version)
    assert health == {"SERVING"}
    assert await asyncio.to_thread(metric, live, "weights_version") == first + 8
    await until(lambda: len(events(live, "model_retired")) >= 8)
    for gauge in ("queue_tokens", "queue_items", "held_bytes", "calls_in_flight"):
        assert await asyncio.to_thread(metric, live, gauge) == 0.0


async def test_after_a_swap_the_window_is_empty_and_the_new_tokenizer_is_asked_for(live, admin, tokenizer, models):
    items = pieces(7, 5)
    async with RewardClient(live.address, policy=ONCE) as client:
        await client.score(items, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
        assert (await admin.get_drift()).window.score_count >= 5
        try:
            swapped = await admin.swap_model("c")
            assert (await admin.get_drift()).window.score_count == 0
            with pytest.raises(PreconditionError, match="the token ids mean something else here; send text instead"):
                await client.score(items, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
            reply = await client.score(items, tokenizer_fingerprint=swapped.model.served_by.tokenizer_fingerprint)
            assert [r.score for r in reply.results] == pytest.approx(direct(models / "c", items), abs=2e-5)
            by_text = (await client.score([ScoreItem(prompt="hello", response=" thanks")])).served_by
            assert by_text == swapped.model.served_by
        finally:
            await admin.swap_model("a")


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (
            "two_labels",
            PreconditionError,
            r"num_labels is 2, must be 1; or name the heads .*; the model that served",
        ),
        ("bad_baseline", PreconditionError, r"baseline.scores\[1\] is nan, must be a finite number; the model that"),
        ("empty", PreconditionError, "the folder has no config.json"),
        ("nothing", PreconditionError, "there is no such folder"),
        ("", InvalidInputError, "must be a name of 1 to 1024 characters"),
        (".", InvalidInputError, "not a folder below the service's models directory"),
        ("../a", InvalidInputError, r"a name may not contain '\.\.'"),
        ("b/../../x", InvalidInputError, r"a name may not contain '\.\.'"),
        ("/etc", InvalidInputError, "not a folder below the service's models directory"),
        ("a\0b", InvalidInputError, "without NUL"),
        ("x" * 5000, InvalidInputError, "must be a name of 1 to 1024 characters"),
        ("y" * 1000, InvalidInputError, "not a folder that can be read"),
        ("org/model", PreconditionError, "there is no such folder"),  # Never the hub's.
    ],
)
async def test_a_model_that_is_not_allowed_or_not_hostable_is_refused_and_the_old_one_serves_on(
    live, admin, models, name, error, said
):
    before = (await admin.get_drift()).served_by
    with pytest.raises(error, match=said) as refused:
        await admin.swap_model(name)
    assert refused.value.field == "model"
    items = pieces(8, 3)
    async with RewardClient(live.address, policy=ONCE) as client:
        reply = await client.score(items, tokenizer_fingerprint=before.tokenizer_fingerprint)
    assert reply.served_by == before
    assert [r.score for r in reply.results] == pytest.approx(direct(models / "a", items), abs=2e-5)


async def test_links_out_of_the_folder_are_refused_and_links_within_are_followed(
    live, admin, models, make_reward_model
):
    outside = make_reward_model(seed=5)
    (models / "linked").symlink_to(outside)
    shutil.copytree(models / "b", models / "leaking")
    (models / "leaking" / "model.safetensors").unlink()
    (models / "leaking" / "model.safetensors").symlink_to(outside / "model.safetensors")
    (models / "round").symlink_to(models / "round")
    for name, members in (("together", ["../a", "../b"]), ("beyond", ["../a", str(outside)])):
        (models / name).mkdir()
        (models / name / "quartet.json").write_text(json.dumps({"kind": "reward-ensemble", "members": members}))
    for name, said in (
        ("beyond", "lies outside the models directory"),
        ("linked", "not a folder below"),
        ("linked/model.safetensors", "not a folder below"),
        ("leaking", "'model.safetensors' in it leads out of"),
        (str(outside), "not a folder below"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            await admin.swap_model(name)
    with pytest.raises(QuartetError) as refused:
        await admin.swap_model("round")
    assert refused.value.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    with pytest.raises(InvalidInputError, match="a folder below the models directory has none"):
        await admin.swap_model("b", revision="main")
    (models / "current").symlink_to("b")
    swapped = await admin.swap_model("current")
    assert swapped.model.served_by.model_id == str((models / "b").resolve())
    await admin.swap_model("together")
    items = pieces(8, 3)
    async with RewardClient(live.address, policy=ONCE) as client:
        info = await client.get_model_info()
        reply = await client.score(items, tokenizer_fingerprint=info[0].served_by.tokenizer_fingerprint)
    both = [direct(models / name, items) for name in ("a", "b")]
    assert [r.score for r in reply.results] == pytest.approx(
        [(x + y) / 2 for x, y in zip(*both, strict=True)], abs=2e-5
    )
    await admin.swap_model(str(models / "a"))  # An absolute path is no matter where it lies below the folder.


RULE = """
import asyncio, threading

loops, threads, running = [], set(), 0


async def score(pairs):
    global running
    running += 1
    if running > 1:
        raise RuntimeError("two batches at once")
    if asyncio.get_running_loop() not in loops:
        loops.append(asyncio.get_running_loop())
    threads.add(threading.get_ident())
    await asyncio.sleep(0.003)
    running -= 1
    return [{{"loops": len(loops), "threads": len(threads), "edition": {edition}}} for _ in pairs]


score.weights = {{"loops": 0.0, "threads": 0.0, "edition": 1.0}}
"""


async def test_a_python_scorer_is_the_same_whatever_model_it_stands_beside(
    start, models, make_reward_model, tmp_path, monkeypatch
):
    shutil.copytree(models / "a", models / "named_as_the_rule")
    shutil.copytree(make_reward_model(seed=5, num_labels=2), models / "named_as_the_rule", dirs_exist_ok=True)
    heads = [{"name": "helpfulness", "weight": 1.0}, {"name": "edition", "weight": 1.0}]
    write_metadata(models / "named_as_the_rule", heads=heads)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "swapped_rule.py").write_text(RULE.format(edition=1))
    live = start("--scorer", "swapped_rule:score")
    done = asyncio.Event()
    answers: list[Scores] = []

    async def score() -> None:
        async with RewardClient(live.address, policy=ONCE) as client:
            while not done.is_set():
                answers.append(await client.score([ScoreItem(prompt="hello", response=" thanks")] * 4))

    async def swap() -> None:
        async with RewardAdminClient(live.admin_address, policy=ONCE) as client:
            (tmp_path / "swapped_rule.py").write_text(RULE.format(edition=2))
            for name in "bababa":
                await client.swap_model(name)
                with pytest.raises(PreconditionError, match=r"'edition' is the name of a head.*goes on serving"):
                    await client.swap_model("named_as_the_rule")
                before = len(answers)
                await until(lambda before=before: len(answers) > before + 6)
        done.set()

    await asyncio.gather(*(score() for _ in range(4)), swap())
    attributes = [result.attributes if isinstance(result, Score) else result for x in answers for result in x.results]
    assert attributes == [{"loops": 1.0, "threads": 1.0, "edition": 1.0}] * len(attributes)
    # Two models, and one rule, the one that runs.
    of_version: dict[int, str] = {x.served_by.weights_version: x.served_by.scoring_fingerprint for x in answers}
    assert sorted(of_version) == list(range(7))
    assert len({of_version[version] for version in (0, 2, 4, 6)}) == 1
    assert len({of_version[version] for version in (1, 3, 5)}) == 1
    assert live.stop() == 0
    assert "Traceback" not in live.log.read_text()


async def test_one_swap_at_a_time_and_a_client_that_leaves_leaves_the_old_model(live, admin, models):
    before = (await admin.get_drift()).served_by
    gate, begun = slow_model(models, 1)
    first = asyncio.create_task(admin.swap_model("slow1"))
    await until(begun.exists)
    with pytest.raises(PreconditionError, match="another swap is under way") as second:
        await admin.swap_model("b")
    assert second.value.code is grpc.StatusCode.ABORTED
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    # What was begun can't be interrupted: until it has ended there is no other.
    await asyncio.sleep(0.2)
    with pytest.raises(PreconditionError, match="given up is still ending"):
        await admin.swap_model("b")
    given_up = len(events(live, "swap_given_up"))
    gate.unlink()
    await until(lambda: len(events(live, "swap_given_up")) > given_up)
    assert (await admin.get_drift()).served_by == before

    _, begun = slow_model(models, 2)
    with pytest.raises(DeadlineError):
        await admin.swap_model("slow2", deadline_s=0.5)
    assert begun.exists()
    (models / "gate2").unlink()
    await until(lambda: len(events(live, "swap_given_up")) > given_up + 1)
    assert (await admin.get_drift()).served_by == before
    # A slow model that is waited for takes over: what was given up has left nothing in the way.
    gate, begun = slow_model(models, 3)
    third = asyncio.create_task(admin.swap_model("slow3"))
    await until(begun.exists)
    gate.unlink()
    swapped = await third
    assert swapped.model.served_by.weights_version == before.weights_version + 1
    assert swapped.model.served_by.weights_fingerprint == safetensors_fingerprint(models / "b")
    await admin.swap_model("a")


async def test_the_data_port_knows_no_swaps_and_the_admin_port_no_scores(live):
    async with RewardAdminClient(live.address, policy=ONCE) as client:
        for call in (client.swap_model("b"), client.get_drift()):
            with pytest.raises(QuartetError) as refused:
                await call
            assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED
    async with RewardClient(live.admin_address, policy=ONCE) as client:
        with pytest.raises(QuartetError) as refused:
            await client.score([ScoreItem(prompt="hello", response="x")])
        assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED


async def test_sigterm_in_the_middle_of_a_swap_answers_everybody_and_ends_cleanly(start, models):
    live = start("--trust-remote-code", "--grace-s", "20")
    _, begun = slow_model(models, 4)
    answered: list[Scores] = []
    ended: list[QuartetError] = []

    async def score() -> None:
        async with RewardClient(live.address, policy=ONCE) as client:
            try:
                while True:
                    answered.append(await client.score([ScoreItem(prompt="hello", response=" thanks")] * 8))
            except UnavailableError as error:
                ended.append(error)

    async with RewardAdminClient(live.admin_address, policy=ONCE) as client:
        swap = asyncio.create_task(client.swap_model("slow4"))
        scoring = [asyncio.create_task(score()) for _ in range(3)]
        await until(lambda: begun.exists() and len(answered) > 10)
        start_s = time.monotonic()
        live.process.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError, match="the service is ending; the model was not swapped"):
            await swap
        await asyncio.gather(*scoring)
    assert await asyncio.to_thread(live.process.wait, 20) == 0
    # It waited neither for the model, which still loads, nor for the grace period.
    assert (models / "gate4").exists()
    assert time.monotonic() - start_s < 10
    assert len(ended) == 3
    assert {(r.served_by.weights_version, len(r.results)) for r in answered} == {(0, 8)}
    assert "Traceback" not in live.log.read_text()


async def test_without_permission_nothing_is_swapped_and_names_that_are_allowed_are(start_service, models):
    live = start_service("reward", models / "a")
    async with RewardAdminClient(live.admin_address, policy=ONCE) as client:
        for name in ("b", str(models / "b"), str(models / "a")):
            with pytest.raises(PreconditionError, match=r"does not swap its model: start it with --models-dir FOLDER"):
                await client.swap_model(name)
    assert live.stop() == 0
    live = start_service("reward", models / "a", "--allow-swap-from", str(models / "b"))
    async with RewardAdminClient(live.admin_address, policy=ONCE) as client:
        with pytest.raises(InvalidInputError, match="not one of those allowed by --allow-swap-from"):
            await client.swap_model(str(models / "c"))
        with pytest.raises(InvalidInputError, match="is a folder, which has none"):
            await client.swap_model(str(models / "b"), revision="main")
        assert (await client.swap_model(str(models / "b"))).model.served_by.weights_version == 1
        # Back to where it came from, always.
        assert (await client.swap_model(str(models / "a"))).model.served_by.weights_version == 2
    assert live.stop() == 0


async def test_the_admin_port_asks_for_a_token_of_its_own(start, tmp_path):
    tokens, admins = tmp_path / "tokens", tmp_path / "admins"
    tokens.write_text("scores-1234567890123456\n")
    admins.write_text("admins-1234567890123456\n")
    live = start("--token-file", str(tokens), "--admin-token-file", str(admins))
    for token, said in ((None, "no token"), ("scores-1234567890123456", "the token is not accepted")):
        async with RewardAdminClient(live.admin_address, policy=ONCE, security=Security(token=token)) as client:
            for call in (client.swap_model("b"), client.get_drift()):
                with pytest.raises(CredentialsError, match=said) as refused:
                    await call
                assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
    security = Security(token="admins-1234567890123456")
    async with RewardAdminClient(live.admin_address, policy=ONCE, security=security) as client:
        assert (await client.swap_model("b")).model.served_by.weights_version == 1
    assert live.stop() == 0
    assert "1234567890123456" not in live.log.read_text()


async def test_the_memory_of_a_former_model_comes_back(start_service, tmp_path, tokenizer):
    """Two models of 96 MiB each, swapped to and fro: a leak of one of them would show at once."""
    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        config = llama_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_labels=1)
        model = LlamaForSequenceClassification(config)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    size_mib = (tmp_path / "x" / "model.safetensors").stat().st_size / 2**20
    assert size_mib > 90
    live = start_service("reward", tmp_path / "x", "--models-dir", str(tmp_path), "--log-format", "json")

    def resident_mib() -> float:
        status = Path(f"/proc/{live.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    async with RewardAdminClient(live.admin_address) as client, RewardClient(live.address) as reward:
        await reward.score([ScoreItem(prompt="hello", response=" thanks")] * 16)
        resident = [resident_mib()]
        for number, name in enumerate("yxyxyx", start=1):
            await reward.score([ScoreItem(prompt="hello", response=" thanks")] * 16)
            await client.swap_model(name)
            await until(lambda number=number: len(events(live, "model_retired")) == number)
            resident.append(resident_mib())
    assert max(resident) - resident[0] < size_mib / 2, resident
    assert live.stop() == 0
