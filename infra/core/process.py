"""What a process asks of the kernel about its life."""

import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Ask the kernel to send us `signum` when the process that started us is gone (Linux).

    DVC does not end its stage when DVC itself is killed; without this a retry would start a
    second copy that writes the same files. The default lets a stage save before it leaves.
    On other systems this does nothing.
    """
    import ctypes
    import sys

    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it was gone before we asked
        os.kill(os.getpid(), signum)
