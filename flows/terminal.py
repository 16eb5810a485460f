"""What a person sees of a run: each stage's lines as they come, and one progress line."""

import re
import shutil
import sys
import time
from typing import TextIO

from vlfoundry.flows.runner import StageResult
from vlfoundry.flows.verbosity import Verbosity

PROGRESS = re.compile(r"\d+%\|")
"""What tqdm's bars have in common, and ordinary lines lack."""
DVC_NOISE = re.compile(
    r"Running stage '|> |Updating lock file|Generating lock file|Use `dvc push`|"
    r"To track the changes with git|To enable auto staging|\tgit add|\tdvc config|"
    r"Stage '.*' (didn't change, skipping|is cached - skipping run)|"
    r"Verifying data sources|Data and pipelines are up to date|"
    # A run clears what is stale itself, and what is not must not be deleted.
    r"If there are no processes with such PIDs|.*Auto removed it from the lock file"
)
MARKS = {"failed": "✗", "timed out": "✗", "cancelled": "■", "not run": "·"}
CLEAR = "\r\x1b[2K"


class Terminal:
    """Prints on one stream. On a terminal, progress lines overwrite each other at the bottom."""

    def __init__(
        self, stream: TextIO | None = None, *, verbosity: Verbosity = Verbosity.NORMAL
    ) -> None:
        self.stream = stream or sys.stdout
        self.verbosity = verbosity
        self.live = self.stream.isatty()
        self._progress = ""

    def say(self, text: str = "") -> None:
        """Print a line of how the run goes on; `-q` leaves it out."""
        if self.verbosity is not Verbosity.QUIET:
            self.tell(text)

    def tell(self, text: str) -> None:
        """Print a result or a warning above the progress line."""
        self._print(text)

    def _print(self, text: str) -> None:
        if self.live and self._progress:
            self.stream.write(CLEAR)
        self.stream.write(text + "\n")
        self._redraw()

    def stage_line(self, stage: str, line: str) -> None:
        """Show one line that a stage printed; DVC's own remarks are left to the log, or `-v`."""
        noise = self.verbosity is not Verbosity.VERBOSE and DVC_NOISE.match(line)
        if not line.strip() or noise or self.verbosity is Verbosity.QUIET:
            return
        text = f"  {stage} │ {line}"
        if not (self.live and PROGRESS.search(line)):
            self._print(text)
            return
        width = shutil.get_terminal_size().columns
        self._progress = text[: width - 1]
        self.stream.write(CLEAR)
        self._redraw()

    def started(self, stage: str) -> None:
        """Say that a stage begins."""
        self.say(f"▶ {stage}")

    def ended(self, result: StageResult) -> None:
        """Say how a stage ended; the progress line goes."""
        if self.live and self._progress:
            self.stream.write(CLEAR)
        self._progress = ""
        mark = MARKS.get(result.state, "✓")
        say = self.say if result.good else self.tell
        say(f"{mark} {result.name}: {result.state}, {duration(result.seconds)}")

    def _redraw(self) -> None:
        if self.live and self._progress:
            self.stream.write(self._progress)
        self.stream.flush()


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def summary_table(results: list[StageResult], began: float) -> str:
    """The closing table: stage, state, time; and the total since `began` (time.monotonic)."""
    if not results:
        return "nothing to do: every stage is up to date"
    shown = [result for result in results if result.state != "up to date"]
    fresh = len(results) - len(shown)
    width = max([len(result.name) for result in shown], default=5)
    lines = [f"  {'stage':{width}s}  {'state':10s}  time"]
    for result in shown:
        spent = duration(result.seconds) if result.seconds else "-"
        lines.append(f"  {result.name:{width}s}  {result.state:10s}  {spent}")
    if not shown:
        lines = ["nothing to do: every stage is up to date"]
    elif fresh:
        lines.append(f"  and {fresh} more, up to date")
    lines.append(f"  total {duration(time.monotonic() - began)}")
    return "\n".join(lines)
