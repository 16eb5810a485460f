"""Shared by all tests: one process imports torch and Megatron, and forks every test's ranks."""

import functools
import os
from pathlib import Path

# Before anything imports torch. Also for the processes that tests start.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
# Without a GPU kernels run in Triton's interpreter; it asks for it when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


@pytest.fixture(scope="session")
def run_ranks():
    """`infra.backend.ranks.run_ranks` from this warmed process, with a time limit."""
    from infra.backend import install
    from infra.backend.ranks import run_ranks

    install()
    return functools.partial(run_ranks, timeout_s=120)
