"""``python -m services.runtime.probe HOST:PORT SERVICE``: exit code 0 exactly when the service is SERVING.

For container health checks where no gRPC probe is built in.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(address: str, service: str, timeout_s: float = 3.0) -> str:
    """The health answer: SERVING, NOT_SERVING, or what went wrong."""
    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.stderr.write("usage: python -m services.runtime.probe HOST:PORT [SERVICE]\n")
        sys.exit(2)
    answer = probe(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "")
    sys.stdout.write(answer + "\n")
    sys.exit(0 if answer == "SERVING" else 1)


if __name__ == "__main__":
    main()
