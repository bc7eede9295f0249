"""The gateway against live services: what callers ask, what other trainers send, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quartet.client import ComparisonItem, ReferenceClient, RewardClient, ScoreItem, TokenSequence
from quartet.model_folder import write_metadata
from services.gateway import keys
from tests.conftest import LiveService, free_port
from tests.integration.test_metrics import DOCUMENT as METRICS_DOCUMENT
from tests.integration.test_metrics import ROW as METRIC_ROW

pytestmark = pytest.mark.timeout(300)

RULE = "tests.gateway_scorer:score"
HELLO = {"prompt": "hello", "response": "Hello there"}


def share(text: str) -> float:
    return sum("a" <= letter <= "z" for letter in text) / max(1, len(text))


@dataclass
class Gateway:
    """A gateway's process."""

    process: subprocess.Popen[str]
    url: str
    metrics_url: str
    log: Path

    def events(self, name: str = "") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in found if not name or event["event"] == name]

    def metric(self, name: str) -> dict[str, float]:
        """Samples of a metric by their labels as text."""
        text = httpx.get(f"{self.metrics_url}/metrics").text
        return {labels: float(value) for labels, value in re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def start_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Gateway]]:
    started: list[Gateway] = []

    def start(*flags: str) -> Gateway:
        port, metrics_port = free_port(), free_port()
        log = tmp_path_factory.mktemp("gateway") / "log"
        command = [sys.executable, "-m", "services.gateway", "--port", str(port), "--metrics-port", str(metrics_port)]
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*command, "--log-format", "json", *flags], stdout=sink, stderr=subprocess.STDOUT, text=True
            )
        gateway = Gateway(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}", log)
        started.append(gateway)
        end = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{gateway.url}/healthz").json() == {"status": "ok"}
                return gateway
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)

    yield start
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.process.kill()
        gateway.process.wait()


@pytest.fixture(scope="module")
def reward(start_service: Callable[..., LiveService]) -> LiveService:
    return start_service("reward", "", "--scorer", RULE)


@pytest.fixture(scope="module")
def gateway(start_gateway: Callable[..., Gateway], reward: LiveService) -> Gateway:
    return start_gateway("--reward", reward.address)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30) as made:
        yield made


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"]["message"] == body["detail"]
    return body


# Our own routes ----------------------------------------------------------------------------------------------------


def test_one_response_has_its_score(client: httpx.Client) -> None:
    found = client.post("/v1/score", json=HELLO).raise_for_status().json()
    assert found["score"] == pytest.approx(share("Hello there"))
    assert found["model"] == RULE
    assert found["weights_version"] == 0
    assert found["truncated"] is False
    assert found["fingerprint"]
    chat = {"prompt": [{"role": "user", "content": "hello"}], "response": "Hello there", "finished": False}
    assert client.post("/v1/score", json=chat).json()["score"] == found["score"]


def test_of_several_each_has_a_score_or_the_reason_why_it_has_none(client: httpx.Client) -> None:
    texts = ["abc", "ABC", "fail", "aB"]
    body = {"items": [{"prompt": "p", "response": text} for text in texts]}
    found = client.post("/v1/score", json=body).raise_for_status().json()["results"]
    assert [result.get("score") for result in found] == [1.0, 0.0, None, 0.5]
    assert "error" in found[2]
    assert set(found[2]) == {"error", "retryable"}
    refused = problem(client.post("/v1/score", json={"prompt": "p", "response": "fail"}), 422)
    assert refused["field"] == "response"
    assert refused["detail"] == found[2]["error"]


async def test_a_ranking_has_scores_and_the_preferences_that_the_service_tells(
    gateway: Gateway, reward: LiveService
) -> None:
    responses = ["ABc", "abc", "Abc", "abc"]
    async with httpx.AsyncClient(base_url=gateway.url) as client, RewardClient(reward.address) as direct:
        found = (await client.post("/v1/rank", json={"prompt": "p", "responses": responses})).raise_for_status().json()
        pairs = [(i, j) for i in range(4) for j in range(4)]
        items = [ComparisonItem(prompt="p", first=responses[i], second=responses[j]) for i, j in pairs]
        compared = await direct.compare(items)
    assert [one["index"] for one in found["ranking"]] == [1, 3, 2, 0]
    assert found["best"] == 1
    assert [one["score"] for one in found["ranking"]] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    for (i, j), expected in zip(pairs, compared.results, strict=True):
        assert found["preferences"][i][j] == pytest.approx(expected.probability, abs=1e-6)
    order = [one["index"] for one in found["ranking"]]
    following = [found["preferences"][i][j] for i, j in itertools.pairwise(order)]
    assert [one.get("preferred_to_next") for one in found["ranking"]] == [*following, None]
    assert following[0] == 0.5


