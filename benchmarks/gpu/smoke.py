"""What there is, whether kernels run, and how fast matrix products alone are."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.sizes import Clock, Sizes
from benchmarks.gpu.towers import DENSE_TFLOPS, timed
from benchmarks.harness import commit, machine
from vlfoundry.infra.backend import install

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "triton", "numpy")


def origin() -> dict[str, Any]:
    """Device, versions, commit and date."""
    import torch

    device = install()
    cuda = device.kind == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_gib": torch.cuda.mem_get_info()[1] / 2**30 if cuda else None,
        "cuda": torch.version.cuda,
        "decision": {"kind": device.kind, "reason": device.reason, "layer_spec": device.layer_spec},
        "versions": {name: _version(name) for name in PACKAGES},
    }


def run(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Whether FP8 is to be had, and the products of bf16 and FP8 matrices of `gemm_side`."""
    yield {"case": "FP8 of Transformer Engine", "available": _te_fp8()}
    for precision in ("bf16", "fp8"):
        yield {"case": f"GEMM {precision}", "side": sizes.gemm_side, **gemm(sizes, precision)}


def gemm(sizes: Sizes, precision: str) -> dict[str, float]:
    """TFLOP/s of one square product, measured."""
    side = sizes.gemm_side
    found = timed(_product(side, precision), sizes.repeats)
    tflops = 2 * side**3 / found["seconds"] / 1e12
    return found | {"tflops": tflops, "share_of_data_sheet": tflops / DENSE_TFLOPS[precision]}


def _product(side: int, precision: str) -> Callable[[], Any]:
    import torch

    kind = install().kind
    a, b = (torch.randn(side, side, device=kind, dtype=torch.bfloat16) for _ in range(2))
    if precision == "bf16":
        return lambda: torch.mm(a, b)
    one = torch.ones((), device=kind)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    fast = kind == "cuda"  # as Transformer Engine's forward products
    return lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _te_fp8() -> str:
    if install().layer_spec != "te":
        return "no: " + install().reason
    import transformer_engine.pytorch as te

    return str(te.is_fp8_available(return_reason=True))


def _commit() -> dict[str, Any]:
    """Where there is no git, what `VLFOUNDRY_COMMIT` says."""
    return commit() if shutil.which("git") else {"commit": os.environ.get("VLFOUNDRY_COMMIT")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
