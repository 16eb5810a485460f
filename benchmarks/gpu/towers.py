"""Encoders to measure: built where they are computed, filled quickly, timed and counted.

FLOPs are the model's: a multiply-accumulate is two, what is recomputed counts once. For s tokens,
width h and MLP f an image costs 2s(4h^2 + 2hf) + 4s^2 h a layer forwards, and twice that backwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.sizes import Point
from vlfoundry.infra.backend import Layout, install
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.backend.placement import to_device
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvit.model import InternViT
from vlfoundry.models.layers.config import LayerSpecKind

if TYPE_CHECKING:
    from torch import Tensor, nn

DENSE_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""of an H100 or H200 SXM, by its data sheet"""


def flops_per_image(config: InternViTConfig) -> float:
    """Model FLOPs of an image's forward and backward pass."""
    tokens, width = config.patches + 1, config.width
    layer = 2 * tokens * (4 * width**2 + 2 * width * config.mlp_hidden) + 4 * tokens**2 * width
    patches = 2 * config.patches * 3 * config.patch_px**2 * width
    return 3.0 * (config.depth * layer + patches)


@contextlib.contextmanager
def encoder(
    config: InternViTConfig,
    point: Point,
    *,
    spec: LayerSpecKind | None = None,
    fp8: Fp8Config | None = None,
    seed: int = 0,
) -> Iterator[InternViT]:
    """An encoder of a point's depth, in the groups that Megatron wants; gone afterwards."""
    with parallel(Layout(recompute=point.recompute), fp8=fp8):
        config = dataclasses.replace(config, depth=point.depth)
        model = to_device(InternViT(config, spec or install().layer_spec))
        fill(model, seed)
        yield model.train()
        del model
    free()


def fill(model: nn.Module, seed: int) -> None:
    """Initial weights, drawn where the model is: the 6B's by the names would take minutes."""
    import torch

    generator = torch.Generator(install().kind).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            kind, value = parameter.init_rule  # pyrefly: ignore[missing-attribute]
            if kind == "constant":
                parameter.fill_(value)
            else:
                parameter.normal_(0, value, generator=generator)


def pixels(config: InternViTConfig, samples: int) -> Tensor:
    """Noise in the model's type [B, 3, S, S]."""
    import torch

    device = install()
    dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
    shape = (samples, 3, config.image_px, config.image_px)
    return torch.randn(shape, device=device.kind, generator=_seeded(device.kind)).to(dtype)


def _seeded(kind: str) -> Any:
    import torch

    return torch.Generator(kind).manual_seed(1)


def square_step(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], None]:
    """Forward and backward pass of the mean square of what an encoder gives."""

    def step() -> None:
        out = model(images)
        out.float().square().mean().backward()

    return step


def timed(step: Callable[[], Any], repeats: int, warm_up: int = 3) -> dict[str, float]:
    """Seconds of a step: median, least and most; and the peak of memory in GiB."""
    import torch

    cuda = install().kind == "cuda"
    synchronise = torch.cuda.synchronize if cuda else _nothing
    for _ in range(warm_up):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        synchronise()
        begun = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - begun)
    found = {
        "seconds": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)
    }  # fmt: skip
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def rates(flops: float, samples: int, seconds: float) -> dict[str, float]:
    """Samples and TFLOP a second, and these as shares of the data sheet's."""
    tflops = flops * samples / seconds / 1e12
    return {
        "samples_per_s": samples / seconds,
        "tflops": tflops,
        "share_of_989": tflops / DENSE_TFLOPS["bf16"],
        "share_of_1979": tflops / DENSE_TFLOPS["fp8"],
    }


def computed_by(model: InternViT, fp8: Fp8Config | None) -> str:
    """What really computes an encoder's products: no row may be taken for another's."""
    layer = model.decoder.layers[len(model.decoder.layers) // 2]
    linear = layer.get_submodule("mlp.linear_fc1")
    library = "Transformer Engine" if hasattr(linear, "fuse_norm") else "PyTorch"
    if fp8 is None:
        return library
    if model.config.fp8:
        return f"{library}, FP8 {fp8.recipe}"
    emulated = getattr(linear, "fp8_product", None) is not None
    return f"FP8 {fp8.recipe}, emulated" if emulated else f"{library}, no FP8 on this device"


def free() -> None:
    """Give memory back to the device."""
    gc.collect()
    if install().kind == "cuda":
        import torch

        torch.cuda.empty_cache()


def _nothing() -> None:
    pass
