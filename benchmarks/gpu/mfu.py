"""How much of the device encoders of full width use, in bf16 and FP8, by micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.sizes import Clock, Point, Sizes
from benchmarks.gpu.smoke import gemm
from benchmarks.gpu.towers import (
    computed_by,
    encoder,
    flops_per_image,
    free,
    pixels,
    rates,
    square_step,
    timed,
)
from vlfoundry.infra.backend.fp8_config import Fp8Config


def run(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Forward and backward passes of every point, in both precisions one after the other."""
    peaks = {precision: gemm(sizes, precision)["tflops"] for precision in ("bf16", "fp8")}
    yield {"case": "GEMM", **peaks}
    for point in sizes.points:
        rows = {}
        for precision, fp8 in (("bf16", None), ("fp8", Fp8Config())):
            about = {"case": precision, **dataclasses.asdict(point)}
            if clock.over:
                yield about | {"left_out": "the time was over"}
                continue
            row = rows[precision] = measure(sizes, point, fp8)
            if "tflops" in row:
                row["share_of_gemm"] = row["tflops"] / peaks[precision]
            yield about | row
        if all("tflops" in rows.get(precision, {}) for precision in ("bf16", "fp8")):
            ratio = rows["fp8"]["tflops"] / rows["bf16"]["tflops"]
            yield {"case": "FP8 over bf16", **dataclasses.asdict(point), "ratio": ratio}


def measure(sizes: Sizes, point: Point, fp8: Fp8Config | None) -> dict[str, Any]:
    """One point; that it does not fit is an answer too."""
    config = dataclasses.replace(sizes.vision, depth=point.depth)
    try:
        with encoder(config, point, fp8=fp8) as model:
            step = square_step(model, pixels(config, point.samples))
            found = timed(step, sizes.repeats)
            found |= rates(flops_per_image(config), point.samples, found["seconds"])
            return found | {"computed_by": computed_by(model, fp8)}
    except torch.OutOfMemoryError as error:
        free()
        return {"does_not_fit": str(error).split(". ")[0]}
