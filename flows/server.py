"""Prefect's embedded server, run so that it ends with the run, however the run ends.

Prefect can start a temporary server itself, but that one shares our terminal's process group (a
Ctrl-C ends it before the flow can record that it was cancelled), outlives a kill -9 of the flow,
and gives up after 20 s. Here the same server runs under `infra/guard.py`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra.errors import UserError
from infra.guard import command_line

START_LIMIT_S = 300.0
STOP_GRACE_S = 3.0
POLL_S = 0.1


class ServerError(UserError):
    """Prefect's server did not start."""


def prefect_environment(root: Path) -> dict[str, str]:
    """Settings of Prefect for runs of the checkout `root`: its own database, no telemetry, quiet.

    They must be in `os.environ` before Prefect is imported.
    """
    local = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return {
        "PREFECT_HOME": str(root / "work" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "INFO",  # what the server keeps of a run
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",  # the terminal is ours
        "PREFECT_LOGGING_INTERNAL_LEVEL": "ERROR",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_LIMIT_S)),
        "NO_PROXY": local,
        "no_proxy": local,
    }


@contextlib.contextmanager
def server(root: Path) -> Iterator["Server"]:
    """A server for one run. Starts at once; `wait()` before the first use."""
    started = Server(root)
    try:
        yield started
    finally:
        started.stop()


class Server:
    """A server process on a free port of the loopback interface."""

    def __init__(self, root: Path) -> None:
        self.home = root / "work" / "prefect"
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = self.home / "server.log"
        self.port = _free_port()
        command = [
            sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
            "--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error",
            "--lifespan", "on",
        ]  # fmt: skip
        environment = {
            **os.environ,
            # As Prefect's own temporary server has them: no pages, no background services.
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
        }
        environment.pop("PREFECT_API_URL", None)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command_line(command, STOP_GRACE_S),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """What PREFECT_API_URL should be."""
        return f"http://127.0.0.1:{self.port}/api"

    def wait(self, limit_s: float = START_LIMIT_S) -> str:
        """Block until the server answers; its URL. Raises ServerError."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self._answers():
                return self.url
            if (code := self.process.poll()) is not None:
                raise ServerError(
                    f"Prefect's server ended with code {code} before it answered; "
                    f"its last words, from {self.log}:\n{self._last_words()}"
                )
            time.sleep(POLL_S)
        raise ServerError(
            f"Prefect's server did not answer within {limit_s:.0f} s; see {self.log}, "
            "or set PREFECT_API_URL to a server that runs"
        )

    def stop(self) -> None:
        """End the server and everything below it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_GRACE_S * 1.25 + 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def _last_words(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-15:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
