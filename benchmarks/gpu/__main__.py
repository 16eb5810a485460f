"""python -m benchmarks.gpu --out FILE [--parts smoke,mfu] [--budget-s 480] [--tiny]

Parts run in the order of their importance, each within a share of the time. What one finds is
written after every line of it; one that fails is recorded with its traceback, and the next goes on.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import FULL, TINY, Clock, Sizes

FORMAT = "vlfoundry.gpu.v1"
BUDGET_S = 480
Part = Callable[[Sizes, Clock], Iterator[dict[str, Any]]]


def parts() -> dict[str, tuple[Part, float]]:
    """Parts and their shares of the time, the most important first."""
    from benchmarks.gpu import curve, mfu, parity, peer, ranks, smoke, stages

    return {
        "smoke": (smoke.run, 0.08),
        "parity": (parity.run, 0.12),
        "mfu": (mfu.run, 0.34),
        "peer": (peer.run, 0.10),
        "contrastive": (stages.contrastive, 0.10),
        "curve": (curve.run, 0.10),
        "ranks": (ranks.run, 0.08),
        "stage2": (stages.generative, 0.04),
        "stage3": (stages.chat, 0.04),
    }


def main() -> int:
    """The command line; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parts", default="", help="comma-separated; all if left out")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it works")
    arguments = parser.parse_args()
    known = parts()
    chosen = arguments.parts.split(",") if arguments.parts else list(known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; known: {', '.join(known)}")
    from benchmarks.gpu.smoke import origin

    # Megatron looks at the gradient of a slice of a parameter to find that it has none.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
    sizes = TINY if arguments.tiny else FULL
    report: dict[str, Any] = {"format": FORMAT, "tiny": arguments.tiny, **origin(), "parts": {}}
    end = time.monotonic() + arguments.budget_s
    for name in known:
        if name not in chosen:
            continue
        part, share = known[name]
        result = report["parts"][name] = {"rows": []}
        clock = Clock(end=min(end, time.monotonic() + share * arguments.budget_s))
        run_part(name, part, sizes, clock, result, lambda: _write(arguments.out, report))
    report["seconds"] = round(time.monotonic() - end + arguments.budget_s, 1)
    _write(arguments.out, report)
    return int(any("traceback" in result for result in report["parts"].values()))


def run_part(
    name: str,
    part: Part,
    sizes: Sizes,
    clock: Clock,
    result: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """One part into `result`, whatever becomes of it; `write` is called after every row."""
    begun = time.monotonic()
    if clock.over:
        result["left_out"] = "the time was over"
        print(f"{name}: left out, the time was over", flush=True)
        write()
        return
    try:
        for row in part(sizes, clock):
            result["rows"].append(row)
            print(name, json.dumps(row), flush=True)
            write()
    except Exception:  # noqa: BLE001 - whatever it is, the other parts are still worth their time
        result["traceback"] = traceback.format_exc()
        print(f"{name}: failed\n{result['traceback']}", flush=True)
    result["seconds"] = round(time.monotonic() - begun, 1)
    write()


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
