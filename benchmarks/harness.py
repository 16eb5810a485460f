"""Runs benchmarks and prints one JSON line a measurement.

    python -m benchmarks.harness [NAME ...] [--out FILE]

A benchmark is a function in a module `benchmarks/bench_*.py` under `@benchmark("name")`. It yields
cases; each case is timed here, all in the same way: repetitions of the whole call, the median, the
spread, and the CPU-seconds of this process and its children. Peers that are not installed
(`requirements/bench.lock`) are reported as left out, never passed over.
"""

import argparse
import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORMAT = "vlfoundry.benchmark.v1"
REPETITIONS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time."""

    name: str
    """What is measured, e.g. "ours" or "webdataset"."""
    call: Callable[[], Any]
    """Does the work once."""
    items: int = 1
    """Units of work in one call; the line also gives the rate."""
    unit: str = "calls"
    """What a unit is."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions belong to the measurement."""
    repetitions: int = REPETITIONS
    """Timed calls, after one that is not counted."""
    against: str = ""
    """An earlier case of the benchmark, called again in turn with this one; the line gives the
    median ratio of our rate a CPU-second to its"""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else the line says, e.g. how far the results are from each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A case that cannot run here."""

    name: str
    """What would be measured."""
    reason: str
    """Why it is not."""


Benchmark = Callable[[], Iterator[Case | LeftOut]]
REGISTRY: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark under a name."""

    def register(function: Benchmark) -> Benchmark:
        REGISTRY[name] = function
        return function

    return register


def machine() -> dict[str, Any]:
    """What a number must never be quoted without: processor, cores, memory, system, load."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        if line.startswith("model name")
    ]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "device": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


@functools.cache
def commit() -> dict[str, Any]:
    """The commit that is measured (when we began), and whether the working tree differs from it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def measure(case: Case, other: Case | None = None) -> dict[str, Any]:
    """Time a case: one call to warm up, then the repetitions.

    With an `other` case each repetition calls that first, so that a machine whose speed drifts
    under load is as slow for the one as for the other.
    """
    case.call()
    walls, cpus, ratios = [], [], []
    for _ in range(case.repetitions):
        other_cpu = _time(other)[1] if other else 0.0
        wall, cpu = _time(case)
        walls.append(wall)
        cpus.append(cpu)
        if other:
            ratios.append(other_cpu / other.items * case.items / cpu)
    median, cpu_s = statistics.median(walls), statistics.median(cpus)
    line = {
        "median_s": round(median, 6),
        "min_s": round(min(walls), 6),
        "max_s": round(max(walls), 6),
        "cpu_s": round(cpu_s, 6),
        "repetitions": case.repetitions,
        "items": case.items,
        "unit": case.unit,
        "items_per_s": round(case.items / median, 2),
        "items_per_cpu_s": round(case.items / cpu_s, 2) if cpu_s else None,
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "versions": {name: importlib.metadata.version(name) for name in case.packages},
    }
    if other:
        line |= {
            "against": other.name,
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return line


def _time(case: Case) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    gc.collect()
    cpu, wall = _cpu_s(), time.perf_counter()
    case.call()
    return time.perf_counter() - wall, _cpu_s() - cpu


def run(name: str) -> Iterator[dict[str, Any]]:
    """All measurements of one benchmark, as JSON-ready lines."""
    timed: dict[str, Case] = {}
    for case in REGISTRY[name]():
        line: dict[str, Any] = {"format": FORMAT, "benchmark": name, "case": case.name}
        if isinstance(case, LeftOut):
            line["left_out"] = case.reason
        else:
            line |= measure(case, timed[case.against] if case.against else None)
            line |= case.facts
            timed[case.name] = case
        yield line | commit() | {"machine": machine()}


def load_all() -> None:
    """Import every `benchmarks/bench_*.py`, which register themselves."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("bench_"):
            importlib.import_module(f"benchmarks.{module.name}")


def _cpu_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> int:
    """The command line."""
    # Imported by its own name, so that the modules register with this registry and not a twin.
    from benchmarks import harness

    harness.load_all()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness")
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(sorted(harness.REGISTRY))}")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - harness.REGISTRY.keys())
    if unknown:
        parser.error(f"no benchmark {unknown}; there are {sorted(harness.REGISTRY)}")
    for name in arguments.names or sorted(harness.REGISTRY):
        for line in harness.run(name):
            text = json.dumps(line, sort_keys=True)
            print(text, flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
