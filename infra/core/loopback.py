"""Sockets by which processes of one machine find each other."""

import socket

from vlfoundry.infra.core.errors import UserError

LIMIT_S = 5.0


class LoopbackError(UserError):
    """There is no loopback interface."""


def listen(backlog: int = 100) -> socket.socket:
    """A socket that listens on a free port of 127.0.0.1.

    Raises LoopbackError if it cannot be reached: without this, whoever connects waits for minutes.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
    try:
        with socket.create_connection(listener.getsockname(), timeout=LIMIT_S):
            listener.accept()[0].close()
    except OSError as error:
        listener.close()
        raise LoopbackError(
            f"127.0.0.1 cannot be reached ({error.strerror or error}); "
            "start the loopback interface: `ip link set lo up`"
        ) from error
    return listener
