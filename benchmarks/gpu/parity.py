"""Whether specs and precisions agree: outputs and gradients of one encoder, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.sizes import Clock, Sizes
from benchmarks.gpu.towers import computed_by, encoder, pixels
from vlfoundry.infra.backend import install
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.models.layers.config import LayerSpecKind

if TYPE_CHECKING:
    from torch import Tensor

RECIPES = (
    Fp8Config(recipe="tensorwise"),
    Fp8Config(recipe="blockwise"),
    Fp8Config(recipe="delayed", first_layers=0, last_layers=0),
)
Found = tuple["Tensor", dict[str, "Tensor"], str]
"""output, gradients by name, and what computed them"""


def run(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """This device's spec against the local one, and each recipe against no FP8."""
    local = compute(sizes, spec="local")
    own = compute(sizes)
    yield {"case": f"{install().layer_spec} against local", **compared(own, local)}
    del local
    for fp8 in RECIPES:
        if clock.over:
            yield {"case": f"FP8 {fp8.recipe}", "left_out": "the time was over"}
            continue
        samples = sizes.blockwise_samples if fp8.recipe == "blockwise" else sizes.parity.samples
        expected = own if samples == sizes.parity.samples else compute(sizes, samples=samples)
        got = compute(sizes, fp8=fp8, samples=samples)
        yield {"case": f"FP8 {fp8.recipe} against none", **compared(got, expected)}


def compute(
    sizes: Sizes,
    *,
    spec: LayerSpecKind | None = None,
    fp8: Fp8Config | None = None,
    samples: int = 0,
) -> Found:
    """One encoder's output, and the gradients of its mean square; weights are always the same."""
    point = dataclasses.replace(sizes.parity, samples=samples or sizes.parity.samples)
    with encoder(sizes.vision, point, spec=spec, fp8=fp8) as model:
        images = pixels(sizes.vision, point.samples)
        if fp8 is not None and fp8.recipe == "delayed":  # whose scales come from a step before
            model(images).float().square().mean().backward()
            model.zero_grad()
        out = model(images)
        # Not the square alone: its gradient at a token is the token.
        (out.float() * pixels_like(out)).mean().backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        return out.detach(), gradients, computed_by(model, fp8)


def pixels_like(out: Tensor) -> Tensor:
    """Fixed noise of a shape: what the output is multiplied with before it is averaged."""
    import torch

    generator = torch.Generator(out.device).manual_seed(2)
    return torch.randn(out.shape, device=out.device, generator=generator)


def compared(got: Found, expected: Found) -> dict[str, Any]:
    """Relative error and cosine of the output, and the gradients' cosines, by layer the least."""
    cosines = {name: _cosine(got[1][name], tensor) for name, tensor in expected[1].items()}
    layers: dict[str, float] = {}
    for name, cosine in cosines.items():
        layer = name.split("layers.")[-1].split(".")[0] if "layers." in name else "embeddings"
        layers[layer] = min(cosine, layers.get(layer, 1.0))
    return {
        "computed_by": got[2],
        "against": expected[2],
        "output_error": float((got[0].float() - expected[0].float()).norm() / expected[0].norm()),
        "output_cosine": _cosine(got[0], expected[0]),
        "gradient_cosine_by_layer": layers,
        "worst": min(cosines, key=lambda name: cosines[name]),
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    import torch

    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))
