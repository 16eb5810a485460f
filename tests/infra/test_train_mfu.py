"""MFU(CPU) by its definition."""

import pytest

from vlfoundry.infra.train.mfu import Utilisation, counted_flops, gemm_rate


def test_counted_flops_are_those_of_the_formula() -> None:
    """Forward 24 W^2 a token and layer and 4 T W of attention; backward twice that."""
    import torch

    from vlfoundry.models.internvit.config import InternViTConfig
    from vlfoundry.models.internvit.model import InternViT

    width, depth, side = 64, 2, 4
    config = InternViTConfig(
        width=width, depth=depth, heads=2, mlp_hidden=4 * width, patch_px=8, image_px=8 * side
    )
    model = InternViT(config)
    pixels = torch.zeros(3, 3, 8 * side, 8 * side)
    found = counted_flops(model, lambda tower, batch: (tower(batch).sum(), {}), pixels)
    tokens = side**2 + 1
    layers = depth * tokens * (24 * width**2 + 4 * tokens * width)
    patches = 2 * side**2 * (3 * 8 * 8) * width
    # The picture itself gets no gradient: the patch embedding has one backward product, not two.
    assert found == pytest.approx(3 * (3 * layers + 2 * patches), rel=0.02)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_utilisation_is_the_ratio_of_both_terms() -> None:
    assert Utilisation(flops_per_cpu_s=3e10, gemm_flops_per_cpu_s=6e10).mfu == pytest.approx(0.5)


def test_gemm_rate_is_a_rate() -> None:
    assert 1e8 < gemm_rate(threads=1, repeats=2) < 1e13
