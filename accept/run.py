"""Runs the acceptance checks of a subject and stores what they measured.

    python -m accept.run pipeline [pytest arguments]

A check is a test in `accept/<subject>.py`; what it measures it hands over with pytest's
`record_property`. The results go to `benchmarks/results/accept-<subject>.json`, with the commit and
the machine: a number without them means nothing.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import commit, machine

ROOT = Path(__file__).parents[1]
FORMAT = "vlfoundry.acceptance.v1"


class Recorder:
    """A pytest plugin: the outcome of every check, with its measurements."""

    def __init__(self) -> None:
        self.checks: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the call, and a set-up that failed or skipped."""
        if report.when != "call" and report.passed:
            return
        self.checks[report.nodeid.partition("::")[2]] = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "measured": dict(report.user_properties),
        } | ({} if report.passed else {"reason": _last_line(report)})


def _last_line(report: pytest.TestReport) -> str:
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return lines[0].removeprefix("E").strip() if lines else report.longreprtext[-200:]


def subjects() -> list[str]:
    """Modules beside this one that hold acceptance checks."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [path.stem for path in modules if "\npytestmark = " in path.read_text("utf-8")]


def main() -> int:
    """The command line; pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m accept.run")
    parser.add_argument("subject", choices=subjects())
    arguments, passed_on = parser.parse_known_args()
    checks = ROOT / "accept" / f"{arguments.subject}.py"
    source = commit()
    recorder = Recorder()
    status = pytest.main([str(checks), "-m", "accept", *passed_on], plugins=[recorder])
    if not recorder.checks:
        return int(status)
    out = ROOT / "benchmarks" / "results" / f"accept-{arguments.subject}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "subject": arguments.subject,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **source,
        "machine": machine(),
        "passed": status == 0,
        "checks": recorder.checks,
    }
    out.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"written to {out.relative_to(ROOT)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
