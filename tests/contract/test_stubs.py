"""The committed stubs are exactly what the pinned generator makes of the .proto files."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROTOS = ROOT / "protos"
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def pinned_generator() -> str:
    found = re.search(r'"grpcio-tools==([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml pins no grpcio-tools"
    return found[1]


def stubs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for pattern in PATTERNS for path in folder.rglob(pattern)}


def test_committed_stubs_are_what_the_pinned_generator_makes(tmp_path):
    try:
        installed = metadata.version("grpcio-tools")
    except metadata.PackageNotFoundError:
        installed = "absent"
    if installed != pinned_generator():
        pytest.skip(f"grpcio-tools is {installed}, stubs are generated with {pinned_generator()}")
    subprocess.run([sys.executable, ROOT / "deploy" / "generate_stubs.py", tmp_path], check=True)
    fresh, committed = stubs(tmp_path), stubs(PROTOS)
    assert len(fresh) == 3 * len(list(PROTOS.rglob("*.proto"))) > 0
    assert sorted(committed) == sorted(fresh), "stubs without a .proto file, or the other way round: run make proto"
    changed = [name for name in fresh if fresh[name] != committed[name]]
    assert changed == [], "not what the .proto files say: run make proto"


def test_the_generator_is_no_newer_than_the_oldest_runtime_allowed():
    """Generated code refuses to be imported by an older runtime than the one it was generated for."""
    runtime = re.search(r'"grpcio>=([0-9.]+),', (ROOT / "pyproject.toml").read_text())
    assert runtime
    assert pinned_generator() == runtime[1]
    for name, stub in stubs(PROTOS).items():
        if name.endswith("_pb2_grpc.py"):
            generated = re.search(rb"GRPC_GENERATED_VERSION = '([0-9.]+)'", stub)
            assert generated, name
            assert generated[1].decode() == runtime[1], name
    protobuf = re.search(r'"protobuf>=([0-9.]+),', (ROOT / "pyproject.toml").read_text())
    assert protobuf
    for name, stub in stubs(PROTOS).items():
        if name.endswith("_pb2.py"):
            version = re.search(rb"# Protobuf Python Version: ([0-9.]+)", stub)
            assert version, name
            assert numbers(version[1].decode()) <= numbers(protobuf[1]), name


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
