"""Pixel shuffle and LayerNorm in one kernel against one after the other."""

import pytest
import torch
from torch.nn.functional import layer_norm

from tests.models.kernels.helpers import assert_as_exact, leaves
from vlfoundry.models.connector.model import pixel_shuffle
from vlfoundry.models.kernels import unshuffle
from vlfoundry.models.kernels.unshuffle import shuffled_norm

pytestmark = pytest.mark.slow

EPS = 1e-5


def pair(grid, merge, version):
    """The kernel and what it stands for, as functions of tokens, weight and bias."""

    def plain(tokens, weight, bias):
        square = tokens.reshape(len(tokens), *grid, -1)
        merged = pixel_shuffle(square, merge, version).flatten(1, 2)
        return (layer_norm(merged, weight.shape, weight, bias, EPS),)

    def fused(tokens, weight, bias):
        swapped = version == "v1"
        return (shuffled_norm(tokens, grid, merge, weight, bias, EPS, swapped=swapped),)

    return fused, plain


def inputs(dtype, grid, merge, width=5, images=2):
    whole = width * merge**2
    return leaves(dtype, (images, grid[0] * grid[1], width), (whole,), (whole,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("grid", "merge"), [((4, 4), 2), ((2, 6), 2), ((6, 3), 3)])
def test_it_is_one_after_the_other(grid, merge, version, dtype):
    assert_as_exact(*pair(grid, merge, version), inputs(dtype, grid, merge))


def test_of_tokens_behind_a_class_token_and_samples_second():
    """As the vision tower hands them over."""
    fused, plain = pair((4, 2), 2, "v2")
    _, weight, bias = inputs(torch.float32, (4, 2), 2)
    (tower,) = leaves(torch.float32, (1 + 8, 2, 5))

    def of_tower(function):
        return lambda tower, *rest: function(tower.transpose(0, 1)[:, 1:], *rest)

    assert_as_exact(of_tower(fused), of_tower(plain), [tower, weight, bias])


def test_wide_rows_that_several_programs_share(monkeypatch):
    monkeypatch.setattr("vlfoundry.models.kernels.rows.PROGRAMS", 2)
    monkeypatch.setattr(unshuffle, "COLUMN_BLOCK", 16)
    assert_as_exact(*pair((4, 6), 2, "v2"), inputs(torch.float32, (4, 6), 2, width=9))


def test_gradients_are_those_of_small_steps():
    fused, _ = pair((2, 4), 2, "v1")
    given = inputs(torch.float64, (2, 4), 2, width=3)
    assert torch.autograd.gradcheck(fused, given, fast_mode=True)