async def test_members_of_an_ensemble_are_asked_for_preferences(
    start_service: Callable[..., LiveService],
    start_gateway: Callable[..., Gateway],
    make_reward_model: Any,
    tmp_path: Path,
) -> None:
    for seed in (0, 1):
        shutil.copytree(make_reward_model(seed), tmp_path / f"seed-{seed}")
        calibration = {"temperature": 1.0 + seed}
        statistics = {"mean": 0.1, "std": 0.5 + seed, "count": 100}
        write_metadata(tmp_path / f"seed-{seed}", kind="reward", normalisation=statistics, calibration=calibration)
    write_metadata(tmp_path, kind="reward-ensemble", members=["seed-0", "seed-1"])
    service = start_service("reward", tmp_path)
    gateway = start_gateway("--reward", service.address)
    responses = ["hello", "please send help", "awful delay"]
    async with httpx.AsyncClient(base_url=gateway.url) as client, RewardClient(service.address) as direct:
        found = (await client.post("/v1/rank", json={"prompt": "p", "responses": responses})).raise_for_status().json()
        pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
        items = [ComparisonItem(prompt="p", first=responses[i], second=responses[j]) for i, j in pairs]
        compared = await direct.compare(items)
        listed = (await client.get("/v1/models")).json()["data"][0]
    for (i, j), expected in zip(pairs, compared.results, strict=True):
        assert found["preferences"][i][j] == pytest.approx(expected.probability, abs=1e-6)
    best = found["ranking"][0]
    assert best["score"] == max(one["score"] for one in found["ranking"])
    assert len(best["member_scores"]) == listed["ensemble"]
    assert best["spread"] > 0


def test_models_are_listed_and_found_by_name(client: httpx.Client) -> None:
    listed = client.get("/v1/models").raise_for_status().json()
    assert [(one["id"], one["kind"], one["engine"]) for one in listed["data"]] == [(RULE, "reward", "python")]
    assert client.get(f"/v1/models/{RULE}").json() == listed["data"][0]
    assert f"there are {RULE}" in problem(client.get("/v1/models/gpt-2"), 404)["detail"]


@pytest.mark.parametrize(
    ("content", "status", "field", "told"),
    [
        (b'{"prompt": "a", ', 400, None, "the body is not valid JSON"),
        (b"[]", 422, None, "body"),
        (b'{"prompt": "a"}', 422, "response", "response: is required"),
        (b'{"prompt": 3, "response": "b"}', 422, "prompt", "prompt is 3: must be text, or a list of turns"),
        (b'{"prompt": "a", "response": "b", "normalize": true}', 422, "normalize", "there is no such field"),
        (b'{"prompt": "a", "response": "b", "truncation": "middle"}', 422, "truncation", "'refuse', 'left'"),
        (b'{"prompt": "a", "response": "b", "head_weights": {"x": 1}}', 422, "head_weights", "x"),
        (b'{"items": []}', 422, "items", "items is []"),
        (b'{"items": [{"prompt": "a", "response": "b"}, {"prompt": "a"}]}', 422, "items[1].response", "required"),
        (b'{"prompt": [{"role": "user"}], "response": "b"}', 422, "prompt[0].content", "required"),
        (b'{"prompt": "a", "response": "b", "normalise": true}', 409, "normalise", "statistics"),
        (b'{"prompt": "\\ud800", "response": "b"}', 422, "prompt", "prompt"),
    ],
)
def test_what_is_wrong_is_told_by_field_value_and_bound(
    client: httpx.Client, content: bytes, status: int, field: str | None, told: str
) -> None:
    response = client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    found = problem(response, status)
    assert told in found["detail"]
    if field is not None:
        assert found["field"] == field


def test_more_than_may_be_asked_at_a_time_is_refused(
    start_gateway: Callable[..., Gateway], reward: LiveService
) -> None:
    url = start_gateway("--reward", reward.address, "--max-items", "2", "--max-candidates", "2").url
    three = {"items": [HELLO] * 3}
    assert "items has 3 entries, at most 2" in problem(httpx.post(f"{url}/v1/score", json=three), 422)["detail"]
    body = {"prompt": "p", "responses": ["a", "b", "c"]}
    assert "responses has 3 entries" in problem(httpx.post(f"{url}/v1/rank", json=body), 422)["detail"]
    assert "query has 3 entries" in problem(httpx.post(f"{url}/get_reward", json={"query": ["a"] * 3}), 422)["detail"]


