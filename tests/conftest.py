"""Shared by all tests: one process imports torch and Megatron, and forks every test's ranks."""

import fcntl
import functools
import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports torch. Also for the processes that tests start.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
# Without a GPU kernels run in Triton's interpreter; it asks for it when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Who sets logging up keeps the stderr of that moment: it must be pytest's own, which lasts, and not
# that of a test.

# It sets logging up anew, which closes the streams of all handlers that are there by then: absl's,
# which comes with Megatron, would be what pytest captures.
import gto.log  # noqa: F401
import psutil
import pytest

import vlfoundry.infra.train.mfu

# Every run begins by measuring what it could do at best: a third of a second for each rank.
vlfoundry.infra.train.mfu.GEMM_SIDE = 128
# A server that whoever runs the tests has is none of theirs.
for name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks for ranks is marked `dist`."""
    for item in items:
        if "run_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.dist)


@pytest.fixture(scope="session")
def run_ranks():
    """`run_ranks` of the launcher `fork` from this warmed process, with a time limit."""
    from vlfoundry.infra.backend import install
    from vlfoundry.infra.launch.launchers.fork import run_ranks

    install()
    return functools.partial(run_ranks, timeout_s=120)


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that is made by whichever test process asks first, and that
    all of them read."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not done.exists():
                    folder.mkdir()
                    make(folder)
                    done.touch()
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # forked processes may still hold it open
        return folder

    return once


@pytest.fixture
def new_children() -> Callable[[], list[psutil.Process]]:
    """Asks for child processes of this one that came in this test: those that others have left,
    zombies perhaps, are not its own."""
    before = psutil.Process().children()
    return lambda: [child for child in psutil.Process().children() if child not in before]
