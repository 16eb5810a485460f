"""InternViT's numbers and named flavours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.layers.config import LoraConfig, check_numbers

_SPREADS = ("layerscale_init", "position_init_std", "init_std")


@dataclass(frozen=True, kw_only=True)
class InternViTConfig:
    """A vision transformer in InternViT's shape."""

    width: int = 128
    """channels of a token"""
    depth: int = 4
    """layers"""
    heads: int = 4
    """attention heads"""
    mlp_hidden: int = 512
    """hidden size of the MLP"""
    patch_px: int = 8
    """side of a square patch"""
    image_px: int = 64
    """side of a square image the position embedding is made for"""
    norm: Literal["rms", "layer"] = "rms"
    """norm before attention and MLP"""
    qkv_bias: bool = False
    """bias on the q, k, v projection (the others always have one)"""
    qk_norm: bool = True
    """RMSNorm of q and k over the full width"""
    layerscale_init: float = 0.1
    """initial value of the vectors that scale each branch"""
    eps: float = 1e-6
    """of all norms"""
    drop_path: float = 0.0
    """probability that a sample skips a branch in training"""
    drop_path_shape: Literal["uniform", "linear"] = "uniform"
    """the same in each layer, or rising from 0 to `drop_path`"""
    position_init_std: float | None = None
    """of the initial position and class embeddings; None: as the matrices. The official class has
    1"""
    init_std: float | None = None
    """of the initial matrices (truncated normal); None: 1 / sqrt(width). The usual 0.02 suits
    widths of thousands: at width 128 the contrastive loss then hardly starts to fall"""
    lora: LoraConfig | None = None
    """adapters of its layers; None: none"""

    def __post_init__(self) -> None:
        sizes = ("width", "depth", "heads", "mlp_hidden", "patch_px", "image_px")
        check_numbers(self, sizes=sizes, above_zero=("eps",), from_zero=_SPREADS)
        if not 0 <= self.drop_path <= 1:
            raise ValueError(f"drop_path is {self.drop_path}, expected a number from 0 to 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        if self.image_px % self.patch_px:
            raise ValueError(
                f"image_px {self.image_px} does not divide by patch_px {self.patch_px}"
            )

    @property
    def matrix_std(self) -> float:
        """`init_std` with None resolved."""
        return self.width**-0.5 if self.init_std is None else self.init_std

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        """Patch tokens of an image of `image_px` (without the class token)."""
        return (self.image_px // self.patch_px) ** 2

    @property
    def drop_paths(self) -> tuple[float, ...]:
        """Drop probability of each layer."""
        if self.drop_path_shape == "uniform" or self.depth == 1:
            return (self.drop_path,) * self.depth
        return tuple(self.drop_path * i / (self.depth - 1) for i in range(self.depth))


_6B = InternViTConfig(
    width=3200, depth=48, heads=25, mlp_hidden=12800, patch_px=14, image_px=224, init_std=0.02
)
_6B_45 = dataclasses.replace(_6B, image_px=448, depth=45)
_300M = InternViTConfig(
    width=1024,
    depth=24,
    heads=16,
    mlp_hidden=4096,
    patch_px=14,
    image_px=448,
    norm="layer",
    qkv_bias=True,
    qk_norm=False,
    layerscale_init=1.0,
    init_std=0.02,
    drop_path=0.1,
    drop_path_shape="linear",
)
# The paper's search at about 6B (InternVL, section 4.5 and table 11): width, depth, MLP, heads.
_SEARCH = (
    (3968, 32, 15872, 62),
    (3200, 48, 12800, 50),
    (3200, 48, 12800, 25),  # chosen: this is "6b"
    (2496, 48, 19968, 39),
    (2816, 64, 11264, 44),
    (2496, 80, 9984, 39),
)
DESIGN_SEARCH: dict[str, InternViTConfig] = {
    f"search-{number}": dataclasses.replace(
        _6B, width=width, depth=depth, mlp_hidden=mlp_hidden, heads=heads
    )
    for number, (width, depth, mlp_hidden, heads) in enumerate(_SEARCH, 1)
}
# Published encoders that differ in their weights alone share a config.
FLAVOURS: dict[str, InternViTConfig] = {
    "6b": _6B,
    "6b-448": dataclasses.replace(_6B, image_px=448),
    "6b-448-v1.2": _6B_45,
    "6b-448-v1.5": _6B_45,
    "6b-448-v2.5": _6B_45,
    "300m": _300M,
    "300m-v2.5": _300M,
    **DESIGN_SEARCH,
    "small": InternViTConfig(layerscale_init=1.0),
}


def internvit(name: str, **changes) -> InternViTConfig:
    """A named flavour, with fields changed.

    Raises:
        ConfigError: no flavour has that name.
    """
    if name not in FLAVOURS:
        raise ConfigError(f"InternViT flavour {name!r} does not exist; known: {sorted(FLAVOURS)}")
    return dataclasses.replace(FLAVOURS[name], **changes)
