"""Text pre-training: a byte-level tokenizer and a small multilingual LLaMA, from text alone.

Captions, and stage 3's questions with answers on scenes that nobody sees: with these it knows how
an answer reads, and stage 3 has only to learn what the picture says
(docs/decisions/007-how-boxes-are-learnt.md).

What it makes stands where Chinese-Alpaca-7B and Vicuna stand in the paper: it starts stage 1's
text tower, QLLaMA's base, and the chat models' language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vlfoundry.infra.core.config import check_languages, check_ranges
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.stage import Context, Stage, main
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.data.images.bulk import uniforms
from vlfoundry.infra.data.shards.read import SampleStream, ShardSet
from vlfoundry.infra.data.synthetic.scenes import (
    BOX_UNITS,
    KINDS,
    Scene,
    background_names,
    check_box_grid,
    conversation,
    format_box,
    imagine,
    pick,
)
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.session import DataParallelSlice, Job, loss_plot, train
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.models.objectives.options import NextTokenConfig

SHARDS = "artifacts/shard/stage1"
MODEL = "artifacts/pretrain_text/model"
HISTORY = "artifacts/pretrain_text/history.json"
LOSS = loss_plot(HISTORY, "pretrain_text")


@dataclass(frozen=True, kw_only=True)
class PretrainTextConfig:
    """Options of text pre-training."""

    train: TrainConfig
    """optimizer and schedule; a sample is one line of text"""
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    """how tokens are weighted"""
    max_tokens: int | None = None
    """longest caption, special tokens included; None: as long as the model sees. A question keeps
    its answer, however long. A batch is as wide as its longest row: a few long ones are dear"""
    whole_characters: bool = False
    """whether the tokenizer merges the bytes of a character before anything else, as far as
    characters take no more than half of the vocabulary: else a small model writes halves of them,
    and learns less of scripts that have many"""
    conversation_share: float = 0.0
    """share of samples that are a question of stage 3 with its answer; the others are captions"""
    conversation_mix: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    """kinds of questions and how often each comes, relatively"""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.conversation_mix) - set(KINDS))
        if unknown:
            raise ConfigError(
                f"pretrain_text.conversation_mix: no question kind {unknown}; known: {list(KINDS)}"
            )
        check_ranges("pretrain_text", self, whole=("max_tokens",), shares=("conversation_share",))
        mix = self.conversation_mix
        check_ranges("pretrain_text.conversation_mix", mix, from_zero=tuple(mix))
        if not any(mix.values()):
            raise ConfigError("pretrain_text.conversation_mix has no weight above 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `pretrain_text` reads from params.yaml."""

    seed: int
    languages: tuple[str, ...]
    box_grid: int
    model: InternVLConfig
    pretrain_text: PretrainTextConfig

    def __post_init__(self) -> None:
        check_languages(self.languages)
        check_box_grid(self.box_grid)


def run(config: Config, context: Context) -> None:
    """Train tokenizer and language model on the captions that the funnel kept."""
    shards = ShardSet(context.path(SHARDS))
    lines = corpus(shards, config.languages, config.box_grid)
    names = spoken_names(shards, config.languages)
    context.log(f"{len(lines)} distinct lines")
    train(
        context,
        config.pretrain_text.train,
        lambda place: job(config, lines, names, place),
        check=partial(check_layout, "text", config.model),
        model_folder=MODEL,
        history=HISTORY,
    )


def corpus(shards: ShardSet, languages: tuple[str, ...], box_grid: int) -> list[str]:
    """Distinct captions in shard order, then stage 3's wordings and the numbers of its boxes."""
    captions = [shards.meta(i)["caption"] for i in range(len(shards))]
    spoken = [text for lang in languages for text in wordings(lang)]
    boxes = [format_box((edge,) * 4) for edge in coordinates(box_grid)]
    return list(dict.fromkeys(captions + spoken + boxes))


def coordinates(box_grid: int) -> list[int]:
    """All that boxes are told by; each is to be one token, not three digits."""
    return [round(line * BOX_UNITS / box_grid) for line in range(box_grid + 1)]


