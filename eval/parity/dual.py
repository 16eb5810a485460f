"""InternVL-14B: -C and -G, stage 2's losses on one rank and two, retrieval, captions.

Letters: B batch, T text tokens, Q queries, D width, E embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.layouts import listen_stages, through_stages
from vlfoundry.eval.parity.recorded import (
    EPS_PROBE_SCALE,
    below,
    blocked,
    canonical_gradients,
    forward_checks,
    gradient_checks,
    listen,
    listen_decoder,
    other,
    read_config,
    read_tensors,
    same_tokens,
    whole_gradients,
)
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import current_layout, parallel
from vlfoundry.infra.backend.world import this_rank
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.step import Engine
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.decoder.model import at_end
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.hf import config_from_official, from_official
from vlfoundry.models.internvl.model import build
from vlfoundry.models.objectives.common import gather_rows
from vlfoundry.models.objectives.contrastive import ContrastiveConfig, own_places
from vlfoundry.models.objectives.generative import Generative, GenerativeConfig
from vlfoundry.models.objectives.next_token import NextTokenConfig
from vlfoundry.models.objectives.retrieval import Retrieval, RetrievalConfig

_BATCH = {
    "pixels": "pixel_values",
    "positive_ids": "positive_input_ids",
    "positive_mask": "positive_attention_mask",
    "negative_ids": "negative_input_ids",
    "negative_mask": "negative_attention_mask",
    "summary_ids": "summarize_input_ids",
    "summary_mask": "summarize_attention_mask",
    "caption_ids": "input_ids",
    "caption_mask": "attention_mask",
    "caption_labels": "labels",
}
_PROBED = ("query_tokens", "qllama.model.embed_tokens.weight")
_LOSSES = {"loss": "loss", "itm": "loss_itm", "itc": "loss_itc", "itg": "loss_itg"}
_OFFICIAL = ContrastiveConfig(max_logit_scale=None)
Weights = Mapping[str, Tensor]
Model = Any
"""an InternVL; which parts it has depends on its kind"""


def dual_model(folder: Path) -> tuple[str, InternVLConfig]:
    """Kind and config of the larger of the two models that a folder is of."""
    return "internvl_g", _read(folder)[0]


def check_dual(folder: Path) -> list[Check]:
    """Everything recorded of an InternVL-14B."""
    config, weights = _read(folder)
    checks = _inference(folder, config, weights)
    checks += _eps_probe(folder, config, weights)
    model = _build("internvl_g", config, weights)
    checks += _captions(folder, model)
    checks += _stage2(folder, model, weights)
    checks += _stage2_smoothed(folder, model, weights)
    checks += _retrieval(folder, model, weights)
    if this_rank() is None:
        checks += _stage2_two_ranks(folder)
    return checks


def _read(folder: Path) -> tuple[InternVLConfig, Weights]:
    config = config_from_official(read_config(folder))
    vision = dataclasses.replace(config.vision, drop_path=0.0)
    return dataclasses.replace(config, vision=vision), read_tensors(folder, "weights")


def _build(kind: str, config: InternVLConfig, weights: Weights) -> Model:
    model = build(kind, config)
    load_weights(model, from_official(weights, config, kind))
    return model


# --- inference --------------------------------------------------------------------------------


@torch.no_grad()
def _inference(folder: Path, config: InternVLConfig, weights: Weights) -> list[Check]:
    """Both models' embeddings and similarities, and the states on the way."""
    inputs, recorded = read_tensors(folder, "inputs"), blocked(read_tensors(folder, "outputs"))
    if not recorded:
        return []
    pixels, ids = inputs["pixel_values"], inputs["text"]
    mask = ids > 0
    small, big = (_build(kind, config, weights).eval() for kind in ("internvl_c", "internvl_g"))
    ours = _image_states(big, pixels) | _text_states(big, ids, mask)
    with listen(vision=small.vision.decoder, pooled=small.clip_projector) as heard:
        ours |= _similarity("C", small, pixels, ids, mask)
    ours["C.image_features"] = heard["pooled"]
    ours["C.vision.last_hidden_state"] = heard["vision"]
    ours |= _similarity("G", big, pixels, ids, mask)
    rows = {n: mask for n in ours if n.startswith("text.") or n == "get_text_features"}
    del rows["text.position_ids"]
    return forward_checks("outputs", ours, recorded, rows)


