"""The benchmark of the kernels runs, at sizes for the interpreter."""

import math

from benchmarks.gpu_kernels import Sizes, measure
from tests.models.kernels.helpers import DEVICE
from vlfoundry.models import kernels


def test_every_kernel_is_measured_beside_plain_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda tensor: True)
    sizes = Sizes(batch=2, tokens=5, heads=2, head_size=4, pairs=5, embed_dim=6)
    rows = measure(DEVICE, sizes, repetitions=1, with_compile=False)
    assert [row["way"] for row in rows] == ["kernel", "plain"] * 5
    assert len({row["kernel"] for row in rows}) == 5
    for row in rows:
        assert row["bytes"] > 0
        assert math.isclose(row["gb_per_s"], row["bytes"] / row["median_s"] / 1e9)