def spoken_names(shards: ShardSet, languages: tuple[str, ...]) -> list[tuple[str, str]]:
    """(language, caption) of distinct names, as in stage 3, or captions where nothing has a name:
    what an imagined scene can show."""
    metas = [meta for i in range(len(shards)) if (meta := shards.meta(i))["lang"] in languages]
    names = [meta for meta in metas if meta.get("kind", "name") == "name"]
    return list(dict.fromkeys((meta["lang"], meta["caption"]) for meta in names or metas))


def wordings(lang: str) -> list[str]:
    """The questions and answers of stage 3 in one language, around an object without a name."""
    blank = np.zeros((1, 1, 3), np.uint8)
    scenes = [
        Scene(image=blank, background=name, objects=(("", (0, 0, 500, 500)),))
        for name in background_names()
    ]
    pairs = [conversation(scene, kind, lang, {"": ""}) for kind in KINDS for scene in scenes]
    return list(dict.fromkeys(text.strip() for pair in pairs for text in pair))


def prefixed(lines: list[str]) -> list[str]:
    """Each line behind each fixed prompt, so that the tokenizer learns these as few tokens."""
    from vlfoundry.models.internvl.prompts import CAPTION_PROMPTS, SUMMARIZE

    prompts = (SUMMARIZE, *CAPTION_PROMPTS.values(), "\nUser:", "\nAssistant:")
    return [f"{prompt} {line}" for prompt in prompts for line in lines]


def imagined(
    config: PretrainTextConfig,
    names: list[tuple[str, str]],
    number: int,
    *,
    size_px: int,
    box_grid: int,
    seed: int,
) -> tuple[str, str] | None:
    """Question and answer of sample `number`; None where the sample is a caption."""
    own = stream_seed(seed, Stream.CONVERSATIONS)
    draws = uniforms(own, [(0, number)], 3)[0]
    if draws[0] >= config.conversation_share:
        return None
    kind = pick(config.conversation_mix, draws[1])
    lang, name = names[int(draws[2] * len(names))]
    rng = np.random.Generator(np.random.Philox(key=[own, number]))
    scene = imagine(rng, name, size_px)
    return conversation(scene, kind, lang, {name: name}, box_grid=box_grid)


def job(
    config: Config, lines: list[str], names: list[tuple[str, str]], place: DataParallelSlice
) -> Job:
    """What a rank trains, in `infra.backend.parallel`."""
    import torch

    from vlfoundry.models import tokenizer as tokenizers
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.internvl.predict import save_model
    from vlfoundry.models.internvl.prompts import labelled_rows
    from vlfoundry.models.objectives.next_token import TextObjective

    options, text = config.pretrain_text, config.model.text
    whole: list[str] = []
    if options.whole_characters:
        characters = tokenizers.wide_characters(lines, text.vocab_size // 2)
        whole = [*map(str, coordinates(config.box_grid)), *characters]
    tokenizer = tokenizers.train([*prefixed(lines), *lines], text.vocab_size, whole=whole)
    begin, end, dialogue = tokenizer.begin, tokenizer.eos_id, tokenizer.dialogue
    room = min(options.max_tokens or text.max_tokens, text.max_tokens)
    model = build("text", config.model, seed=config.seed)
    order = SampleStream(len(lines), config.seed)

    def batch_at(step: int) -> dict[str, torch.Tensor]:
        batch = options.train.batch_samples
        places = order.rank_indices(step, batch, place.rank, place.ranks)
        first = step * batch + place.rank * len(places)
        rows = []
        for number, (_, index) in enumerate(places, first):
            pair = imagined(
                options,
                names,
                number,
                size_px=config.model.vision.image_px,
                box_grid=config.box_grid,
                seed=config.seed,
            )
            if pair is None:
                learnt = tokenizer.encode(lines[index])[: room - len(begin) - 1]
                rows.append(([], [*begin, *learnt, end]))
            else:
                rows.append(dialogue.exchange(*pair, visual_tokens=0))
        ids, mask, labels = map(torch.from_numpy, labelled_rows(rows, tokenizer.pad_id))
        return {"ids": ids, "mask": mask, "labels": labels}

    return Job(
        model=model,
        objective=TextObjective(options.objective),
        batch_at=batch_at,
        save=lambda folder: save_model(folder, "text", config.model, model, tokenizer),
    )


STAGE = Stage(
    name="pretrain_text",
    config=Config,
    inputs=(SHARDS,),
    outputs=(MODEL, HISTORY, LOSS.path),
    plots=(LOSS,),
    run=run,
    timeout_s=14400,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
