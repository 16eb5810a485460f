"""Every parameter of a configuration, by its canonical name, as one tensor rank holds it.

Letters: D width, F hidden size of the MLP, H head size, V vocabulary, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from infra.errors import ConfigError
from models.common.config import DecoderConfig
from models.connector.config import ConnectorConfig
from models.internvit.config import InternViTConfig
from models.internvl.config import PARTS, InternVLConfig
from models.internvl.cut import Share


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    """canonical name"""
    shape: tuple[int, ...]
    """of one tensor rank's part"""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def weights(kind: str, config: InternVLConfig, tensor: int = 1) -> list[Weight]:
    """All parameters of a rank of `tensor` tensor ranks, padding of heads and vocabulary included.

    Args:
        kind: one of `models.internvl.config.PARTS`.
    """
    parts = PARTS[kind]
    if any(part.lora for part in (config.vision, config.text, config.chat)):
        raise ConfigError("a plan does not count LoRA adapters; plan without them: they are small")
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
        found += _connector("connector", config.connector, config.vision.width, config.chat.width)
        if "queries" in parts:
            plain = ConnectorConfig(kind="mlp2x")
            found += _connector("query_connector", plain, config.text.width, config.chat.width)
    return found


def is_held(name: str, share: Share, config: InternVLConfig) -> bool:
    """Whether a pipeline stage with a share of the layers holds a parameter."""
    tower, _, rest = name.partition(".")
    if rest.startswith("decoder.layers."):
        return int(rest.split(".")[2]) in share.get(tower, ())
    if tower not in ("vision", "text", "language"):
        tower = "vision" if tower in ("clip_projector", "connector") else "text"
        at_end = True
    else:
        at_end = rest.startswith(("decoder.final_layernorm", "head"))
    depth = {"vision": config.vision, "text": config.text, "language": config.chat}[tower].depth
    return (depth - 1 if at_end else 0) in share.get(tower, ())


def padded(amount: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `amount`."""
    return -(-amount // parts) * parts


def _vision(config: InternViTConfig, tensor: int) -> Iterator[Weight]:
    width = config.width
    yield Weight("vision.class_embedding", (width,))
    yield Weight("vision.position_embedding", (1 + config.patches, width))
    yield from _linear("vision.patch_embedding", width, 3 * config.patch_px**2)
    inner = padded(config.heads, tensor) // tensor * config.head_size
    hidden = config.mlp_hidden // tensor
    for layer in range(config.depth):
        name = f"vision.decoder.layers.{layer}"
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            yield Weight(f"{name}.{norm}.weight", (width,))
            if config.norm == "layer":
                yield Weight(f"{name}.{norm}.bias", (width,))
        attention, mlp = f"{name}.self_attention", f"{name}.mlp"
        yield from _linear(f"{attention}.linear_qkv", 3 * inner, width, config.qkv_bias)
        if config.qk_norm:
            yield Weight(f"{attention}.q_layernorm.weight", (inner,))
            yield Weight(f"{attention}.k_layernorm.weight", (inner,))
        yield from _linear(f"{attention}.linear_proj", width, inner)
        yield from _linear(f"{mlp}.linear_fc1", hidden, width)
        yield from _linear(f"{mlp}.linear_fc2", width, hidden)
        yield Weight(f"{name}.ls1", (width,))
        yield Weight(f"{name}.ls2", (width,))


def _decoder(part: str, config: DecoderConfig, tensor: int, *, head: bool) -> Iterator[Weight]:
    width = config.width
    vocabulary = padded(config.vocab_size, tensor) // tensor
    groups = config.key_value_heads or config.heads
    inner, hidden = width // tensor, config.mlp_hidden // tensor
    mixed = (config.heads + 2 * groups) * config.head_size // tensor
    yield Weight(f"{part}.embedding.weight", (vocabulary, width))
    for layer in range(config.depth):
        name = f"{part}.decoder.layers.{layer}"
        yield Weight(f"{name}.input_layernorm.weight", (width,))
        yield Weight(f"{name}.pre_mlp_layernorm.weight", (width,))
        attention, mlp = f"{name}.self_attention", f"{name}.mlp"
        yield from _linear(f"{attention}.linear_qkv", mixed, width, config.qkv_bias)
        yield from _linear(f"{attention}.linear_proj", width, inner, bias=False)
        yield from _linear(f"{mlp}.linear_fc1", 2 * hidden, width, bias=False)
        yield from _linear(f"{mlp}.linear_fc2", width, hidden, bias=False)
    yield Weight(f"{part}.decoder.final_layernorm.weight", (width,))
    if head and not config.tied_head:
        yield Weight(f"{part}.head.weight", (vocabulary, width))


def _queries(config: InternVLConfig, tensor: int) -> Iterator[Weight]:
    width, vision = config.text.width, config.vision.width
    inner = width // tensor
    yield Weight("text.query_tokens", (config.queries.num_queries, width))
    for layer in range(0, config.text.depth, config.queries.cross_attention_frequency):
        name = f"text.decoder.layers.{layer}.cross_attention"
        yield Weight(f"{name}.query_norm.weight", (width,))
        yield Weight(f"{name}.vision_norm.weight", (vision,))
        yield from _linear(f"{name}.linear_q", inner, width, bias=False)
        yield from _linear(f"{name}.linear_k", inner, vision, bias=False)
        yield from _linear(f"{name}.linear_v", inner, vision, bias=False)
        yield from _linear(f"{name}.linear_proj", width, inner, bias=False)


def _contrast(config: InternVLConfig, *, with_queries: bool) -> Iterator[Weight]:
    text = config.text.width
    yield from _pool("clip_projector", config.vision.width, config)
    yield Weight("text_projection", (text, config.embed_dim))
    yield Weight("logit_scale", ())
    if with_queries:
        yield from _pool("clip_projector2", text, config)
        yield from _linear("itm_head", 2, text)


def _pool(name: str, width: int, config: InternVLConfig) -> Iterator[Weight]:
    for part in ("q", "k", "v"):
        yield Weight(f"{name}.norm_{part}.weight", (width,))
        yield Weight(f"{name}.norm_{part}.bias", (width,))
        yield from _linear(f"{name}.linear_{part}", width, width)
    yield from _linear(f"{name}.linear_proj", config.embed_dim, width)


def _connector(name: str, config: ConnectorConfig, vision: int, width: int) -> Iterator[Weight]:
    inner = vision * config.merge**2
    if config.kind == "pixel_shuffle":
        yield Weight(f"{name}.norm.weight", (inner,))
        yield Weight(f"{name}.norm.bias", (inner,))
    yield from _linear(f"{name}.linear1", width, inner)
    yield from _linear(f"{name}.linear2", width, width)


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (rows, columns))
    if bias:
        yield Weight(f"{name}.bias", (rows,))
