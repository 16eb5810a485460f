"""Stage 3: the vision tower joins a language model through an MLP. Makes the two chat models.

`simple` gives the language model InternViT's tokens; `full` goes on from there and gives it
QLLaMA's query outputs as well. Questions are asked about scenes composed from the funnel's
pictures, so every answer is known exactly; chat files of `data/chat` may join them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlfoundry.infra.core.config import check_languages, check_ranges
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.stage import Context, Stage, check_folders, main
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.images.bulk import decode_rgba, uniforms
from vlfoundry.infra.data.shards.packing import pack
from vlfoundry.infra.data.shards.read import ShardSet, rank_slice
from vlfoundry.infra.data.synthetic.scenes import (
    KINDS,
    Drawing,
    Scene,
    check_box_grid,
    compose,
    conversation,
    pick,
)
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.session import DataParallelSlice, Job, loss_plot, train
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.init_from import InitPlan, plan_init
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.models.layers.config import LoraConfig
from vlfoundry.models.objectives.options import NextTokenConfig

if TYPE_CHECKING:
    import torch

    from vlfoundry.models.chat.dialogue import Dialogue
    from vlfoundry.models.chat.examples import Example
    from vlfoundry.models.chat.stream import ConversationStream

SHARDS = "artifacts/shard/stage2"
CHAT_DATA = "data/chat"
HISTORY = "artifacts/sft/{variant}/history.json"
LOSS = loss_plot(HISTORY, "sft@{variant}")
SCENES = "scenes"
"""the source of questions that needs no file"""
TOWERS = ("vision", "text", "language")
"""what can have adapters"""
KIND = {"simple": "chat_simple", "full": "chat_full"}
WRITES = {"simple": "language", "full": "chat"}
"""which folder of `start` has the language model, and with it the tokenizer"""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of conversations."""

    weight: float | None = None
    """how often it comes, relatively; None: the square root of how many conversations it has"""
    root: str | None = None
    """folder or URL that its pictures are relative to; None: where its file lies"""


@dataclass(frozen=True, kw_only=True)
class SimpleStart:
    """What Chat simple starts from."""

    vision: str = "artifacts/contrastive/model"
    """a model with a vision tower"""
    language: str = "artifacts/pretrain_text/model"
    """a chat model, whose connector goes on too, or a text model; its tokenizer stays"""

    def __post_init__(self) -> None:
        check_folders("sft.start.simple", self)


