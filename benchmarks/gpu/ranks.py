"""Two tensor ranks against one, both on this GPU.

    python -m benchmarks.gpu.ranks [--tiny]

is what `run` starts: ranks are forked, which a process that has used the GPU cannot do. They talk
through gloo, as NCCL wants a GPU for each.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlfoundry.infra.backend
from benchmarks.gpu.sizes import FULL, TINY, Clock, Sizes

ROOT = Path(__file__).parents[2]


def run(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Output and gradients of both, compared in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.ranks"]
    if sizes is TINY:
        command.append("--tiny")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"two ranks failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one JSON line."""
    from vlfoundry.infra.launch.launchers.fork import run_ranks

    sizes = TINY if "--tiny" in sys.argv else FULL
    vlfoundry.infra.backend.install()
    one = run_ranks(gradients, sizes, 1, ranks=1)[0]
    two = run_ranks(gradients, sizes, 2, ranks=2)[0]
    print(json.dumps({"case": "TP2 against TP1", **_compared(two, one)}))


def gradients(sizes: Sizes, ranks: int) -> tuple[float, dict[str, Any]] | None:
    """Loss and whole gradients of an encoder; on rank 0."""
    from benchmarks.gpu.towers import pixels
    from vlfoundry.infra.backend import Layout, install
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.backend.placement import to_device
    from vlfoundry.infra.train.weights import gather_weights
    from vlfoundry.models.internvit.model import InternViT
    from vlfoundry.models.layers.canonical import initialise

    vlfoundry.infra.backend._installed = dataclasses.replace(install(), process_group="gloo")
    config = dataclasses.replace(sizes.vision, depth=2)
    with parallel(Layout(tensor=ranks)):
        model = InternViT(config, install().layer_spec)
        initialise(model, 0)
        model = to_device(model)
        loss = model(pixels(config, sizes.parity.samples)).float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.data = parameter.grad.cpu()  # gloo sends nothing else
        whole = gather_weights(model)
        return (float(loss), {n: t.numpy() for n, t in whole.items()}) if whole else None


def _compared(got: Any, expected: Any) -> dict[str, Any]:
    import numpy as np

    apart = {
        name: float(np.linalg.norm(got[1][name] - tensor) / max(np.linalg.norm(tensor), 1e-12))
        for name, tensor in expected[1].items()
    }
    worst = max(apart, key=lambda name: apart[name])
    return {
        "loss": got[0], "loss_of_one": expected[0], "worst_gradient": worst,
        "gradient_error": apart[worst],
    }  # fmt: skip


if __name__ == "__main__":
    main()
