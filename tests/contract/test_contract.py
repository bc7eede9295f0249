"""The contract is linted and every part of it is explained; the clients name services that it has."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from quartet.client import AdapterClient, PolicyClient, ReferenceClient, RewardAdminClient, RewardClient, WeightsClient
from services.runtime.config import ServiceSettings

ROOT = Path(__file__).resolve().parent.parent.parent
PROTOS = ROOT / "protos"
BUF = Path(sysconfig.get_path("scripts")) / "buf"

# Numbers of fields in descriptor.proto, of which paths of source locations are made.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE, SERVICE_METHOD = 2, 2
Path_ = tuple[int, ...]


def compile_protos(folder: Path, output: Path) -> descriptor_pb2.FileDescriptorSet:
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.proto"))
    arguments = ["protoc", f"--proto_path={folder}", f"--proto_path={files('grpc_tools') / '_proto'}"]
    code = protoc.main([*arguments, "--include_source_info", f"--descriptor_set_out={output}", *sources])
    assert code == 0
    return descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())


def parts_of_message(message: descriptor_pb2.DescriptorProto, name: str, path: Path_) -> Iterator[tuple[str, Path_]]:
    yield name, path
    for index, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, MESSAGE_FIELD, index)
    synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
    for index, oneof in enumerate(message.oneof_decl):
        if index not in synthetic:
            yield f"{name}.{oneof.name}", (*path, MESSAGE_ONEOF, index)
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from parts_of_message(nested, f"{name}.{nested.name}", (*path, MESSAGE_NESTED, index))
    for index, enum in enumerate(message.enum_type):
        yield from parts_of_enum(enum, f"{name}.{enum.name}", (*path, MESSAGE_ENUM, index))


def parts_of_enum(enum: descriptor_pb2.EnumDescriptorProto, name: str, path: Path_) -> Iterator[tuple[str, Path_]]:
    yield name, path
    for index, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, ENUM_VALUE, index)


def parts_of_file(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, Path_]]:
    for index, message in enumerate(file.message_type):
        yield from parts_of_message(message, f"{file.package}.{message.name}", (FILE_MESSAGE, index))
    for index, enum in enumerate(file.enum_type):
        yield from parts_of_enum(enum, f"{file.package}.{enum.name}", (FILE_ENUM, index))
    for index, service in enumerate(file.service):
        yield f"{file.package}.{service.name}", (FILE_SERVICE, index)
        for number, method in enumerate(service.method):
            yield f"{file.package}.{service.name}.{method.name}", (FILE_SERVICE, index, SERVICE_METHOD, number)


def unexplained(descriptors: descriptor_pb2.FileDescriptorSet) -> list[str]:
    """Names of all messages, fields, oneofs, enums, values, services and methods without a comment."""
    missing = []
    for file in descriptors.file:
        explained = {
            tuple(location.path)
            for location in file.source_code_info.location
            if location.leading_comments.strip() or location.trailing_comments.strip()
        }
        missing += [name for name, path in parts_of_file(file) if path not in explained]
    return missing


def test_buf_finds_nothing_to_complain_about():
    done = subprocess.run([BUF, "lint", PROTOS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_message_field_enum_value_and_method_has_a_comment(tmp_path):
    descriptors = compile_protos(PROTOS, tmp_path / "set")
    assert sum(1 for file in descriptors.file for _ in parts_of_file(file)) > 100
    assert unexplained(descriptors) == []


def test_a_missing_comment_would_be_found(tmp_path):
    (tmp_path / "protos").mkdir()
    (tmp_path / "protos" / "a.proto").write_text(
        'syntax = "proto3";\npackage a.v1;\n// Told.\nmessage M {\n  int32 untold = 1;\n  // Told.\n  int32 told = 2;\n'
        "  oneof either {\n    // Told.\n    int32 left = 3;\n  }\n}\n// Told.\nenum E {\n  E_UNSPECIFIED = 0;\n}\n"
        "// Told.\nservice S {\n  rpc Call(M) returns (M);\n}\n"
    )
    found = unexplained(compile_protos(tmp_path / "protos", tmp_path / "set"))
    assert found == ["a.v1.M.untold", "a.v1.M.either", "a.v1.E.E_UNSPECIFIED", "a.v1.S.Call"]


@pytest.mark.parametrize(
    "client", [PolicyClient, WeightsClient, AdapterClient, RewardClient, RewardAdminClient, ReferenceClient]
)
def test_every_client_asks_for_the_health_of_a_service_in_the_contract(client, tmp_path):
    descriptors = compile_protos(PROTOS, tmp_path / "set")
    services = {f"{file.package}.{service.name}" for file in descriptors.file for service in file.service}
    assert client.health_service in services


def test_stubs_import_without_any_model_library():
    """Applications may install the contract and clients alone."""
    code = (
        "import sys, quartet.client\n"
        "mine = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'services', 'trainer'} & mine))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# Memory that each repeated message of each request takes, over the size of a request of nothing else, all of it empty:
# two bytes each. In a process of its own each, so that none has memory that another has left.
READ_MEMORY = """
import json, os
from pathlib import Path
from google.protobuf import descriptor_pool, message_factory
import quartet.client

def repeated(message, path=()):
    for field in message.fields:
        if field.message_type is not None and field not in path:
            if field.is_repeated and not field.message_type.GetOptions().map_entry:
                yield (*path, field)
            yield from repeated(field.message_type, (*path, field))

def sized(number, content):
    length, size = len(content), b""
    while length > 127:
        length, size = length >> 7, size + bytes([length & 127 | 128])
    return bytes([number << 3 | 2]) + size + bytes([length]) + content

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

found = {}
for file in ("policy/v1/policy", "policy/v1/weights", "policy/v1/adapters", "reward/v1/reward", "reward/v1/admin",
             "reference/v1/reference"):
    services = descriptor_pool.Default().FindFileByName(f"quartet/{file}.proto").services_by_name.values()
    for request in {method.input_type for service in services for method in service.methods}:
        kind = message_factory.GetMessageClass(request)
        for path in repeated(request):
            content = sized(path[-1].number, b"") * 2**20
            for field in reversed(path[:-1]):
                content = sized(field.number, content)
            reading, writing = os.pipe()
            if os.fork() == 0:
                before = resident()
                kept = kind.FromString(content)
                os.write(writing, str((resident() - before) / len(content)).encode())
                os._exit(0)
            os.wait()
            found[".".join([request.name, *(field.name for field in path)])] = float(os.read(reading, 100))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc tells the memory of a process")
def test_the_worst_request_takes_half_a_gib_while_it_is_read():
    """Before anything can be counted in it, or refused."""
    done = subprocess.run([sys.executable, "-c", READ_MEMORY], capture_output=True, text=True, check=True, timeout=300)
    times = json.loads(done.stdout)
    assert {"ScoreRequest.items", "LogProbsRequest.items", "GenerateRequest.prompts.messages.messages"} <= times.keys()
    assert all(4 < factor < 33 for factor in times.values()), times
    assert ServiceSettings.model_fields["max_message_mib"].default * 32 == 512
