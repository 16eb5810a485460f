"""MFU(CPU) by its definition."""

import pytest

from infra.train.mfu import gemm_rate, transformer_flops, utilisation


def test_flops_by_the_formula():
    # 24 W^2 a token and layer + 4 T W of attention a token and layer
    assert transformer_flops(layers=6, width=384, tokens=257) == pytest.approx(
        6 * 257 * (24 * 384**2 + 4 * 257 * 384)
    )


def test_gated_mlp_and_grouped_heads_count():
    flops = transformer_flops(
        layers=1, width=8, tokens=1, mlp_ratio=2.0, mlp_matrices=3, key_value_ratio=0.5
    )
    assert flops == 2 * 64 * (2 + 1) + 2 * 64 * 6 + 4 * 8


def test_backward_counts_twice():
    found = utilisation(forward_flops=1e9, cpu_s=0.1, gemm_flops_per_cpu_s=6e10)
    assert found.flops_per_cpu_s == pytest.approx(3e10)
    assert found.mfu == pytest.approx(0.5)


def test_gemm_rate_is_a_rate():
    assert 1e8 < gemm_rate(threads=1, repeats=2) < 1e13
