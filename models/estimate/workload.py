"""What one sample of a training run sends through which stack.

Letters: T tokens, Q queries, V vision tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from vlfoundry.infra.backend.layout import Layout
from vlfoundry.models.estimate.weights import Weight, weights
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.freeze import select
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.models.layers.config import LoraConfig

Objective = Literal["text", "contrastive", "generative", "retrieval", "chat"]
Stack = Literal["vision", "text", "language"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows of tokens that go through a stack for one sample."""

    stack: Stack
    tokens: int
    """of a row"""
    rows: float = 1
    """of a sample"""
    layers: int
    """of the stack, whose output is used"""
    unused_layers: int = 0
    """that are run all the same"""
    context_tokens: int = 0
    """vision tokens that cross-attention looks at; 0: there is none"""
    context_rows: float = 1
    """images whose keys and values the rows share"""
    masked: bool = False
    """an explicit attention mask [T, T] a row"""
    gradient: bool = True
    """False: forwards only"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A model, what of it is trained, and one sample's size. Compared by identity: caches ask."""

    kind: str
    """of `models.internvl.config.PARTS`"""
    config: InternVLConfig
    """the model's numbers"""
    objective: Objective
    """which losses"""
    batch_samples: int
    """of one step over all ranks"""
    steps: int
    """optimizer steps"""
    text_tokens: int
    """of a text; in chat of the whole sequence, visual tokens included"""
    trained: tuple[str, ...] = ("all",)
    """as `models.internvl.freeze` takes it"""
    captions: int = 1
    """texts of a picture (contrastive)"""
    images: float = 1
    """pictures or tiles of a sample"""
    kept_patches: int | None = None
    """of a picture (FLIP); None: all"""
    labelled_tokens: int | None = None
    """of a sample, for which logits are made; None: all but one, as the first is never asked for"""
    hard_negatives: bool = False
    """stage 2 looks for them with the frozen towers, forwards"""
    moments: Literal["fp32", "bf16"] = "fp32"
    """of Adam, as `TrainConfig` says"""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """what they are summed in, as `TrainConfig` says"""
    names: frozenset[str] = field(init=False, repr=False)
    """canonical names of the trained parameters"""

    def __post_init__(self) -> None:
        every = [weight.name for weight in weights(self.kind, self.config)]
        object.__setattr__(self, "names", frozenset(select(every, self.trained)))

    @property
    def parts(self) -> frozenset[str]:
        return PARTS[self.kind]

    @property
    def vision_tokens(self) -> int:
        """Tokens that leave the vision tower, the class token included."""
        kept = self.kept_patches
        return 1 + (self.config.vision.patches if kept is None else kept)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """Every pass of one sample, in the order of the data."""
        found = []
        if "vision" in self.parts and self.images:
            found.append(self._vision())
        if self.objective in ("text", "contrastive"):
            found.append(self._text(rows=self.captions))
        elif self.objective in ("generative", "retrieval"):
            found += self._three_tasks()
        elif self.objective == "chat":
            found += self._chat()
        return tuple(found)

    @property
    def logits_tokens(self) -> int:
        """`labelled_tokens` with None resolved; 0 where no objective makes logits."""
        if self.objective in ("contrastive", "retrieval"):
            return 0
        return self.text_tokens - 1 if self.labelled_tokens is None else self.labelled_tokens

    def trains(self, prefix: str) -> bool:
        """Whether a parameter whose name begins so is trained."""
        return _any_begins(self, prefix)

    @cached_property
    def trained_layers(self) -> frozenset[tuple[str, int, str]]:
        """(tower, layer, what of it: "self", "cross" or "lora") of every trained parameter."""
        found = set()
        for name in self.names:
            stack, *rest = name.split(".")
            if rest[:2] == ["decoder", "layers"]:
                what = "cross" if rest[3] == "cross_attention" else "self"
                found.add((stack, int(rest[2]), "lora" if rest[-2] == "lora" else what))
        return frozenset(found)

    @property
    def coupled(self) -> bool:
        """Whether the loss needs all samples at once (`models.objectives.common.Objective`)."""
        return self.objective in ("contrastive", "generative", "retrieval")

    def check(self, layout: Layout) -> None:
        """Raises LayoutError for a layout that the model's sizes do not allow."""
        check_layout(self.kind, self.config, layout)

    def weights(self, tensor: int) -> list[Weight]:
        return weights(self.kind, self.config, tensor)

    def lora(self, tower: str) -> LoraConfig | None:
        """Its adapters, if they are trained."""
        trained = (tower, 0, "lora") in self.trained_layers
        return self.config.lora_of(tower) if trained else None

    @cached_property
    def lora_elements(self) -> dict[str, int]:
        """Elements of a layer's adapters, by tower."""
        found: dict[str, int] = {}
        for weight in self.weights(1):
            if ".lora." in weight.name and weight.layer == 0:
                found[weight.tower] = found.get(weight.tower, 0) + weight.elements
        return found

    def _vision(self) -> Pass:
        depth, select_layer = self.config.vision.depth, self.config.connector.select_layer
        layers = depth
        if self.kind == "chat_simple":
            layers = select_layer if select_layer >= 0 else depth + 1 + select_layer
        return Pass(
            stack="vision", tokens=self.vision_tokens, rows=self.images, layers=layers,
            unused_layers=depth - layers,
        )  # fmt: skip

    def _text(self, **changes: Any) -> Pass:
        fields: dict[str, Any] = {
            "stack": "text",
            "tokens": self.text_tokens,
            "layers": self.config.text.depth,
        }
        return Pass(**fields | changes)

    def _three_tasks(self) -> list[Pass]:
        queries = self.config.queries.num_queries
        pairs = self._text(
            tokens=queries + self.text_tokens,
            rows=3,
            context_tokens=self.vision_tokens,
            masked=True,
        )
        if not self.hard_negatives:
            return [pairs]
        search = dataclasses.replace(self._vision(), rows=self.images / 2, gradient=False)
        return [search, self._text(gradient=False), pairs]

    def _chat(self) -> list[Pass]:
        config = self.config
        found = []
        if "queries" in self.parts and self.images:
            found.append(
                self._text(
                    tokens=config.queries.num_queries,
                    rows=self.images,
                    context_tokens=self.vision_tokens,
                    context_rows=self.images,
                    masked=True,
                )
            )
        language = Pass(stack="language", tokens=self.text_tokens, layers=config.chat.depth)
        return [*found, language]


