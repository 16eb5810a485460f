"""Which widths FP8 can multiply; what it cannot is refused before any process starts."""

from __future__ import annotations

from collections.abc import Iterator

from vlfoundry.infra.backend.fp8_config import FEATURES, Fp8Config
from vlfoundry.infra.backend.layout import Layout
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.layers.config import DecoderConfig

Width = tuple[str, int, int]
"""what it is, how many features, and over how many ranks they are cut"""


def check_widths(kind: str, config: InternVLConfig, layout: Layout, fp8: Fp8Config) -> None:
    """Hold the features of all matrix products in FP8 against what FP8 multiplies.

    Raises:
        ConfigError: a width that does not fit, with the next that does; no layer would compute in
            FP8; or what a GPU would refuse later.
    """
    if fp8.recipe == "delayed" and (fp8.first_layers or fp8.last_layers):
        raise ConfigError(
            f"train.fp8.recipe is delayed with first_layers {fp8.first_layers} and last_layers "
            f"{fp8.last_layers}: Transformer Engine's scales follow at the end of a whole stack; "
            "set both to 0, or use the recipe tensorwise"
        )
    depths = config.depths(kind)
    covered = {
        tower: layers
        for tower, depth in depths.items()
        if (layers := [index for index in range(depth) if fp8.covers(index, depth)])
    }
    if not covered:
        raise ConfigError(
            f"train.fp8: no layer of {kind} would compute in FP8: its towers have {depths} layers, "
            f"of which the first {fp8.first_layers} and the last {fp8.last_layers} stay in higher "
            "precision; lower train.fp8.first_layers and last_layers, or leave train.fp8 out"
        )
    for tower, layers in covered.items():
        apart = tower == "text" and layout.text_stands_apart
        ranks = layout.of_text.tensor if apart else layout.tensor
        for name, size, parts in _widths(tower, kind, config, ranks, layers):
            unit = FEATURES * parts
            if size % unit:
                raise ConfigError(
                    f"train.fp8: {tower}: {name} {size} on {parts} ranks is {size / parts:g} a "
                    f"rank; FP8 multiplies multiples of {FEATURES}, so the next that fits is "
                    f"{-(-size // unit) * unit}"
                )


def _widths(
    tower: str, kind: str, config: InternVLConfig, ranks: int, layers: list[int]
) -> Iterator[Width]:
    if tower == "vision":
        vision = config.vision
        heads = -(-vision.heads // ranks) * ranks  # padded with zero heads
        yield from _of_layer(vision.width, heads, heads, vision.head_size, vision.mlp_hidden, ranks)
        return
    decoder: DecoderConfig = config.text if tower == "text" else config.chat
    groups = decoder.key_value_heads or decoder.heads
    yield from _of_layer(
        decoder.width, decoder.heads, groups, decoder.head_size, decoder.mlp_hidden, ranks
    )
    frequency = config.queries.cross_attention_frequency
    if tower == "text" and "queries" in PARTS[kind] and any(i % frequency == 0 for i in layers):
        yield "width of the vision tokens, which its cross-attention reads,", config.vision.width, 1


def _of_layer(
    width: int, heads: int, groups: int, head_size: int, mlp_hidden: int, ranks: int
) -> Iterator[Width]:
    yield "width", width, 1
    yield "heads x head size", heads * head_size, ranks
    yield "(heads + 2 x key_value_heads) x head size", (heads + 2 * groups) * head_size, ranks
    yield "mlp_hidden", mlp_hidden, ranks
