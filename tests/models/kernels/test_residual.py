"""LayerScale, residual and norm in one kernel against the same in plain PyTorch."""

import pytest
import torch

from tests.models.kernels.helpers import DEVICE, assert_as_exact, gradients, leaves
from vlfoundry.models.kernels.residual import scaled_residual

EPS = 1e-6


def plain(x, bias, scale, factor, residual, weight):
    """The definition, in the type of its arguments."""
    branch = x if bias is None else x + bias
    if factor is not None:
        branch = branch * factor[:, None]
    out = residual + scale * branch
    if weight is None:
        return (out,)
    return out, out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS) * weight


def fused(x, bias, scale, factor, residual, weight):
    out, normed = scaled_residual(x, bias, scale, factor, residual, weight, EPS)
    return (out,) if normed is None else (out, normed)


def inputs(dtype, *, tokens=3, batch=2, width=20, left_out=()):
    shapes = {
        "x": (tokens, batch, width),
        "bias": (width,),
        "scale": (width,),
        "factor": (batch,),
        "residual": (tokens, batch, width),
        "weight": (width,),
    }
    made = leaves(dtype, *shapes.values())
    made[3] = torch.tensor([0.0, 1 / 0.7][:batch], device=DEVICE, dtype=made[3].dtype)
    return [None if n in left_out else t for n, t in zip(shapes, made, strict=True)]


OPTIONS = {
    "all": (),
    "no norm": ("weight",),
    "no bias": ("bias",),
    "nothing dropped": ("factor",),
    "bare": ("bias", "factor", "weight"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_the_plain_one(option, dtype):
    given = inputs(dtype, left_out=OPTIONS[option])
    assert_as_exact(fused, plain, given)


@pytest.mark.parametrize("width", [1, 16, 100])
def test_any_width(width):
    assert_as_exact(fused, plain, inputs(torch.float32, width=width))


def test_more_rows_than_programs_share_them(monkeypatch):
    monkeypatch.setattr("vlfoundry.models.kernels.rows.PROGRAMS", 4)
    given = inputs(torch.float32, tokens=7)
    assert_as_exact(fused, plain, given)
    again = gradients(fused, given)
    assert all(torch.equal(a, b) for a, b in zip(gradients(fused, given), again, strict=True))


def test_gradients_are_those_of_small_steps():
    x, bias, scale, factor, residual, weight = inputs(torch.float64, width=5)

    def of_leaves(x, bias, scale, residual, weight):
        return fused(x, bias, scale, factor, residual, weight)

    assert torch.autograd.gradcheck(of_leaves, (x, bias, scale, residual, weight), fast_mode=True)


def test_of_strided_tensors():
    given = inputs(torch.float32)
    for place in (0, 4):
        other = given[place].detach().transpose(0, 1).contiguous().transpose(0, 1)
        given[place] = other.requires_grad_()
    assert_as_exact(fused, plain, given)
