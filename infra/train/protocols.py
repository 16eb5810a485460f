"""What the training loop asks of a model and of an objective.

`models.internvl.model.InternVL` and `models.objectives` are made to fit; anything else that does
can be trained as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, Any]
"""name -> a tensor with one row a sample, or what is the same for all of them"""
Metrics = dict[str, Any]
"""name -> a tensor without gradient"""
Rows = dict[str, Any]
"""name -> a tensor with one row a sample"""
PlainObjective = Callable[[Any, Any], tuple[Any, Metrics]]
"""(model, batch) -> (loss, metrics), of a model that is whole in this process"""


class PathModel(Protocol):
    """A model that takes a batch along a named path, maybe cut over a pipeline."""

    def run(self, path: str, batch: Batch, state: Any = None) -> Rows:
        """What comes out at the end of what is here, from a batch or from the stage before."""
        ...


class Plan(Protocol):
    """Micro-batches of one path."""

    @property
    def batches(self) -> Sequence[Batch]:
        """What goes through the model one after another."""
        ...

    def assemble(self, outputs: Sequence[Rows]) -> Rows:
        """The whole batch's results from those of the micro-batches."""
        ...


class Runner(Protocol):
    """Whoever can take a batch through the whole model."""

    def collect(self, path: str, batch: Batch) -> Rows:
        """What `finish` gives at the end of a path, without gradients, on every rank."""
        ...


class PathObjective(Protocol):
    """A loss, in pieces that can be put together in any layout."""

    paths: tuple[str, ...]
    """of the model, along which a batch goes; the parameters that they go through learn"""
    coupled: bool
    """whether a sample's loss depends on what others come to; if not, it is a sum over samples"""

    def prepare(self, run: Runner, batch: Batch) -> Batch:
        """Add what must be known of the whole batch before anything is learnt."""
        ...

    def micro_batches(self, path: str, batch: Batch, parts: int) -> Plan:
        """Cut what a path reads into `parts`, by samples."""
        ...

    def finish(self, path: str, model: Any, state: Rows, batch: Batch) -> Rows:
        """From a path's end to tensors with one row a sample."""
        ...

    def loss(self, model: Any, outputs: Rows, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss whose mean over the data-parallel ranks counts, and detached scalars."""
        ...

    def samples(self, batch: Batch) -> int:
        """Samples of this rank's batch."""
        ...


Objective = PathObjective | PlainObjective


def has_paths(objective: Objective) -> bool:
    """Whether an objective comes in pieces; a plain function does not."""
    return hasattr(objective, "paths")
