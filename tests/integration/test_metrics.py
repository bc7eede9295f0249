"""docs/metrics.md against what live services export: every metric is in it, and nothing else."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quartet.client import (
    InvalidInputError,
    OverloadedError,
    PolicyClient,
    ReferenceClient,
    RewardClient,
    Sampling,
    ScoreItem,
)
from quartet.client.reference import TokenSequence
from quartet.model_folder import write_metadata

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(?P<name>[\w]+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\| (?P<services>[^|]*) \| .+ \|$", re.M)
# Whose samples need what is not here.
WITHOUT_SAMPLES = {"gpu_bytes"}
CARDINALITY = 40


@dataclass(frozen=True)
class Metric:
    kind: str
    labels: frozenset[str]


def documented(service: str) -> dict[str, Metric]:
    """By name, those that the document says ``service`` exports."""
    found = {}
    for row in ROW.finditer(DOCUMENT.read_text()):
        services = row["services"]
        if services.startswith("all") or service in services:
            labels = frozenset(re.findall(r"`(\w+)`", row["labels"]))
            found[row["name"].replace("SERVICE", service)] = Metric(row["type"], labels)
    return found


def read(live) -> str:
    return urllib.request.urlopen(f"http://{live.metrics_address}/metrics", timeout=5).read().decode()


def calls_in_flight(live) -> float:
    return float(re.findall(r"^quartet_policy_calls_in_flight (\S+)$", read(live), re.M)[0])


def exported(live) -> tuple[dict[str, Metric], dict[str, int]]:
    """By name what is exported, and how many label values each has."""
    found, series = {}, {}
    for family in text_string_to_metric_families(read(live)):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        found[name] = Metric(family.type, frozenset(labels))
        series[name] = len(
            {tuple(sorted(sample.labels.items())) for sample in family.samples if "le" not in sample.labels}
        )
        assert family.documentation
    return found, series


def require_documented(service: str, live) -> None:
    told, (shown, series) = documented(service), exported(live)
    assert sorted(set(shown) - set(told)) == [], f"{service} exports these, and docs/metrics.md has no row for them"
    assert sorted(set(told) - set(shown)) == [], f"docs/metrics.md has rows for these, and {service} exports none"
    for name, metric in told.items():
        assert metric.kind == shown[name].kind, name
        if not any(name.endswith(suffix) for suffix in WITHOUT_SAMPLES):
            assert metric.labels == shown[name].labels, name
        assert series[name] <= CARDINALITY, name


async def test_the_reward_service_exports_what_the_document_says(start_service, make_reward_model):
    folder = make_reward_model(seed=3)
    write_metadata(folder, kind="reward", append_eos=True, baseline={"scores": np.linspace(-2, 2, 60).tolist()})
    live = start_service("reward", folder, "--drift-every", "50", "--drift-window", "50", "--max-queued-tokens", "2000")
    async with RewardClient(live.address) as client:
        for i in range(4):
            await client.score([ScoreItem(prompt="hello " * (1 + n % 5), response=f"{i} {n}") for n in range(30)])
        with pytest.raises(InvalidInputError, match="max_queued_tokens"):
            await client.score([ScoreItem(prompt="hello " * 20, response="thanks")] * 400)
    require_documented("reward", live)
    shown, _ = exported(live)
    assert shown["quartet_reward_drifted"].kind == "gauge"


async def test_the_reference_service_exports_what_the_document_says(start_service, make_policy):
    live = start_service("reference", make_policy(), "--max-queued-tokens", "50")
    async with ReferenceClient(live.address) as client:
        fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
        sequence = TokenSequence(token_ids=list(range(5, 25)), response_start=3)
        await client.logprobs([sequence], tokenizer_fingerprint=fingerprint)
        with pytest.raises(InvalidInputError, match="max_queued_tokens"):
            await client.logprobs([sequence] * 4, tokenizer_fingerprint=fingerprint)
    require_documented("reference", live)


async def test_the_policy_service_exports_what_the_document_says(start_service, make_policy):
    live = start_service("policy", make_policy(), "--engine", "transformers", "--max-queued", "8")
    sampling = Sampling(max_new_tokens=100, min_new_tokens=100, seed=1)
    async with PolicyClient(live.address) as client:
        stream = client.generate(["hello"], sampling, n=8)
        waiting = asyncio.ensure_future(anext(stream))
        while not calls_in_flight(live):  # noqa: ASYNC110  # It is in another process.
            await asyncio.sleep(0.005)
        with pytest.raises(OverloadedError, match="8 completions are in hand and 8 more"):
            await anext(client.generate(["hello"], sampling, n=8, patience_s=0.0))
        lengths = [len((await waiting).token_ids)] + [len(completion.token_ids) async for completion in stream]
    require_documented("policy", live)
    assert lengths == [100] * 8
    text = read(live)
    assert 'quartet_policy_refused_total{reason="completions"} 1.0' in text
    assert "quartet_policy_completion_tokens_sum 800.0" in text
    assert "quartet_policy_generation_seconds_count 8.0" in text
    assert "quartet_policy_engine_slots 256.0" in text
    assert "quartet_policy_engine_running 0.0" in text
