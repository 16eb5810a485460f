"""Whole tensors by layout-free name: how weights are initialised, collected and assigned.

A parameter's canonical tensor is what one rank without padding would hold. Initial weights are
drawn from a generator seeded with (seed, canonical name), then cut to what the rank holds, so
neither the order of construction nor the layout matters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import ModelError
from models.common.parallel import tensor_group

Rule = tuple[str, float]
"""("normal", std), ("trunc_normal", std) or ("constant", value)"""


def set_init(module: nn.Module, std: float) -> None:
    """Give every parameter below `module` its usual rule: matrices truncated normal, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.init_rule = ("trunc_normal", std)
        else:
            parameter.init_rule = ("constant", 1.0 if _is_gain(name) else 0.0)


def set_rule(parameter: nn.Parameter, kind: str, value: float) -> None:
    """Override the rule of one parameter."""
    parameter.init_rule = (kind, value)


def set_true_shape(parameter: nn.Parameter, *shape: int) -> None:
    """Say which part of a padded parameter is real: what canonical checkpoints hold."""
    parameter.true_shape = torch.Size(shape)


def canonical_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their layout-free names."""
    return dict(model.named_parameters())


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole tensor over the tensor ranks, without padding."""
    true_shape = getattr(parameter, "true_shape", None)
    if true_shape is not None:
        return true_shape
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tensor_group().size()
    return torch.Size(shape)


def cut(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor; padding is zero.

    A `partition_stride` of 2 (SwiGLU's gate and up in one matrix) cuts each half.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    group, dim = tensor_group(), parameter.partition_dim
    pieces = []
    for part in full.chunk(parameter.partition_stride, dim):
        local = parameter.shape[dim] // parameter.partition_stride
        missing = local * group.size() - part.shape[dim]
        if missing:
            shape = list(part.shape)
            shape[dim] = missing
            part = torch.cat([part, part.new_zeros(shape)], dim)
        pieces.append(part.narrow(dim, local * group.rank(), local))
    return torch.cat(pieces, dim)


@torch.no_grad()
def whole(parameter: Tensor, values: Tensor) -> Tensor:
    """The canonical tensor of `values` (the parameter's own, or its gradient's), from all ranks."""
    values = values.detach()
    if not getattr(parameter, "tensor_model_parallel", False):
        return values
    group, dim = tensor_group(), parameter.partition_dim
    pieces = [values]
    if group.size() > 1:
        pieces = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(pieces, values.contiguous(), group=group)
    per_part = full_shape(parameter)[dim] // parameter.partition_stride
    parts = zip(*(piece.chunk(parameter.partition_stride, dim) for piece in pieces), strict=True)
    return torch.cat([torch.cat(part, dim).narrow(dim, 0, per_part) for part in parts], dim)


def relax_padding(sharded: dict, parameters: Mapping[str, nn.Parameter]) -> dict:
    """Let padded parameters be loaded from a Megatron checkpoint with another padding."""
    for name, parameter in parameters.items():
        if hasattr(parameter, "true_shape"):
            sharded[name].allow_shape_mismatch = True
    return sharded


@torch.no_grad()
def collect(model: nn.Module) -> dict[str, Tensor]:
    """Canonical fp32 tensors of a model, on every rank. All tensor ranks must call it."""
    return {
        name: whole(parameter, parameter).to("cpu", torch.float32).contiguous()
        for name, parameter in canonical_names(model).items()
    }


@torch.no_grad()
def assign(
    model: nn.Module, tensors: Mapping[str, Tensor], *, only: Iterable[str] | None = None
) -> None:
    """Fill parameters of a model from canonical tensors.

    Args:
        model: in any tensor-parallel layout.
        tensors: whole tensors by canonical name.
        only: prefixes of the parameters to fill; None: all, and `tensors` holds nothing else.

    Raises:
        ModelError: a tensor is missing, is of another shape, or belongs to no parameter.
    """
    prefixes = None if only is None else tuple(only)
    names = canonical_names(model)
    surplus = sorted(tensors.keys() - names.keys())
    if prefixes is None and surplus:
        raise ModelError(f"{len(surplus)} weights belong to no parameter, first {surplus[0]!r}")
    for name, parameter in names.items():
        if prefixes is not None and not name.startswith(prefixes):
            continue
        if name not in tensors:
            raise ModelError(f"weight {name!r} is missing; is this another kind of model?")
        full = tensors[name]
        if full.shape != full_shape(parameter):
            raise ModelError(
                f"weight {name!r} has shape {list(full.shape)}, the model's config asks for "
                f"{list(full_shape(parameter))}"
            )
        parameter.copy_(cut(full, parameter))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` by its rule."""
    for name, parameter in canonical_names(model).items():
        if parameter.is_meta:
            continue
        kind, value = parameter.init_rule
        if kind == "constant":
            parameter.copy_(cut(torch.full(full_shape(parameter), value), parameter))
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        full = torch.empty(full_shape(parameter), dtype=torch.float32)
        if kind == "trunc_normal":
            _trunc_normal(full, value, generator)
        else:
            full.normal_(0.0, value, generator=generator)
        parameter.copy_(cut(full, parameter))


def _trunc_normal(full: Tensor, std: float, generator: torch.Generator) -> None:
    """Normal cut at two standard deviations, by the inverse of the distribution function."""
    low = math.erf(-2 / math.sqrt(2))
    full.uniform_(low, -low, generator=generator)
    full.erfinv_().mul_(std * math.sqrt(2))


def _is_gain(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] == "weight" and "norm" in (parts[-2] if len(parts) > 1 else "")
