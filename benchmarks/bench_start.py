"""How long a command takes before it does anything: the price of imports."""

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness import Case, LeftOut, benchmark

STARTS = {
    "vlfoundry --help": (["-m", "vlfoundry.flows.cli", "--help"], ("typer",)),
    "import torch": (["-c", "import torch"], ("torch",)),
    "import prefect's flow": (["-c", "from prefect import flow"], ("prefect",)),
    "import dvc's Repo": (["-c", "from dvc.repo import Repo"], ("dvc",)),
}


@benchmark("start")
def start() -> Iterator[Case | LeftOut]:
    """A fresh interpreter each time, its files warm in the page cache."""
    for name, (arguments, packages) in STARTS.items():
        command = [sys.executable, *arguments]

        def call(command: list[str] = command) -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        yield Case(name=name, call=call, packages=packages, repetitions=3)