# Other trainers ----------------------------------------------------------------------------------------------------


async def test_openrlhf_s_requests_of_one_sample_go_to_the_service_together(
    gateway: Gateway, reward: LiveService
) -> None:
    """Its client sends each sample as a request of its own, all at once."""
    prompts = [f"Prompt {n}: " for n in range(256)]
    # The first keeps the service busy while the others arrive.
    responses = ["sleep 1", *(f"{'a' * n} {'B' * (256 - n)}" for n in range(1, 256))]
    before = gateway.metric("quartet_gateway_joined_items_count").get("", 0.0)
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=180) as client:

        async def ask(prompt: str, response: str) -> Any:
            body = {"query": [prompt + response], "prompts": [prompt], "labels": [None]}
            return (await client.post("/get_reward", json=body)).raise_for_status().json()

        found = await asyncio.gather(*map(ask, prompts, responses))
    async with RewardClient(reward.address) as direct:
        items = [ScoreItem(prompt=p, response=r, finished=False) for p, r in zip(prompts, responses, strict=True)]
        expected = (await direct.score(items)).results
    assert [one["rewards"] for one in found] == [[pytest.approx(score.score)] for score in expected]
    for one in found:
        assert one["scores"] == [pytest.approx(1 / (1 + 2.718281828459045 ** -one["rewards"][0]))]
        assert one["extra_logs"].keys() == found[0]["extra_logs"].keys()
        assert all(len(values) == 1 for values in one["extra_logs"].values())
    calls = gateway.metric("quartet_gateway_joined_items_count")[""] - before
    assert calls < 64


def test_openrlhf_s_empty_list_is_answered_empty_and_a_failure_is_no_number(client: httpx.Client) -> None:
    empty = {"query": [], "prompts": [], "labels": []}
    assert client.post("/get_reward", json=empty).json() == {"rewards": [], "scores": [], "extra_logs": {}}
    refused = problem(client.post("/get_reward", json={"query": ["a", "fail"]}), 422)
    assert refused["field"] == "query[1]"
    uneven = {"query": ["a", "b"], "prompts": ["a"]}
    assert "prompts has 1 entries, query 2" in problem(client.post("/get_reward", json=uneven), 422)["detail"]


def test_slime_has_a_bare_number_or_its_key(client: httpx.Client) -> None:
    for prompt in ("hello", [{"role": "user", "content": "hello"}]):
        sample = {"prompt": prompt, "response": "aB", "label": {"answer": 3}}
        response = client.post("/slime", json=sample).raise_for_status()
        assert response.json() == 0.5
        keyed = client.post("/slime?reward_key=reward", json=sample).json()
        assert keyed["reward"] == 0.5
    problem(client.post("/slime", json={"prompt": "a", "response": "fail", "label": None}), 422)


def test_verl_reads_the_score_where_vllm_and_sglang_have_it(client: httpx.Client) -> None:
    raw = {"model": "any", "input": "Hello aB", "use_activation": False}
    found = client.post("/classify", json=raw).raise_for_status().json()
    assert found["data"][-1]["probs"][-1] == pytest.approx(share("Hello aB"))
    assert found["object"] == "list"
    active = client.post("/classify", json={"model": "any", "input": ["aB", "ab"]}).json()
    expected = [1 / (1 + 2.718281828459045**-value) for value in (0.5, 1.0)]
    assert [one["probs"][-1] for one in active["data"]] == pytest.approx(expected)
    embedded = client.post("/v1/embeddings", json={"model": "any", "input": "aB"}).raise_for_status().json()
    assert embedded["data"][-1]["embedding"][-1] == 0.5


