"""How a model and its batch are cut over ranks, checked before any process starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vlfoundry.infra.core.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The numbers of one transformer stack that a layout must divide."""

    name: str
    """how messages call it, e.g. "vision" """
    heads: int
    """attention heads, without padding"""
    width: int
    """hidden size"""
    mlp_hidden: int
    """hidden size of the MLP"""
    key_value_heads: int | None = None
    """heads of keys and values under grouped-query attention; None: as many as heads"""
    pads_heads: bool = False
    """the model adds zero heads up to a multiple of the tensor-parallel size"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes. Not a parameter of a stage: results agree in every layout."""

    tensor: int = 1
    """ranks that share each layer's matrices"""
    pipeline: int = 1
    """ranks that hold consecutive layers"""
    virtual_pipeline: int | None = None
    """model chunks a pipeline rank holds (the interleaved schedule); None: one"""
    data: int = 1
    """copies of the model, each with its part of the batch"""
    text_tensor: int | None = None
    """ranks that share the text tower's matrices, where it meets the vision tower in the loss alone
    (internvl_c): each such group of a tensor group encodes its part of the texts; None: `tensor`"""
    sequence_parallel: bool = False
    """cut activations outside attention and MLP along the sequence over the tensor ranks"""
    batch_p2p: bool | None = None
    """send and receive between stages in one batched call; None: whatever is right"""
    recompute: bool = False
    """keep only what goes into each layer, and run the layer again in the backward pass"""
    micro_batch_samples: int | None = None
    """samples that a data-parallel rank computes at once; None: all of its share, or where there
    is a pipeline enough micro-batches to fill it"""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline * self.data

    @property
    def text_stands_apart(self) -> bool:
        """Whether the text tower is cut in another way than the rest."""
        return self.text_tensor not in (None, self.tensor)

    @property
    def of_text(self) -> Layout:
        """How the text tower alone is cut, if it stands apart."""
        assert self.text_tensor is not None, "the text tower has no layout of its own"
        return dataclasses.replace(
            self,
            tensor=self.text_tensor,
            data=self.data * (self.tensor // self.text_tensor),
            text_tensor=None,
            sequence_parallel=False,
        )

    @property
    def interleaved(self) -> bool:
        return self.virtual_pipeline is not None

    @property
    def stages(self) -> int:
        """Pieces that a model is cut into: pipeline ranks times the pieces that each holds."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def micro_batches(self, samples: int) -> int:
        """How many micro-batches a rank's share of a batch is computed in."""
        if self.micro_batch_samples is not None:
            wanted = -(-samples // self.micro_batch_samples)
        else:
            wanted = 1 if self.pipeline == 1 else min(samples, 2 * self.stages)
        # The interleaved schedule goes round in groups of as many as there are ranks.
        return -(-wanted // self.pipeline) * self.pipeline if self.interleaved else wanted

    @property
    def batched_p2p(self) -> bool:
        """`batch_p2p` with None resolved: never batched under the interleaved schedule."""
        return not self.interleaved if self.batch_p2p is None else self.batch_p2p

    def check(self, *models: ModelFacts, ranks: int | None = None) -> None:
        """Refuse what cannot work, or would be silently wrong.

        Args:
            models: the transformer stacks that will run in this layout.
            ranks: processes the launcher will start, if known.

        Raises:
            LayoutError: with the numbers and what to change.
        """
        self._check_sizes(ranks)
        self._check_pipeline()
        for facts in models:
            self._check_model(facts)

    def _check_sizes(self, ranks: int | None) -> None:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        if self.micro_batch_samples is not None:
            sizes["micro_batch_samples"] = self.micro_batch_samples
        for name, size in sizes.items():
            if size < 1:
                raise LayoutError(f"layout.{name} is {size}; expected at least 1")
        if self.text_tensor is not None and not 1 <= self.text_tensor <= self.tensor:
            raise LayoutError(
                f"layout.text_tensor is {self.text_tensor}; expected 1 to tensor {self.tensor}, "
                "or left out"
            )
        if self.text_tensor is not None and self.tensor % self.text_tensor:
            raise LayoutError(
                f"layout.tensor {self.tensor} does not divide by layout.text_tensor "
                f"{self.text_tensor}: groups of so many ranks share the texts of a tensor group"
            )
        if ranks is not None and ranks != self.ranks:
            raise LayoutError(
                f"the layout needs tensor {self.tensor} x pipeline {self.pipeline} x data "
                f"{self.data} = {self.ranks} ranks, but {ranks} are to be started; "
                "change one of the sizes or the number of ranks"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise LayoutError(
                "layout.sequence_parallel needs layout.tensor of at least 2 (got 1): "
                "it cuts the sequence over the tensor ranks; switch it off"
            )

    def _check_pipeline(self) -> None:
        if self.virtual_pipeline is None:
            return
        if self.virtual_pipeline < 2 or self.pipeline < 2:
            raise LayoutError(
                f"layout.virtual_pipeline is {self.virtual_pipeline} with layout.pipeline "
                f"{self.pipeline}; interleaving needs at least 2 of both, "
                "or virtual_pipeline left out"
            )
        if self.pipeline == 2 and self.batched_p2p:
            # Both neighbours are the same rank then, and one batch holds two messages for it
            # that are told apart by order only: Megatron-Core mixes them up without an error.
            raise LayoutError(
                "layout.pipeline 2 with the interleaved schedule "
                f"(virtual_pipeline {self.virtual_pipeline}) and batch_p2p gives wrong gradients "
                "silently; set layout.batch_p2p to false, or leave it out"
            )

    def _check_model(self, facts: ModelFacts) -> None:
        padded = -(-facts.heads // self.tensor) * self.tensor if facts.pads_heads else facts.heads
        self._divide(facts, "heads", padded, "tensor", self.tensor)
        kv_heads = facts.key_value_heads
        if kv_heads is not None and kv_heads != facts.heads:
            self._divide(facts, "key_value_heads", kv_heads, "tensor", self.tensor)
        self._divide(facts, "mlp_hidden", facts.mlp_hidden, "tensor", self.tensor)
        self._divide(facts, "width", facts.width, "heads", facts.heads)

    @staticmethod
    def _divide(facts: ModelFacts, what: str, amount: int, by: str, parts: int) -> None:
        if amount % parts:
            raise LayoutError(
                f"{facts.name}: {what} {amount} does not divide by {by} {parts} "
                f"({amount} = {parts} x {amount // parts} + {amount % parts}); "
                f"choose a {by} that divides it"
            )
