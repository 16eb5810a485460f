"""How far apart the scores of finished runs lie: other seeds, other processors.

    python -m benchmarks.spread "seed 0=DIR" "seed 1=DIR" "seed 0, avx2=DIR" [--out FILE]

Each DIR is a checkout or workspace whose run has ended. Written are, for every score, its value in
each run, their mean and standard deviation, and `low`: two standard errors of one run below the
mean, where a limit of the gate may stand. The error of one run is what the runs show or what its
items alone would give, whichever is larger.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, commit, machine
from vlfoundry.eval.compare.scores import Score, read_scores
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.infra.core.errors import DataError, UserError
from vlfoundry.infra.core.files import require_writable

FORMAT = "vlfoundry.spread.v1"
OUT = ROOT / "benchmarks" / "results" / "spread.json"
STDERRS = 2


def spread(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The document of runs, by their names.

    Scores that not all runs have are left out. Raises DataError where a run has no scores.
    """
    scores: dict[str, dict[str, Any]] = {}
    for variant in OUTPUTS:
        runs = [
            {score.key: score for score in read_scores(folder / OUTPUTS[variant].scores)}
            for folder in folders.values()
        ]
        shared = [key for key in runs[0] if all(key in run for run in runs)]
        scores[variant] = {key: _line([run[key] for run in runs]) for key in shared}
    return {"runs": {name: _facts(folder) for name, folder in folders.items()}, "scores": scores}


def _line(scores: list[Score]) -> dict[str, Any]:
    values = [score.value for score in scores]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    error = max(deviation, *(score.stderr for score in scores))
    return {
        "values": values,
        "mean": round(mean, 4),
        "deviation": round(deviation, 4),
        "low": round(mean - STDERRS * error, 4),
        "n": scores[0].n,
        "chance": scores[0].chance,
    }


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / "artifacts/gate/gate.json"
    try:
        gate = json.loads(file.read_text("utf-8"))
        return {key: gate[key] for key in ("passed", "reasons", "warnings")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file}: expected what the gate of a finished run says ({error})"
        ) from None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spread", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="at least two")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    folders = {
        name: Path(folder) for name, _, folder in (r.rpartition("=") for r in arguments.runs)
    }
    if len(folders) < 2 or "" in folders:
        parser.error("expected at least two runs, each as NAME=DIR with a name of its own")
    try:
        require_writable(arguments.out, "the spread")
        found = spread(folders)
    except UserError as error:
        parser.error(str(error))
    document = {"format": FORMAT, "collected": {**commit(), "machine": machine()}, **found}
    arguments.out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")
    print(f"{len(folders)} runs: mean (standard deviation in points), where a limit may stand")
    for variant, keys in found["scores"].items():
        for key, line in keys.items():
            points = 100 * line["deviation"]
            print(f"{variant} {key}: {line['mean']:.1%} ({points:.1f}), {line['low']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
