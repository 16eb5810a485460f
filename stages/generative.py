"""Stage 2: QLLaMA's queries and cross-attention learn to read frozen InternViT. Makes InternVL-G.

Three losses of equal weight: image-text contrast, matching, and captioning, on the curated pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.config import check_ranges
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
from vlfoundry.models.objectives.options import GenerativeConfig

if TYPE_CHECKING:
    import torch

SHARDS = "artifacts/shard/stage2"
MODEL = "artifacts/generative/model"
HISTORY = "artifacts/generative/history.json"
LOSS = loss_plot(HISTORY, "generative")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What stage 2 starts from."""

    model: str = "artifacts/contrastive/model"
    """an InternVL-C, or an InternVL-G to go on from; its tokenizer stays"""
    head: str = "artifacts/pretrain_text/model"
    """the text tower's head onto words: of a text model, or the InternVL-G again"""

    def __post_init__(self) -> None:
        check_folders("generative.start", self)


@dataclass(frozen=True, kw_only=True)
class GenerativeStageConfig:
    """Options of stage 2."""

    train: TrainConfig
    """optimizer and schedule; a sample is one picture with one caption"""
    start: StartConfig = field(default_factory=StartConfig)
    """folders whose parts the model starts from (models.internvl.init_from)"""
    max_tokens: int = 32
    """longest caption, prompt and special tokens included; a longer one is cut"""
    group: str | None = "concept"
    """field of a sample's metadata; in matching, captions of two samples that have the same there
    are not wrong for each other's pictures, whatever their words; None: only the same words are
    not"""
    trainable: tuple[str, ...] = ("stage2",)
    """what is trained (models.internvl.freeze): as in the paper only what is new"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """how pictures vary"""
    objective: GenerativeConfig = field(default_factory=GenerativeConfig)
    """options of the three losses"""

    def __post_init__(self) -> None:
        check_ranges("generative", self, whole=("max_tokens",))
        check_augment("generative.augment", self.augment)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `generative` reads from params.yaml."""

    seed: int
    model: InternVLConfig
    generative: GenerativeStageConfig


def run(config: Config, context: Context) -> None:
    """Train the new parts on top of stage 1's frozen towers."""
    _start(config, context).announce(context.log, context.record)
    train(
        context,
        config.generative.train,
        lambda place: _job(config, context, place),
        check=partial(check_layout, "internvl_g", config.model),
        model_folder=MODEL,
        history=HISTORY,
    )


def _start(config: Config, context: Context) -> InitPlan:
    folders = asdict(config.generative.start)
    return plan_init("generative", config.model, folders, context.root)


def _job(config: Config, context: Context, place: DataParallelSlice) -> Job:
    import torch

    from vlfoundry.models.internvl.freeze import freeze
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.internvl.predict import load_tokenizer, save_model
    from vlfoundry.models.layers.draws import drop_samples
    from vlfoundry.models.objectives.generative import Generative
    from vlfoundry.models.preprocess.normalize import normalize_float

    options, size_px = config.generative, config.model.vision.image_px
    pairs = PairStream(ShardSet(context.path(SHARDS)), seed=config.seed, size_px=size_px)
    tokenizer = load_tokenizer(context.path(options.start.model))
    model = build("internvl_g", config.model, seed=config.seed)
    _start(config, context).fill(model, context.root)
    freeze(model, options.trainable)

    def batch_at(step: int) -> dict[str, Any]:
        batch = pairs.take(step, options.train.batch_samples, place.rank, place.ranks)
        pictures = augment(
            batch.rgba, config.seed, batch.positions, options.augment, size_px=size_px
        )
        texts = text_rows(tokenizer, batch.metas[0], options.max_tokens)
        if options.objective.negatives == "random":
            draws = uniforms(stream_seed(config.seed, Stream.NEGATIVES), batch.positions, 1)
            texts["draws"] = torch.from_numpy(draws[:, 0])
        if options.group is not None:
            texts["group"] = groups(batch.metas[0], options.group, batch.positions)
        if config.model.vision.drop_path:
            texts["samples"] = drop_samples(config.seed, batch.positions)
        return {"pixels": normalize_float(pictures), **texts}

    return Job(
        model=model,
        objective=Generative(options.objective),
        batch_at=batch_at,
        save=lambda folder: save_model(folder, "internvl_g", config.model, model, tokenizer),
    )


def groups(
    metas: list[dict[str, Any]], field: str, positions: list[tuple[int, int]]
) -> torch.Tensor:
    """A number for each sample [B], the same for those with the same text in `field`, on whichever
    rank; one without the field stands alone."""
    import torch

    from vlfoundry.infra.core.fingerprint import sha256_bytes

    names = [
        f"{field}={meta[field]}" if meta.get(field) else f"picture {picture}"
        for meta, (_, picture) in zip(metas, positions, strict=True)
    ]
    return torch.tensor([int(sha256_bytes(name.encode())[:15], 16) for name in names])


def text_rows(tokenizer: Any, metas: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    """The three forms in which stage 2 sees each caption: alone, summarised, and to be written."""
    import torch

    from vlfoundry.models.internvl.prompts import SUMMARIZE, caption_rows

    captions = [meta["caption"] for meta in metas]
    rows = {
        "positive": tokenizer.encode_batch(captions, max_tokens=max_tokens),
        "summary": tokenizer.encode_batch(captions, prefix=SUMMARIZE, max_tokens=max_tokens),
    }
    langs = [meta["lang"] for meta in metas]
    ids, mask, labels = caption_rows(tokenizer, captions, langs, max_tokens=max_tokens)
    tensors = {"caption_ids": ids, "caption_mask": mask, "caption_labels": labels}
    for name, (row_ids, row_mask) in rows.items():
        tensors |= {f"{name}_ids": row_ids, f"{name}_mask": row_mask}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


STAGE = Stage(
    name="generative",
    config=Config,
    inputs=(SHARDS,),
    outputs=(MODEL, HISTORY, LOSS.path),
    plots=(LOSS,),
    run=run,
    timeout_s=14400,
    start_parameters=lambda _variant: tuple(
        f"generative.start.{field.name}" for field in fields(StartConfig)
    ),
    starts=lambda config, _variant: tuple(asdict(config.generative.start).values()),
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