async def test_prime_rl_has_log_probabilities_of_the_reference(
    start_service: Callable[..., LiveService], start_gateway: Callable[..., Gateway], make_policy: Any
) -> None:
    service = start_service("reference", make_policy(3))
    gateway = start_gateway("--reference", service.address)
    tokens = [5, 9, 200, 31, 7]
    body = {
        "model": "any",
        "token_ids": tokens,
        "sampling_params": {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1},
    }
    async with httpx.AsyncClient(base_url=gateway.url) as client, ReferenceClient(service.address) as direct:
        found = (await client.post("/inference/v1/generate", json=body)).raise_for_status().json()
        info = await direct.get_model_info()
        expected = await direct.logprobs(
            [TokenSequence(token_ids=tuple(tokens), response_start=1)],
            tokenizer_fingerprint=info.served_by.tokenizer_fingerprint,
        )
        refused = await client.post("/inference/v1/generate", json=body | {"token_ids": [5, 999]})
        lacking = await client.post("/v1/score", json=HELLO)
    assert found["prompt_logprobs"][0] is None
    values = [one[str(token)]["logprob"] for token, one in zip(tokens[1:], found["prompt_logprobs"][1:], strict=True)]
    assert values == pytest.approx(expected.results[0].logprobs)
    assert problem(refused, 422)["field"] == "token_ids"
    assert "this gateway has no reward service (--reward)" in problem(lacking, 404)["detail"]


