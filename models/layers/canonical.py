"""Initial weights by name: the same numbers in every parallel layout.

A parameter's canonical tensor is what one rank without padding would hold. Initial weights are
drawn from a generator seeded with (seed, canonical name), then cut to what the rank holds, so
neither the order of construction nor the layout matters. (`infra.train.weights` reads and writes
canonical tensors; it takes their real shape from the `true_shape` set here.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlfoundry.models.layers.parallel import mark, tensor_group_of
from vlfoundry.models.tokenizer import EOS_ID

Rule = tuple[str, float]
"""("normal", std), ("trunc_normal", std), ("token_embedding", std), ("uniform", bound) or
("constant", value).

A token embedding is normal but for the end token, which starts at zero: the feature of a text is
read there, so that it starts as a mean of what the other tokens say. With a random end token all
texts start (and for hundreds of steps stay) nearly the same vector.
"""


def set_init(module: nn.Module, std: float) -> None:
    """Give every parameter below `module` its usual rule: matrices truncated normal, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            set_rule(parameter, "trunc_normal", std)
        else:
            set_rule(parameter, "constant", 1.0 if _is_gain(name) else 0.0)


def set_rule(parameter: nn.Parameter, kind: str, value: float) -> None:
    """Override the rule of one parameter."""
    mark(parameter, init_rule=(kind, value))


def set_true_shape(parameter: nn.Parameter, *shape: int) -> None:
    """Say which part of a padded parameter is real: what canonical checkpoints hold."""
    mark(parameter, true_shape=torch.Size(shape))


def full_shape(parameter: Any) -> torch.Size:
    """Shape of the whole tensor over the tensor ranks, without padding."""
    true_shape = getattr(parameter, "true_shape", None)
    if true_shape is not None:
        return true_shape
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tensor_group_of(parameter).size()
    return torch.Size(shape)


def cut(full: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor; padding is zero.

    A `partition_stride` of 2 (SwiGLU's gate and up in one matrix) cuts each half.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    group, dim = tensor_group_of(parameter), parameter.partition_dim
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


def relax_padding(sharded: dict, parameters: Mapping[str, nn.Parameter]) -> dict:
    """Let padded parameters be loaded from a Megatron checkpoint with another padding."""
    for name, parameter in parameters.items():
        if hasattr(parameter, "true_shape"):
            sharded[name].allow_shape_mismatch = True
    return sharded


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` by its rule."""
    parameters: Any = model.named_parameters()  # with what `mark` says of them
    for name, parameter in parameters:
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
        elif kind == "uniform":
            full.uniform_(-value, value, generator=generator)
        else:
            full.normal_(0.0, value, generator=generator)
        if kind == "token_embedding":
            full[EOS_ID] = 0.0
        parameter.copy_(cut(full, parameter))


def _trunc_normal(full: Tensor, std: float, generator: torch.Generator) -> None:
    """Normal cut at two standard deviations, by the inverse of the distribution function."""
    low = math.erf(-2 / math.sqrt(2))
    full.uniform_(low, -low, generator=generator)
    full.erfinv_().mul_(std * math.sqrt(2))


def _is_gain(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] == "weight" and "norm" in (parts[-2] if len(parts) > 1 else "")
