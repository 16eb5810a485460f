"""Bytes that autograd keeps between the forward and the backward pass of one micro-batch.

Counted from our own layers (`models.layers.layer`, `.attention`, `.norms`): every tensor that an
operator saves for its backward pass, each storage once, parameters left out. Attention is the fused
one, which keeps its output and no T x T scores. Tests hold the sums against what PyTorch saves
(`torch.autograd.graph.saved_tensors_hooks`). The scheme is Korthikanti et al. 2022, section 4: what
is inside attention and MLP is cut over the tensor ranks; what is between them is cut only under
sequence parallelism.

Letters: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlfoundry.models.estimate.weights import padded
from vlfoundry.models.estimate.workload import LayerState, Pass, Workload, layer_states
from vlfoundry.models.layers.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How many bytes a kept tensor takes on one rank."""

    element: int = 4
    """bytes of a number: 4 (fp32) or 2 (bf16)"""
    tensor: int = 1
    """tensor ranks"""
    sequence_parallel: bool = False

    def between(self, elements: float) -> float:
        """Of tensors between attention and MLP."""
        return elements * self.element / (self.tensor if self.sequence_parallel else 1)

    def inside(self, elements: float) -> float:
        """Of tensors inside attention and MLP."""
        return elements * self.element / self.tensor

    def rms(self, trained: bool) -> int:
        """Tensors that an RMSNorm keeps: its input; in bf16 that in fp32, and, for the gradient of
        its weight, the unit vectors."""
        return 1 if self.element == 4 else 2 + trained

    def cut_rms(self, trained: bool) -> int:
        """The same of a norm whose vectors are cut over the tensor ranks, as queries' and keys'."""
        return 1 + (self.tensor > 1 and trained) if self.element == 4 else 2 + trained


def pass_bytes(work: Workload, step: Pass, samples: int, kept: Kept) -> list[float]:
    """Bytes of each layer of one pass."""
    return [
        _layer(work, step, state, layer, samples, kept)
        for layer, state in enumerate(layer_states(work, step))
    ]


def input_bytes(step: Pass, work: Workload, samples: int, kept: Kept) -> float:
    """What full recomputation keeps of a layer: its input."""
    return kept.between(samples * step.rows * step.tokens * _width(work, step))


def _width(work: Workload, step: Pass) -> int:
    config = work.config
    parts = {"vision": config.vision, "text": config.text, "language": config.chat}
    return parts[step.stack].width


def _layer(
    work: Workload, step: Pass, state: LayerState, layer: int, samples: int, kept: Kept
) -> float:
    if not state.graph:
        return 0.0
    tokens = samples * step.rows * step.tokens
    adapters = _adapters(work, step, tokens, kept) if state.lora else 0.0
    if step.stack == "vision":
        return _vision_layer(work, tokens, state.trained, kept) + adapters
    found = _decoder_layer(work, step, tokens, state.trained, kept) + adapters
    if step.context_tokens and layer % work.config.queries.cross_attention_frequency == 0:
        found += _cross_attention(work, step, samples, state.cross_trained, kept)
    return found


def _vision_layer(work: Workload, tokens: float, trained: bool, kept: Kept) -> float:
    config = work.config.vision
    stream = tokens * config.width
    heads = tokens * padded(config.heads, kept.tensor) * config.head_size
    hidden = tokens * config.mlp_hidden
    norm = kept.rms(trained) if config.norm == "rms" else 1
    # Both norms; if trained also both linears' inputs and both branches before LayerScale.
    between = 2 * norm + 4 * trained
    # q, k, v are one tensor; the core's output; normalised q and k beside their norms' own.
    inside = 3 + 1 + (2 * (1 + kept.cut_rms(trained)) if config.qk_norm else 0)
    mlp = 1 + trained  # before and behind the GELU
    return kept.between(between * stream) + kept.inside(inside * heads + mlp * hidden)


def _decoder_layer(work: Workload, step: Pass, tokens: float, trained: bool, kept: Kept) -> float:
    config = work.config.text if step.stack == "text" else work.config.chat
    stream, hidden = tokens * config.width, tokens * config.mlp_hidden
    heads = tokens * config.heads_width
    between = 2 * kept.rms(trained) + 2 * trained
    # Rotated q and k and the core's output; v is a view of q, k, v in one, or, where groups share
    # keys and values, both are repeated.
    groups = config.key_value_heads or config.heads
    inside: float = 4 if groups < config.heads else 6
    if config.qk_norm:
        inside += _head_norms(groups, config.heads, trained, kept)
    mlp = 4 + trained  # gate and up in one, up again, SiLU of the gate, their product
    return kept.between(between * stream) + kept.inside(inside * heads + mlp * hidden)


