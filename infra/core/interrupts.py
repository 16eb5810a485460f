"""Requests to stop a process: Ctrl-C, SIGTERM, and SIGUSR1, which Slurm sends before its limit.

While modules are being imported there is nothing to save, and an exception in the middle of torch's
import is 60 lines of no use: then the process says its line and leaves. At any other time
KeyboardInterrupt is raised.
"""

import os
import signal
import sys
import threading
from types import FrameType

EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 0.01
ORPHAN_GRACE_S = 15
"""What the guard gives a stage: 10 s, and a quarter more after SIGTERM."""


def heed_interrupts(line: str) -> None:
    """Handle `SIGNALS` from now on; `line` is what the process says if it leaves at once.

    Python drops what is raised in a `__del__` or in a callback of the garbage collector: then the
    request is repeated.
    """
    parent = os.getppid()

    def heed(_signum: int, frame: FrameType | None) -> None:
        end_if_orphaned(parent)
        if importing(frame):
            leave(line)
        raise KeyboardInterrupt

    def heed_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            sys.__unraisablehook__(unraisable)

    for signum in SIGNALS:
        signal.signal(signum, heed)
    sys.unraisablehook = heed_again


def end_if_orphaned(parent: int) -> None:
    """Set a limit to the end of a process whose parent is gone: nobody is left to kill it."""
    if os.getppid() != parent:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ORPHAN_GRACE_S)


def importing(frame: FrameType | None) -> bool:
    """Whether the code that was interrupted is in the middle of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def leave(line: str) -> None:
    """Say one line and end this process. Never returns."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())
    os._exit(EXIT_INTERRUPTED)


def quiet_start(line: str) -> None:
    """Until `heed_interrupts`: leave at once, whatever is being imported."""
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: leave(line))