@dataclass(frozen=True, kw_only=True)
class FullStart:
    """What Chat full starts from."""

    qllama: str = "artifacts/generative/model"
    """an InternVL-G, or a Chat full to go on from"""
    chat: str = "artifacts/sft/simple/model"
    """a chat model: vision tower, connectors, language model; its tokenizer stays"""

    def __post_init__(self) -> None:
        check_folders("sft.start.full", self)


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What each variant starts from."""

    simple: SimpleStart = field(default_factory=SimpleStart)
    full: FullStart = field(default_factory=FullStart)

    def folders(self, variant: str | None) -> dict[str, str]:
        """Of one variant, by what they are for."""
        return asdict(self.full if variant == "full" else self.simple)


@dataclass(frozen=True, kw_only=True)
class SftStageConfig:
    """Options of stage 3."""

    train: dict[str, TrainConfig]
    """for each variant optimizer and schedule; a sample is one scene with one question"""
    start: StartConfig = field(default_factory=StartConfig)
    """folders whose parts the model starts from (models.internvl.init_from)"""
    trainable: tuple[str, ...] = ("sft", "vision")
    """what is trained (models.internvl.freeze)"""
    lora: dict[str, LoraConfig] = field(default_factory=dict)
    """adapters of vision, text (QLLaMA's base) and language; `trainable` has to name them"""
    mix: dict[str, float] = field(default_factory=lambda: {"colour": 1, "box": 2, "caption": 1})
    """kinds of questions and how often each comes, relatively"""
    begins: dict[str, dict[str, float]] = field(default_factory=dict)
    """for a variant the share of its run after which a kind joins the mix; others are in it from
    the start"""
    objects: tuple[float, ...] = (1.0,)
    """how often a scene has 1, 2, ... objects, relatively; box and position always ask about one"""
    sources: dict[str, SourceConfig] = field(
        default_factory=lambda: {SCENES: SourceConfig(weight=1.0)}
    )
    """what conversations are taken from: "scenes", and files of data/chat without their .jsonl"""
    max_tokens: int = 4096
    """longest conversation of a file"""
    max_tiles: int | None = None
    """most tiles of a picture, or of all pictures of a conversation; a thumbnail comes on top;
    None: model.pictures.max_tiles"""
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    """how answer tokens are weighted"""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sft.sources is empty; expected e.g. {scenes: {weight: 1}}")
        check_ranges("sft", self, whole=("max_tokens", "max_tiles"))
        check_ranges("sft.mix", self.mix, from_zero=tuple(self.mix))
        for variant, begins in self.begins.items():
            check_ranges(f"sft.begins.{variant}", begins, shares=tuple(begins))
        for name, source in self.sources.items():
            check_ranges(f"sft.sources.{name}", source, above_zero=("weight",))
        if SCENES in self.sources and self.sources[SCENES].weight is None:
            raise ConfigError(
                "sft.sources.scenes has no weight; expected a number: there is no end of scenes"
            )
        unknown = sorted(set(self.mix) - set(KINDS))
        if unknown:
            raise ConfigError(f"sft.mix: no question kind {unknown}; known: {list(KINDS)}")
        if set(self.train) != set(KIND):
            raise ConfigError(f"sft.train has {sorted(self.train)}, expected {sorted(KIND)}")
        if not self.mix or sum(self.mix.values()) <= 0 or sum(self.objects) <= 0:
            raise ConfigError("sft.mix and sft.objects need at least one positive weight")
        if not set(self.lora) <= set(TOWERS):
            raise ConfigError(f"sft.lora names {sorted(self.lora)}; expected some of {TOWERS}")
        if self.lora and "lora" not in self.trainable:
            raise ConfigError(
                f"sft.lora is set, but sft.trainable is {list(self.trainable)}: the adapters would "
                'stay as they are; expected e.g. ["lora", "connector"]'
            )
        for variant, begins in self.begins.items():
            if variant not in KIND or not set(begins) <= set(KINDS):
                raise ConfigError(
                    f"sft.begins.{variant} names {sorted(begins)}; expected kinds of questions "
                    f"({', '.join(KINDS)}) under one of {sorted(KIND)}"
                )
            if not any(begins.get(kind, 0) <= 0 < weight for kind, weight in self.mix.items()):
                raise ConfigError(
                    f"sft.begins.{variant} leaves nothing to ask at the start; "
                    "let at least one kind of sft.mix begin at 0"
                )

    def weights(self, variant: str, progress: float) -> dict[str, float]:
        """How often each kind comes at a share `progress` of the run."""
        begins = self.begins.get(variant, {})
        return {kind: w for kind, w in self.mix.items() if begins.get(kind, 0.0) <= progress}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `sft` reads from params.yaml."""

    seed: int
    languages: tuple[str, ...]
    box_grid: int
    model: InternVLConfig
    sft: SftStageConfig

    def __post_init__(self) -> None:
        check_languages(self.languages)
        check_box_grid(self.box_grid)


def run(config: Config, context: Context) -> None:
    """Train one of the chat models."""
    assert context.variant
    folder = f"artifacts/sft/{context.variant}"
    _start(config, context).announce(context.log, context.record)
    train(
        context,
        config.sft.train[context.variant],
        lambda place: _job(config, context, place),
        check=partial(check_layout, f"chat_{context.variant}", config.model),
        model_folder=f"{folder}/model",
        history=HISTORY.format(variant=context.variant),
    )


def architecture(config: Config) -> InternVLConfig:
    """The new model; its folder says how it was given pictures, so that it is asked alike."""
    lora, most = config.sft.lora, config.sft.max_tiles
    model = config.model.with_lora(**lora) if lora else config.model
    return model if most is None else model.with_tiles(most)


def _start(config: Config, context: Context) -> InitPlan:
    folders = config.sft.start.folders(context.variant)
    return plan_init(context.bound.address, architecture(config), folders, context.root)


class SceneQuestions:
    """The endless supply of scenes with questions; sample g depends on (seed, g) alone.

    Args:
        shards: pictures and their names.
        config: which questions are asked.
        variant: of stage 3, whose run the questions are for.
        languages: in which they are asked.
        box_grid: on how many lines a side boxes are told.
        seed: of everything drawn.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: SftStageConfig,
        variant: str,
        languages: tuple[str, ...],
        *,
        box_grid: int,
        seed: int,
    ) -> None:
        self._config, self._variant = config, variant
        self._languages, self._box_grid, self._seed = languages, box_grid, seed
        train = config.train[variant]
        self._samples = train.samples
        self._names: dict[str, dict[str, str]] = {}
        pictures: dict[tuple[str, str], bytes] = {}
        for sample in shards:
            meta = sample.meta
            if meta.get("kind", "name") != "name":
                continue
            self._names.setdefault(meta["concept"], {}).setdefault(meta["lang"], meta["caption"])
            pictures.setdefault((meta["concept"], meta["source"]), sample.image_bytes)
        self._drawings = [
            Drawing(concept=concept, rgba=rgba, names=self._names[concept])
            for (concept, _), data in sorted(pictures.items())
            if (rgba := decode_rgba(data))[..., 3].any()
        ]
        if not self._drawings:
            raise DataError(f"{shards.folder} has no picture to compose scenes from")

    def sample(self, index: int, size_px: int) -> tuple[Scene, str, str]:
        """Scene, question and answer number `index`."""
        own = stream_seed(self._seed, Stream.SCENES)
        draws = uniforms(own, [(0, index)], 3)[0]
        rng = np.random.Generator(np.random.Philox(key=[own, index]))
        mix = self._config.weights(self._variant, index / self._samples)
        kind = pick(mix, draws[0])
        one = kind in ("box", "position")
        count = 1 if one else pick(dict(enumerate(self._config.objects, 1)), draws[1])
        drawings = [self._drawings[int(i)] for i in rng.integers(len(self._drawings), size=count)]
        spoken = [
            lang for lang in self._languages if all(lang in drawing.names for drawing in drawings)
        ]
        scene = compose(rng, drawings, size_px)
        if not spoken:  # no language names them all: ask what needs no name
            kind, spoken = "colour", list(self._languages)
        lang = spoken[int(draws[2] * len(spoken))]
        names = {drawing.concept: drawing.names.get(lang, "") for drawing in drawings}
        return scene, *conversation(scene, kind, lang, names, box_grid=self._box_grid)