def _head_norms(groups: int, heads: int, trained: bool, kept: Kept) -> float:
    """What norms of q and k keep, in the elements of q: in fp32 their inputs."""
    shared = groups / heads
    if kept.element != 4:
        return kept.rms(trained) * (1 + shared)
    if groups == heads:
        return 0.0  # views of q, k and v in one, which v keeps anyway
    copied = groups > 1  # the queries of several groups are put together
    return copied + 1 + 2 * shared


def _adapters(work: Workload, step: Pass, tokens: float, kept: Kept) -> float:
    """What LoRA keeps: its linears' inputs, with dropout those after it and its mask."""
    parts = {"vision": work.config.vision, "text": work.config.text, "language": work.config.chat}
    config, lora = parts[step.stack], parts[step.stack].lora
    assert lora is not None
    copies = 2 if lora.dropout else 1
    between = sum(name in ("qkv", "fc1") for name in lora.linears) * config.width
    heads = config.heads * config.head_size
    inside = ("proj" in lora.linears) * heads + ("fc2" in lora.linears) * config.mlp_hidden
    pairs = {"qkv": 3, "fc1": 2} if step.stack != "vision" else {}
    narrow = sum(pairs.get(name, 1) for name in lora.linears) * lora.rank
    return (
        copies * tokens * (kept.between(between) + kept.inside(inside))
        + kept.element * tokens * narrow
    )


def _cross_attention(work: Workload, step: Pass, samples: int, trained: bool, kept: Kept) -> float:
    width, vision = work.config.text.width, work.config.vision.width
    rows = samples * step.rows
    stream = rows * step.tokens * width
    queries = rows * work.config.queries.num_queries * width
    heads = work.config.text.heads_width
    asked = rows * work.config.queries.num_queries * heads
    seen = samples * step.context_rows * step.context_tokens * vision
    keys = rows * step.context_tokens * heads
    # In fp32 the norms keep their inputs: the whole stream, as the queries are a view of it, and
    # the vision tokens, which are all layers' (`behind_bytes`).
    norms = stream if kept.element == 4 else kept.rms(trained) * (queries + seen)
    between = norms + trained * (queries + 2 * seen)  # vision tokens once for each linear
    # Under sequence parallelism the tokens are put together around it.
    return kept.element * between + kept.inside(2 * asked + 2 * keys)


def around_bytes(work: Workload, samples: int, kept: Kept) -> float:
    """What is kept outside of the layers: final norms, masks, pooling heads, connectors, logits."""
    config, element = work.config, kept.element
    found = sum(behind_bytes(work, step, samples, kept) for step in work.passes if step.gradient)
    if work.trains("vision.patch_embedding") and work.images:
        patches = samples * work.images * (work.vision_tokens - 1)
        found += element * patches * 3 * config.vision.patch_px**2
    if work.objective in ("contrastive", "retrieval"):
        found += element * samples * _pool(config.vision.width, work.vision_tokens, work)
    if work.objective in ("generative", "retrieval"):
        found += element * samples * _pool(config.text.width, config.queries.num_queries, work)
    if "connector" in work.parts and work.images:
        found += element * samples * work.images * _connectors(work)
    return found + logits_bytes(work, samples, kept)


def logits_bytes(work: Workload, samples: int, kept: Kept) -> float:
    """Logarithms of the probabilities of the vocabulary in fp32, which no tensor rank has less
    of."""
    config = config_of_logits(work)
    return 4 * samples * work.logits_tokens * config.vocab_size


def config_of_logits(work: Workload) -> DecoderConfig:
    """Of the stack with the head."""
    return work.config.chat if work.objective == "chat" else work.config.text


def behind_bytes(work: Workload, step: Pass, samples: int, kept: Kept) -> float:
    """A pass's final norm, its mask, and the vision tokens that it looks at."""
    rows = samples * step.rows
    found = 0.0
    if step.stack != "vision":
        trained = work.trains(f"{step.stack}.decoder.final_layernorm")
        found += kept.rms(trained) * kept.between(rows * step.tokens * _width(work, step))
    if step.masked:
        found += kept.element * rows * step.tokens**2
    if step.context_tokens and kept.element == 4:
        seen = samples * step.context_rows * step.context_tokens
        found += kept.element * seen * work.config.vision.width
    return found


def _pool(width: int, tokens: int, work: Workload) -> float:
    """Elements of an attention pooling: tokens and their unit vectors, and a few vectors a head."""
    return 2 * tokens * width + 4 * work.config.pool_heads * width


def _connectors(work: Workload) -> float:
    """Elements an image: what goes in, its norm, and both sides of the GELU."""
    config, width = work.config, work.config.chat.width
    if not (work.trains("connector.") or work.trains("vision.")):
        return 0.0
    patches = config.vision.patches
    normed = config.connector.kind == "pixel_shuffle"
    tokens = patches // config.connector.merge**2
    found = patches * config.vision.width * (1 + normed) + 2 * tokens * width
    if "queries" in work.parts:
        found += config.queries.num_queries * (config.text.width + 2 * width)
    return found
