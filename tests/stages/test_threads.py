"""How many threads a stage computes with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlfoundry.stages.evaluate import STAGE

SHOW = f"""
import vlfoundry.stages.{STAGE.name}
import numpy as np
from threadpoolctl import threadpool_info
np.ones((8, 8)) @ np.ones((8, 8))
print(max(pool["num_threads"] for pool in threadpool_info()))
"""


@pytest.mark.parametrize(("asked", "expected"), [(None, 1), ("2", 2)])
def test_a_stage_computes_with_one_thread_unless_told_otherwise(
    asked: str | None, expected: int
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    if asked:
        environment["OMP_NUM_THREADS"] = asked
    shown = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(shown.stdout) == min(expected, os.cpu_count() or 1)