@lru_cache(maxsize=1024)
def _any_begins(work: Workload, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in work.names)


@dataclass(frozen=True)
class LayerState:
    """What autograd has to do with one layer."""

    trained: bool
    """self-attention, MLP and norms"""
    cross_trained: bool
    """cross-attention"""
    lora: bool
    """adapters"""
    graph: bool
    """gradients pass here"""
    first: bool
    """nothing before its q, k and v is trained: what they take in needs no gradient"""


@lru_cache(maxsize=256)
def layer_states(work: Workload, step: Pass) -> list[LayerState]:
    """One state a layer that `step` runs, from the first."""
    if not step.gradient:
        return [LayerState(False, False, False, False, False)] * step.layers
    flows = reaches_input(work, step)
    states = []
    for layer in range(step.layers):
        own = [
            (step.stack, layer, what) in work.trained_layers for what in ("self", "cross", "lora")
        ]
        first = not flows and not own[0]
        flows = flows or any(own)
        states.append(LayerState(*own, graph=flows, first=first))
    return states


def reaches_input(work: Workload, step: Pass) -> bool:
    """Whether something before the first layer of `step` is trained."""
    before = {
        "vision": ("vision.class", "vision.position", "vision.patch"),
        "text": (
            "text.embedding",
            "text.query_tokens",
            *(("vision.",) if step.context_tokens else ()),
        ),
        "language": ("language.embedding", "connector.", "query_connector.", "vision.", "text."),
    }[step.stack]
    return any(work.trains(prefix) for prefix in before)