def _similarity(
    case: str, model: Model, pixels: Tensor, ids: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    cosine = model.embed_images(pixels) @ model.embed_texts(ids, mask.long()).T
    logits = model.logit_scale.exp() * cosine
    return {
        f"{case}.cosine": cosine,
        f"{case}.logits_per_image": logits,
        f"{case}.logits_per_text": logits.T,
    }


def _image_states(model: Model, pixels: Tensor) -> dict[str, Tensor]:
    """What -G's image side goes through. Its feature is the sum of two unit vectors."""
    parts = {
        "vision.last_hidden_state": model.vision.decoder,
        "clip_projector.out": model.clip_projector,
        "clip_projector2.out": model.clip_projector2,
    }
    with listen(**parts) as heard, listen_decoder(model.text) as stack:
        model.embed_images(pixels)
    pooled = [heard[f"{name}.out"] for name in ("clip_projector", "clip_projector2")]
    ours = {f"G.image.{name}": value for name, value in (heard | _named(stack)).items()}
    return ours | {
        "G.image_features": torch.stack([normalize(p, dim=-1) for p in pooled]).sum(0),
        "G.get_image_features.backbone": heard["vision.last_hidden_state"],
        "G.get_image_features.qllama": stack["after_norm"],
    }


def _text_states(model: Model, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    with listen_decoder(model.text) as stack:
        pooled = at_end(model.text.encode(ids, mask.long()), mask)
    return {f"text.{name}": value for name, value in _named(stack).items()} | {
        "get_text_features": stack["after_norm"],
        "text_features": pooled @ model.text_projection,
    }


def _named(stack: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as recorded: states are `qllama.<name>`."""
    plain = ("attention_mask_additive", "position_ids")
    return {name if name in plain else f"qllama.{name}": value for name, value in stack.items()}


def check_dual_stages(folder: Path) -> list[Check]:
    """What goes forward through two pipeline stages: both models' features, and stage 2."""
    config, weights = _read(folder)
    return _embedding_stages(folder, config, weights) + _stage2_stages(folder, config, weights)


def _embedding_stages(folder: Path, config: InternVLConfig, weights: Weights) -> list[Check]:
    inputs, recorded = read_tensors(folder, "inputs"), blocked(read_tensors(folder, "outputs"))
    if not recorded:
        return []
    ids = inputs["text"]
    mask = ids > 0
    ours: dict[str, Tensor] = {}
    for case, kind in (("C", "internvl_c"), ("G", "internvl_g")):
        model = _build(kind, config, weights)
        scale = from_official(weights, config, kind)["logit_scale"].exp()
        with listen_stages("text", model) as image_stack:
            image = through_stages(model, "image", {"pixels": inputs["pixel_values"]})["image"]
        with listen_stages("text", model) as text_stack:
            text = through_stages(model, "text", {"ids": ids, "mask": mask.long()})["text"]
        cosine = image @ text.T
        ours |= {
            f"{case}.cosine": cosine,
            f"{case}.logits_per_image": scale * cosine,
            f"{case}.logits_per_text": scale * cosine.T,
        }
    # InternVL-G's, the second.
    ours |= {f"G.image.{name}": value for name, value in _named(image_stack).items()}
    ours |= {f"text.{name}": value for name, value in _named(text_stack).items()}
    ours["G.get_image_features.qllama"] = image_stack["after_norm"]
    ours["get_text_features"] = text_stack["after_norm"]
    rows = {n: mask for n in ours if n.startswith("text.") or n == "get_text_features"}
    rows.pop("text.position_ids", None)
    found = {name: tensor for name, tensor in recorded.items() if name in ours}
    return forward_checks("outputs", ours, found, rows)


def _stage2_stages(folder: Path, config: InternVLConfig, weights: Weights) -> list[Check]:
    recorded = blocked(read_tensors(folder, "train_outputs"))
    if not recorded:
        return []
    model, objective = _build("internvl_g", config, weights), _objective()
    batch = _batch(read_tensors(folder, "train_inputs"))
    terms = Engine(model.eval(), [model], objective, current_layout()).forward(batch)
    ours = {_LOSSES[name]: torch.tensor(value) for name, value in terms.items() if name in _LOSSES}
    found = {name: tensor for name, tensor in recorded.items() if name in ours}
    return forward_checks("train_outputs", ours, found)


@torch.no_grad()
def _eps_probe(folder: Path, config: InternVLConfig, weights: Weights) -> list[Check]:
    """With queries and token embeddings this small, the epsilon of QLLaMA's norms decides."""
    inputs, recorded = read_tensors(folder, "inputs"), read_tensors(folder, "eps_probe_outputs")
    if not recorded:
        return []
    small = {n: t * EPS_PROBE_SCALE if n in _PROBED else t for n, t in weights.items()}
    model = _build("internvl_g", config, small).eval()
    mask = inputs["text"] > 0
    ours = {
        "G.get_image_features.qllama": model.text.encode_image(
            model.vision(inputs["pixel_values"])
        ),
        "get_text_features": model.text.encode(inputs["text"], mask.long()),
    }
    return forward_checks("eps_probe_outputs", ours, recorded, {"get_text_features": mask})


@torch.no_grad()
def _captions(folder: Path, model: Model) -> list[Check]:
    """Greedy and beam search, and the logits along the greedy captions."""
    inputs, recorded = (read_tensors(folder, f"generate_{part}") for part in ("inputs", "outputs"))
    if not recorded:
        return []
    model.eval()
    qllama = read_config(folder)["qllama_config"]
    begin, end = qllama.get("bos_token_id"), qllama.get("eos_token_id")
    end = -1 if end is None else end
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    vision = model.vision(inputs["pixel_values"])
    tokens = {n: t for n, t in recorded.items() if n.endswith(("_new_tokens", "_raw_return"))}
    raw = {name for name in tokens if name.endswith("_raw_return")}
    options = {
        "max_new_tokens": max(t.shape[1] - (n in raw) for n, t in tokens.items()),
        "eos_id": end,
    }
    checks = []
    for name, wanted in tokens.items():
        # What transformers 4.37 returns begins with a token that was never fed to the model.
        extra = [begin] if name in raw else []
        beams = int(name.removeprefix("beam").split("_")[0]) if name.startswith("beam") else 1
        if beams == 1:
            rows = model.text.generate(vision, ids, mask, **options).tolist()
        else:
            rows = model.text.generate_by_beams(vision, ids, mask, beams=beams, **options)
        checks.append(
            same_tokens(f"generate_outputs/{name}", [extra + row for row in rows], wanted, end)
        )
    return checks + _along_captions(model, vision, ids, mask, recorded, end)


def _along_captions(
    model: Model,
    vision: Tensor,
    ids: Tensor,
    mask: Tensor,
    recorded: Weights,
    end: int,
) -> list[Check]:
    wanted = {n: t for n, t in recorded.items() if n == "teacher_forced_logits_text_part"}
    if not wanted:
        return []
    new = recorded["greedy_new_tokens"]
    text, real = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    embeddings, full, hidden_from = model.text.prompt(text, real)
    positions = (full.long().cumsum(1) - 1).clamp_min(0)
    hidden = model.text(embeddings, hidden_from, positions=positions, context=vision)
    ours = {
        "teacher_forced_logits_text_part": model.text.logits(hidden[:, model.text.num_queries :])
    }
    ended = (torch.cat([torch.zeros_like(ids), new], 1) == end).cumsum(1) > 0
    rows = {"teacher_forced_logits_text_part": real.bool() & ~ended}
    return forward_checks("generate_outputs", ours, wanted, rows)


# --- training ---------------------------------------------------------------------------------


def _batch(inputs: Weights, part: slice = slice(None)) -> dict[str, Tensor]:
    return {ours: inputs[theirs][part] for ours, theirs in _BATCH.items()}


def _objective(*, label_smoothing: float = 0.0) -> Generative:
    """Stage 2 as the official code has it: each rank divides by its own tokens."""
    contrastive = dataclasses.replace(_OFFICIAL, label_smoothing=label_smoothing)
    return Generative(
        GenerativeConfig(
            negatives="given",
            contrastive=contrastive,
            next_token=NextTokenConfig(global_mean=False),
        )
    )


def _learn(model: Model, objective: Callable, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses by their recorded names; leaves the gradients on the model."""
    model.train()
    model.zero_grad()
    loss, metrics = objective(model, batch)
    loss.backward()
    return {_LOSSES[name]: value for name, value in metrics.items() if name in _LOSSES}


def _gradients(
    file: str,
    model: Model,
    recorded: Weights,
    weights: Weights,
    without: Collection[str] = (),
) -> list[Check]:
    got = whole_gradients(model)
    if got is None:
        return []
    config = model.model_config

    def convert(tensors: Weights) -> dict[str, Tensor]:
        return from_official(tensors, config, "internvl_g")

    wanted = canonical_gradients(recorded, weights, convert, without)
    return gradient_checks(file, got, wanted)


def _stage2(folder: Path, model: Model, weights: Weights) -> list[Check]:
    """The three losses, everything on the way to them, and all gradients."""
    recorded = blocked(read_tensors(folder, "train_outputs"))
    if not recorded:
        return []
    batch = _batch(read_tensors(folder, "train_inputs"))
    objective = _objective()
    ours = _learn(model, objective, batch)
    without = read_config(folder, "meta.json").get("params_without_grad_in_train", ())
    checks = _gradients("train_grads", model, read_tensors(folder, "train_grads"), weights, without)
    with torch.no_grad():
        ours |= _stage2_states(model, batch) | _stage2_scores(model, objective, batch)
    caption = batch["caption_mask"].bool()
    places = _places(model, [objective.matching(model, batch)[0][1], *_masks(batch)])
    rows = dict.fromkeys(_wide(ours), places)
    rows |= {"lm_head.out": caption, "itg_shift_logits": caption[:, :-1].flatten()}
    return forward_checks("train_outputs", ours, recorded, rows) + checks


def _masks(batch: Mapping[str, Tensor]) -> list[Tensor]:
    return [batch["summary_mask"], batch["caption_mask"]]


def _places(model: Model, text_masks: list[Tensor]) -> Tensor:
    """[rows, Q + T]: all queries, and the text that is no padding."""
    mask = torch.cat(text_masks).bool()
    queries = torch.ones(len(mask), model.text.num_queries, dtype=torch.bool)
    return torch.cat([queries, mask], 1)


def _wide(names: Mapping[str, Tensor]) -> list[str]:
    """Those over all places of [queries | text]."""
    states = ("qllama.layer_in", "qllama.after_", "attention_mask_additive")
    return [name for name in names if name.startswith(states)]


def _stage2_states(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {
        "vision.last_hidden_state": model.vision.decoder,
        "clip_projector2.out": model.clip_projector2,
        "itm_head.out": model.itm_head,
    }
    with listen(**parts) as heard, listen_decoder(model.text) as stack:
        _objective()(model, batch)
    pooled = model.clip_projector(heard["vision.last_hidden_state"])
    return heard | _named(stack) | {"clip_projector.out": pooled}


def _stage2_scores(
    model: Model, objective: Generative, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Logits and targets of the three losses."""
    (ids, mask), is_match, counts = objective.matching(model, batch)
    summary = (batch["summary_ids"], batch["summary_mask"])
    out = model.run("tasks", {**batch, "match_ids": ids, "match_mask": mask})
    logits = model.text.logits(out["hidden"])
    empty = summary[1].sum(1) == objective.config.empty_summary_tokens
    return _similarities(model, out["image"], out["text"], "sim_{}") | {
        "itm_logits": out["match"],
        "itm_labels": torch.where(counts, is_match, -100),
        "itc_targets": own_places(len(empty), empty.device).masked_fill(empty, -100),
        "lm_head.out": logits,
        "itg_shift_logits": logits[:, :-1].flatten(0, 1),
        "itg_shift_labels": batch["caption_labels"][:, 1:].flatten(),
    }


def _similarities(model: Model, images: Tensor, texts: Tensor, name: str) -> dict[str, Tensor]:
    """Scaled similarities of our rows to the columns of all ranks, both ways."""
    scale = model.logit_scale.exp()
    return {
        name.format("i2t"): scale * images @ gather_rows(texts).T,
        name.format("t2i"): scale * texts @ gather_rows(images).T,
    }


def _stage2_smoothed(folder: Path, model: Model, weights: Weights) -> list[Check]:
    file = "train_label_smoothing_outputs"
    recorded = read_tensors(folder, file)
    if not recorded:
        return []
    smoothing = read_config(folder, "meta.json")["label_smoothing_case"]
    batch = _batch(read_tensors(folder, "train_inputs"))
    ours = _learn(model, _objective(label_smoothing=smoothing), batch)
    checks = forward_checks(file, ours, other(recorded, "grad."))
    return checks + _gradients(f"{file}/grad", model, below(recorded, "grad."), weights)


def _retrieval(folder: Path, model: Model, weights: Weights) -> list[Check]:
    """Fine-tuning for retrieval, with several captions of one image in the batch."""
    recorded = blocked(read_tensors(folder, "retrieval_outputs"))
    if not recorded:
        return []
    extra = read_tensors(folder, "retrieval_extra_inputs")
    batch = _batch(read_tensors(folder, "train_inputs")) | {"group": extra["image_ids"].flatten()}
    ours = _learn(model, Retrieval(RetrievalConfig(contrastive=_OFFICIAL)), batch)
    checks = _gradients("retrieval_outputs/grad", model, below(recorded, "grad."), weights)
    parts = {
        "clip_projector.out": model.clip_projector,
        "clip_projector2.out": model.clip_projector2,
        "itm_head.out": model.itm_head,
    }
    with torch.no_grad(), listen(**parts) as heard, listen_decoder(model.text) as stack:
        out = model.run("retrieval", batch)
        ours |= heard | _named(stack)
        ours |= _similarities(model, out["image"], out["text"], "sim_{}")
        ours |= _similarities(model, out["backbone"], out["text"], "backbone_{}")
    size = len(batch["pixels"])
    ours |= {
        "itm_logits": out["match"],
        "itm_labels": (torch.arange(2 * size) >= size).long(),
    }
    masks = [batch[f"{name}_mask"] for name in ("negative", "positive", "summary")]
    rows = dict.fromkeys(_wide(ours), _places(model, masks))
    return forward_checks("retrieval_outputs", ours, other(recorded, "grad."), rows) + checks


# --- two ranks --------------------------------------------------------------------------------


def _stage2_two_ranks(folder: Path) -> list[Check]:
    """The batch in two halves on two data-parallel ranks."""
    if not (folder / "train_world2_outputs.safetensors").is_file():
        return []
    return [check for checks in run_ranks(_half_a_batch, folder, ranks=2) for check in checks]


def _half_a_batch(folder: Path) -> list[Check]:
    """This rank's losses, scores and gradients; on rank 0 also the mean of the gradients."""
    file = "train_world2_outputs"
    with parallel(Layout(data=2)):
        rank = torch.distributed.get_rank()
        config, weights = _read(folder)
        model = _build("internvl_g", config, weights)
        inputs = read_tensors(folder, "train_inputs")
        size = len(inputs["pixel_values"]) // 2
        batch = _batch(inputs, slice(rank * size, (rank + 1) * size))
        objective = _objective()
        ours = _learn(model, objective, batch)
        with torch.no_grad():
            ours |= _stage2_scores(model, objective, batch)
        everything = read_tensors(folder, file)
        recorded = below(everything, f"rank{rank}.")
        prefix = f"{file}/rank{rank}"
        checks = forward_checks(prefix, ours, other(recorded, "grad."))
        own = below(recorded, "grad.")
        # Ranks divide the scale's gradient in another way here: each has the share of its images'
        # rows of the logits, officially of its images and its texts. Only the mean is ever used,
        # so it is their mean that is compared.
        own.pop("logit_scale", None)
        shares = [t for n, t in everything.items() if n.endswith(".grad.logit_scale")]
        checks += _gradients(f"{prefix}/grad", model, own, weights)
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        if rank:
            return checks
        mean = below(everything, "ddp_mean_grad.")
        checks += _gradients(f"{file}/ddp_mean_grad", model, mean, weights)
        if shares:
            mean = {"logit_scale": torch.stack(shares).mean(0)}
            checks += _gradients(f"{file}/mean_of_ranks/grad", model, mean, weights)
        return checks
