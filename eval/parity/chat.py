"""InternVL-Chat: features, logits, losses, gradients, greedy replies, transformers' own port.

Letters: B conversations, N tiles, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.layouts import listen_stages, through_stages
from vlfoundry.eval.parity.recorded import (
    canonical_gradients,
    forward_checks,
    gradient_checks,
    listen_decoder,
    read_config,
    read_tensors,
    same_tokens,
    whole_gradients,
)
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.connector.model import pixel_shuffle
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.hf import config_from_official, from_official, native_keys
from vlfoundry.models.internvl.model import build
from vlfoundry.models.objectives.next_token import NextTokenConfig, next_token
from vlfoundry.models.official.keymap import join_all

KIND = "chat_simple"
Tensors = Mapping[str, Tensor]
Model = Any
"""an InternVL; which parts it has depends on its kind"""


def chat_model(folder: Path) -> tuple[str, InternVLConfig]:
    """Kind and config of the model that a folder is of."""
    return KIND, config_from_official(read_config(folder))


def check_chat(folder: Path) -> list[Check]:
    """Everything recorded of an InternVL-Chat."""
    config = config_from_official(read_config(folder))
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, drop_path=0.0))
    model: Model = build(KIND, config)
    checks: list[Check] = []
    weights = read_tensors(folder, "weights")
    if weights:
        load_weights(model, from_official(weights, config, KIND))
        checks += _conversations(folder, model, "outputs", read_tensors(folder, "outputs"))
        checks += _gradients(folder, model, weights, read_tensors(folder, "grads"))
        checks += _replies(folder, model, "generate_outputs")
    native = read_tensors(folder, "hf_native_weights")
    if native:
        load_weights(model, join_all(native_keys(config), native))
        recorded = read_tensors(folder, "hf_native_outputs")
        values = {n: t for n, t in recorded.items() if not n.endswith("_greedy")}
        checks += _conversations(folder, model, "hf_native_outputs", values)
        checks += _replies(folder, model, "hf_native_outputs")
    return checks


# --- one pass ---------------------------------------------------------------------------------


@torch.no_grad()
def _conversations(folder: Path, model: Model, file: str, recorded: Tensors) -> list[Check]:
    """Tiles to features to logits to losses; right-padded places of the text mean nothing."""
    if not recorded:
        return []
    inputs, official = read_tensors(folder, "inputs"), read_config(folder)
    model.eval()
    features = model.visual_tokens(inputs["pixel_values"])
    vision = model.vision(inputs["pixel_values"])
    with listen_decoder(model.language) as stack:
        hidden = _hidden(model, inputs, official)
    ours = {
        "extract_feature": features,
        "image_hidden_states": features[_real_tiles(inputs)],
        "vit.last_hidden_state": vision,
        "logits": model.language.logits(hidden),
        "loss": _loss(model, hidden, inputs, weighted=False),
        "loss_weighted": _loss(model, hidden, inputs, weighted=True),
    }
    states = _states(stack)
    places = dict.fromkeys(["logits", *states], inputs["attention_mask"].bool())
    ours |= states | _shuffled(model, recorded)
    if "train.loss" in recorded:
        model.train()
        ours["train.loss"] = _loss(model, _hidden(model, inputs, official), inputs, weighted=False)
    return forward_checks(file, ours, recorded, places)


def check_chat_stages(folder: Path) -> list[Check]:
    """What goes forward through two pipeline stages: states, logits, losses."""
    weights, inputs = read_tensors(folder, "weights"), read_tensors(folder, "inputs")
    recorded, official = read_tensors(folder, "outputs"), read_config(folder)
    if not weights or not recorded:
        return []
    config = config_from_official(official)
    model = build(KIND, config)
    load_weights(model, from_official(weights, config, KIND))
    batch = {
        "ids": inputs["input_ids"],
        "pixels": inputs["pixel_values"][_real_tiles(inputs)],
        "context_id": official["img_context_token_id"],
    }

    def finish(last: Model, state: dict[str, Tensor], _batch: Any) -> dict[str, Tensor]:
        hidden = state["hidden"]
        return {
            "logits": last.language.logits(hidden),
            "loss": _loss(last, hidden, inputs, weighted=False)[None],
            "loss_weighted": _loss(last, hidden, inputs, weighted=True)[None],
        }

    with listen_stages("language", model) as stack:
        ours = through_stages(model, "chat", batch, finish)
    ours |= {name: ours[name][0] for name in ("loss", "loss_weighted")}
    states = _states(dict(sorted(stack.items(), key=_by_layer)))
    places = dict.fromkeys(["logits", *states], inputs["attention_mask"].bool())
    ours |= states
    return forward_checks("outputs", ours, {n: t for n, t in recorded.items() if n in ours}, places)


def _by_layer(entry: tuple[str, Tensor]) -> tuple[str, int]:
    kind, _, index = entry[0].partition(".")
    return kind, int(index or 0)


def _hidden(model: Model, inputs: Tensors, official: Mapping) -> Tensor:
    """[B, T, D]; a text-only sample's dummy tile is left out."""
    pixels = inputs["pixel_values"][_real_tiles(inputs)]
    return model.chat_hidden(inputs["input_ids"], pixels, official["img_context_token_id"])