def _stream(config: Config, context: Context, dialogue: Dialogue) -> ConversationStream:
    """Scenes and chat files, as the config mixes them."""
    from vlfoundry.models.chat.examples import Conversations, Example
    from vlfoundry.models.chat.stream import ConversationStream
    from vlfoundry.models.internvl.prompts import IGNORE

    assert context.variant
    options, kind = config.sft, KIND[context.variant]
    tokens, size_px = config.model.visual_tokens(kind), config.model.vision.image_px
    questions = SceneQuestions(
        ShardSet(context.path(SHARDS)),
        options,
        context.variant,
        config.languages,
        box_grid=config.box_grid,
        seed=config.seed,
    )

    def scene(number: int) -> Example:
        drawn, *pair = questions.sample(number, size_px)
        prompt, answer = dialogue.exchange(*pair, visual_tokens=tokens)
        return Example(
            ids=prompt + answer,
            labels=[IGNORE] * len(prompt) + answer,
            tiles=1,
            pictures=lambda: drawn.image[None],
        )

    sources = {
        name: scene
        if name == SCENES
        else Conversations(
            context.path(CHAT_DATA) / f"{name}.jsonl",
            source.root,
            dialogue,
            tiling=architecture(config).pictures.tiling(size_px),
            tile_tokens=tokens,
            max_tokens=options.max_tokens,
        )
        for name, source in options.sources.items()
    }
    weights = {name: source.weight for name, source in options.sources.items()}
    return ConversationStream(sources, weights, seed=config.seed)