def test_the_document_of_the_routes_holds_together_and_its_examples_run(client: httpx.Client) -> None:
    document = client.get("/openapi.json").raise_for_status().json()
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in document["components"]["schemas"]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) >= 11
    assert len({operation["operationId"] for _, _, operation in operations}) == len(operations)
    for path, method, operation in operations:
        assert operation["summary"]
        if method == "post":
            refusals = {int(status) for status in operation["responses"] if status != "200"}
            assert {400, 401, 403, 413, 422, 429, 502, 503, 504} <= refusals, path
    content = document["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]
    assert set(content["examples"]) == {"one", "chat", "many"}
    for example in content["examples"].values():
        client.post("/v1/score", json=example["value"]).raise_for_status()


def test_every_metric_is_in_the_document_and_nothing_else_is(gateway: Gateway, client: httpx.Client) -> None:
    client.post("/v1/score", json=HELLO).raise_for_status()
    client.post("/nowhere").json()
    told = {
        row["name"]: (row["type"], set(re.findall(r"`(\w+)`", row["labels"])))
        for row in METRIC_ROW.finditer(METRICS_DOCUMENT.read_text())
        if row["services"] == "gateway" or row["name"].startswith("process_")
    }
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{gateway.metrics_url}/metrics").text):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    sampled = {name: kind for name, (kind, labels) in found.items() if not labels and told.get(name, ("", set()))[1]}
    assert {name: kind for name, (kind, _) in found.items()} == {name: kind for name, (kind, _) in told.items()}
    for name, (_, labels) in found.items():
        assert name in sampled or labels == told[name][1]
    routes = gateway.metric("quartet_gateway_requests_total")
    assert any('route="/v1/score"' in labels and 'status="200"' in labels for labels in routes)
    assert any('route="unmatched"' in labels and 'status="404"' in labels for labels in routes)


# What goes wrong ---------------------------------------------------------------------------------------------------


def test_deadlines_and_request_ids_of_callers_hold(gateway: Gateway, client: httpx.Client) -> None:
    slow = {"prompt": "p", "response": "sleep 1"}
    headers = {"X-Request-Timeout": "0.2", "X-Request-Id": "mine.7"}
    found = problem(client.post("/v1/score", json=slow, headers=headers), 504)
    assert found["request_id"] == "mine.7"
    assert "0.2 s" in found["detail"]
    for odd in ("-1", "soon", "nan", "inf"):
        refused = problem(client.post("/v1/score", json=HELLO, headers={"X-Request-Timeout": odd}), 422)
        assert refused["field"] == "X-Request-Timeout"
    strange = client.post("/v1/score", json=HELLO, headers={"X-Request-Id": 'a"b c'})
    assert re.fullmatch("[0-9a-f]{32}", strange.headers["x-request-id"])
    (event,) = [event for event in gateway.events() if event.get("request_id") == "mine.7"]
    assert (event["route"], event["status"], event["items"]) == ("/v1/score", 504, 0)


def test_the_request_id_is_in_the_log_of_the_service(client: httpx.Client, reward: LiveService) -> None:
    client.post("/v1/score", json=HELLO, headers={"X-Request-Id": "look-for-me"}).raise_for_status()
    assert "look-for-me." in reward.log.read_text()


def test_a_caller_who_leaves_takes_the_work_along(gateway: Gateway, client: httpx.Client) -> None:
    body = {"items": [{"prompt": "p", "response": "sleep 0.3"}] * 20}
    headers = {"X-Request-Id": "leaves"}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/score", json=body, headers=headers, timeout=0.3)
    start_s = time.monotonic()
    while not (events := [event for event in gateway.events() if event.get("request_id") == "leaves"]):
        assert time.monotonic() - start_s < 5
        time.sleep(0.05)
    assert (events[0]["event"], events[0]["status"]) == ("request_left", 499)
    while gateway.metric("quartet_gateway_requests_in_flight")[""]:
        assert time.monotonic() - start_s < 5
        time.sleep(0.05)


def test_a_service_that_is_away_is_named_and_found_again(
    start_service: Callable[..., LiveService], start_gateway: Callable[..., Gateway]
) -> None:
    service = start_service("reward", "", "--scorer", RULE)
    gateway = start_gateway("--reward", service.address)
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        client.post("/v1/score", json=HELLO).raise_for_status()
        assert client.get("/readyz").raise_for_status().json() == {"status": "ok"}
        service.process.kill()
        service.process.wait()
        response = client.post("/v1/score", json=HELLO)
        found = problem(response, 503)
        assert found["service"] == "reward service"
        assert int(response.headers["retry-after"]) >= 1
        assert "reward service" in problem(client.get("/readyz"), 503)["detail"]
        assert client.get("/healthz").status_code == 200
        start_service("reward", "", "--scorer", RULE, like=service)
        end = time.monotonic() + 20
        while (again := client.post("/v1/score", json=HELLO)).status_code != 200:
            assert time.monotonic() < end, again.text
            time.sleep(0.2)
        client.get("/readyz").raise_for_status()


async def test_a_service_that_refuses_for_its_load_is_heard_and_named(
    start_service: Callable[..., LiveService], start_gateway: Callable[..., Gateway]
) -> None:
    service = start_service("reward", "", "--scorer", RULE, "--max-calls", "1")
    gateway = start_gateway("--reward", service.address, "--patience-s", "0")
    body = {"items": [{"prompt": "p", "response": "sleep 0.2"}] * 2}
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
        found = await asyncio.gather(*(client.post("/v1/score", json=body) for _ in range(12)))
    refused = [response for response in found if response.status_code != 200]
    assert len(refused) >= 1
    assert any(response.status_code == 200 for response in found)
    for response in refused:
        assert problem(response, 429)["service"] == "reward service"
        assert int(response.headers["retry-after"]) >= 1


@pytest.fixture
def guarded(
    start_gateway: Callable[..., Gateway], reward: LiveService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Gateway, Path, dict[str, str]]:
    file, made = tmp_path / "keys.toml", {}
    for name, *flags in (
        ("score", "--scopes", "score", "--requests-per-minute", "4"),
        ("generate", "--scopes", "generate"),
        ("admin", "--scopes", "admin,score"),
    ):
        keys.main(["--keys", str(file), "--name", name, *flags])
        made[name] = capsys.readouterr().out.strip()
    return start_gateway("--reward", reward.address, "--keys", str(file)), file, made


def test_keys_scopes_limits_and_rotation(guarded: tuple[Gateway, Path, dict[str, str]]) -> None:
    gateway, file, made = guarded

    def ask(path: str, key: str | None, body: Any = None, header: str = "authorization") -> httpx.Response:
        headers = {} if key is None else {header: f"Bearer {key}" if header == "authorization" else key}
        method = "GET" if body is None else "POST"
        return httpx.request(method, gateway.url + path, json=body, headers=headers)

    for key in (None, "wrong", made["score"][:-1], made["score"] + "x"):
        response = ask("/v1/score", key, HELLO)
        problem(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert "generate: score is needed here" in problem(ask("/v1/score", made["generate"], HELLO), 403)["detail"]
    assert ask("/v1/score", made["admin"], HELLO, "x-api-key").status_code == 200
    assert [ask("/v1/score", made["score"], HELLO).status_code for _ in range(4)] == [200] * 4
    response = ask("/v1/score", made["score"], HELLO)
    assert "may send 4 requests a minute" in problem(response, 429)["detail"]
    assert 1 <= int(response.headers["retry-after"]) <= 15
    used = ask("/v1/usage", made["admin"]).json()
    assert used["score"]["requests"] == 4
    problem(ask("/v1/usage", made["score"]), 403)
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert ask(path, None).status_code == 200
    rest = file.read_text().split("[[keys]]")
    file.write_text("[[keys]]".join(part for part in rest if 'name = "admin"' not in part))
    end = time.monotonic() + 10
    while ask("/v1/usage", made["admin"]).status_code != 401:
        assert time.monotonic() < end
        time.sleep(0.2)
    log = gateway.log.read_text()
    assert not any(key in log for key in made.values())
    assert gateway.metric("quartet_gateway_refused_total")['{reason="key"}'] >= 4


def test_large_and_slow_requests_are_refused_and_hold_nothing(
    start_gateway: Callable[..., Gateway], reward: LiveService
) -> None:
    gateway = start_gateway("--reward", reward.address, "--arrival-timeout-s", "1", "--max-body-mib", "1")
    host, port = gateway.url.removeprefix("http://").split(":")
    found = problem(httpx.post(f"{gateway.url}/v1/score", content=b"x" * 100_000_000), 413)
    assert "100,000,000 bytes, at most 1,048,576" in found["detail"]

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    with contextlib.suppress(httpx.WriteError):  # It was answered and closed while we were sending.
        assert httpx.post(f"{gateway.url}/v1/score", content=chunks()).status_code == 413

    def slow(*parts: bytes) -> tuple[bytes, float]:
        """What comes back of a request that is sent a byte of its last part at a time, and after how long."""
        start_s = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            *whole, last = parts
            for part in whole:
                connection.sendall(part)
            connection.settimeout(0.05)
            answer = b""
            for byte in last:
                try:
                    connection.sendall(bytes([byte]))
                    if (received := connection.recv(65536)) == b"":
                        break
                    answer += received
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            return answer, time.monotonic() - start_s

    head = b"POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n"
    answer, seconds = slow(head, b"x" * 900)
    assert b" 408 " in answer.splitlines()[0]
    assert 0.9 < seconds < 8
    answer, seconds = slow(b"POST /v1/score HTTP/1.1\r\n", b"x-odd: " + b"y" * 900)
    assert (answer, 0.9 < seconds < 8) == (b"", True)
    answer, seconds = slow(b"", b"" * 900 + b"GET")
    with socket.create_connection((host, int(port)), timeout=10) as silent:
        start_s = time.monotonic()
        assert silent.recv(10) == b""
        assert time.monotonic() - start_s < 8
    with socket.create_connection((host, int(port)), timeout=10) as long:
        long.sendall(b"GET /healthz HTTP/1.1\r\nx-odd: " + b"y" * 100_000)
        assert b" 431 " in long.recv(1000)
    assert httpx.post(f"{gateway.url}/v1/score", json=HELLO).status_code == 200
    assert gateway.metric("quartet_gateway_held_bytes")[""] == 0
    assert gateway.metric("quartet_gateway_requests_in_flight")[""] == 0


def test_told_to_stop_it_finishes_what_it_has_and_exits_0(
    start_gateway: Callable[..., Gateway], reward: LiveService
) -> None:
    gateway = start_gateway("--reward", reward.address)
    command = [
        sys.executable, "-c",
        "import httpx, sys; r = httpx.post(sys.argv[1], json={'prompt': 'p', 'response': 'sleep 1'}, timeout=30);"
        "print(r.status_code)",
        f"{gateway.url}/v1/score",
    ]  # fmt: skip
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    while not gateway.metric("quartet_gateway_requests_in_flight").get(""):
        time.sleep(0.05)
    gateway.process.send_signal(signal.SIGTERM)
    assert asking.communicate(timeout=30)[0].strip() == "200"
    assert gateway.process.wait(30) == 0
    assert [event["event"] for event in gateway.events() if event["event"] in ("ready", "draining")] == [
        "ready",
        "draining",
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "no service is given: set --reward, --policy or --reference to its address"),
        (("--reward", "nowhere"), "--reward is 'nowhere'"),
        (("--reward", "127.0.0.1:1", "--keys", "/nowhere/keys.toml"), "--keys: key file '/nowhere/keys.toml'"),
        (("--reward", "127.0.0.1:1", "--tls-cert", "a.pem"), "--tls-cert is set without --tls-key"),
        (("--reward", "127.0.0.1:1", "--service-ca", "/nowhere.pem"), "/nowhere.pem"),
        (("--reward", "127.0.0.1:1", "--max-items", "0"), "--max-items is"),
    ],
)
def test_wrong_settings_are_told_in_one_line(flags: tuple[str, ...], told: str) -> None:
    command = [sys.executable, "-m", "services.gateway", "--port", "0", "--metrics-port", "0", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert told in run.stderr
    assert "Traceback" not in run.stderr
