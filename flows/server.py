"""Prefect's embedded server, run so that it ends with the run, however the run ends.

Prefect can start a temporary server itself, but that one shares our terminal's process group (a
Ctrl-C ends it before the flow can record that it was cancelled), outlives a kill -9 of the flow,
and gives up after 20 s. Here the same server runs under `infra/core/guard.py`: it ends when the run
lets go of the guard or is gone, and the kernel kills it if its guard is killed. It listens on a
socket that was bound before it was started: no other program can come by its port, and nobody
else's server can be taken for it.

The server keeps a record and nothing else: what happens to it must not stop a run.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vlfoundry.infra.core.errors import UserError, ending
from vlfoundry.infra.core.guard import command_line
from vlfoundry.infra.core.loopback import listen

START_LIMIT_S = 300.0
STOP_GRACE_S = 3.0
POLL_S = 0.1
OF_ONE_RUN = {
    # As Prefect's own temporary server has them: no pages, no background services.
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
OF_CLIENTS = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
"""settings of Prefect that say where a server is: nothing for a server"""


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
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal is ours
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_LIMIT_S)),
        "NO_PROXY": local,
        "no_proxy": local,
    }


@contextlib.contextmanager
def server(root: Path, *, held: tuple[int, ...] = ()) -> Iterator["Server"]:
    """A server for one run. Starts at once; `wait()` before the first use."""
    started = Server(root, held=held)
    try:
        yield started
    finally:
        started.stop()


class Server:
    """A server process; of one run, and on a free port of the loopback interface, unless told
    otherwise.

    Args:
        root: the project, whose database it has.
        held: file descriptors that it keeps open, such as the lock of the run.
        listener: the socket that it answers on; it is closed here.
        settings: of Prefect, for the server alone.

    Raises:
        LoopbackError: there is no loopback interface.
        OSError: its folder cannot be written.
    """

    def __init__(
        self,
        root: Path,
        *,
        held: tuple[int, ...] = (),
        listener: socket.socket | None = None,
        settings: Mapping[str, str] = MappingProxyType(OF_ONE_RUN),
    ) -> None:
        self.home = root / "work" / "prefect"
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = self.home / "server.log"
        with listener or listen() as bound:
            self.host, self.port = bound.getsockname()[:2]
            self.process = self._start(bound.fileno(), held, settings)

    def _start(
        self, listener: int, held: tuple[int, ...], settings: Mapping[str, str]
    ) -> subprocess.Popen:
        command = [
            sys.executable, "-P", "-m",
            "uvicorn", "--factory", "prefect.server.api.server:create_app",
            "--fd", str(listener), "--log-level", "error", "--lifespan", "on",
        ]  # fmt: skip
        environment = {**os.environ, **settings}
        for name in OF_CLIENTS:
            environment.pop(name, None)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command_line(command, STOP_GRACE_S),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(listener, *held),
            )

    @property
    def url(self) -> str:
        """What PREFECT_API_URL should be on this machine."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self.port}/api"

    @property
    def lives(self) -> bool:
        """Whether it has not ended by itself, or been killed."""
        return self.process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        return ending(self.process.wait())

    def wait(self, limit_s: float = START_LIMIT_S) -> str:
        """Block until the server answers; its URL. Raises ServerError."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if answers(self.url):
                return self.url
            if not self.lives:
                raise ServerError(f"Prefect's server {self.ending}: {self._last_words()}")
            time.sleep(POLL_S)
        raise ServerError(
            f"Prefect's server did not answer within {limit_s:.0f} s (see {self.log}); "
            "PREFECT_API_URL can name one that runs"
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

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines()]
        return f"{next(filter(None, reversed(lines)), 'it said nothing')} ({self.log})"


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a Prefect server is reached at `url`, whatever it says."""
    local = urllib.parse.urlsplit(url).hostname == "127.0.0.1"
    handlers = [urllib.request.ProxyHandler({})] if local else []
    try:
        with urllib.request.build_opener(*handlers).open(f"{url}/health", timeout=timeout_s):
            return True
    except urllib.error.HTTPError:
        return not local  # it wants a key, say
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
        return False
