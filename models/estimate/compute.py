"""FLOPs of one sample: matrix products alone, a multiply-accumulate as two.

Counted as PyTorch's counter counts (a test holds them together): a linear costs
2 x tokens x weights, attention 4 x T^2 x D whether causal or not; backwards the gradient of a
linear's input and that of its weight cost as much as the forward pass, each where it is needed.
What is frozen gets no gradient of weights, and what lies before everything trained none at all.

Letters: T tokens, D width, F hidden size of the MLP, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vlfoundry.models.estimate.weights import padded
from vlfoundry.models.estimate.workload import LayerState, Pass, Workload, layer_states


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def sample_flops(work: Workload, tensor: int = 1) -> Flops:
    """FLOPs of one sample over all tensor ranks together, heads padded for `tensor` of them."""
    flops = _around(work)
    for step in work.passes:
        flops += pass_flops(work, step, tensor)
    return flops


def pass_flops(work: Workload, step: Pass, tensor: int = 1) -> Flops:
    """FLOPs of one pass through all layers that are run."""
    linear, attention = _self_costs(work, step, tensor)
    unused = Flops(step.unused_layers * (linear + attention))
    return sum(layer_flops(work, step, tensor), start=unused)


@lru_cache(maxsize=256)
def layer_flops(work: Workload, step: Pass, tensor: int = 1) -> list[Flops]:
    """FLOPs of each layer of a pass."""
    linear, attention = _self_costs(work, step, tensor)
    layers = []
    for layer, state in enumerate(layer_states(work, step)):
        flops = _linear(linear, state.trained, state.graph)
        flops += Flops(attention, 2 * attention if state.graph else 0)
        if state.first and state.graph:
            flops += Flops(0, -_qkv_cost(work, step, tensor, state.lora))
        if work.lora(step.stack):
            adapters = 2 * step.tokens * step.rows * work.lora_elements[step.stack]
            flops += _linear(adapters, state.lora, state.graph)
        if step.context_tokens and layer % work.config.queries.cross_attention_frequency == 0:
            flops += _cross(work, step, state)
        layers.append(flops)
    return layers


def patch_flops(work: Workload) -> float:
    """Forward FLOPs of a sample's patch embedding."""
    vision = work.config.vision
    return 2 * work.images * (work.vision_tokens - 1) * 3 * vision.patch_px**2 * vision.width


def _linear(forward: float, trained: bool, graph: bool) -> Flops:
    return Flops(forward, forward * (trained + graph))


def _self_costs(work: Workload, step: Pass, tensor: int) -> tuple[float, float]:
    """Forward FLOPs of a layer's linears and of its core attention."""
    tokens = step.tokens * step.rows
    if step.stack == "vision":
        vision = work.config.vision
        inner = padded(vision.heads, tensor) * vision.head_size
        weights = vision.width * (4 * inner + 2 * vision.mlp_hidden)
    else:
        config = work.config.text if step.stack == "text" else work.config.chat
        inner = config.heads_width
        groups = config.key_value_heads or config.heads
        mixed = inner + 2 * groups * config.head_size
        weights = config.width * (mixed + inner + 3 * config.mlp_hidden)
    return 2 * tokens * weights, 4 * tokens * step.tokens * inner


def _qkv_cost(work: Workload, step: Pass, tensor: int, lora: bool) -> float:
    """Forward FLOPs of what a layer's input goes into first: q, k, v and their adapters' A."""
    name = f"{step.stack}.decoder.layers.0.self_attention.linear_qkv."
    wanted = {f"{name}weight", f"{name}lora.a"} if lora else {f"{name}weight"}
    found = [w.elements for w in work.weights(tensor) if w.name in wanted]
    return 2 * step.tokens * step.rows * tensor * sum(found)


def _cross(work: Workload, step: Pass, state: LayerState) -> Flops:
    """One layer's cross-attention."""
    width, vision = work.config.text.width, work.config.vision.width
    heads = work.config.text.heads_width
    queries = work.config.queries.num_queries * step.rows
    flops = _linear(2 * queries * 2 * width * heads, state.cross_trained, state.graph)
    keys = 2 * step.context_tokens * step.context_rows * 2 * vision * heads
    flops += _linear(keys, state.cross_trained, state.cross_trained or work.trains("vision."))
    attention = 4 * queries * step.context_tokens * heads
    return flops + Flops(attention, 2 * attention if state.graph else 0)


def _around(work: Workload) -> Flops:
    """Patch embedding, heads, connectors and the contrastive loss."""
    config = work.config
    flops = Flops()
    if "vision" in work.parts and work.images:
        cost = patch_flops(work)
        times = 1.5 if work.hard_negatives else 1.0
        flops += Flops(cost * times, cost if work.trains("vision.patch_embedding") else 0)
    if work.objective == "contrastive":
        flops += _pool(work, "clip_projector", config.vision.width, work.vision_tokens)
        flops += _projected_texts(work, work.captions)
    elif work.objective in ("generative", "retrieval"):
        flops += _pool(work, "clip_projector2", config.text.width, config.queries.num_queries)
        flops += _projected_texts(work, 1)
        if work.objective == "retrieval":
            flops += _pool(work, "clip_projector", config.vision.width, work.vision_tokens)
    if "connector" in work.parts and work.images:
        flops += _connectors(work)
    return flops + _logits(work)


def _pool(work: Workload, name: str, width: int, tokens: int) -> Flops:
    """Attention pooling as `models.layers.pooling` does it: keys and values are never made."""
    config = work.config
    weights = 3 * width**2 + width * config.embed_dim
    attention = 4 * config.pool_heads * width * tokens
    trained, graph = work.trains(f"{name}."), True
    return _linear(2 * weights, trained, graph) + Flops(attention, 2 * attention)


def _projected_texts(work: Workload, texts: int) -> Flops:
    cost = 2 * texts * work.config.text.width * work.config.embed_dim
    graph = work.trains("text.")
    # Similarities with the whole batch, made again in the backward pass (models.objectives.tiled).
    loss = 2 * texts * work.batch_samples * work.config.embed_dim
    return _linear(cost, work.trains("text_projection"), graph) + Flops(loss, 3 * loss)


def _connectors(work: Workload) -> Flops:
    config, width = work.config, work.config.chat.width
    inner = config.vision.width * config.connector.merge**2
    tokens = config.vision.patches // config.connector.merge**2 * work.images
    before = work.trains("vision.")
    flops = _connector(work, "connector.", tokens, inner, width, before)
    if "queries" in work.parts:
        before = work.trains("vision.") or work.trains("text.")
        tokens = config.queries.num_queries * work.images
        flops += _connector(work, "query_connector.", tokens, config.text.width, width, before)
    return flops


def _connector(
    work: Workload, name: str, tokens: float, inner: int, width: int, before: bool
) -> Flops:
    trained = work.trains(name)
    normed = work.config.connector.kind == "pixel_shuffle" and name == "connector."
    first = _linear(2 * tokens * inner * width, trained, before or (trained and normed))
    return first + _linear(2 * tokens * width**2, trained, before or trained)


def _logits(work: Workload) -> Flops:
    part = "language" if work.objective == "chat" else "text"
    config = work.config.chat if part == "language" else work.config.text
    cost = 2 * work.logits_tokens * config.width * config.vocab_size
    return _linear(cost, work.trains(f"{part}.head"), True)
