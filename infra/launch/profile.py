"""Where and how wide a stage runs: the launcher profile.

A profile is about a place, not about a model: it is never a parameter, never in a run key and
never in dvc.lock, so that another machine or another number of ranks does not mean another run.
`VLFOUNDRY_LAUNCHER` names it: a file of the project's `launchers/` or of those that come with
VLFoundry (`infra/launch/profiles/`), without its ending; or a path.
"""

import dataclasses
import os
from pathlib import Path

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.project import project_around
from vlfoundry.infra.data.shards.packing import PackingConfig

ENVIRONMENT_VARIABLE = "VLFOUNDRY_LAUNCHER"
FOLDER = "launchers"
"""of a project"""
SHIPPED = Path(__file__).parent / "profiles"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionProfile:
    """How many processes a training stage starts here, and how they share the model."""

    name: str = "local"
    """What the run record calls this place."""
    launcher: str = "fork"
    """How ranks are started: a module of infra/launch/launchers/."""
    ranks: int = 2
    """Processes; those left over by `tensor` times `pipeline` are data parallel."""
    threads: int = 1
    """Computing threads of each process."""
    tensor: int = 1
    """Ranks that share each layer (TP)."""
    pipeline: int = 1
    """Ranks that share the depth (PP)."""
    text_tensor: int | None = None
    """Ranks that share each layer of the text tower in stage 1, where that is smaller than the
    vision tower: the rest of `tensor` shares its texts; null: `tensor`."""
    workers: int = 0
    """Processes of each rank that make its batches ahead; 0: it makes them itself."""
    packing: PackingConfig | None = None
    """Samples share sequences up to this size (sft); None: each has a row, padded to the longest.
    Changes speed and memory, not what is learnt."""
    virtual_pipeline: int | None = None
    """Pieces of the model that each of those holds (the interleaved schedule); null: one."""
    sequence_parallel: bool = False
    """Cut activations along the sequence over the tensor ranks."""
    recompute: bool = False
    """Keep only what goes into each layer, and run it again in the backward pass."""
    micro_batch_samples: int | None = None
    """Samples that a rank computes at once; null: all of its share. Changes speed and memory,
    not results."""
    limit_s: float | None = None
    """Seconds after which a stage saves and leaves resumable, e.g. Slurm's time limit less a few
    minutes; null: no limit."""

    telemetry: tuple[str, ...] = ()
    """Who is told about each step beside `steps.jsonl` in its work folder: tensorboard, dvclive."""
    prometheus: str | None = None
    """"host:port" at which a running stage answers Prometheus, "[::1]:9435" for IPv6; null:
    nowhere."""

    def __post_init__(self) -> None:
        for field in ("ranks", "threads", "tensor", "pipeline"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"launcher {self.name}: {field} is {getattr(self, field)}, expected 1 or more"
                )
        if self.workers < 0:
            raise ConfigError(
                f"launcher {self.name}: workers is {self.workers}, expected 0 or more"
            )
        for field in ("micro_batch_samples", "limit_s"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"launcher {self.name}: {field} is {value}, expected more than 0, or null"
                )
        if self.prometheus is not None:
            host_and_port(self.prometheus, f"launcher {self.name}: prometheus")
        model_parallel = self.tensor * self.pipeline
        if self.ranks % model_parallel:
            raise ConfigError(
                f"launcher {self.name}: {self.ranks} ranks cannot be shared by tensor "
                f"{self.tensor} x pipeline {self.pipeline}; expected a multiple of {model_parallel}"
            )

    @property
    def data(self) -> int:
        """Replicas of the model (DP)."""
        return self.ranks // (self.tensor * self.pipeline)


def host_and_port(text: str, where: str) -> tuple[str, int]:
    """The two parts of "host:port" or "[IPv6]:port"; no host is 127.0.0.1. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    good_host = bracketed or not set(host) & set("[]:/ ")
    if not (colon and good_host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(
            f"{where} is {text!r}, expected host:port with a port up to 65535, "
            "for example 127.0.0.1:9435 or [::1]:9435"
        )
    return (host[1:-1] if bracketed else host) or "127.0.0.1", int(port)


def local_profile(root: Path | None = None) -> ExecutionProfile:
    """The profile that `VLFOUNDRY_LAUNCHER` names; `local` where it names none.

    root: the project; None: the one that the working directory lies in, or that directory.

    Raises ConfigError if there is no such profile or its content is wrong.
    """
    return load_profile(os.environ.get(ENVIRONMENT_VARIABLE) or "local", root)


def load_profile(name: str, root: Path | None = None) -> ExecutionProfile:
    """Read a launcher profile by its name, in the project or else in `infra/launch/profiles/`, or
    by the path of a YAML file, which may be relative to the project."""
    from vlfoundry.infra.core.config import build, load_params
    from vlfoundry.infra.launch.launchers import launcher

    root = root or project_around(Path.cwd()) or Path.cwd()
    folders = (root / FOLDER, SHIPPED)
    places = [*(folder / f"{name}.yaml" for folder in folders), root / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        own, shipped = ([file.stem for file in sorted(f.glob("[!.]*.yaml"))] for f in folders)
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}: no launcher profile {name!r}; expected one of "
            + (f"{own} (files of {FOLDER}/ in {root}), of " if own else "")
            + f"{shipped} (which come with VLFoundry), or the path of a YAML file"
        )
    profile = build(
        ExecutionProfile, {"name": path.stem, **load_params(path)}, where=f"launcher {path.name}"
    )
    try:
        launcher(profile.launcher)
    except ConfigError as error:
        raise ConfigError(f"launcher {path.name}: {error}") from None
    return profile
