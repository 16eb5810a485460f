"""Mistakes that a user can mend. Anything else that goes wrong is a bug and keeps its traceback."""


def one_line(text: str) -> str:
    """A text of somebody else as it can be shown: what is not printable, as repr escapes it.

    A name may hold line ends and the codes that a terminal obeys.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """The message says what is wrong, what was got, what was expected, and what to do.

    The command line prints it without a traceback and exits with code 2. It is one line, whatever
    the names and texts of files that stand in it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(UserError):
    """A parameter is unknown, missing, or of the wrong type or range."""


class DataError(UserError):
    """A data file is missing, unreadable or not in the documented format."""


class LayoutError(UserError):
    """A parallel layout cannot work for this model on this number of ranks."""


class ModelError(UserError):
    """A model folder is incomplete, or a model cannot do what was asked of it."""


class KilledError(RuntimeError):
    """A process that we started was ended by somebody else, most often for want of memory.

    No fault of ours and none that a user has made: one line, and exit code 1.
    """

    @classmethod
    def of(cls, what: str, exit_code: int) -> "KilledError":
        """For a child whose exit code, as `os.waitstatus_to_exitcode` gives it, was unexpected."""
        return cls(f"{what} {ending(exit_code)}")


def killed_by(exit_code: int) -> int | None:
    """The signal that ended a process, told as -N or, by a shell or the guard, as 128 + N."""
    if exit_code < 0:
        return -exit_code
    return exit_code - 128 if 128 < exit_code <= 192 else None


def ending(exit_code: int) -> str:
    """How a process ended, in words: `was killed by SIGKILL (out of memory?)`."""
    signum = killed_by(exit_code)
    if signum is None:
        return f"ended unasked with exit code {exit_code}"
    import signal

    name = signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
    return f"was killed by {name}{' (out of memory?)' if signum == signal.SIGKILL else ''}"