def _job(config: Config, context: Context, place: DataParallelSlice) -> Job:
    import torch

    from vlfoundry.models.chat.examples import packed, padded
    from vlfoundry.models.internvl.freeze import freeze
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.internvl.predict import load_tokenizer, save_model
    from vlfoundry.models.layers.draws import drop_samples
    from vlfoundry.models.objectives.next_token import ChatObjective
    from vlfoundry.models.preprocess.normalize import normalize_uint8

    assert context.variant
    options, kind = config.sft, KIND[context.variant]
    batch = options.train[context.variant].batch_samples
    folders = options.start.folders(context.variant)
    tokenizer = load_tokenizer(context.path(folders[WRITES[context.variant]]))
    dialogue = tokenizer.dialogue
    made = architecture(config)
    model = build(kind, made, seed=config.seed)
    _start(config, context).fill(model, context.root)
    freeze(model, options.trainable)
    stream = _stream(config, context, dialogue)

    def tensors(made: dict[str, np.ndarray]) -> dict[str, Any]:
        found = {name: torch.from_numpy(values) for name, values in made.items()}
        return {**found, "context_id": dialogue.context_id}

    def dropped(numbers: Iterable[int], examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """What drop path draws by, if there is any: a number for each tile."""
        if not config.model.vision.drop_path:
            return {}
        places = [
            (tile, number)
            for number, example in zip(numbers, examples, strict=True)
            for tile in range(example.tiles)
        ]
        return {"samples": drop_samples(config.seed, places)}

    def padded_at(step: int) -> dict[str, Any]:
        first, count = rank_slice(step, batch, place.rank, place.ranks)
        examples = stream.take(first, count)
        numbers = range(first, first + count)
        return {**tensors(padded(examples, tokenizer.pad_id)), **dropped(numbers, examples)}

    def packed_at(step: int) -> dict[str, Any]:
        """Every rank looks at the whole step, so that all agree on its packs, and decodes the
        pictures of its own."""
        assert place.packing is not None
        examples = stream.take(step * batch, batch)
        packs = pack(
            [len(example.ids) for example in examples],
            [example.tiles for example in examples],
            place.packing,
            multiple=place.ranks * place.rounds,
        )[place.rank :: place.ranks]
        chosen = [i for members in packs for i in members]
        mine = [examples[i] for i in chosen]
        return {
            **tensors(packed(mine)),
            "packs": torch.tensor([len(members) for members in packs]),
            **dropped([step * batch + i for i in chosen], mine),
        }

    def finish(made: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in made.items() if name != "pictures"}
        return {**rest, "pixels": normalize_uint8(made["pictures"].numpy())}

    return Job(
        model=model,
        objective=ChatObjective(options.objective),
        batch_at=packed_at if place.packing else padded_at,
        finish=finish,
        save=lambda folder: save_model(folder, kind, made, model, tokenizer),
    )


STAGE = Stage(
    name="sft",
    config=Config,
    inputs=(SHARDS, CHAT_DATA),
    outputs=("artifacts/sft/{variant}/model", HISTORY, LOSS.path),
    plots=(LOSS,),
    run=run,
    timeout_s=14400,
    variants=tuple(KIND),
    start_parameters=lambda variant: tuple(
        f"sft.start.{variant}.{name}" for name in StartConfig().folders(variant)
    ),
    starts=lambda config, variant: tuple(config.sft.start.folders(variant).values()),
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
