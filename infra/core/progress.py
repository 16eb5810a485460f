"""One progress bar for every stage: a bar on a terminal, whole lines in a log."""

import sys
from types import TracebackType
from typing import Any, Self, TextIO

LINE_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.2


class Progress:
    """A context manager that shows how far a loop is and how long it will still take.

    The remaining time is extrapolated from a moving average of the recent rate, and counts from
    `start`, so that a resumed run does not claim the speed of work that it did not do.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str = "items",
        label: str = "",
        start: int = 0,
        stream: TextIO | None = None,
        enabled: bool = True,
    ) -> None:
        from tqdm import tqdm

        stream = stream or sys.stdout
        is_terminal = stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=label,
            unit=f" {unit}",
            file=stream if is_terminal else _Lines(stream),
            mininterval=BAR_INTERVAL_S if is_terminal else LINE_INTERVAL_S,
            maxinterval=BAR_INTERVAL_S if is_terminal else LINE_INTERVAL_S,
            miniters=1,
            dynamic_ncols=is_terminal,
            ncols=None if is_terminal else 110,
            disable=not enabled,
            leave=True,
        )

    def update(self, count: int = 1, **facts: Any) -> None:
        """Count `count` more units as done; `facts` (e.g. loss=2.31) stand behind the bar."""
        if facts:
            self._bar.set_postfix(facts, refresh=False)
        self._bar.update(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()


class _Lines:
    """Turns tqdm's carriage returns into whole lines, for logs and pipes."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
