"""What a training run is asked to do. These are parameters of a stage; the layout is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from infra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, schedule and bookkeeping of one run."""

    steps: int
    """optimizer steps in all"""
    batch_samples: int
    """samples of one step over all ranks"""
    lr: float
    """peak learning rate"""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """factor on the learning rate of parameters whose name begins so; the longest match wins"""
    warmup_steps: int = 0
    """steps of linear rise to `lr`"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up"""
    min_lr_ratio: float = 0.0
    """where the cosine ends, as a share of `lr`"""
    beta1: float = 0.9
    """Adam's decay of the mean"""
    beta2: float = 0.98
    """Adam's decay of the square"""
    eps: float = 1e-6
    """Adam's addend in the denominator"""
    weight_decay: float = 0.1
    """decoupled; never on norms, biases and other vectors"""
    decay_embeddings: bool = True
    """whether parameters with "embedding" in their name are decayed"""
    clip_grad: float = 1.0
    """largest gradient norm over all parameters; 0: no clipping"""
    save_every_steps: int = 100
    """steps between two checkpoints"""
    log_every_steps: int = 50
    """steps between two lines of the log"""
    seed: int = 0
    """of dropout and of whatever else draws during training"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_samples", "save_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected more than 0")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 0 <= it < 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"train.min_lr_ratio is {self.min_lr_ratio}; expected 0 to 1")
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps}, more than train.steps {self.steps}; "
                "the peak learning rate would never be reached"
            )

    @property
    def samples(self) -> int:
        """Samples that the whole run sees, each epoch's again."""
        return self.steps * self.batch_samples

    def samples_per_rank(self, data_ranks: int) -> int:
        """Batch of one data-parallel rank. Raises ConfigError if it does not divide."""
        if self.batch_samples % data_ranks:
            raise ConfigError(
                f"train.batch_samples {self.batch_samples} does not divide by {data_ranks} "
                f"data-parallel ranks; the nearest that does is "
                f"{max(1, round(self.batch_samples / data_ranks)) * data_ranks}"
            )
        return self.batch_samples // data_ranks
