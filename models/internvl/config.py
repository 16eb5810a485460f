"""InternVL's parts and which configuration has which."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.families import family_of, flavour
from vlfoundry.models.internvit.config import InternViTConfig, internvit
from vlfoundry.models.layers.config import DecoderConfig, LoraConfig, check_numbers
from vlfoundry.models.preprocess.geometry import PictureConfig, Sight
from vlfoundry.models.qllama.config import PAPER, QLlamaConfig

Kind = Literal["vision", "text", "internvl_c", "internvl_g", "chat_simple", "chat_full"]

PARTS: dict[str, frozenset[str]] = {
    "vision": frozenset({"vision"}),
    "text": frozenset({"text", "text_head"}),
    "internvl_c": frozenset({"vision", "text", "contrast"}),
    "internvl_g": frozenset({"vision", "text", "text_head", "queries", "contrast"}),
    "chat_simple": frozenset({"vision", "connector", "language"}),
    "chat_full": frozenset({"vision", "text", "queries", "connector", "language"}),
}
CAPABILITIES: dict[str, frozenset[str]] = {
    "vision": frozenset(),
    "text": frozenset(),
    "internvl_c": frozenset({"embed"}),
    "internvl_g": frozenset({"embed", "match", "generate"}),
    "chat_simple": frozenset({"generate"}),
    "chat_full": frozenset({"generate"}),
}


@dataclass(frozen=True, kw_only=True)
class InternVLConfig:
    """Every part's numbers. A configuration builds the parts it has and ignores the rest."""

    vision: InternViTConfig = field(default_factory=lambda: internvit("small"))
    """the vision tower"""
    text: DecoderConfig = field(default_factory=DecoderConfig)
    """the text tower, which is also QLLaMA's base"""
    queries: QLlamaConfig = field(default_factory=QLlamaConfig)
    """what makes a QLLaMA of the text tower"""
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    """vision tokens to the chat models' language model"""
    language: DecoderConfig | None = None
    """the chat models' language model; None: of the text tower's shape"""
    pictures: PictureConfig = field(default_factory=PictureConfig)
    """how a chat model is given pictures"""
    embed_dim: int = 128
    """channels of the shared space of images and texts"""
    pool_heads: int = 4
    """heads of the attention pooling"""
    head_init_std: float | None = None
    """of the initial matrices of pooling, projection and matching head; None: as the text
    tower's"""
    temperature: float = 0.07
    """initial temperature of the contrastive loss"""
    logit_bias: float | None = None
    """initial bias of the logits, which the sigmoid loss learns; None: they have none"""

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "pool_heads")
        check_numbers(self, sizes=sizes, above_zero=("temperature",), from_zero=("head_init_std",))

    def check(self, kind: str) -> None:
        """Refuse numbers that do not go together in the parts that a configuration has.

        Raises:
            ConfigError: with the arithmetic.
        """
        parts = PARTS[kind]
        for name, decoder in (("text", self.text), ("language", self.chat)):
            if name in parts:
                family_of(decoder)
        widths = {"vision": self.vision.width, "text": self.text.width}
        for name, width in widths.items():
            pooled = name == "vision" or "queries" in parts
            if "contrast" in parts and pooled and width % self.pool_heads:
                raise ConfigError(
                    f"{name}.width {width} does not divide by pool_heads {self.pool_heads}"
                )
        if "connector" not in parts:
            return
        if self.grid % self.connector.merge:
            raise ConfigError(
                f"the {self.grid}x{self.grid} patch grid does not divide by "
                f"{self.connector.merge} for the pixel shuffle"
            )
        depth, layer = self.vision.depth, self.connector.select_layer
        if not -depth - 1 <= layer <= depth:
            raise ConfigError(
                f"connector.select_layer is {layer}, expected a number from {-depth - 1} to "
                f"{depth}, for the vision tower has {depth} layers"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.vision.image_px // self.vision.patch_px

    @property
    def chat(self) -> DecoderConfig:
        """The chat models' language model."""
        return self.language or self.text

    @property
    def head_std(self) -> float:
        """`head_init_std` with None resolved."""
        return self.text.matrix_std if self.head_init_std is None else self.head_init_std

    @property
    def logit_scale(self) -> float:
        """Initial logarithm of the inverse temperature."""
        return math.log(1 / self.temperature)

    def for_sigmoid(self) -> InternVLConfig:
        """The same model as the sigmoid loss starts it (SigLIP, arXiv 2303.15343, section 3.2)."""
        return dataclasses.replace(self, temperature=0.1, logit_bias=-10.0)

    def with_lora(
        self,
        *,
        vision: LoraConfig | None = None,
        text: LoraConfig | None = None,
        language: LoraConfig | None = None,
    ) -> InternVLConfig:
        """The same model with these adapters and no others."""
        return dataclasses.replace(
            self,
            vision=dataclasses.replace(self.vision, lora=vision),
            text=dataclasses.replace(self.text, lora=text),
            language=dataclasses.replace(self.chat, lora=language),
        )

    def with_tiles(self, most: int) -> InternVLConfig:
        """The same model, whose pictures have at most so many tiles."""
        least = min(self.pictures.min_tiles, most)
        pictures = dataclasses.replace(self.pictures, min_tiles=least, max_tiles=most)
        return dataclasses.replace(self, pictures=pictures)

    def depths(self, kind: str) -> dict[str, int]:
        """Layers of each tower that a configuration has."""
        towers = {"vision": self.vision, "text": self.text, "language": self.chat}
        return {name: tower.depth for name, tower in towers.items() if name in PARTS[kind]}

    def lora_of(self, part: str) -> LoraConfig | None:
        """The adapters of a part of a model; None: it has none, or is no tower."""
        towers = {"vision": self.vision, "text": self.text, "language": self.chat}
        return towers[part].lora if part in towers else None

    def sight(self, kind: str) -> Sight:
        """How a model of this kind is given pictures."""
        return Sight(
            chats="language" in PARTS[kind], side_px=self.vision.image_px, pictures=self.pictures
        )

    def visual_tokens(self, kind: str) -> int:
        """Tokens that one square of a picture takes in a chat model's prompt."""
        patches = self.vision.patches // self.connector.merge**2
        return patches + (self.queries.num_queries if kind == "chat_full" else 0)


TILES = PictureConfig(max_tiles=12)
"""as InternVL 1.5 and later are trained"""
ONE = PictureConfig(geometry="squeeze")
"""as InternVL 1.1 and 1.2 are"""


def _paper() -> InternVLConfig:
    return InternVLConfig(
        pictures=PictureConfig(geometry="pad"),
        vision=internvit("6b"),
        text=flavour("chinese-alpaca-7b"),
        queries=PAPER,
        connector=ConnectorConfig(kind="mlp2x", select_layer=-4, init_std=0.02),
        language=flavour("vicuna-7b"),
        embed_dim=768,
        pool_heads=16,
    )


def _chat(
    vision: str, language: str, pictures: PictureConfig = TILES, **connector
) -> InternVLConfig:
    return InternVLConfig(
        vision=internvit(vision),
        language=flavour(language),
        pictures=pictures,
        connector=ConnectorConfig(kind="pixel_shuffle", init_std=0.02, **connector),
    )


FLAVOURS: dict[str, Callable[[], InternVLConfig]] = {
    "paper": _paper,
    # Published chat models; of the kinds of model, they are for `chat_simple`.
    "chat-v1.1": partial(_chat, "6b-448", "llama2-13b", ONE, ps_version="v1", select_layer=-4),
    "chat-v1.2": partial(_chat, "6b-448-v1.2", "yi-34b", ONE, ps_version="v1"),
    "chat-v1.5-26b": partial(_chat, "6b-448-v1.5", "internlm2-20b"),
    "internvl2-8b": partial(_chat, "300m", "internlm2-7b"),
    "internvl2-2b": partial(_chat, "300m", "internlm2-1.8b"),
    "internvl2-1b": partial(_chat, "300m", "qwen2-0.5b-untied"),
    "small": InternVLConfig,
}


def internvl(name: str, **changes) -> InternVLConfig:
    """A named flavour, with fields changed.

    Raises:
        ConfigError: no flavour has that name.
    """
    if name not in FLAVOURS:
        raise ConfigError(f"InternVL flavour {name!r} does not exist; known: {sorted(FLAVOURS)}")
    return dataclasses.replace(FLAVOURS[name](), **changes)
