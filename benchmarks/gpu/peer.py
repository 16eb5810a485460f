"""The same encoder as transformers has it, compiled by PyTorch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.mfu import measure
from benchmarks.gpu.sizes import Clock, Sizes
from benchmarks.gpu.towers import flops_per_image, free, pixels, rates, square_step, timed
from vlfoundry.infra.backend import install


def run(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Theirs eager and compiled, then ours, at one point in bf16."""
    if importlib.util.find_spec("transformers") is None:
        yield {"case": "transformers", "left_out": "transformers is not installed"}
        return
    point = sizes.peer
    config = dataclasses.replace(sizes.vision, depth=point.depth)
    images = pixels(config, point.samples)
    theirs = _encoder(config).to(install().kind, images.dtype).train()
    best = 0.0
    for case in ("eager", "compiled"):
        if case == "compiled" and install().kind == "cpu":
            yield {"case": "transformers, compiled", "left_out": "a CPU's compiler takes minutes"}
            continue
        if case == "compiled":
            theirs.compile()
        step = square_step(lambda images: theirs(images).last_hidden_state, images)
        found = timed(step, sizes.repeats)
        found |= rates(flops_per_image(config), point.samples, found["seconds"])
        best = max(best, found["tflops"])
        yield {"case": f"transformers, {case}", **dataclasses.asdict(point), **found}
    del step
    theirs.cpu()
    free()
    ours = measure(sizes, point, None)
    ratio = ours.get("tflops", 0.0) / best
    yield {"case": "ours", **dataclasses.asdict(point), **ours, "over_their_best": ratio}


def _encoder(config: Any) -> Any:
    """`InternVLVisionModel` of the same shape, with fused attention."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    return InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=config.width, num_hidden_layers=config.depth,
            num_attention_heads=config.heads, intermediate_size=config.mlp_hidden,
            norm_type="rms_norm" if config.norm == "rms" else "layer_norm",
            use_qk_norm=config.qk_norm, attention_bias=config.qkv_bias,
            image_size=[config.image_px] * 2, patch_size=[config.patch_px] * 2,
            layer_norm_eps=config.eps, layer_scale_init_value=config.layerscale_init,
        )
    )  # fmt: skip
