"""Which layers of which tower each pipeline stage holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.layout import Layout, ModelFacts
from vlfoundry.infra.core.errors import LayoutError
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.widths import check_widths

StageLayers = dict[str, range]
"""tower -> its layers that are here; a tower that is not named has none here"""

# What a batch goes through one after another. The towers of InternVL-C meet in the loss alone, so
# each of them is cut over all stages.
_SERIES = {
    "internvl_g": ("vision", "text"),
    "chat_simple": ("vision", "language"),
    "chat_full": ("vision", "text", "language"),
}


@lru_cache(maxsize=64)
def split_layers(kind: str, config: InternVLConfig, stages: int) -> list[StageLayers]:
    """What each of `stages` holds, in order; consecutive layers, of about equal cost.

    Raises:
        LayoutError: there are more stages than layers.
    """
    depths = config.depths(kind)
    if stages > 1 and any(
        decoder.tied_head
        for tower, decoder in (("text", config.text), ("language", config.chat))
        if tower in depths
    ):
        raise LayoutError(
            f"{kind}: the embeddings are also the head, so the first and the last of {stages} "
            "pipeline stages would need them; use pipeline 1, or a decoder with tied_head false"
        )
    series = _SERIES.get(kind)
    chains = [series] if series else [(tower,) for tower in depths]
    shares: list[StageLayers] = [{} for _ in range(stages)]
    for chain in chains:
        layers = [(tower, index) for tower in chain for index in range(depths[tower])]
        if len(layers) < stages:
            raise LayoutError(
                f"{kind}: {' and '.join(chain)}: {len(layers)} layers for {stages} pipeline "
                "stages (pipeline x virtual_pipeline); choose at most as many stages as layers"
            )
        costs = [_layer_cost(config, tower) for tower, _ in layers]
        start = 0
        for share, size in zip(shares, _even(costs, stages), strict=True):
            for tower, group in itertools.groupby(
                layers[start : start + size], lambda layer: layer[0]
            ):
                held = [index for _, index in group]
                share[tower] = range(held[0], held[-1] + 1)
            start += size
    return shares


def has_independent_towers(kind: str) -> bool:
    """Whether a configuration has two towers that meet in the loss alone, so that each may have a
    layout of its own."""
    return kind not in _SERIES and {"vision", "text"} <= set(PARTS[kind])


def check_layout(
    kind: str, config: InternVLConfig, layout: Layout, *, fp8: Fp8Config | None = None
) -> Layout:
    """Refuse, before any process starts, a layout that a configuration's sizes do not allow.

    Args:
        kind, config: the configuration.
        layout: how it is to be cut.
        fp8: what the run computes in FP8.

    Returns:
        The layout without what does not concern this configuration.

    Raises:
        LayoutError: with the arithmetic.
        ConfigError: FP8 cannot multiply these sizes, or they do not go together.
    """
    config.check(kind)
    if not has_independent_towers(kind):
        layout = dataclasses.replace(layout, text_tensor=None)
    vision = ModelFacts(
        name="vision",
        heads=config.vision.heads,
        width=config.vision.width,
        mlp_hidden=config.vision.mlp_hidden,
        pads_heads=True,
    )
    decoders = {
        name: ModelFacts(
            name=name,
            heads=decoder.heads,
            width=decoder.width,
            mlp_hidden=decoder.mlp_hidden,
            key_value_heads=decoder.key_value_heads,
        )
        for name, decoder in (("text", config.text), ("language", config.chat))
    }
    facts = {"vision": vision, **decoders}
    apart = [facts.pop("text")] if layout.text_stands_apart else []
    layout.check(*(facts[tower] for tower in facts if tower in PARTS[kind]))
    for tower in apart:
        layout.of_text.check(tower)
    split_layers(kind, config, layout.stages)
    if fp8:
        check_widths(kind, config, layout, fp8)
    return layout


def _layer_cost(config: InternVLConfig, tower: str) -> float:
    """Parameters of a layer times tokens of one sample: FLOPs but for a constant."""
    if tower == "vision":
        vision = config.vision
        return (4 * vision.width + 2 * vision.mlp_hidden) * vision.width * (1 + vision.patches)
    decoder = config.text if tower == "text" else config.chat
    return (4 * decoder.width + 3 * decoder.mlp_hidden) * decoder.width * decoder.max_tokens


def _even(costs: Sequence[float], parts: int) -> list[int]:
    """Sizes of `parts` consecutive groups, none empty, of which the dearest is cheapest.

    Among equals the earlier groups are the smaller ones: they also hold the embeddings.
    """
    totals = [0.0, *itertools.accumulate(costs)]
    count = len(costs)
    # best[k][i]: the dearest of k groups over the first i layers, and where the last one begins.
    best = [{0: (0.0, 0)}]
    for group in range(1, parts + 1):
        row = {}
        for end in range(group, count - (parts - group) + 1):
            row[end] = (math.inf, 0)
            for start in reversed([start for start in best[-1] if start < end]):
                last = totals[end] - totals[start]
                if last > row[end][0]:
                    break  # from here on the last group only becomes dearer
                row[end] = min(row[end], (max(best[-1][start][0], last), start))
        best.append(row)
    sizes, end = [], count
    for row in reversed(best[1:]):
        start = row[end][1]
        sizes.append(end - start)
        end = start
    return sizes[::-1]
