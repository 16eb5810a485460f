"""Every kernel compiles for the H100 at the 6B's width; that needs no GPU."""

import os
import subprocess
import sys

import pytest

from tests.models.kernels.compile import KERNELS

pytestmark = pytest.mark.slow


def test_every_kernel_compiles(tmp_path):
    """In a process of its own: this one has Triton's interpreter."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.kernels.compile"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(KERNELS)
