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
    items: float = 1
    """Units of work in one call; the line also gives the rate."""
    unit: str = "calls"
    """What a unit is."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions belong to the measurement."""
    repetitions: int = REPETITIONS
    """Timed calls."""
    warm_up: bool = True
    """Whether a call that is not counted goes before them."""
    against: str = ""
    """An earlier case of the benchmark; the line gives the ratio of our rate a CPU-second to its"""
    ratios_to: tuple[str, ...] = ()
    """Further earlier cases; the line gives the ratio to each."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else the line says, e.g. how far the results are from each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A case that cannot run here."""

    name: str
    """What would be measured."""
    reason: str
    """Why it is not."""


Benchmark = Callable[[], Iterator[Case | LeftOut | tuple[Case, ...]]]
"""A tuple is timed in turns: a load that comes and goes then meets all of its cases alike."""
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


def measure(*cases: Case) -> list[dict[str, Any]]:
    """Time cases in turns: one call of each to warm up, then the repetitions."""
    for case in cases:
        if case.warm_up:
            case.call()
    walls: list[list[float]] = [[] for _ in cases]
    cpus: list[list[float]] = [[] for _ in cases]
    for repetition in range(max(case.repetitions for case in cases)):
        for case, wall_s, cpu_s in zip(cases, walls, cpus, strict=True):
            if repetition >= case.repetitions:
                continue
            gc.collect()
            cpu, wall = _cpu_s(), time.perf_counter()
            case.call()
            wall_s.append(time.perf_counter() - wall)
            cpu_s.append(_cpu_s() - cpu)
    return [_line(*measured) for measured in zip(cases, walls, cpus, strict=True)]


def _line(case: Case, walls: list[float], cpus: list[float]) -> dict[str, Any]:
    median, cpu_s = statistics.median(walls), statistics.median(cpus)
    return {
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


def run(name: str) -> Iterator[dict[str, Any]]:
    """All measurements of one benchmark, as JSON-ready lines."""
    rates: dict[str, float | None] = {}
    for item in REGISTRY[name]():
        head = {"format": FORMAT, "benchmark": name}
        if isinstance(item, LeftOut):
            yield head | {"case": item.name, "left_out": item.reason} | _origin()
            continue
        cases = item if isinstance(item, tuple) else (item,)
        for case, line in zip(cases, measure(*cases), strict=True):
            rates[case.name] = line["items_per_cpu_s"]
            if case.against:
                line["against"] = case.against
                line["ratio"] = _ratio(rates, case.name, case.against)
            if case.ratios_to:
                line["ratios"] = {to: _ratio(rates, case.name, to) for to in case.ratios_to}
            yield head | {"case": case.name} | line | dict(case.facts) | _origin()


def _ratio(rates: Mapping[str, float | None], ours: str, other: str) -> float | None:
    rate, peer = rates[ours], rates[other]
    return rate and peer and round(rate / peer, 2)


def _origin() -> dict[str, Any]:
    return commit() | {"machine": machine()}


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
