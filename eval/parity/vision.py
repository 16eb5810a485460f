"""InternViT alone: forward at several sizes, gradients, and a probe of the norms' epsilon."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.layouts import through_stages
from vlfoundry.eval.parity.recorded import (
    EPS_PROBE_SCALE,
    below,
    canonical_gradients,
    forward_checks,
    gradient_checks,
    other,
    read_config,
    read_tensors,
    whole_gradients,
)
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.internvit.hf import config_from_official, from_official
from vlfoundry.models.internvit.model import InternViT
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.model import build


def vision_model(folder: Path) -> tuple[str, InternVLConfig]:
    """Kind and config of the model that a folder is of."""
    return "vision", InternVLConfig(vision=config_from_official(read_config(folder)))


def check_vision(folder: Path) -> list[Check]:
    """Everything recorded of an InternViT."""
    config = dataclasses.replace(config_from_official(read_config(folder)), drop_path=0.0)
    weights, inputs = read_tensors(folder, "weights"), read_tensors(folder, "inputs")
    recorded, grads = read_tensors(folder, "outputs"), read_tensors(folder, "grads")
    model = InternViT(config)
    load_weights(model, from_official(weights, config))
    checks = forward_checks("outputs", _forward(model, inputs), other(recorded, "train."))
    checks += _training(model, inputs, weights, below(recorded, "train."), grads)
    return checks + _eps_probe(model, inputs, weights, read_tensors(folder, "eps_probe_outputs"))


@torch.no_grad()
def _forward(model: InternViT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`pixel_values` is the case "native", `pixel_values_big` the case "big"."""
    model.eval()
    side = model.vit_config.patch_px
    ours: dict[str, Tensor] = {}
    for name, pixels in below(inputs, "pixel_values").items():
        case = name.removeprefix("_") or "native"
        states = model.hidden_states(pixels)
        last = model(pixels)
        ours |= {f"{case}.hidden_states.{i}": state for i, state in enumerate(states)}
        ours[f"{case}.embeddings"] = states[0]
        ours[f"{case}.last_hidden_state"] = last
        ours[f"{case}.pooler_output"] = last[:, 0]
        grid = (pixels.shape[2] // side, pixels.shape[3] // side)
        ours[f"{case}.resized_position_embedding"] = model.positions(*grid)[None]
    return ours


def _training(
    model: InternViT,
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor],
    recorded: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> list[Check]:
    """The mean of the last states times given weights, and its gradients."""
    if not recorded and not grads:
        return []
    model.train()
    model.zero_grad()
    pixels = inputs["grad_pixel_values"].clone().requires_grad_()
    last = model(pixels)
    loss = (last * inputs["grad_weight_last"]).mean()
    loss.backward()
    assert pixels.grad is not None
    to_pixels = {n: t for n, t in recorded.items() if n == "grad_pixel_values"}
    values = other(recorded, "grad_pixel_values")
    checks = forward_checks(
        "outputs/train", {"last_hidden_state": last, "loss": loss}, values
    ) + gradient_checks("outputs/train", {"grad_pixel_values": pixels.grad}, to_pixels)
    got = whole_gradients(model)
    if got is None or not grads:
        return checks
    config = model.vit_config
    wanted = canonical_gradients(grads, weights, lambda t: from_official(t, config))
    return checks + gradient_checks("grads", got, wanted)


def check_vision_stages(folder: Path) -> list[Check]:
    """What goes forward through two pipeline stages, of the native size and of others."""
    vision = dataclasses.replace(config_from_official(read_config(folder)), drop_path=0.0)
    model = build("vision", InternVLConfig(vision=vision))
    weights = from_official(read_tensors(folder, "weights"), vision)
    load_weights(model, {f"vision.{name}": tensor for name, tensor in weights.items()})
    wanted = range(vision.depth + 1)
    ours: dict[str, Tensor] = {}
    for name, pixels in below(read_tensors(folder, "inputs"), "pixel_values").items():
        case = name.removeprefix("_") or "native"
        found = through_stages(model, "vision", {"pixels": pixels, "wanted": wanted})
        ours |= {f"{case}.hidden_states.{i}": found[f"vision.{i}"] for i in wanted}
        ours[f"{case}.last_hidden_state"] = found[f"vision.{vision.depth}"]
        ours[f"{case}.pooler_output"] = found[f"vision.{vision.depth}"][:, 0]
    recorded = read_tensors(folder, "outputs")
    return forward_checks("outputs", ours, {n: t for n, t in recorded.items() if n in ours})


@torch.no_grad()
def _eps_probe(
    model: InternViT,
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor],
    recorded: dict[str, Tensor],
) -> list[Check]:
    """With embeddings this small, the epsilon of the norms decides."""
    if not recorded:
        return []
    small = {
        n: t * EPS_PROBE_SCALE if n.startswith("embeddings.") else t for n, t in weights.items()
    }
    load_weights(model, from_official(small, model.vit_config))
    model.eval()
    states = model.hidden_states(inputs["pixel_values"])
    ours = {f"hidden_states.{i}": state for i, state in enumerate(states)}
    ours["last_hidden_state"] = model(inputs["pixel_values"])
    return forward_checks("eps_probe_outputs", ours, recorded)
