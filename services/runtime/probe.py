"""``python -m services.runtime.probe HOST:PORT [SERVICE] [--tls-ca FILE ...]``: exit code 0 exactly when it is SERVING.

For container health checks where no gRPC probe is built in. Health needs no token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quartet.client import CredentialsError, Security


def probe(address: str, service: str, timeout_s: float = 3.0, security: Security | None = None) -> str:
    """The health answer: SERVING, NOT_SERVING, or what went wrong."""
    credentials, options = (security or Security()).for_channel()
    if credentials is None:
        opened = grpc.insecure_channel(address, options=options)
    else:
        opened = grpc.secure_channel(address, credentials, options=options)
    with opened as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.runtime.probe", description="Is a service SERVING?")
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("service", metavar="SERVICE", nargs="?", default="", help="full name; liveness without it")
    parser.add_argument("--tls-ca", type=Path, help="PEM authorities of the service's certificate: turns TLS on")
    parser.add_argument("--tls-cert", type=Path, help="PEM certificate chain to show (mTLS)")
    parser.add_argument("--tls-key", type=Path, help="PEM private key of --tls-cert")
    parser.add_argument("--tls-server-name", help="name to look for in the certificate, where HOST is another")
    given = parser.parse_args()
    try:
        security = Security(
            ca_file=given.tls_ca, cert_file=given.tls_cert, key_file=given.tls_key, server_name=given.tls_server_name
        )
        answer = probe(given.address, given.service, security=security)
    except CredentialsError as error:
        parser.error(str(error))
    sys.stdout.write(answer + "\n")
    sys.exit(0 if answer == "SERVING" else 1)


if __name__ == "__main__":
    main()
