"""Every parameter of a configuration, by its canonical name, as one tensor rank holds it.

Letters: D width, F hidden size of the MLP, H head size, V vocabulary, E embedding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.layers.config import DecoderConfig, LoraConfig

LayerRef = tuple[str, int]
"""tower and layer"""


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    """canonical name"""
    shape: tuple[int, ...]
    """of one tensor rank's part"""
    tower: str
    """whose pipeline stages hold it"""
    layer: int
    """of that tower; what stands before or behind a tower is with its first or last layer"""

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.shape)


def weights(kind: str, config: InternVLConfig, tensor: int = 1) -> list[Weight]:
    """All parameters of a rank of `tensor` tensor ranks, padding of heads and vocabulary included.

    Args:
        kind: one of `models.internvl.config.PARTS`.
    """
    parts = PARTS[kind]
    found: list[Weight] = []
    if "vision" in parts:
        found += _vision(config.vision, tensor)
    if "text" in parts:
        head = "text_head" in parts
        found += _decoder("text", config.text, tensor, head=head)
    if "queries" in parts:
        found += _queries(config, tensor)
    if "language" in parts:
        found += _decoder("language", config.chat, tensor, head=True)
    if "contrast" in parts:
        found += _contrast(config, with_queries="queries" in parts)
    if "connector" in parts:
        sizes = (config.connector, config.vision.width, config.chat.width)
        found += _connector("connector", *sizes, ("vision", config.vision.depth - 1))
        if "queries" in parts:
            plain = ConnectorConfig(kind="mlp2x")
            sizes = (plain, config.text.width, config.chat.width)
            found += _connector("query_connector", *sizes, ("text", config.text.depth - 1))
    return found


