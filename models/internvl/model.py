"""InternVL: the four configurations, and each tower alone, as one module.

Letters: B batch, N images, K kept patches, T text tokens, Q queries, D width, E embedding,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from infra.errors import ConfigError, ModelError
from models.common.canonical import initialise, set_init, set_rule
from models.common.generate import greedy
from models.common.layers import LayerSpecKind
from models.common.parallel import Part
from models.common.pooling import AttentionPool
from models.connector.config import ConnectorConfig
from models.connector.model import Connector
from models.internvit.model import InternViT
from models.internvl.config import PARTS, InternVLConfig
from models.llama.model import Llama
from models.qllama.masks import contrastive_blocked, generative_blocked, matching_blocked
from models.qllama.model import QLlama
from models.tokenizer import IMG_CONTEXT_ID

Text = tuple[Tensor, Tensor]
"""ids and mask, each [B, T]"""


def build(
    kind: str, config: InternVLConfig, *, seed: int = 0, spec: LayerSpecKind = "local"
) -> InternVL:
    """A freshly initialised model of one configuration, in the current parallel layout.

    Raises:
        ConfigError: no configuration is called `kind`.
    """
    if kind not in PARTS:
        raise ConfigError(f"model kind {kind!r} does not exist; known: {sorted(PARTS)}")
    model = InternVL(kind, config, spec)
    initialise(model, seed)
    return model


class InternVL(Part):
    """Parts that the configuration has; methods that need a missing part fail."""

    def __init__(self, kind: str, config: InternVLConfig, spec: LayerSpecKind = "local"):
        parts = PARTS[kind]
        vision = InternViT(config.vision, spec) if "vision" in parts else None
        text = _text_tower(config, parts, spec) if "text" in parts else None
        language = Llama(config.chat, spec=spec) if "language" in parts else None
        super().__init__((text or language or vision).config)
        self.kind = kind
        self.model_config = config
        self.vision, self.text, self.language = vision, text, language
        if "contrast" in parts:
            self._add_contrast(config, with_queries="queries" in parts)
        if "connector" in parts:
            self._add_connectors(config, with_queries="queries" in parts)

    def set_input_tensor(self, _tensor) -> None:
        """Megatron's schedules call this; each rank runs the whole model, so it gets nothing."""

    # --- embeddings -------------------------------------------------------------------------

    def embed_images(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Unit image embeddings [B, E]; InternVL-G adds the unit vectors of both its heads.

        pixels [B, 3, H, W]; `kept` [B, K] masks patches (FLIP).
        """
        tokens = self.vision(pixels, kept)
        unit = normalize(self.clip_projector(tokens), dim=-1)
        if self.kind == "internvl_g":
            unit = unit + normalize(self.clip_projector2(self.text.encode_image(tokens)), dim=-1)
            unit = normalize(unit, dim=-1)
        return unit

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit text embeddings [B, E] of "summarize:"-prefixed ids [B, T]."""
        return normalize(self.text.last_hidden(ids, mask) @ self.text_projection, dim=-1)

    @torch.no_grad()
    def stage1_similarity(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cosines [B, B'] of images and texts by the towers and the heads of stage 1 alone."""
        images = normalize(self.clip_projector(self.vision(pixels)), dim=-1)
        return images @ self.embed_texts(ids, mask).T

    # --- stage 2 ----------------------------------------------------------------------------

    def three_tasks(
        self, pixels: Tensor, matching: Text, contrastive: Text, generative: Text
    ) -> dict[str, Tensor]:
        """One pass of QLLaMA over 3B rows: matching, contrastive and generative.

        Args:
            pixels: [B, 3, H, W].
            matching, contrastive, generative: (ids [B, T], mask [B, T]) of each task's text,
                all of one T.

        Returns:
            "match" logits [B, 2] (1: match), unit "image" and "text" embeddings [B, E],
            and "hidden" states [B, T, D] of the generative rows.
        """
        if self.kind != "internvl_g":
            raise ModelError(f"stage 2 needs an internvl_g, got {self.kind}")
        queries, batch = self.text.num_queries, len(pixels)
        tasks = (matching, contrastive, generative)
        masks = (matching_blocked, contrastive_blocked, generative_blocked)
        ids = torch.cat([task[0] for task in tasks])
        blocked = torch.cat(
            [mask(queries, task[1]) for mask, task in zip(masks, tasks, strict=True)]
        )
        query_states, text_states = self.text.encode_pairs(ids, blocked, self.vision(pixels))
        last = contrastive[1].long().sum(1) - 1
        rows = torch.arange(batch, device=ids.device)
        ends = text_states[batch : 2 * batch][rows, last]
        return {
            "match": self.itm_head(query_states[:batch]).mean(1),
            "image": normalize(self.clip_projector2(query_states[batch : 2 * batch]), dim=-1),
            "text": normalize(ends @ self.text_projection, dim=-1),
            "hidden": text_states[2 * batch :],
        }

    # --- chat -------------------------------------------------------------------------------

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, tokens, D] for the language model: queries first, then patches."""
        patch_px = self.model_config.vision.patch_px
        grid = (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)
        select = self.model_config.connector.select_layer
        if self.query_connector is None:
            return self.connector(self.vision(pixels, hidden_state=select)[:, 1:], grid)
        states = self.vision.hidden_states(pixels)
        queries = self.query_connector(self.text.encode_image(states[-1]))
        return torch.cat([queries, self.connector(states[select][:, 1:], grid)], 1)

    def chat_embeddings(
        self, ids: Tensor, pixels: Tensor | None, context_id: int = IMG_CONTEXT_ID
    ) -> Tensor:
        """Embeddings [B, T, D] of ids [B, T], image places filled in order with visual tokens.

        Raises:
            ModelError: the number of image places is not the number of visual tokens.
        """
        embeddings = self.language.embed(ids)
        if pixels is None or not len(pixels):
            return embeddings
        visual = self.visual_tokens(pixels).flatten(0, 1)
        places = ids == context_id
        if int(places.sum()) != len(visual):
            raise ModelError(
                f"the prompts have {int(places.sum())} image places for {len(visual)} visual "
                f"tokens of {len(pixels)} images; a prompt was cut, or made for another model"
            )
        return embeddings.masked_scatter(places[..., None], visual.to(embeddings.dtype))

    def chat_hidden(
        self,
        ids: Tensor,
        pixels: Tensor | None,
        context_id: int = IMG_CONTEXT_ID,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] of conversations, right-padded or (`cu_seqlens`) packed."""
        return self.language(self.chat_embeddings(ids, pixels, context_id), cu_seqlens)

    # --- generation -------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        pixels: Tensor | None,
        *,
        max_new_tokens: int,
        eos_id: int,
        context_id: int = IMG_CONTEXT_ID,
    ) -> Tensor:
        """Greedy new tokens [B, N] for left-padded prompts ids [B, T]."""
        if self.kind == "internvl_g":
            return self.text.generate(
                self.vision(pixels), ids, mask, max_new_tokens=max_new_tokens, eos_id=eos_id
            )
        return greedy(
            self.language,
            self.chat_embeddings(ids, pixels, context_id),
            mask,
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
        )

    # --- construction -----------------------------------------------------------------------

    def _add_contrast(self, config: InternVLConfig, *, with_queries: bool) -> None:
        make = {"dtype": self.config.params_dtype}
        pool = {"heads": config.pool_heads, "out_width": config.embed_dim}
        self.clip_projector = AttentionPool(self.config, config.vision.width, **pool)
        self.text_projection = nn.Parameter(
            torch.zeros(config.text.width, config.embed_dim, **make)
        )
        self.logit_scale = nn.Parameter(torch.zeros((), **make))
        set_rule(self.text_projection, "trunc_normal", config.head_std)
        set_rule(self.logit_scale, "constant", config.logit_scale)
        new: list[nn.Module] = [self.clip_projector]
        if with_queries:
            self.clip_projector2 = AttentionPool(self.config, config.text.width, **pool)
            self.itm_head = nn.Linear(config.text.width, 2, **make)
            new += [self.clip_projector2, self.itm_head]
        for module in new:
            set_init(module, config.head_std)

    def _add_connectors(self, config: InternVLConfig, *, with_queries: bool) -> None:
        self.connector = Connector(
            self.config, config.connector, config.vision.width, config.chat.width
        )
        self.query_connector = None
        if with_queries:
            plain = ConnectorConfig(kind="mlp2x", init_std=config.connector.init_std)
            self.query_connector = Connector(
                self.config, plain, config.text.width, config.chat.width
            )


def _text_tower(config: InternVLConfig, parts: frozenset[str], spec: LayerSpecKind):
    head = "text_head" in parts
    if "queries" not in parts:
        return Llama(config.text, head=head, spec=spec)
    return QLlama(config.text, config.queries, config.vision.width, head=head, spec=spec)
