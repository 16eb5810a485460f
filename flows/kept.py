"""The Prefect server that `vlfoundry server` keeps for a project, and how others find it.

Beside the server's database, in work/prefect, lie its address and its credential. The address holds
while `server.lock` does; after a kill -9 nobody takes it for a server that runs.
"""

import dataclasses
import errno
import ipaddress
import json
import os
import secrets
import shlex
import socket
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from vlfoundry.flows.database import check_database
from vlfoundry.flows.marks import is_held, mark
from vlfoundry.flows.server import Server, ServerError, answers, prefect_environment
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.files import write_atomic

URL = "PREFECT_API_URL"
CREDENTIAL = "PREFECT_API_AUTH_STRING"
DEFAULT_PORT = 4200
SECRET_BYTES = 24
PRIVATE = 0o600
ANSWER_LIMIT_S = 5.0
START_ONE = f"start one with `vlfoundry server`, or name one that runs in {URL}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """A server that runs."""

    url: str
    """Of its API."""
    credential: str
    """For `PREFECT_API_AUTH_STRING`, and for the pages, which ask for it."""

    @property
    def environment(self) -> dict[str, str]:
        """What Prefect's clients need to reach it."""
        return {URL: self.url, CREDENTIAL: self.credential}

    def exports(self) -> list[str]:
        """The same as lines for a shell."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]


def kept(root: Path) -> Kept | None:
    """The server that is kept for the project `root`; None if there is none, or not yet."""
    home = _home(root)
    if not is_held(home / "server.lock"):
        return None
    try:
        facts = json.loads((home / "server.json").read_text("utf-8"))
        return Kept(url=facts["url"], credential=(home / "credential").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # it is just being started, or stopped


def connect(root: Path) -> str:
    """Let Prefect, which must not be imported yet, find a server; its URL.

    That is the one that `PREFECT_API_URL` names, or the one kept for the project.

    Raises UserError if there is neither, it does not answer, or it refuses our credential.
    """
    os.environ.update(prefect_environment(root))
    if not os.environ.get(URL):
        found = kept(root)
        if not found:
            raise UserError(f"no Prefect server is kept for {root}: {START_ONE}")
        os.environ.update(found.environment)
    url = os.environ[URL]
    if not answers(url, ANSWER_LIMIT_S):
        raise UserError(f"the Prefect server at {url} does not answer: {START_ONE}")
    if "PREFECT_API_KEY" not in os.environ and not _accepts(url, os.environ.get(CREDENTIAL)):
        got = "a wrong one" if CREDENTIAL in os.environ else "none"
        raise UserError(
            f"the Prefect server at {url} asks for a credential, got {got}: set {CREDENTIAL} "
            "(`vlfoundry server --env` prints that of a project)"
        )
    return url


def keep(root: Path, host: str, port: int, say: Callable[[str], None]) -> None:
    """Run a server until this process is asked to end.

    Args:
        root: the project, whose database it has.
        host: an address of this machine; 127.0.0.1: nobody else's can reach it.
        port: of that address.
        say: is told where it is.

    Raises:
        UserError: one runs already, or the address cannot be had.
        ServerError: it did not start, or ended by itself.
    """
    home = _home(root)
    with mark(home / "server.lock", "the lock of the server") as descriptor:
        if descriptor is None:
            other = kept(root)
            at = f" at {other.url.removesuffix('/api')}" if other else ", which is just starting"
            raise UserError(f"a server of {root} runs already{at}; stop it first")
        (home / "server.json").unlink(missing_ok=True)
        listener = _bind(host, port)
        os.environ.update(prefect_environment(root))
        check_database(home, say)
        secret = _secret(home / "credential")
        server = Server(
            root, held=(descriptor,), listener=listener, settings=_settings(host, port, secret)
        )
        try:
            server.wait()
            write_atomic(home / "server.json", json.dumps({"url": server.url}), PRIVATE)
            _greet(root, host, server, say)
            raise ServerError(f"the server {server.ending} (see {server.log})")
        except KeyboardInterrupt:
            say("stopping")
        finally:
            (home / "server.json").unlink(missing_ok=True)
            server.stop()


def _home(root: Path) -> Path:
    return root / "work" / "prefect"


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=100)
    except OSError as error:
        what = f"cannot listen on {host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{what}: the port is taken; name another with --port") from error
        advice = "--host has to be an address of this machine, --port free to use"
        raise UserError(f"{what}: {error.strerror}; {advice}") from error
    except OverflowError as error:
        raise UserError(f"--port {port} is no port; expected 1 to 65535") from error


def _settings(host: str, port: int, secret: str) -> dict[str, str]:
    """Pages that find the API on any port, no word to anybody else, a credential."""
    shown = socket.gethostname() if _address(host).is_unspecified else host
    return {
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_UI_API_URL": f"http://{shown}:{port}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The second version of the pages asks a measuring service, whatever the settings say.
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT__SERVER_FINAL": "1",
        # Of its services, such as the scheduler, nobody else would hear.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "ERROR",
    }


def _address(host: str) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(socket.gethostbyname(host))


def _secret(path: Path) -> str:
    """The credential of this project's servers, made once: browsers keep it."""
    if not path.is_file():
        write_atomic(path, f"vlfoundry:{secrets.token_urlsafe(SECRET_BYTES)}", PRIVATE)
    path.chmod(PRIVATE)
    return path.read_text("utf-8")


def _greet(root: Path, host: str, server: Server, say: Callable[[str], None]) -> None:
    """Say where everything is, and wait for the server's end."""
    say(f"pages: {server.url.removesuffix('/api')} (they ask for the credential)")
    say(f"credential: in {_home(root) / 'credential'}, for your eyes alone")
    say('for commands of Prefect: eval "$(vlfoundry server --env)"')
    if not _address(host).is_loopback:
        say(f"NOTE: {host} is open to other machines, and the credential travels unencrypted")
    server.process.wait()


def _accepts(url: str, credential: str | None) -> bool:
    """Whether the server lets us in."""
    request = urllib.request.Request(f"{url}/admin/version")
    if credential:
        request.add_header("Authorization", f"Basic {b64encode(credential.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    except OSError as error:
        raise UserError(f"the Prefect server at {url} does not answer: {START_ONE}") from error
