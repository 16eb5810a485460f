"""What a person sees of a run."""

import io
import time

from vlfoundry.flows.runner import StageResult
from vlfoundry.flows.terminal import CLEAR, Terminal, duration, summary_table
from vlfoundry.flows.verbosity import Verbosity

BAR = "contrastive:  12%|█▏        | 12/100 [00:10<01:15, 1.17 steps/s, loss=4.1]"


class Screen(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_in_a_log_every_line_stands_and_dvc_is_quiet() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    for line in ("Running stage 'sft':", "> python -m vlfoundry.stages.sft", "", "ready", BAR):
        terminal.stage_line("sft", line)
    assert stream.getvalue() == f"  sft │ ready\n  sft │ {BAR}\n"


def test_quiet_shows_results_and_failures_alone_and_verbose_everything() -> None:
    shown = {}
    for verbosity in Verbosity:
        stream = io.StringIO()
        terminal = Terminal(stream, verbosity=verbosity)
        terminal.say("9 of 17 stages to run")
        terminal.started("sft")
        for line in ("Running stage 'sft':", "ready"):
            terminal.stage_line("sft", line)
        terminal.ended(StageResult(name="sft", state="ran", seconds=7))
        terminal.ended(StageResult(name="gate", state="failed", seconds=3))
        terminal.tell("champion: internvl_c@v0.1.0")
        shown[verbosity.name] = stream.getvalue().splitlines()
    failed, told = "✗ gate: failed, 3.0 s", "champion: internvl_c@v0.1.0"
    assert shown["QUIET"] == [failed, told]
    normal = ["9 of 17 stages to run", "▶ sft", "  sft │ ready", "✓ sft: ran, 7.0 s", failed, told]
    assert shown["NORMAL"] == normal
    assert shown["VERBOSE"] == [*normal[:2], "  sft │ Running stage 'sft':", *normal[2:]]


def test_on_a_terminal_progress_overwrites_itself_and_lines_go_above_it() -> None:
    screen = Screen()
    terminal = Terminal(screen)
    terminal.stage_line("sft", BAR)
    terminal.stage_line("sft", BAR.replace("12%", "13%"))
    terminal.stage_line("sft", "saved")
    terminal.ended(StageResult(name="sft", state="ran", seconds=75.2))
    shown = screen.getvalue()
    assert shown.count("\n") == 2
    last = shown.split(CLEAR)[-1]
    assert last == "✓ sft: ran, 75 s\n"
    assert "13%" in shown.split("saved\n")[1]  # redrawn below the line


def test_the_closing_table() -> None:
    results = [
        StageResult(name="ingest", state="up to date"),
        StageResult(name="sft@full", state="ran", seconds=605),
        StageResult(name="gate", state="not run"),
    ]
    table = summary_table(results, time.monotonic())
    assert "sft@full  ran         10 min 05 s" in table
    assert "gate      not run     -" in table
    assert "and 1 more, up to date" in table
    assert "nothing to do" in summary_table(results[:1], time.monotonic())


def test_durations() -> None:
    spelled = [duration(s) for s in (0.44, 99.6, 185, 7600)]
    assert spelled == ["0.4 s", "100 s", "3 min 05 s", "2 h 06 min"]
