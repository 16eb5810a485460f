"""Stage 1: InternViT from scratch and the LLaMA text tower, contrastively. Makes InternVL-C.

As in the paper half of the patches are masked (FLIP) for most of the run and none for the last
part; the text tower starts from text pre-training at a lower learning rate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.stage import Context, Stage, check_folders, main
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.images.bulk import AugmentConfig, augment, check_augment, uniforms
from vlfoundry.infra.data.shards.pairs import PairStream
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.session import DataParallelSlice, Job, loss_plot, train
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.init_from import InitPlan, plan_init
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.models.objectives.options import ContrastiveConfig

SHARDS = "artifacts/shard/stage1"
MODEL = "artifacts/contrastive/model"
HISTORY = "artifacts/contrastive/history.json"
LOSS = loss_plot(HISTORY, "contrastive")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What stage 1 starts from."""

    model: str = "artifacts/pretrain_text/model"
    """a text model, or a model of both towers to go on from; its tokenizer stays"""

    def __post_init__(self) -> None:
        check_folders("contrastive.start", self)


@dataclass(frozen=True, kw_only=True)
class ContrastiveStageConfig:
    """Options of stage 1."""

    train: TrainConfig
    """optimizer and schedule; a sample is one picture with its captions"""
    start: StartConfig = field(default_factory=StartConfig)
    """folder whose parts the model starts from (models.internvl.init_from)"""
    captions: int = 4
    """captions that each picture learns from in one step, each beside all other pictures' """
    max_tokens: int = 32
    """longest caption, special tokens included (80 in the paper); a longer one is cut"""
    mask_ratio: float = 0.5
    """share of the patches left out (FLIP)"""
    masked_px: int | None = None
    """side of the pictures while patches are left out (196 in the paper); None: the model's"""
    unmasked_share: float = 0.1
    """last share of the steps, in which nothing is masked"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """how pictures vary"""
    objective: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """options of the loss"""

    def __post_init__(self) -> None:
        whole, shares = ("captions", "max_tokens"), ("mask_ratio", "unmasked_share")
        check_ranges("contrastive", self, whole=whole, shares=shares)
        check_augment("contrastive.augment", self.augment)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `contrastive` reads from params.yaml."""

    seed: int
    model: InternVLConfig
    contrastive: ContrastiveStageConfig

    def __post_init__(self) -> None:
        side, patch = self.contrastive.masked_px, self.model.vision.patch_px
        if side is not None and (side < patch or side % patch):
            raise ConfigError(
                f"contrastive.masked_px is {side}, expected a multiple of {patch}, the side of a "
                "patch (model.vision.patch_px)"
            )


def run(config: Config, context: Context) -> None:
    """Train both towers on the funnel's pairs."""
    _start(config, context).announce(context.log, context.record)
    train(
        context,
        config.contrastive.train,
        lambda place: job(config, context, place),
        check=partial(check_layout, "internvl_c", config.model),
        model_folder=MODEL,
        history=HISTORY,
    )


def _architecture(config: Config) -> InternVLConfig:
    with_bias = config.contrastive.objective.loss == "sigmoid"
    return config.model.for_sigmoid() if with_bias else config.model


def _start(config: Config, context: Context) -> InitPlan:
    folders = asdict(config.contrastive.start)
    return plan_init("contrastive", _architecture(config), folders, context.root)


def kept_patches(
    seed: int, positions: list[tuple[int, int]], patches: int, mask_ratio: float
) -> np.ndarray:
    """Which patches each sample keeps: ascending indices, int64 [N, K].

    Depends on (seed, epoch, index) alone, as everything random about a sample does.
    """
    kept = max(1, round(patches * (1 - mask_ratio)))
    draws = uniforms(stream_seed(seed, Stream.MASKS), positions, patches)
    return np.sort(draws.argsort(1)[:, :kept], axis=1)


def job(config: Config, context: Context, place: DataParallelSlice) -> Job:
    """What a rank trains, in `infra.backend.parallel`."""
    import torch

    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.internvl.predict import load_tokenizer, save_model
    from vlfoundry.models.internvl.prompts import SUMMARIZE
    from vlfoundry.models.layers.draws import drop_samples
    from vlfoundry.models.objectives.contrastive import Contrastive
    from vlfoundry.models.preprocess.normalize import normalize_float

    options, vision = config.contrastive, config.model.vision
    shards, masked_px = ShardSet(context.path(SHARDS)), options.masked_px or vision.image_px
    streams = {
        size_px: PairStream(shards, seed=config.seed, size_px=size_px, captions=options.captions)
        for size_px in {vision.image_px, masked_px}
    }
    tokenizer = load_tokenizer(context.path(options.start.model))
    architecture = _architecture(config)
    model = build("internvl_c", architecture, seed=config.seed)
    _start(config, context).fill(model, context.root)
    unmasked_from = round(options.train.steps * (1 - options.unmasked_share))

    def batch_at(step: int) -> dict[str, torch.Tensor]:
        masked = bool(options.mask_ratio) and step < unmasked_from
        size_px = masked_px if masked else vision.image_px
        batch = streams[size_px].take(step, options.train.batch_samples, place.rank, place.ranks)
        pictures = augment(
            batch.rgba, config.seed, batch.positions, options.augment, size_px=size_px
        )
        ids, mask = tokenizer.encode_batch(
            batch.captions, prefix=SUMMARIZE, max_tokens=options.max_tokens
        )
        tensors = {
            "pixels": normalize_float(pictures),
            "ids": torch.from_numpy(ids),
            "mask": torch.from_numpy(mask),
        }
        if vision.drop_path:
            tensors["samples"] = drop_samples(config.seed, batch.positions)
        if masked:
            patches = (size_px // vision.patch_px) ** 2
            kept = kept_patches(config.seed, batch.positions, patches, options.mask_ratio)
            tensors["kept"] = torch.from_numpy(kept)
        return tensors

    return Job(
        model=model,
        objective=Contrastive(options.objective),
        batch_at=batch_at,
        save=lambda folder: save_model(folder, "internvl_c", architecture, model, tokenizer),
    )


STAGE = Stage(
    name="contrastive",
    config=Config,
    inputs=(SHARDS,),
    outputs=(MODEL, HISTORY, LOSS.path),
    plots=(LOSS,),
    run=run,
    timeout_s=14400,
    start_parameters=lambda _variant: ("contrastive.start.model",),
    starts=lambda config, _variant: (config.contrastive.start.model,),
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
