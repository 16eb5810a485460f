"""How kernels are held against plain PyTorch: in the interpreter, or compiled where a GPU is."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest entry. Up to three roundings to bf16 follow one another, each of 2 ** -9;
# Triton's interpreter cuts off where a GPU rounds, which is twice that.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 3e-6,
    torch.bfloat16: 3 * 2.0 ** (-9 if DEVICE == "cuda" else -8),
}


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors with gradients."""
    generator = torch.Generator().manual_seed(len(shapes))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in made]


def gradients(function: Callable, given: Sequence[Tensor | None]) -> list[Tensor]:
    """Results of a function, and gradients of all that can have one for random ones of these."""
    results = function(*given)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    learnt = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    grads = [grad.to(DEVICE, r.dtype) for grad, r in zip(upstream, results, strict=True)]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, learnt, grads)]


def assert_as_exact(
    fused: Callable, plain: Callable, given: Sequence[Tensor | None], tolerance: float | None = None
) -> None:
    """`fused` of these is `plain` of them in fp64, results and gradients, within rounding."""
    dtype = next(tensor.dtype for tensor in given if tensor is not None)
    exact = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given
    ]
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    for ours, wanted in zip(gradients(fused, given), gradients(plain, exact), strict=True):
        assert ours.shape == wanted.shape
        assert (ours.double() - wanted).abs().max() <= limit * wanted.abs().max()
