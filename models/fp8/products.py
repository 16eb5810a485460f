"""Matrix products in FP8, emulated with Transformer Engine's formulas on any device.

A linear has three products, each of two quantised operands with an fp32 accumulator: the output,
the gradient of its input and that of its weight. The recipes (`infra.backend.fp8_config`) differ
in the scales:

- tensorwise: one a tensor, from its own maximum. e4m3 forwards, e5m2 for gradients.
- delayed: one a tensor, from the maxima of earlier steps (`DelayedScales`). The same formats.
- blockwise: one for 128 values along the sum of the product (for 128 x 128 of a weight). e4m3.

What a tensor rank holds of a weight, an input or a gradient it scales for itself, as Transformer
Engine does; only the maxima of `delayed` are made equal on all ranks. Under sequence parallelism
tokens are gathered before they are quantised, so that the maximum is that of all of them.

Letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlfoundry.infra.backend.fp8_config import MULTIPLE, Fp8Config
from vlfoundry.models.fp8.formats import (
    BLOCK,
    E4M3,
    E5M2,
    LARGEST,
    largest_magnitude,
    next_scale,
    pad_tokens,
    round_,
    rounded_in_blocks,
    scale_of,
)

ROLES = {"input": E4M3, "weight": E4M3, "gradient": E5M2}
"""operands of a linear's products, and their format where a scale is a whole tensor's"""


class Operand(NamedTuple):
    """A quantised matrix [T, K], in fp32."""

    across: Tensor
    """for products that sum over its columns"""
    down: Tensor | None
    """for those that sum over its rows; may be None where nobody asked for it"""
    unscale: Tensor
    """what products with it are multiplied with, a scalar"""


@dataclass
class Seen:
    """What became of an operand in the passes of a step."""

    amax: float = 0.0
    """largest magnitude before quantising"""
    nonzero: int = 0
    """values that were not 0"""
    lost: int = 0
    """of these, how many became 0"""

    def add(self, x: Tensor, quantised: Tensor) -> None:
        """Count one tensor and what it was rounded to."""
        nonzero = int(x.count_nonzero())
        self.amax = max(self.amax, float(largest_magnitude(x)))
        self.nonzero += nonzero
        self.lost += nonzero - int(quantised.count_nonzero())


class DelayedScales:
    """The scales of a linear's three operands, and the maxima that they come from.

    They stand still during a step, however many passes it has, and follow at its end (`update`).
    All of it lies on the CPU.

    Args:
        steps: length of the history.
    """

    def __init__(self, steps: int):
        self.scale = torch.ones(len(ROLES))
        self.history = torch.zeros(len(ROLES), steps)
        self.amax = torch.zeros(len(ROLES))
        self._largest = torch.tensor([LARGEST[dtype] for dtype in ROLES.values()])

    def note(self, role: str, x: Tensor) -> Tensor:
        """The scale for x, whose maximum becomes part of this step's."""
        place = list(ROLES).index(role)
        self.amax[place] = torch.maximum(self.amax[place], largest_magnitude(x).cpu())
        return self.scale[place]

    def forget(self) -> None:
        """This step's maxima."""
        self.amax.zero_()

    def update(self) -> None:
        """At the end of a step, with `amax` that of all ranks."""
        self.history[:, 0] = self.amax
        self.scale.copy_(next_scale(self.history.amax(1), self.scale, self._largest))
        self.history.copy_(self.history.roll(-1, 1))
        self.history[:, 0] = 0.0
        self.forget()


class Fp8Product:
    """What a linear multiplies with: called instead of `torch.nn.functional.linear`.

    It is no module: nothing of it belongs to a model's weights.
    """

    def __init__(self, config: Fp8Config):
        self.recipe = config.recipe
        self.multiple = MULTIPLE[config.recipe]
        self.delayed = DelayedScales(config.amax_history) if self.recipe == "delayed" else None
        self.seen: dict[str, Seen] | None = None
        """filled while it is a dictionary, by operand"""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], weight [N, K] -> [..., N]."""
        return _Linear.apply(x, weight, bias, self)

    def quantise(self, role: str, x: Tensor, *, down: bool = True) -> Operand:
        """An operand of `ROLES` from x [T, K]; `down`: whether it is also summed over its rows."""
        operand = self._quantised(role, x, down)
        if self.seen is not None:
            self.seen.setdefault(role, Seen()).add(x, operand.across)
        return operand

    def _quantised(self, role: str, x: Tensor, down: bool) -> Operand:
        if self.recipe == "blockwise":
            if role == "weight":
                values = rounded_in_blocks(x, BLOCK, BLOCK)
                return Operand(values, values, x.new_ones((), dtype=torch.float32))
            return Operand(
                rounded_in_blocks(x, 1, BLOCK),
                rounded_in_blocks(x, BLOCK, 1) if down else None,
                x.new_ones((), dtype=torch.float32),
            )
        if self.delayed is not None:
            scale = self.delayed.note(role, x)
        else:
            scale = scale_of(largest_magnitude(x), ROLES[role], x.dtype)
        values = round_(x.float() * scale, ROLES[role])
        return Operand(values, values, 1 / scale)


class _Linear(torch.autograd.Function):
    """x [..., K] times weight [N, K], plus a bias [N]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, product: Fp8Product) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        left = product.quantise(
            "input", pad_tokens(tokens, product.multiple), down=ctx.needs_input_grad[1]
        )
        right = product.quantise("weight", weight)
        ctx.product, ctx.shape, ctx.dtypes = product, x.shape, (x.dtype, weight.dtype)
        ctx.save_for_backward(
            left.down if ctx.needs_input_grad[1] else None,
            right.across if ctx.needs_input_grad[0] else None,
            left.unscale,
            right.unscale,
        )
        out = _multiply(left.across, right.across.T, left.unscale * right.unscale, bias)
        return out[: len(tokens)].to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    # pyrefly: ignore[bad-override]  # PyTorch's stub takes any number of gradients
    def backward(ctx, grad: Tensor):
        left, right, left_unscale, right_unscale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        gradient = ctx.product.quantise(
            "gradient", pad_tokens(rows, ctx.product.multiple), down=ctx.needs_input_grad[1]
        )
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _multiply(gradient.across, right, gradient.unscale * right_unscale)
            x_grad = x_grad[: len(rows)].to(ctx.dtypes[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = _multiply(gradient.down.T, left, gradient.unscale * left_unscale)
            weight_grad = weight_grad.to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0)
        return x_grad, weight_grad, bias_grad, None


def _multiply(a: Tensor, b: Tensor, unscale: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b * unscale + bias, in one pass."""
    addend = a.new_empty(()) if bias is None else bias.float()
    return torch.addmm(addend, a, b, beta=int(bias is not None), alpha=float(unscale))