def padded(amount: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `amount`."""
    return -(-amount // parts) * parts


def _vision(config: InternViTConfig, tensor: int) -> Iterator[Weight]:
    width, depth = config.width, config.depth
    first = ("vision", 0)
    yield Weight("vision.class_embedding", (width,), *first)
    yield Weight("vision.position_embedding", (1 + config.patches, width), *first)
    yield from _linear("vision.patch_embedding", width, 3 * config.patch_px**2, first)
    inner = padded(config.heads, tensor) // tensor * config.head_size
    hidden = config.mlp_hidden // tensor
    for layer in range(depth):
        name, place = f"vision.decoder.layers.{layer}", ("vision", layer)
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            yield Weight(f"{name}.{norm}.weight", (width,), *place)
            if config.norm == "layer":
                yield Weight(f"{name}.{norm}.bias", (width,), *place)
        attention, mlp = f"{name}.self_attention", f"{name}.mlp"
        adapt: dict[str, Any] = {"place": place, "lora": config.lora}
        yield from _linear(
            f"{attention}.linear_qkv", 3 * inner, width, bias=config.qkv_bias, **adapt
        )
        if config.qk_norm:
            yield Weight(f"{attention}.q_layernorm.weight", (inner,), *place)
            yield Weight(f"{attention}.k_layernorm.weight", (inner,), *place)
        yield from _linear(f"{attention}.linear_proj", width, inner, **adapt)
        yield from _linear(f"{mlp}.linear_fc1", hidden, width, **adapt)
        yield from _linear(f"{mlp}.linear_fc2", width, hidden, **adapt)
        yield Weight(f"{name}.ls1", (width,), *place)
        yield Weight(f"{name}.ls2", (width,), *place)


def _decoder(part: str, config: DecoderConfig, tensor: int, *, head: bool) -> Iterator[Weight]:
    width, depth = config.width, config.depth
    vocabulary = padded(config.vocab_size, tensor) // tensor
    groups = config.key_value_heads or config.heads
    inner, hidden = config.heads_width // tensor, config.mlp_hidden // tensor
    mixed = (config.heads + 2 * groups) * config.head_size // tensor
    yield Weight(f"{part}.embedding.weight", (vocabulary, width), part, 0)
    for layer in range(depth):
        name, place = f"{part}.decoder.layers.{layer}", (part, layer)
        yield Weight(f"{name}.input_layernorm.weight", (width,), *place)
        yield Weight(f"{name}.pre_mlp_layernorm.weight", (width,), *place)
        attention, mlp = f"{name}.self_attention", f"{name}.mlp"
        adapt: dict[str, Any] = {"place": place, "lora": config.lora}
        yield from _linear(
            f"{attention}.linear_qkv", mixed, width, bias=config.qkv_bias, pairs=3, **adapt
        )
        for norm in ("q", "k") if config.qk_norm else ():
            yield Weight(f"{attention}.{norm}_layernorm.weight", (config.head_size,), *place)
        linears = (
            (f"{attention}.linear_proj", width, inner, 1),
            (f"{mlp}.linear_fc1", 2 * hidden, width, 2),
            (f"{mlp}.linear_fc2", width, hidden, 1),
        )
        for linear, rows, columns, pairs in linears:
            yield from _linear(linear, rows, columns, bias=False, pairs=pairs, **adapt)
    yield Weight(f"{part}.decoder.final_layernorm.weight", (width,), part, depth - 1)
    if head and not config.tied_head:
        yield Weight(f"{part}.head.weight", (vocabulary, width), part, depth - 1)


def _queries(config: InternVLConfig, tensor: int) -> Iterator[Weight]:
    width, vision = config.text.width, config.vision.width
    inner = config.text.heads_width // tensor
    yield Weight("text.query_tokens", (config.queries.num_queries, width), "text", 0)
    for layer in range(0, config.text.depth, config.queries.cross_attention_frequency):
        name = f"text.decoder.layers.{layer}.cross_attention"
        place = ("text", layer)
        yield Weight(f"{name}.query_norm.weight", (width,), *place)
        yield Weight(f"{name}.vision_norm.weight", (vision,), *place)
        yield from _linear(f"{name}.linear_q", inner, width, place, bias=False)
        yield from _linear(f"{name}.linear_k", inner, vision, place, bias=False)
        yield from _linear(f"{name}.linear_v", inner, vision, place, bias=False)
        yield from _linear(f"{name}.linear_proj", width, inner, place, bias=False)


def _contrast(config: InternVLConfig, *, with_queries: bool) -> Iterator[Weight]:
    text, read = config.text.width, ("text", config.text.depth - 1)
    seen = ("vision", config.vision.depth - 1)
    yield from _pool("clip_projector", config.vision.width, config, seen)
    yield Weight("text_projection", (text, config.embed_dim), *read)
    yield Weight("logit_scale", (), *read)
    if config.logit_bias is not None:
        yield Weight("logit_bias", (), *read)
    if with_queries:
        yield from _pool("clip_projector2", text, config, read)
        yield from _linear("itm_head", 2, text, read)


def _pool(name: str, width: int, config: InternVLConfig, place: LayerRef) -> Iterator[Weight]:
    for part in ("q", "k", "v"):
        yield Weight(f"{name}.norm_{part}.weight", (width,), *place)
        yield Weight(f"{name}.norm_{part}.bias", (width,), *place)
        yield from _linear(f"{name}.linear_{part}", width, width, place)
    yield from _linear(f"{name}.linear_proj", config.embed_dim, width, place)


def _connector(
    name: str, config: ConnectorConfig, vision: int, width: int, place: LayerRef
) -> Iterator[Weight]:
    inner = vision * config.merge**2
    if config.kind == "pixel_shuffle":
        yield Weight(f"{name}.norm.weight", (inner,), *place)
        yield Weight(f"{name}.norm.bias", (inner,), *place)
    yield from _linear(f"{name}.linear1", width, inner, place)
    yield from _linear(f"{name}.linear2", width, width, place)


def _linear(
    name: str,
    rows: int,
    columns: int,
    place: LayerRef,
    bias: bool = True,
    lora: LoraConfig | None = None,
    pairs: int = 1,
) -> Iterator[Weight]:
    """A linear and, if `lora` names it, its adapters: `pairs` of them."""
    yield Weight(f"{name}.weight", (rows, columns), *place)
    if bias:
        yield Weight(f"{name}.bias", (rows,), *place)
    if lora and name.rsplit("linear_")[-1] in lora.linears:
        yield Weight(f"{name}.lora.a", (pairs * lora.rank, columns), *place)
        yield Weight(f"{name}.lora.b", (rows, lora.rank), *place)
