"""Layer 4: what happens in one step. One module a DVC stage.

Each process of a stage computes with one thread, unless OMP_NUM_THREADS says otherwise. With one
for every core, stages that run side by side get in each other's way (two evaluations on two
cores: 108 s instead of 35), and sums would be split by the number of cores. numpy and torch read
the variable when they are imported, hence it is set before.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

if (
    sys.argv[0] == "-m"
):  # `python -m vlfoundry.stages.NAME` is about to import the module that it runs
    from vlfoundry.infra.core.interrupts import quiet_start

    quiet_start("stopped; run it again to go on")

if __name__ != "vlfoundry.stages":
    raise ImportError("import vlfoundry.stages: under two names every module is there twice")
