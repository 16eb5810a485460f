"""InternVL: the four configurations, and each tower alone, as one module.

Letters: B batch, N images, K kept patches, T text tokens, Q queries, D width, E embedding,
V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlfoundry.infra.backend import install
from vlfoundry.infra.backend.parallel import current_layout
from vlfoundry.infra.core.errors import ConfigError, LayoutError, ModelError
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.connector.model import Connector
from vlfoundry.models.decoder.generate import greedy
from vlfoundry.models.decoder.model import Decoder, at_end, mask_of_holes
from vlfoundry.models.internvit.model import InternViT
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.pipeline_split import (
    StageLayers,
    has_independent_towers,
    split_layers,
)
from vlfoundry.models.layers.canonical import initialise, set_init, set_rule
from vlfoundry.models.layers.config import LayerSpecKind
from vlfoundry.models.layers.megatron import MegatronModule
from vlfoundry.models.layers.parallel import (
    Part,
    apart_metadata,
    beside,
    pipeline_rank,
    schedule_config,
    stand_apart,
    text_apart,
)
from vlfoundry.models.layers.pooling import AttentionPool
from vlfoundry.models.qllama.masks import contrastive_blocked, generative_blocked, matching_blocked
from vlfoundry.models.qllama.model import QLlama
from vlfoundry.models.tokenizer import IMG_CONTEXT_ID

Text = tuple[Tensor, Tensor]
"""ids and mask, each [B, T]"""
State = dict[str, Tensor]
"""what one pipeline stage hands to the next, and at the end what a path is for"""


def build(
    kind: str, config: InternVLConfig, *, seed: int = 0, spec: LayerSpecKind | None = None
) -> InternVL | Chunks:
    """A freshly initialised model of one configuration: what this rank holds of it.

    Args:
        kind: a name of `PARTS`.
        config: of its parts.
        seed: of its initial weights.
        spec: None: this device's (`infra.backend.devices`).

    Raises:
        ConfigError: no configuration is called `kind`, or its numbers do not go together.
        LayoutError: it has too few layers for the pipeline, or its text tower cannot have a layout
            of its own.
    """
    spec = spec or install().layer_spec
    if kind not in PARTS:
        raise ConfigError(f"model kind {kind!r} does not exist; known: {sorted(PARTS)}")
    config.check(kind)
    layout = current_layout()
    if layout.text_stands_apart and not has_independent_towers(kind):
        raise LayoutError(
            f"layout.text_tensor {layout.text_tensor} is for a text tower that meets the vision "
            f"tower in the loss alone, which {kind} has not; leave it out"
        )
    # Interleaved: rank r of R holds the stages r, r + R, r + 2R ...
    shares = split_layers(kind, config, layout.stages)[pipeline_rank() :: layout.pipeline]
    chunks = [InternVL(kind, config, spec, share) for share in shares]
    for chunk in chunks:
        initialise(chunk, seed)
    return chunks[0] if len(chunks) == 1 else Chunks(chunks)


class InternVL(Part):
    """Parts that the configuration has; methods that need a missing part fail.

    As one stage of a pipeline it holds some layers, and with a tower's last layer what comes
    after the tower. `run` is the same there: it goes on from what the stage before returned.
    """

    def __init__(
        self,
        kind: str,
        config: InternVLConfig,
        spec: LayerSpecKind = "local",
        share: StageLayers | None = None,
    ):
        share = split_layers(kind, config, 1)[0] if share is None else share
        parts = PARTS[kind]
        vision = InternViT(config.vision, spec, share["vision"]) if "vision" in share else None
        layout = current_layout()
        apart = text_apart() if layout.text_stands_apart else contextlib.nullcontext()
        with apart:
            text = _text_tower(config, parts, spec, share["text"]) if "text" in share else None
        language = None
        if "language" in share:
            language = Decoder(config.chat, spec=spec, layers=share["language"])
        first: Any = vision or language or text
        super().__init__(schedule_config(first.config))
        self.kind = kind
        self.model_config = config
        # Typed as what a method finds that runs only where the part is: `None` is asked for first.
        self.vision: Any = vision
        self.text: Any = text
        self.language: Any = language
        self.input_tensor: Tensor | None = None
        if "contrast" in parts:
            self._add_contrast(config, with_queries="queries" in parts)
        if "connector" in parts:
            self._add_connectors(config, with_queries="queries" in parts)
        if layout.text_stands_apart:
            stand_apart(*(p for n, p in self.named_parameters() if n.startswith("text")))

    def set_input_tensor(self, tensors: Sequence[Tensor | None]) -> None:
        """Megatron's schedules hand over what came from the stage before."""
        self.input_tensor = tensors[0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        """As Megatron's; a text tower that stands apart has other ranks that hold the same."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.text is not None and current_layout().text_stands_apart:
            sharded |= self.text.sharded_state_dict(
                f"{prefix}text.", sharded_offsets, apart_metadata(metadata)
            )
        return sharded

    # --- paths ------------------------------------------------------------------------------

    def run(self, path: str, batch: Mapping[str, Any], state: State | None = None) -> State:
        """Take a batch along a path, as far as the layers here go.

        Args:
            path: a name of `PATHS`; its method says what it reads and what it is for.
            batch: every stage gets the same.
            state: what the stage before returned; None at the first.

        Returns:
            What the path is for at the last stage, before that what the next one needs.

        Raises:
            ModelError: the model has no such path.
        """
        return self._path(path)(dict(state or {}), batch)

    def _path(self, path: str) -> Callable[[State, Mapping[str, Any]], State]:
        if path not in PATHS:
            raise ModelError(f"path {path!r} does not exist; known: {sorted(PATHS)}")
        return PATHS[path].__get__(self)

    def _image(self, state: State, batch: Mapping[str, Any]) -> State:
        """`pixels` [B, 3, H, W], maybe `kept` [B, K] (FLIP) and `samples` [B] -> unit "image"
        [B, E]. InternVL-G adds the unit vectors of both its heads."""
        self._run_vision(state, batch)
        if self._has_seen:
            vision = _rows_first(state["vision"])
            state["image"] = normalize(self.clip_projector(vision), dim=-1)
        if self.kind != "internvl_g":
            return {"image": state["image"]} if self._has_seen else state
        self._run_queries(state, len(batch["pixels"]))
        if self._has_read:
            queries = normalize(self.clip_projector2(_rows_first(state["text"])), dim=-1)
            return {"image": normalize(state["image"] + queries, dim=-1)}
        return state

    def _vision(self, state: State, batch: Mapping[str, Any]) -> State:
        """`pixels` as for "image" -> "vision.i" [B, 1 + patches, D] for each i of `wanted`: what
        goes into the first layer, and what comes out of the i-th."""
        self._run_vision(state, batch, batch["wanted"])
        if not self._has_seen:
            return state
        del state["vision"]
        return {name: _rows_first(tokens) for name, tokens in state.items()}

    def _backbone(self, state: State, batch: Mapping[str, Any]) -> State:
        """As "image", by the vision tower and its own head alone."""
        if "image" in state:
            return state
        self._run_vision(state, batch)
        if self._has_seen:
            return {"image": normalize(self.clip_projector(_rows_first(state["vision"])), dim=-1)}
        return state

    def _text(self, state: State, batch: Mapping[str, Any]) -> State:
        """ "summarize:"-prefixed `ids` and `mask` [B, T] -> unit "text" [B, E]. Of packed texts
        `ids` are [1, T] and `mask` is cu_seqlens."""
        state = self._lm(state, batch)
        if self._has_read:
            ends = at_end(state["hidden"], batch["mask"])
            return {"text": normalize(ends @ self.text_projection, dim=-1)}
        return state

    def _lm(self, state: State, batch: Mapping[str, Any]) -> State:
        """`ids` and `mask` [B, T] of text alone, or `ids` [1, T] and `cu_seqlens` -> "hidden"
        [B, T, D]."""
        ids = batch["ids"]
        mask = batch["cu_seqlens"] if "cu_seqlens" in batch else batch["mask"]
        _run_decoder(
            self.text, state, "text", lambda: self.text.embed(ids), ids.shape[1],
            mask_of_holes(mask),
        )  # fmt: skip
        return {"hidden": _rows_first(state["text"])} if self._has_read else state

    def _tasks(self, state: State, batch: Mapping[str, Any]) -> State:
        """One pass of QLLaMA over 3B rows: matching, contrastive and generative.

        `pixels` [B, 3, H, W] and, all [B, T], ids and mask of `match`, `summary` and `caption` ->
        "match" logits [B, 2] (1: match), unit embeddings [B, E]: "image" through the queries,
        "backbone" without them, "text"; and "hidden" states [B, T, D] of the generative rows.
        """
        names = ("match", "summary", "caption")
        masks = (matching_blocked, contrastive_blocked, generative_blocked)
        self._see_both(state, batch)
        self._run_pairs(state, batch, names, masks)
        if not self._has_read:
            return state
        size = len(batch["pixels"])
        queries, texts = self._queries_and_texts(state)
        ends = at_end(texts[size : 2 * size], batch["summary_mask"])
        return {
            "match": self.itm_head(queries[:size]).mean(1),
            "image": normalize(self.clip_projector2(queries[size : 2 * size]), dim=-1),
            "backbone": state["backbone"],
            "text": normalize(ends @ self.text_projection, dim=-1),
            "hidden": texts[2 * size :],
        }

    def _match(self, state: State, batch: Mapping[str, Any]) -> State:
        """`pixels` [N, 3, H, W], `match_ids` and `match_mask` [B, T], `picture` [B], the image of
        each text -> "match" logits [B, 2] (1: match)."""
        self._run_vision(state, batch)
        if self._has_seen:
            state["vision"] = state["vision"][:, batch["picture"]]
        self._run_pairs(state, batch, ("match",), (matching_blocked,))
        if not self._has_read:
            return state
        queries, _ = self._queries_and_texts(state)
        return {"match": self.itm_head(queries).mean(1)}

    def _retrieval(self, state: State, batch: Mapping[str, Any]) -> State:
        """One pass of QLLaMA over [wrong; right; contrastive] rows.

        `pixels` [B, 3, H, W] and, all [B, T], ids and mask of `negative`, `positive` and
        `summary` -> "match" logits [2B, 2] (1: match), and unit embeddings [B, E]: "image"
        through the queries, "backbone" without them, "text".
        """
        names = ("negative", "positive", "summary")
        masks = (matching_blocked, matching_blocked, contrastive_blocked)
        self._see_both(state, batch)
        self._run_pairs(state, batch, names, masks)
        if not self._has_read:
            return state
        size = len(batch["pixels"])
        queries, texts = self._queries_and_texts(state)
        ends = at_end(texts[2 * size :], batch["summary_mask"])
        return {
            "match": self.itm_head(queries[: 2 * size]).mean(1),
            "image": normalize(self.clip_projector2(queries[2 * size :]), dim=-1),
            "backbone": state["backbone"],
            "text": normalize(ends @ self.text_projection, dim=-1),
        }

    def _chat(self, state: State, batch: Mapping[str, Any]) -> State:
        """Conversations `ids` [B, T], right-padded or packed (`cu_seqlens`), `pixels`
        [N, 3, H, W] or none, maybe another `context_id` than ours -> "hidden" [B, T, D]."""
        pixels, ids = batch.get("pixels"), batch["ids"]
        if pixels is not None and len(pixels):
            self._visual_tokens(state, batch)
        _run_decoder(
            self.language, state, "language",
            lambda: self._chat_embeddings(
                ids, state.pop("visual", None), len(pixels if pixels is not None else ()),
                batch.get("context_id", IMG_CONTEXT_ID),
            ),
            ids.shape[1], batch.get("cu_seqlens"),
        )  # fmt: skip
        if self.language is not None and self.language.ends:
            return {"hidden": _rows_first(state["language"])}
        return state

    # --- pieces of paths --------------------------------------------------------------------

    @property
    def _has_seen(self) -> bool:
        """Whether the vision tower ends here."""
        return self.vision is not None and self.vision.ends

    @property
    def _has_read(self) -> bool:
        """Whether the text tower ends here."""
        return self.text is not None and self.text.ends

    def _run_vision(
        self, state: State, batch: Mapping[str, Any], wanted: Sequence[int] = ()
    ) -> None:
        """Run the vision tower: state "vision", whole where it ends, and "vision.i" if wanted."""
        if self.vision is None:
            return
        state["vision"], found = self.vision.through(
            state.pop("vision", None), batch["pixels"], batch.get("kept"),
            wanted=wanted, samples=batch.get("samples"),
        )  # fmt: skip
        state |= {f"vision.{index}": tokens for index, tokens in found.items()}

    def _see_both(self, state: State, batch: Mapping[str, Any]) -> None:
        """As `_run_vision`, and state "backbone" [B, E], a unit vector for each image."""
        self._run_vision(state, batch)
        if self._has_seen:
            vision = _rows_first(state["vision"])
            state["backbone"] = normalize(self.clip_projector(vision), dim=-1)

    def _run_queries(self, state: State, images: int) -> None:
        """Run QLLaMA's queries about images: state "text"."""
        if self.text is None:
            return
        _run_decoder(
            self.text, state, "text", lambda: self.text.before_image(images),
            self.text.num_queries, self.text.open_mask(), _rows_first(state["vision"]),
        )  # fmt: skip

    def _run_pairs(
        self, state: State, batch: Mapping[str, Any], names: Sequence[str], masks: Sequence
    ) -> None:
        """Run QLLaMA over [queries | text] of several tasks: state "text"."""
        if self.text is None:
            return
        if not isinstance(self.text, QLlama):
            raise ModelError(f"stage 2 needs an internvl_g, got {self.kind}")
        queries = self.text.num_queries
        ids = torch.cat([batch[f"{name}_ids"] for name in names])
        blocked = torch.cat(
            [mask(queries, batch[f"{n}_mask"]) for n, mask in zip(names, masks, strict=True)]
        )
        _run_decoder(
            self.text, state, "text", lambda: self.text.before_pairs(ids),
            queries + ids.shape[1], blocked, _rows_first(state["vision"]),
        )  # fmt: skip

    def _queries_and_texts(self, state: State) -> tuple[Tensor, Tensor]:
        hidden = _rows_first(state["text"])
        return hidden[:, : self.text.num_queries], hidden[:, self.text.num_queries :]

    def _visual_tokens(self, state: State, batch: Mapping[str, Any]) -> None:
        """Images to tokens for the language model: state "visual" [N, tokens, D], queries first,
        then patches."""
        pixels = batch["pixels"]
        vision = self.model_config.vision
        select = self.model_config.connector.select_layer
        select = select if select >= 0 else vision.depth + 1 + select
        full = self.kind == "chat_full"
        self._run_vision(state, batch, [select])
        if self._has_seen:
            patch_px = vision.patch_px
            grid = (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)
            state["visual"] = self.connector(
                _rows_first(state.pop(f"vision.{select}"))[:, 1:], grid
            )
            if not full:
                del state["vision"]
        if full and self.text is not None:
            self._run_queries(state, len(pixels))
            if self._has_read:
                queries = self.query_connector(_rows_first(state.pop("text")))
                state["visual"] = torch.cat([queries, state["visual"]], 1)
                del state["vision"]

    # --- embeddings -------------------------------------------------------------------------

    def embed_images(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Unit image embeddings [B, E] of pixels [B, 3, H, W]; `kept` [B, K] masks patches."""
        return self.run("image", {"pixels": pixels, "kept": kept})["image"]

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit text embeddings [B, E] of "summarize:"-prefixed ids [B, T]."""
        return self.run("text", {"ids": ids, "mask": mask})["text"]

    # --- chat -------------------------------------------------------------------------------

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, tokens, D] for the language model: queries first, then patches."""
        state: State = {}
        self._visual_tokens(state, {"pixels": pixels})
        return state["visual"]

    def chat_embeddings(
        self, ids: Tensor, pixels: Tensor | None, context_id: int = IMG_CONTEXT_ID
    ) -> Tensor:
        """Embeddings [B, T, D] of ids [B, T], image places filled in order with visual tokens.

        Raises:
            ModelError: the number of image places is not the number of visual tokens.
        """
        if pixels is None or not len(pixels):
            return self.language.embed(ids)
        return self._chat_embeddings(ids, self.visual_tokens(pixels), len(pixels), context_id)

    def _chat_embeddings(
        self, ids: Tensor, visual: Tensor | None, images: int, context_id: int
    ) -> Tensor:
        if visual is None:
            return self.language.embed(ids)
        visual = visual.flatten(0, 1)
        places = ids == context_id
        # An id that is none of the vocabulary's has no embedding; whichever is taken is replaced.
        embeddings = self.language.embed(ids if context_id >= 0 else ids.masked_fill(places, 0))
        if int(places.sum()) != len(visual):
            raise ModelError(
                f"the prompts have {int(places.sum())} image places for {len(visual)} visual "
                f"tokens of {images} images; a prompt was cut, or made for another model"
            )
        return embeddings.masked_scatter(places[..., None], visual.to(embeddings.dtype))

    def chat_hidden(
        self, ids: Tensor, pixels: Tensor | None, context_id: Any = IMG_CONTEXT_ID
    ) -> Tensor:
        """Hidden states [B, T, D] of right-padded conversations."""
        batch = {"ids": ids, "pixels": pixels, "context_id": context_id}
        return self.run("chat", batch)["hidden"]

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
        new: list[nn.Module] = []
        if self._has_seen:
            self.clip_projector = AttentionPool(beside(self.vision), config.vision.width, **pool)
            new.append(self.clip_projector)
        if self._has_read:
            self.text_projection = nn.Parameter(
                torch.zeros(config.text.width, config.embed_dim, **make)
            )
            self.logit_scale = nn.Parameter(torch.zeros((), **make))
            set_rule(self.text_projection, "trunc_normal", config.head_std)
            set_rule(self.logit_scale, "constant", config.logit_scale)
            if config.logit_bias is not None:
                self.logit_bias = nn.Parameter(torch.zeros((), **make))
                set_rule(self.logit_bias, "constant", config.logit_bias)
        if self._has_read and with_queries:
            self.clip_projector2 = AttentionPool(beside(self.text), config.text.width, **pool)
            self.itm_head = nn.Linear(config.text.width, 2, **make)
            new += [self.clip_projector2, self.itm_head]
        for module in new:
            set_init(module, config.head_std)

    def _add_connectors(self, config: InternVLConfig, *, with_queries: bool) -> None:
        if self._has_seen:
            self.connector = Connector(
                beside(self.vision), config.connector, config.vision.width, config.chat.width
            )
        if self._has_read and with_queries:
            plain = ConnectorConfig(kind="mlp2x", init_std=config.connector.init_std)
            self.query_connector = Connector(
                beside(self.text), plain, config.text.width, config.chat.width
            )


PATHS: dict[str, Callable[[InternVL, State, Mapping[str, Any]], State]] = {
    "image": InternVL._image,
    "vision": InternVL._vision,
    "backbone": InternVL._backbone,
    "text": InternVL._text,
    "lm": InternVL._lm,
    "tasks": InternVL._tasks,
    "match": InternVL._match,
    "retrieval": InternVL._retrieval,
    "chat": InternVL._chat,
}
"""what a batch can be taken along; see each method"""


class Chunks(MegatronModule):
    """The several pieces of one model that a rank holds under the interleaved schedule.

    Names of parameters are those of the whole model, as everywhere.
    """

    def __init__(self, chunks: Sequence[InternVL]):
        super().__init__(chunks[0].config)
        self.model_config = chunks[0].model_config
        self.chunks: Any = nn.ModuleList(chunks)

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        for chunk in self.chunks:
            yield from chunk.named_parameters(*args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        whole: dict[str, Any] = {}
        for chunk in self.chunks:
            whole |= chunk.sharded_state_dict(prefix, sharded_offsets, metadata)
        return whole

    # pyrefly: ignore[bad-override]  # Megatron's says nothing of `assign`
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False):
        for chunk in self.chunks:
            own = {name: state_dict[name] for name in chunk.state_dict()}
            chunk.load_state_dict(own, strict, assign)


def _text_tower(config: InternVLConfig, parts: frozenset[str], spec: LayerSpecKind, layers: range):
    head = "text_head" in parts
    if "queries" not in parts:
        return Decoder(config.text, head=head, spec=spec, layers=layers)
    return QLlama(
        config.text, config.queries, config.vision.width, head=head, spec=spec, layers=layers
    )


def _run_decoder(
    tower: Decoder | None,
    state: State,
    name: str,
    start: Callable[[], Tensor],
    length: int,
    mask: Tensor | None = None,
    context: Tensor | None = None,
) -> None:
    """Run a decoder's layers that are here: state `name`, from embeddings [B, T, D] on."""
    if tower is None:
        return
    hidden = start().transpose(0, 1).contiguous() if tower.starts else state.pop(name)
    state[name] = tower.through(hidden, length, mask, context=context)


def _rows_first(tokens: Tensor) -> Tensor:
    """[T, B, D] -> [B, T, D]."""
    return tokens.transpose(0, 1)
