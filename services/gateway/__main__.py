"""``quartet-gateway``: scores, rankings and log-probabilities over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator

import structlog
import uvicorn

from quartet import tracing
from quartet.client.errors import CredentialsError
from quartet.token_file import LOOK_EVERY_S, stamp_of
from services.gateway import keys
from services.gateway.app import make_app
from services.gateway.config import GatewaySettings
from services.gateway.metrics import GatewayMetrics
from services.gateway.protocol import bounded
from services.runtime.errors import StartError
from services.runtime.logs import configure_logging
from services.runtime.security import ListenerSecurity, ServerCertificate, is_loopback
from services.runtime.server import serve_metrics

log = structlog.get_logger()


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["new-key"]:
        keys.main(arguments[1:])
        return
    settings = GatewaySettings.from_command_line(arguments)
    configure_logging(settings.log_level, settings.log_format)
    code = 2
    try:
        tracing.start(settings.command, settings.otlp_endpoint)
        code = _run(settings)
    except (StartError, CredentialsError, tracing.TracingError) as error:
        sys.stderr.write(f"{settings.command}: {error}\n")
    except KeyboardInterrupt:
        code = 130
    tracing.stop()
    sys.stderr.flush()
    sys.exit(code)


def _run(settings: GatewaySettings) -> int:
    """Binds, and serves until told to stop.

    Raises:
        StartError: a port is taken, or a file can't be used.
        CredentialsError: a file of the services' credentials can't be used.
    """
    metrics = GatewayMetrics()
    _ = settings.service_security.for_channel()  # Raises what is wrong before anybody is let in.
    app = make_app(settings, metrics)
    listener = _bind(settings.host, settings.port)
    host, port = settings.host, int(listener.getsockname()[1])
    _warn_of_exposure(settings, port)
    serve_metrics(metrics.registry, settings.metrics_host or settings.host, settings.metrics_port)
    config = uvicorn.Config(
        app,
        http=bounded(settings.arrival_timeout_s, settings.max_connections),
        ws="none",
        timeout_keep_alive=settings.idle_timeout_s,
        timeout_graceful_shutdown=max(1, round(settings.grace_s)),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
    )
    config.load()
    context = _TlsContext(settings.security) if settings.security.encrypted else None
    config.ssl = None if context is None else context.context
    server = _Server(config)
    server.runs(context, addresses={"the gateway": f"{host}:{port}"})
    server.run(sockets=[listener])
    return 0 if server.started else 2


class _Server(uvicorn.Server):
    """uvicorn's, which says when it is ready, looks after certificates, and exits with 0 when it was told to stop."""

    _tls: _TlsContext | None = None
    _addresses: dict[str, str]

    def runs(self, tls: _TlsContext | None, addresses: dict[str, str]) -> None:
        self._tls, self._addresses = tls, addresses

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def main_loop(self) -> None:
        log.info("ready", service="gateway", addresses=self._addresses)
        await super().main_loop()
        log.info("draining", service="gateway", grace_s=self.config.timeout_graceful_shutdown)

    async def on_tick(self, counter: int) -> bool:
        if self._tls is not None:
            self._tls.look()
        return await super().on_tick(counter)


class _TlsContext:
    """HTTPS with the certificate as its files are now."""

    def __init__(self, security: ListenerSecurity) -> None:
        """
        Raises:
            StartError: the files can't be used.
        """
        self._security = security
        ServerCertificate(security)  # Says what is wrong with them, if anything is.
        assert security.tls_cert is not None
        assert security.tls_key is not None
        self._files = security.tls_cert, security.tls_key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.load_cert_chain(*self._files)
        self._stamp = stamp_of(self._files)
        self._looked_s = time.monotonic()

    def look(self) -> None:
        """Takes a new certificate for connections to come. One that can't be used changes nothing and is logged."""
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        stamp = stamp_of(self._files)
        if stamp is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            ServerCertificate(self._security)
            self.context.load_cert_chain(*self._files)
        except (StartError, ssl.SSLError, OSError) as error:
            log.error("certificate_not_rotated", reason=str(error), serving="the one read before")
            return
        log.info("certificate_rotated", certificate=str(self._files[0]))


def _bind(host: str, port: int) -> socket.socket:
    bare = host.strip("[]")
    try:
        family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((bare, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}; stop what holds it or choose another --port"
        ) from error


def _warn_of_exposure(settings: GatewaySettings, port: int) -> None:
    if is_loopback(settings.host):
        return
    where = {"host": settings.host, "port": port}
    if settings.keys is None:
        log.warning("listener_open_to_anyone", **where, advice="whoever reaches the port may call: set --keys")
    elif settings.tls_cert is None:
        log.warning("keys_in_clear_text", **where, advice="set --tls-cert and --tls-key, or put TLS before the gateway")


if __name__ == "__main__":
    main()
