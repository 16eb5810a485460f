"""Registers a deployment: when the pipeline runs, with which parameters, who runs it."""

import dataclasses
import datetime
import json
import os
import re
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlfoundry.flows.addresses import check_stages
from vlfoundry.flows.flowrun import COMMAND
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.kept import connect
from vlfoundry.flows.parameters import check_parameters
from vlfoundry.flows.workspace import Variation
from vlfoundry.infra.core.errors import ConfigError

BANNED = "/%&<>"
"""characters that Prefect has in no name"""
EVERY = re.compile(r"(\d+)([smhdw])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
CRON_FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")
IF_BUSY = ("wait", "refuse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is asked for. Raises ConfigError for what Prefect would refuse."""

    name: str
    """Of the deployment."""
    profile: str | None = None
    """As of `vlfoundry run`."""
    overrides: tuple[str, ...] = ()
    """As `--set` of `vlfoundry run`."""
    stages: tuple[str, ...] = ()
    """As of `vlfoundry run`."""
    cron: str | None = None
    """When; five fields."""
    every: str | None = None
    """How often, e.g. 1d; only one of both. Without either it runs when Prefect is asked to."""
    timezone: str = "UTC"
    """Of `cron`."""
    if_busy: str = "wait"
    """What a run does that finds another one at work."""
    pool: str | None = None
    """Prefect's work pool; None: named after the project."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_name("--pool", self.pool)
        if self.if_busy not in IF_BUSY:
            raise ConfigError(f"--if-busy {self.if_busy!r}: expected one of {list(IF_BUSY)}")
        if self.cron is not None and self.every is not None:
            raise ConfigError("got --cron and --every, expected one of them")
        self.interval()
        self._check_timezone()
        # Prefect refuses R and H, which croniter takes for a time at random.
        fields = self.cron.split() if self.cron is not None else None
        if fields is not None and (len(fields) != 5 or set("RrHh") & set(fields)):
            raise self._no_cron()

    def interval(self) -> datetime.timedelta | None:
        """`every` as a time."""
        if self.every is None:
            return None
        found = EVERY.fullmatch(self.every)
        try:
            length = datetime.timedelta(**{UNITS[found[2]]: int(found[1])}) if found else None
        except OverflowError:
            length = None
        if not length:
            raise ConfigError(
                f"--every {self.every!r}: expected a number above 0 and a unit, as in 90s, 30m, "
                "12h, 1d, 1w"
            )
        return length

    def parameters(self, root: Path) -> dict[str, Any]:
        """Of the flow `flows.deployed.pipeline`."""
        return {
            "project": str(root), "profile": self.profile, "stages": list(self.stages),
            "overrides": list(self.overrides), "if_busy": self.if_busy,
        }  # fmt: skip

    def _check_timezone(self) -> None:
        if self.timezone not in zoneinfo.available_timezones():
            raise ConfigError(
                f"--timezone {self.timezone!r}: expected a name such as UTC or Europe/Berlin"
            )

    def check_cron(self) -> None:
        """Raises ConfigError for a `cron` that Prefect could not read. It imports Prefect."""
        if self.cron is None:
            return
        from prefect._vendor.croniter import croniter

        if not croniter.is_valid(self.cron):
            others = ["*"] * len(CRON_FIELDS)
            wrong = [
                f"the {name} cannot be {field!r}"
                for i, (name, field) in enumerate(zip(CRON_FIELDS, self.cron.split(), strict=True))
                if not croniter.is_valid(" ".join([*others[:i], field, *others[i + 1 :]]))
            ]
            raise self._no_cron(*wrong)

    def _no_cron(self, *wrong: str) -> ConfigError:
        return ConfigError(
            f"--cron {self.cron!r}: {''.join(f'{what}; ' for what in wrong)}expected "
            f"{', '.join(CRON_FIELDS[:-1])} and {CRON_FIELDS[-1]}, as in '0 3 * * *' (every night "
            "at 3)"
        )


def check_name(what: str, name: str | None) -> None:
    """Raises ConfigError for a name that Prefect would refuse; None is none."""
    if name is not None and (not name.strip() or set(name) & set(BANNED)):
        raise ConfigError(f"{what} {name!r}: expected a name without any of {BANNED}")


def pool_of(root: Path) -> str:
    """The work pool of a project: its folder's name, as Prefect can have it."""
    return re.sub(f"[{BANNED}]", "-", root.name)


def register(root: Path, asked: Deployment) -> Iterator[str]:
    """Make the deployment, or change the one of that name, and its work pool; lines that say so.

    Raises UserError if no server is there, for a time that is none, and for a profile, parameter or
    stage that does not exist.
    """
    params = Variation(profile=asked.profile, overrides=asked.overrides).apply(root)
    check_stages(root, asked.stages)
    url = connect(root)  # before anything imports Prefect
    asked.check_cron()
    check_parameters(root, params)
    if asked.stages:
        load_graph(root, lambda _: None, beside=True).needed_for(asked.stages)
    # Deployed again without a time, it has none.
    os.environ["PREFECT_DEPLOYMENTS_CLEAR_SCHEDULES_ON_EMPTY"] = "true"
    from vlfoundry.flows.pool import ensure_pool

    pool = asked.pool or pool_of(root)
    if ensure_pool(pool):
        yield f"work pool {pool}: made"
    number = _apply(root, asked, pool)
    yield f"deployment pipeline/{asked.name} on {url}: {_times(asked)}"
    yield f"pages: {url.removesuffix('/api')}/deployments/deployment/{quote(number)}"
    option = f" --pool {pool}" if asked.pool else ""
    yield f"`vlfoundry worker{option}` runs it then, or when one types"
    yield f"    prefect deployment run pipeline/{asked.name}"


def _apply(root: Path, asked: Deployment, pool: str) -> str:
    """Tell the server; the id of the deployment."""
    from prefect.deployments.runner import EntrypointType
    from prefect.schedules import Cron, Interval

    from vlfoundry.flows.deployed import pipeline

    schedules = []
    if asked.cron:
        schedules = [Cron(asked.cron, timezone=asked.timezone)]
    elif interval := asked.interval():
        schedules = [Interval(interval, timezone=asked.timezone)]
    made: Any = pipeline.to_deployment(  # a coroutine only where a loop runs
        asked.name, schedules=schedules, parameters=asked.parameters(root), work_pool_name=pool,
        job_variables={"command": COMMAND, "working_dir": str(root)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )  # fmt: skip
    return str(made.apply())


def _times(asked: Deployment) -> str:
    if asked.cron:
        return f"at {asked.cron!r}, {asked.timezone}"
    return f"every {asked.every}" if asked.every else "at no set time"


def prefect_yaml(root: Path) -> str:
    """A prefect.yaml for the project `root`, with which plain `prefect deploy` works too."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlfoundry.flows"), undefined=StrictUndefined,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    quoted = {"project": json.dumps(root.name), "pool": json.dumps(pool_of(root))}
    return environment.get_template("prefect.yaml").render(quoted, command=COMMAND)
