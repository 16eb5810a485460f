"""Configs that more than one family needs (no PyTorch here: the command line reads them)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from vlfoundry.infra.core.config import SPARSE

MOST = 1 << 31
"""beyond any size of a model: a number that is larger is a slip of the pen or worse"""
MOST_LAYERS = 4096
"""as `MOST`, of layers, of which each has names and memory"""


def check_numbers(
    config: Any,
    *,
    sizes: tuple[str, ...] = (),
    above_zero: tuple[str, ...] = (),
    from_zero: tuple[str, ...] = (),
) -> None:
    """Raises ValueError unless fields are what they have to be; None passes.

    Args:
        config: a dataclass.
        sizes: fields that are whole numbers from 1.
        above_zero: fields that are finite and above 0.
        from_zero: fields that are finite and at least 0.
    """
    for name in sizes:
        value = getattr(config, name)
        most = MOST_LAYERS if name == "depth" else MOST
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} is {value}, expected a whole number from 1 to {most}")
    for name in above_zero:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}, expected a finite number above 0")
    for name in from_zero:
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, expected a finite number of at least 0")


LayerSpecKind = Literal["local", "te"]
"""what transformer layers are made of: PyTorch's operators, or Transformer Engine's"""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched, so that a model reads further than it was trained to."""

    kind: Literal["linear", "dynamic", "llama3"]
    """all frequencies divided by `factor`; a base that grows with the longest position of a batch
    beyond `max_tokens` (NTK); or only low frequencies divided, as in LLaMA 3.1"""
    factor: float
    """by how much"""
    low_freq_factor: float = 1.0
    """llama3: waves of which fewer than this fit the original context are divided by `factor`"""
    high_freq_factor: float = 4.0
    """llama3: waves of which more than this fit the original context stay as they are"""
    original_max_tokens: int = 8192
    """llama3: the context before stretching"""

    def __post_init__(self) -> None:
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor {self.factor} would shorten the context; expected at least 1")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                f"{self.high_freq_factor}"
            )


LINEARS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""what a `LoraConfig` names, in a layer"""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of a stack: W x + alpha / rank * B A dropout(x) (LoRA, arXiv 2106.09685).

    The defaults are those of InternVL's retrieval fine-tuning and of its chat models.
    """

    rank: int = 16
    """rows of A, columns of B"""
    alpha: float = 32.0
    """scale of what is added, times the rank; official code has twice the rank"""
    dropout: float = 0.05
    """probability that an element of x is dropped on its way to A in training"""
    linears: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj", "fc1", "fc2")
    """of attention and MLP; in a decoder q, k, v, gate and up have a pair each"""

    def __post_init__(self) -> None:
        check_numbers(self, sizes=("rank",), above_zero=("alpha",))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}; expected at least 0 and below 1")
        if not self.linears:
            raise ValueError("linears is empty; leave the lora out instead")

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.alpha / self.rank

    def holds(self, other: LoraConfig) -> bool:
        """Whether adapters of `other` mean the same here; dropout is not asked."""
        return dataclasses.replace(other, dropout=self.dropout) == self


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal transformer in LLaMA's shape: RMSNorm, SwiGLU, rotary positions, no biases.

    `models.families` says which options go together.
    """

    vocab_size: int = 4096
    """tokens, special ones included"""
    width: int = 128
    """channels of a token"""
    depth: int = 2
    """layers"""
    heads: int = 4
    """attention heads"""
    key_value_heads: int | None = None
    """heads of keys and values (grouped-query attention); None: as many as heads"""
    head_dim: int | None = field(default=None, metadata=SPARSE)
    """channels of a head, where that is not width / heads; None: it is"""
    mlp_hidden: int = 352
    """hidden size of the SwiGLU MLP"""
    max_tokens: int = 80
    """longest text, special tokens included"""
    eps: float = 1e-6
    """of all norms"""
    qkv_bias: bool = False
    """bias on the q, k, v projection, as in Qwen2 (nothing else has one)"""
    qk_norm: bool = field(default=False, metadata=SPARSE)
    """RMSNorm of each head's queries and keys before they are rotated, as in Qwen3"""
    rope_base: float = 10000.0
    """of the rotary position embedding"""
    rope_scaling: RopeScaling | None = None
    """how rotary positions are stretched; None: not at all"""
    tied_head: bool = False
    """one matrix for token embeddings and head, as in Qwen2-0.5B"""
    names: str = "llama"
    """how official chat checkpoints name and cut the weights ("llama" or "internlm2"); what is
    computed is the same"""
    init_std: float | None = None
    """of the initial matrices (truncated normal); None: 1 / sqrt(width)"""
    embedding_init_std: float = 1.0
    """of the initial token embeddings; at 0.02 a small text tower hardly starts to learn"""
    lora: LoraConfig | None = None
    """adapters of its layers; None: none"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            sizes=(
                *("vocab_size", "width", "depth", "heads", "key_value_heads", "head_dim"),
                "mlp_hidden",
            ),
            above_zero=("max_tokens", "eps", "rope_base"),
            from_zero=("init_std", "embedding_init_std"),
        )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        if self.head_size % 2:
            raise ValueError(
                f"width {self.width} / heads {self.heads} = {self.head_size} is odd; "
                "rotary positions need an even head size"
            )
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(
                f"heads {self.heads} does not divide by key_value_heads {self.key_value_heads}"
            )

    @property
    def matrix_std(self) -> float:
        """`init_std` with None resolved."""
        return self.width**-0.5 if self.init_std is None else self.init_std

    @property
    def head_size(self) -> int:
        """`head_dim` with None resolved."""
        return self.head_dim or self.width // self.heads

    @property
    def heads_width(self) -> int:
        """Channels of all heads together, which the projection behind attention reads."""
        return self.heads * self.head_size
