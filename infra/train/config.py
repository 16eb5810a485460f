"""What a training run is asked to do. These are parameters of a stage; the layout is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.core.errors import ConfigError


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
    layer_decay: dict[str, float] = field(default_factory=dict)
    """for a tower ("vision", "text"; "" is the whole model) the factor from a block to the one
    below it; multiplies `lr_scale`"""
    warmup_steps: int = 0
    """steps of linear rise to `lr`"""
    warmup_ratio: float = 0.0
    """the same as a share of `steps`; one of the two"""
    schedule: Literal["cosine", "constant", "linear", "polynomial"] = "cosine"
    """after the warm-up"""
    power: float = 1.0
    """of the polynomial: lr * (1 - progress) ** power"""
    min_lr_ratio: float = 0.0
    """where the schedule ends, as a share of `lr`"""
    optimizer: Literal["adamw", "stable_adamw"] = "adamw"
    """stable_adamw shortens a tensor's step where its second moment lags behind its gradients"""
    beta1: float = 0.9
    """Adam's decay of the mean"""
    beta2: float = 0.98
    """Adam's decay of the square"""
    eps: float = 1e-6
    """Adam's addend in the denominator"""
    moments: Literal["fp32", "bf16"] = "fp32"
    """what Adam keeps both moments in; bf16 saves 6 bytes a trained parameter: 4 of the moments,
    and 2 as of masters only that is kept which bf16 weights lack of fp32; GPUs only"""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """what gradients are summed in, over micro-batches and ranks; bf16 saves 2 bytes, needs bf16
    moments, and wants few micro-batches; GPUs only"""
    weight_decay: float = 0.1
    """decoupled; never on norms, biases and other vectors"""
    decay_embeddings: bool = True
    """whether parameters with "embedding" in their name are decayed"""
    clip_grad: float = 1.0
    """largest gradient norm over all parameters; 0: no clipping"""
    ema_decay: float = 0.0
    """of a running mean of the weights, which then is the model that the run leaves; 0: none"""
    fp8: Fp8Config | None = None
    """train the transformer layers in FP8; None: in the device's own precision"""
    on_bad_step: Literal["stop", "skip", "rollback", "higher_precision"] = "stop"
    """what a loss or gradient norm that is not finite, or a spike, does: end the run, drop this
    update, go back to the last checkpoint and on with batches that were not seen yet, or go back
    and on without FP8 (on the same batches; a bad step after that is rolled back)"""
    spike_factor: float = 0.0
    """a loss beyond this many times the median of the last `spike_steps` is a spike; 0: none is"""
    spike_steps: int = 32
    """losses that the median is taken of; before there are so many nothing is a spike"""
    max_bad_steps: int = 10
    """bad steps of a run before it ends with an error"""
    save_every_steps: int = 100
    """steps between two checkpoints"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept"""
    keep_best: str = ""
    """term of the history ("loss"; "-accuracy": the larger the better) by whose mean since the
    checkpoint before one more is kept; empty: none"""
    log_every_steps: int = 50
    """steps between two lines of the log"""
    seed: int = 0
    """of dropout and of whatever else draws during training"""

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.gradients == "bf16" and self.moments != "bf16":
            raise ConfigError(
                "train.gradients is bf16 with train.moments fp32; the optimizer reads gradients in "
                "bf16 only where its moments are: set train.moments to bf16"
            )
        if self.moments == "bf16" and self.optimizer != "adamw":
            raise ConfigError(
                f"train.moments is bf16 with train.optimizer {self.optimizer}; expected adamw"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps} and train.warmup_ratio "
                f"{self.warmup_ratio}; expected one of the two"
            )
        if self.warmup > self.steps:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps}, more than train.steps {self.steps}; "
                "the peak learning rate would never be reached"
            )
        if self.on_bad_step == "higher_precision" and self.fp8 is None:
            raise ConfigError(
                "train.on_bad_step is higher_precision, but the run has no train.fp8 to leave; "
                "use rollback"
            )
        if self.spike_factor and self.spike_factor <= 1:
            raise ConfigError(
                f"train.spike_factor is {self.spike_factor}; expected more than 1, or 0 for none"
            )

    def _check_ranges(self) -> None:
        at_least_1 = ("steps", "batch_samples", "save_every_steps", "log_every_steps",
                      "spike_steps", "max_bad_steps", "keep_checkpoints")  # fmt: skip
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("lr", "eps", "power"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected more than 0")
        for name in ("warmup_steps", "weight_decay", "clip_grad", "spike_factor"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 0 <= it < 1")
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 0 to 1")
        for tower, rate in self.layer_decay.items():
            if not 0 < rate <= 1:
                raise ConfigError(f"train.layer_decay.{tower} is {rate}; expected 0 < it <= 1")

    @property
    def goes_back(self) -> bool:
        """Whether a bad step needs a checkpoint, so that there must be one before the first."""
        return self.on_bad_step in ("rollback", "higher_precision")

    @property
    def warmup(self) -> int:
        """Steps of the warm-up, however it is given."""
        return self.warmup_steps or round(self.warmup_ratio * self.steps)

    @property
    def samples(self) -> int:
        """Samples that the whole run sees, each epoch's again."""
        return self.steps * self.batch_samples

    def logs(self, done: int) -> bool:
        """Whether there is a line of the log after so many steps."""
        return done % self.log_every_steps == 0 or done == self.steps

    def samples_per_rank(self, data_ranks: int) -> int:
        """Batch of one data-parallel rank. Raises ConfigError if it does not divide."""
        if self.batch_samples % data_ranks:
            raise ConfigError(
                f"train.batch_samples {self.batch_samples} does not divide by {data_ranks} "
                f"data-parallel ranks; the nearest that does is "
                f"{max(1, round(self.batch_samples / data_ranks)) * data_ranks}"
            )
        return self.batch_samples // data_ranks
