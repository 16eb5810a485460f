"""Where a step's time goes, and who is told: a file, TensorBoard, DVCLive, Prometheus.

Nothing here is part of a result. Rank 0 writes; its phases stand for all ranks', which wait for
each other anyway.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.launch.profile import host_and_port

PHASES = ("data", "forward", "backward", "communication", "optimizer", "checkpoint")
SINKS = ("tensorboard", "dvclive")


class Stopwatch:
    """Seconds of each phase of a step. Phases may be nested: the outer one stands still."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._synchronise = synchronise
        self._running: list[str] = []
        self._since = 0.0

    def start(self) -> None:
        """A new step."""
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to a phase."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        if self._synchronise:
            self._synchronise()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step computes, over all ranks; for rates."""

    samples: int
    """samples"""
    flops: float
    """FLOPs of its matrix products; what is computed again counts again"""
    peak_flops_per_s: float
    """what all ranks could do: the matrix-product rate measured on a CPU, a GPU's data sheet"""
    peak_is: str
    """where that is from"""


@dataclass
class Telemetry:
    """Rank 0's record of every step; the other ranks make one that is not `enabled`.

    Args:
        folder: gets `steps.jsonl`, and what the sinks write.
        work: for rates.
        sinks: of `SINKS`.
        prometheus: "host:port" to answer at; None: nowhere.
        enabled: whether to write.
    """

    folder: Path
    work: Work
    sinks: tuple[str, ...] = ()
    prometheus: str | None = None
    enabled: bool = True
    samples_per_s: float = 0.0
    _told: list[Callable[[int, dict[str, float]], None]] = field(default_factory=list)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Telemetry:
        if not self.enabled:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            path = self.folder / "steps.jsonl"
            self._stream = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
            for name in self.sinks:
                self._told.append(_OPENERS[name](self.folder, stack))
            if self.prometheus:
                self._told.append(_prometheus(self.prometheus, stack))
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_error: Any) -> None:
        self._closing.close()

    def step(
        self, step: int, watch: Stopwatch, wall_s: float, cpu_s: float, tokens: int,
        row: dict[str, float] | None, seen: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Tell everybody about a step.

        Args:
            watch: its phases.
            wall_s, cpu_s: of all of it.
            tokens: that went through the towers of all ranks.
            row: of the history; None: the step did not count.
            seen: what else was looked at in this step, by name; texts are for the file alone.
        """
        self.samples_per_s = self.work.samples / wall_s
        if not self.enabled:
            return
        line = {
            "samples_per_s": round(self.samples_per_s, 2),
            "tokens_per_s": round(tokens / wall_s, 1),
            "tflops": round(self.work.flops / wall_s / 1e12, 6),
            "mfu": round(self.work.flops / wall_s / self.work.peak_flops_per_s, 4),
            "wall_s": round(wall_s, 5),
            "cpu_s": round(cpu_s, 5),
            **{f"{name}_s": round(value, 5) for name, value in watch.seconds.items()},
            **(seen or {}),
        }
        self._stream.write(json.dumps({"step": step, **line}) + "\n")
        numbers = {name: value for name, value in line.items() if not isinstance(value, str)}
        for tell in self._told:
            tell(step, {**(row or {}), **numbers})


def check_sinks(sinks: tuple[str, ...], prometheus: str | None) -> None:
    """Refuse, before anything starts, what nobody can write to.

    Raises:
        ConfigError: an unknown sink, one whose package is not installed, or no host:port.
    """
    import importlib.util

    for name in sinks:
        if name not in SINKS:
            raise ConfigError(f"launcher: telemetry {name!r} does not exist; known: {SINKS}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"launcher: telemetry {name!r} needs the package {name}, which is not installed; "
                "install the extra `telemetry`, or leave it out"
            )
    if prometheus is not None:
        host_and_port(prometheus, "launcher: prometheus")


def _tensorboard(folder: Path, stack: contextlib.ExitStack) -> Callable:
    from torch.utils.tensorboard import SummaryWriter

    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))

    def tell(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return tell


def _dvclive(folder: Path, stack: contextlib.ExitStack) -> Callable:
    from dvclive import Live

    live = stack.enter_context(
        # The pipeline's own DVC files and experiments are not its business.
        Live(str(folder / "dvclive"), resume=True, report=None, save_dvc_exp=False, dvcyaml=None)
    )

    def tell(step: int, values: dict[str, float]) -> None:
        live.step = step
        for name, value in values.items():
            live.log_metric(name, value)
        live.make_summary()

    return tell


def _prometheus(address: str, stack: contextlib.ExitStack) -> Callable:
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    host, port = host_and_port(address, "launcher: prometheus")
    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"launcher: prometheus cannot answer at {address} ({error}); name another host:port"
        ) from error
    stack.callback(thread.join)
    stack.callback(server.shutdown)

    def tell(step: int, values: dict[str, float]) -> None:
        for name, value in {"step": step, **values}.items():
            if name not in gauges:
                gauges[name] = Gauge(
                    f"vlfoundry_{name}", f"{name} of the last step", [], registry=registry
                )
            gauges[name].set(value)

    return tell


_OPENERS = {"tensorboard": _tensorboard, "dvclive": _dvclive}
