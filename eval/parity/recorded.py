"""Golden folders of models: what was recorded in them, against what our modules computed.

A folder holds the official `config.json` and safetensors files. Every tensor of a file of results
is compared: one that nothing of ours answers to does not pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlfoundry.eval.parity.check import Check, close, same
from vlfoundry.infra.train.weights import gather_weights
from vlfoundry.models.layers.parallel import tensor_group
from vlfoundry.models.layers.stack import Stack

FORWARD_ATOL = 1e-4
"""largest absolute difference of a forward value"""
GRADIENT_RTOL = 1e-4
"""largest difference of a gradient, relative to the largest entry of its tensor"""
ROUNDING = 1e-6
"""A gradient that is zero but for rounding (the bias on keys: it shifts all scores of a query
alike) is compared with this times the largest entry of all gradients instead."""
EPS_PROBE_SCALE = 0.002
"""what the parameters of the epsilon probes are multiplied with: their folders' README"""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of the folder; {} if there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """`<name>.safetensors` of the folder; {} if there is none."""
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    return load_file(path) if path.is_file() else {}


def forward_checks(
    file: str,
    ours: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor],
    rows: Mapping[str, Tensor] | None = None,
) -> list[Check]:
    """Compare every recorded tensor with ours of its name.

    Args:
        file: which file it is from: what the names of the checks begin with.
        ours: what we computed, by the recorded names; may hold more.
        recorded: floats are compared within `FORWARD_ATOL`, integers and booleans exactly.
        rows: boolean mask over the leading axes of a tensor: only these places mean something.
    """
    checks = []
    for name, wanted in recorded.items():
        label = f"{file}/{name}"
        if name not in ours:
            checks.append(Check(name=label, passed=False, note="nothing of ours answers to it"))
            continue
        got = ours[name].detach()
        if rows and name in rows and got.shape == wanted.shape:
            got, wanted = got[rows[name]], wanted[rows[name]]
        if wanted.is_floating_point():
            checks.append(close(label, got.numpy(), wanted.numpy(), atol=FORWARD_ATOL))
        else:
            checks.append(same(label, got.tolist(), wanted.tolist()))
    return checks


def gradient_checks(
    file: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> list[Check]:
    """Compare gradients by canonical name; those that `wanted` lacks are not compared."""
    largest = max((float(t.abs().max()) for t in wanted.values()), default=0.0)
    checks = []
    for name, expected in wanted.items():
        pair = (f"{file}/{name}", got[name].numpy(), expected.numpy())
        if expected.abs().max() > ROUNDING * largest:
            checks.append(close(*pair, rtol=GRADIENT_RTOL))
            continue
        check = close(*pair, atol=ROUNDING * largest, note="zero; relative to the largest gradient")
        if check.worst_abs is not None and largest:
            check = dataclasses.replace(check, worst_rel=check.worst_abs / largest)
        checks.append(check)
    return checks


def whole_gradients(model: nn.Module) -> dict[str, Tensor] | None:
    """Gradients by canonical name, zero where there is none.

    With tensor parallelism every rank must call it, and all but the first get None.
    """
    if tensor_group().size() == 1:
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
    values = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in values:
            gradient = parameter.grad
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
        whole = gather_weights(model)
        return None if whole is None else {name: t.clone() for name, t in whole.items()}
    finally:
        for parameter, value in values.items():
            parameter.data = value


def canonical_gradients(
    recorded: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    without: Collection[str] = (),
) -> dict[str, Tensor]:
    """Official gradients under canonical names; those that were not recorded are left out.

    Args:
        recorded: by official name.
        weights: the official weights, whose names and shapes are all there are.
        convert: official tensors to canonical ones.
        without: official names of the parameters that got none: zero is expected of them.
    """
    full = {
        n: recorded.get(n, torch.full_like(t, 0.0 if n in without else torch.nan))
        for n, t in weights.items()
    }
    return {n: t for n, t in convert(full).items() if not t.isnan().any()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def other(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors whose names begin with none of `prefixes`."""
    return {n: t for n, t in tensors.items() if not n.startswith(prefixes)}


def same_tokens(name: str, got: list[list[int]], wanted: Tensor, eos_id: int) -> Check:
    """Compare generated tokens, each row up to its end token: what follows is padding."""
    rows = [[_until(eos_id, row) for row in found] for found in (got, wanted.tolist())]
    return same(name, rows[0], rows[1])


def _until(eos_id: int, row: list[int]) -> list[int]:
    return row[: row.index(eos_id)] if eos_id in row else row


@contextlib.contextmanager
def listen(**modules: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the context, what each module returned last, by the given names; rows first."""
    heard: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module: Any, _arguments: Any, output: Any):
            first = (output[0] if isinstance(output, tuple) else output).detach()
            heard[name] = first.transpose(0, 1) if isinstance(module, Stack) else first

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def listen_decoder(decoder: Any) -> Iterator[dict[str, Tensor]]:
    """Within the context, what went into and through a decoder last.

    `layer_in`, `after_layer.<i>` and `after_norm` [B, T, D], `cross_attn_out.<i>` [B, Q, D],
    `attention_mask_additive` as whether each is blocked [B, T, T], `position_ids` [1, T].
    """
    heard: dict[str, Tensor] = {}

    def keep_stack(_module: Any, arguments: Any, keywords: Any, output: Any):
        tokens, mask = arguments[0], keywords["attention_mask"]
        length, batch = tokens.shape[:2]
        if mask is None:
            blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
        else:
            blocked = (mask if mask.dtype == torch.bool else mask < 0)[:, 0]
        heard["attention_mask_additive"] = blocked.expand(batch, -1, -1)
        heard["position_ids"] = keywords["rotary_pos_emb"][:, :1, 0, 0].T.round().long()
        heard["layer_in"] = tokens.transpose(0, 1)
        heard["after_norm"] = output.transpose(0, 1)

    def keep(name: str):
        def keep_one(_module: Any, _arguments: Any, output: Any):
            heard[name] = output[0].transpose(0, 1)

        return keep_one

    stack = decoder.decoder
    handles = [stack.register_forward_hook(keep_stack, with_kwargs=True)]
    for index, layer in zip(stack.held, stack.layers, strict=True):
        handles.append(layer.register_forward_hook(keep(f"after_layer.{index}")))
        cross = getattr(layer.cross_attention, "linear_proj", None)
        if cross is not None:
            handles.append(cross.register_forward_hook(keep(f"cross_attn_out.{index}")))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def blocked(recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Recorded tensors with additive attention masks [B, 1, T, T] as booleans [B, T, T]."""
    return {
        name: (t < 0)[:, 0] if name.endswith("attention_mask_additive") else t
        for name, t in recorded.items()
    }