def _real_tiles(inputs: Tensors) -> Tensor:
    return inputs["image_flags"].flatten() == 1


def _loss(model: Model, hidden: Tensor, inputs: Tensors, *, weighted: bool) -> Tensor:
    weights = inputs.get("loss_weight") if weighted else None
    head = model.language.logits
    return next_token(hidden, inputs["labels"], head, NextTokenConfig(), weights)[0]


def _states(stack: Tensors) -> dict[str, Tensor]:
    """As transformers returns them: embeddings, after each layer, the last one after the norm."""
    layers = [tensor for name, tensor in stack.items() if name.startswith("after_layer.")]
    states = [stack["layer_in"], *layers[:-1], stack["after_norm"]]
    return {f"llm.hidden_states.{i}": state for i, state in enumerate(states)}


def _shuffled(model: Model, recorded: Tensors) -> dict[str, Tensor]:
    """The pixel shuffle of consecutive numbers, in the recorded numbers' shape."""
    name = "pixel_shuffle.arange_out"
    if name not in recorded:
        return {}
    connector = model.model_config.connector
    side = connector.merge
    batch, rows, columns, width = recorded[name].shape
    if connector.ps_version == "v1":
        rows, columns = columns, rows
    numbers = torch.arange(recorded[name].numel(), dtype=recorded[name].dtype)
    square = numbers.view(batch, rows * side, columns * side, width // side**2)
    return {name: pixel_shuffle(square, side, connector.ps_version)}


def _gradients(folder: Path, model: Model, weights: Tensors, recorded: Tensors) -> list[Check]:
    if not recorded:
        return []
    inputs = read_tensors(folder, "inputs")
    model.train()
    model.zero_grad()
    hidden = _hidden(model, inputs, read_config(folder))
    _loss(model, hidden, inputs, weighted=False).backward()
    got = whole_gradients(model)
    if got is None:
        return []
    config = model.model_config

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_official(tensors, config, KIND)

    without = read_config(folder, "meta.json").get("params_without_grad", ())
    wanted = canonical_gradients(recorded, weights, convert, without)
    return gradient_checks("grads", got, wanted)


# --- replies ----------------------------------------------------------------------------------


@torch.no_grad()
def _replies(folder: Path, model: Model, file: str, only: set[str] | None = None) -> list[Check]:
    """Greedy replies to one prompt and to a left-padded batch, and the logits along the first."""
    inputs, recorded = read_tensors(folder, "generate_inputs"), read_tensors(folder, file)
    model.eval()
    official = read_config(folder)
    language = official["llm_config"]
    context, end = official["img_context_token_id"], language.get("eos_token_id")
    end = -1 if end is None else end
    checks = []
    for name, wanted in recorded.items():
        case = name.split("_")[0]
        if not name.endswith(("_greedy", "_raw_return")):
            continue
        # What transformers 4.37 returns begins with a token that was never fed to the model.
        extra = [language.get("bos_token_id")] if name.endswith("_raw_return") else []
        ids = inputs[f"{case}_input_ids"]
        new = model.generate(
            ids,
            inputs.get(f"{case}_attention_mask", torch.ones_like(ids)),
            inputs[f"{case}_pixel_values"],
            max_new_tokens=wanted.shape[1] - len(extra),
            eos_id=end,
            context_id=context,
        )
        got = [extra + row for row in new.tolist()]
        checks.append(same_tokens(f"{file}/{name}", got, wanted, end))
    return checks + _along_replies(model, inputs, recorded, context, file)


def _along_replies(
    model: Model, inputs: Tensors, recorded: Tensors, context: int, file: str
) -> list[Check]:
    """Logits of each new token of the single reply, with the recorded ones before it."""
    wanted = {name: t for name, t in recorded.items() if name == "single_step_logits"}
    if not wanted:
        return []
    ids, new = inputs["single_input_ids"], recorded["single_greedy"]
    fed = torch.cat([ids, new[:, :-1]], 1)
    hidden = model.chat_hidden(fed, inputs["single_pixel_values"], context)
    ours = {"single_step_logits": model.language.logits(hidden[:, ids.shape[1] - 1 :])}
    return forward_checks(file, ours, wanted)
