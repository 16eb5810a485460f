"""Options of the objectives, read without PyTorch: parameters are checked before it is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlfoundry.infra.core.errors import ConfigError

TASKS = ("itm", "itc", "itg")
"""matching, contrast and captioning"""
Averaging = Literal["token", "sample", "square"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Options of the contrastive loss."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: each picture and each caption chooses among all of the other kind (CLIP); sigmoid:
    each pair matches or not (SigLIP), with a bias that the model learns"""
    label_smoothing: float = 0.0
    """share of the target spread over all columns; softmax alone"""
    max_logit_scale: float | None = 100.0
    """ceiling of the inverse temperature; None: none, as in the official code; softmax alone"""

    def __post_init__(self) -> None:
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}, but the sigmoid loss spreads no "
                'target; leave it at 0, or use loss "softmax"'
            )

    def require_softmax(self, option: str) -> None:
        """Refuse the sigmoid loss where it is not meant.

        Raises:
            ConfigError: `option` asks for it.
        """
        if self.loss != "softmax":
            raise ConfigError(
                f'{option}.loss is {self.loss!r}; expected "softmax": the sigmoid loss, and the '
                "bias that it learns, are stage 1's alone"
            )


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Options of the next-token loss."""

    averaging: Averaging = "token"
    """weight of a token in a row of x labelled ones: 1, 1/x or 1/sqrt(x)"""
    global_mean: bool = True
    """divide by the weights of all ranks, so that the number of ranks changes nothing"""


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig:
    """Options of the three losses."""

    negatives: Literal["given", "random", "hard"] = "random"
    """ITM's wrong captions: the batch's own, or one of the wrong captions of all ranks' samples:
    any, or the most similar by the stage-1 towers"""
    heads: Literal["queries", "both"] = "queries"
    """ITC's embeddings of pictures: QLLaMA's, or the mean of the losses of these and of the vision
    tower's own, which keeps a text tower that is trained in touch with it (one that is frozen
    learns nothing from that)"""
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    """of each loss in their sum; 0 leaves a task out of it"""
    empty_summary_tokens: int = 5
    """an ITC text of this many tokens is empty: begin, the prefix, end"""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """of ITC"""
    next_token: NextTokenConfig = field(default_factory=NextTokenConfig)
    """of ITG"""

    def __post_init__(self) -> None:
        self.contrastive.require_softmax("generative.objective.contrastive")
        values = self.weights.values()
        if set(self.weights) != set(TASKS) or min(values) < 0 or not any(values):
            raise ConfigError(
                f"generative.objective.weights is {self.weights}; expected a number from 0 for "
                f"each of {', '.join(TASKS)}, one of them above 0"
            )
