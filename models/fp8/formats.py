"""Numbers of eight bits: how tensors are scaled and rounded onto them.

The formulas are those of Transformer Engine 2.20: the scale from a tensor's own maximum as in
`recipe_common.cuh`, the one from earlier maxima as in `pytorch/quantization.py`, the blocks as in
its cast kernels. Rounding is to nearest even and saturates. fp32 holds every number of eight bits,
so rounded tensors stay in fp32, where an ordinary product of two of them is that of the quantised.

Letters: T tokens, K features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (E4M3, E5M2)}
BLOCK = 128
"""values that share a scale in blockwise quantisation"""
_SIGN_AND_EXPONENT, _EXPONENT = -(1 << 23), 0xFF << 23
"""bits of an fp32 number"""


def round_(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn x (fp32) into the nearest numbers of an 8-bit format, in place.

    What is beyond the largest becomes the largest. PyTorch's own casts do not saturate, and on a
    CPU the way back takes five times as long as this.
    """
    facts = torch.finfo(dtype)
    x.clamp_(-facts.max, facts.max)
    # Beside a number so large fp32 has no finer steps than the format has at x.
    beside = (x.view(torch.int32) & _EXPONENT).view(torch.float32)
    beside.clamp_(min=facts.smallest_normal).mul_(1.5 * 2**23 * facts.eps)
    return x.add_(beside).sub_(beside)


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x|, an fp32 scalar."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def scale_of(
    amax: Tensor, dtype: torch.dtype, source: torch.dtype, *, power_of_two: bool = False
) -> Tensor:
    """What to multiply values with whose largest magnitude is `amax` (fp32), before rounding.

    Args:
        source: the values' own type; its largest number stands for a scale that is infinite.
        power_of_two: the next lower power of two instead.

    Returns:
        1 where amax is 0 or not finite.
    """
    scale = torch.div(LARGEST[dtype], amax)  # `/` would multiply with the reciprocal
    scale = torch.where(scale.isinf(), torch.finfo(source).max, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def next_scale(amax: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
    """The scale of the coming steps from the largest magnitude of the past ones.

    `scale`, the one before, stays where amax is 0 or not finite.
    """
    new = largest / amax
    new = torch.where(amax.isfinite() & (amax > 0), new, scale)
    return torch.where(new.isinf(), torch.finfo(torch.float32).max, new)


def rounded_in_blocks(x: Tensor, tokens: int, features: int) -> Tensor:
    """x [T, K] rounded to e4m3 in blocks of tokens x features, each with a scale of its own.

    The scales are powers of two, so that they can be taken out again without an error: the result
    is of x's magnitude. Blocks at the end of a side may be smaller.
    """
    rows, columns = x.shape
    missing = (0, -columns % features, 0, -rows % tokens)
    whole = pad(x.float(), missing) if any(missing) else x.float()
    blocks = whole.reshape(-1, tokens, whole.shape[1] // features, features)
    amax = torch.maximum(-blocks.amin((1, 3), True), blocks.amax((1, 3), True))
    scale = scale_of(amax, E4M3, x.dtype, power_of_two=True)
    values = round_(blocks * scale, E4M3).div_(scale)
    return values.reshape(whole.shape)[:rows, :columns]


def pad_tokens(x: Tensor, multiple: int) -> Tensor:
    """x [T, K] with rows of zeros behind it, up to a multiple; they change no maximum, no product
    with the other rows and no sum over tokens."""
    missing = -x.shape[0] % multiple
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x
