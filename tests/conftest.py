"""Tiny models from fixed seeds, and live services as child processes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from quartet.client import Security

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Services and tests share the cores: threads without work sleep at once, as quartet-local has them do. Before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
# Several processes run tests: each takes its share of the cores, as do the services that it starts.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# How long an example takes is the machine's matter, and no fact about the code.
hypothesis.settings.register_profile("quartet", deadline=None)
hypothesis.settings.load_profile("quartet")

# These load services with more than they can bear, or time them: they want the machine to themselves.
_ALONE = ("integration/test_under_load.py",)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if any(item.path.match(f"tests/{pattern}") for pattern in _ALONE):
            item.add_marker(pytest.mark.alone)


WORDS = (
    "hello thanks please sorry help order refund broken phone screen router delay the a is my your we can not do it "
    "today tomorrow restart check open close send account password reset good bad great awful"
).split()


def train_tokenizer(vocab_size: int = 300):  # type: ignore[no-untyped-def]
    """A byte-level BPE with pad, end and begin tokens and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", model_max_length=128
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def save_stock_tokenizer(folder: Path, pad_token: str | None) -> None:
    """The tokenizer of ``train_tokenizer`` as many models have it: None for its pad token, or the end token, "<eos>".

    Nor is there another token in it that is meant for padding.
    """
    tokenizer = train_tokenizer()
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace('"<pad>"', '"<unused>"'))


@pytest.fixture(scope="session")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer()


def llama_config(**changes: object):  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig

    settings: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(settings | changes))


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory, tokenizer) -> Callable[..., Path]:  # type: ignore[no-untyped-def]
    """make_policy(seed=0, tied=False, scale=1) saves a tiny Llama and its tokenizer and returns the folder."""

    def make(seed: int = 0, *, tied: bool = False, scale: float = 1.0, with_tokenizer: bool = True) -> Path:
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config(tie_word_embeddings=tied))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0 * scale)  # Far from uniform, so that a wrong distribution shows.
        folder = tmp_path_factory.mktemp(f"policy-{seed}-{'tied' if tied else 'untied'}")
        model.save_pretrained(folder)
        if with_tokenizer:
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_reward_model(tmp_path_factory, tokenizer) -> Callable[..., Path]:  # type: ignore[no-untyped-def]
    """make_reward_model(seed=0, architecture="llama") saves a tiny reward model and returns the folder."""

    def make(seed: int = 0, *, architecture: str = "llama", num_labels: int = 1, save_tokenizer=None) -> Path:  # type: ignore[no-untyped-def]
        import torch
        from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

        torch.manual_seed(seed)
        if architecture == "bert":
            config = BertConfig(
                vocab_size=300,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                num_labels=num_labels,
                pad_token_id=0,
            )
            model = BertForSequenceClassification(config)
        else:
            model = LlamaForSequenceClassification(llama_config(num_labels=num_labels))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(4.0)
        folder = tmp_path_factory.mktemp(f"reward-{architecture}-{seed}")
        model.save_pretrained(folder)
        (save_tokenizer or tokenizer).save_pretrained(folder)
        return folder

    return make


@dataclass
class LiveService:
    """A service process and where it listens."""

    process: subprocess.Popen[str]
    address: str
    admin_address: str
    metrics_address: str
    log: Path

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=60)


def free_port() -> int:
    """A port below those that the system hands out itself: while a service is restarted, no connection takes it."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(15_000, 32_000)
            listener.bind(("127.0.0.1", port))
            return port


_started: list[LiveService] = []


def _stop_since(mark: int) -> None:
    while len(_started) > mark:
        _started.pop().stop()


@pytest.fixture(scope="session")
def start_service(tmp_path_factory) -> Iterator[Callable[..., LiveService]]:  # type: ignore[no-untyped-def]
    """start_service("reward", model, "--flag", ...) starts it and waits until it is SERVING.

    On free ports, or on those of ``like``, a service that ended; asked with ``security``, where it has TLS. It ends
    with the test or the module whose fixture started it.
    """
    from services.runtime.probe import probe

    health = {
        "policy": "quartet.policy.v1.PolicyService",
        "reward": "quartet.reward.v1.RewardService",
        "reference": "quartet.reference.v1.ReferenceService",
    }

    def start(
        name: str,
        model: Path,
        *flags: str,
        timeout_s: float = 120.0,
        like: LiveService | None = None,
        security: Security | None = None,
    ) -> LiveService:
        port, metrics_port, admin_port = free_port(), free_port(), free_port()
        if like is not None:
            addresses = (like.address, like.metrics_address, like.admin_address)
            port, metrics_port, admin_port = (int(address.rpartition(":")[2]) for address in addresses)
        log = tmp_path_factory.mktemp(name) / "log"
        command = [sys.executable, "-m", f"services.{name}", "--model", str(model), *flags]
        command += ["--port", str(port), "--metrics-port", str(metrics_port)]
        if name in ("policy", "reward"):
            command += ["--admin-port", str(admin_port)]
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, text=True)
        service = LiveService(process, f"127.0.0.1:{port}", f"127.0.0.1:{admin_port}", f"127.0.0.1:{metrics_port}", log)
        _started.append(service)
        end = time.monotonic() + timeout_s
        while probe(service.address, health[name], timeout_s=1.0, security=security) != "SERVING":
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{name} is not serving (exit {process.poll()}):\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        return service

    yield start
    _stop_since(0)


@pytest.fixture(autouse=True)
def _services_end_with_their_test() -> Iterator[None]:
    """Those of wider fixtures were started before this one and stay."""
    mark = len(_started)
    yield
    _stop_since(mark)


@pytest.fixture(autouse=True, scope="module")
def _services_end_with_their_module() -> Iterator[None]:
    mark = len(_started)
    yield
    _stop_since(mark)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data beside the repository, named by QUARTET_DATA or ../shared/data; skips where it is absent."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("QUARTET_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set QUARTET_DATA)")
    return folder
