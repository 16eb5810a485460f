"""Text pre-training: a byte-level tokenizer and a small multilingual LLaMA, from captions alone.

What it makes stands where Chinese-Alpaca-7B and Vicuna stand in the paper: it starts stage 1's
text tower, QLLaMA's base, and the chat models' language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from infra.loader import SampleStream, ShardSet
from infra.scenes import BOX_UNITS, KINDS, Scene, background_names, conversation, format_box
from infra.stage import Context, Stage, main
from infra.train.config import TrainConfig
from infra.train.session import Job, Place, train
from models.internvl.config import InternVLConfig
from models.objectives.next_token import NextTokenConfig

SHARDS = "artifacts/shard/stage1"
MODEL = "artifacts/pretrain_text/model"
HISTORY = "artifacts/pretrain_text/history.json"


@dataclass(frozen=True, kw_only=True)
class PretrainTextConfig:
    """Options of text pre-training."""

    train: TrainConfig
    """optimizer and schedule; a sample is one line of text"""
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    """how tokens are weighted"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `pretrain_text` reads from params.yaml."""

    seed: int
    languages: tuple[str, ...]
    model: InternVLConfig
    pretrain_text: PretrainTextConfig


def run(config: Config, context: Context) -> None:
    """Train tokenizer and language model on the captions that the funnel kept."""
    lines = corpus(context.path(SHARDS), config.languages, config.model.vision.image_px)
    context.log(f"{len(lines)} distinct lines")
    train(
        context,
        config.pretrain_text.train,
        lambda place: _job(config, lines, place),
        model_folder=MODEL,
        history=HISTORY,
    )


def corpus(shards: Path, languages: tuple[str, ...], scene_px: int) -> list[str]:
    """Distinct captions in shard order, then the wordings of stage 3 and the numbers of its boxes.

    A coordinate that the tokenizer has seen is one token, not three digits.
    """
    shard_set = ShardSet(shards)
    captions = [shard_set.meta(i)["caption"] for i in range(len(shard_set))]
    spoken = [text for lang in languages for text in wordings(lang)]
    edges = [round(edge * BOX_UNITS / scene_px) for edge in range(scene_px + 1)]
    return list(dict.fromkeys(captions + spoken + [format_box((edge,) * 4) for edge in edges]))


def wordings(lang: str) -> list[str]:
    """The questions and answers of stage 3 in one language, around an object without a name."""
    import numpy as np

    blank = np.zeros((1, 1, 3), np.uint8)
    scenes = [
        Scene(image=blank, background=name, objects=(("", (0, 0, 500, 500)),))
        for name in background_names()
    ]
    pairs = [conversation(scene, kind, lang, {"": ""}) for kind in KINDS for scene in scenes]
    return list(dict.fromkeys(text.strip() for pair in pairs for text in pair))


def prefixed(lines: list[str]) -> list[str]:
    """Each line behind each fixed prompt, so that the tokenizer learns these as few tokens."""
    from models.internvl.prompts import CAPTION_PROMPTS, SUMMARIZE

    return [
        f"{prompt} {line}" for prompt in (SUMMARIZE, *CAPTION_PROMPTS.values()) for line in lines
    ]


def _job(config: Config, lines: list[str], place: Place) -> Job:
    import torch

    from models import tokenizer as tokenizers
    from models.internvl.load import save_model
    from models.internvl.model import build
    from models.objectives.next_token import TextObjective

    options, text = config.pretrain_text, config.model.text
    tokenizer = tokenizers.train([*prefixed(lines), *lines], text.vocab_size)
    model = build("text", config.model, seed=config.seed)
    order = SampleStream(len(lines), config.seed)

    def batch_at(step: int) -> dict[str, torch.Tensor]:
        places = order.rank_indices(step, options.train.batch_samples, place.rank, place.ranks)
        texts = [lines[index] for _, index in places]
        ids, mask = map(torch.from_numpy, tokenizer.encode_batch(texts, max_tokens=text.max_tokens))
        return {"ids": ids, "mask": mask}

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
    outputs=(MODEL, HISTORY),
    run=run,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
