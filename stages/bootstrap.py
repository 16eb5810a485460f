"""Score how well each caption fits its picture, with a small model that never saw the picture.

Vendors' families are split into two folds; the model that scores a fold was trained on the other
one alone, so no score is memory. What a picture shows is judged from its pixels and from what the
other records of the same or a very similar picture say (`models/scorer/evidence.py`); `score_alone`
is the score from the pixels only.

A score is the share of random pairings, of the same language and kind, that fit worse: for a
shuffled caption it is spread evenly over 0..1, for a true one it is close to 1. That gives a
threshold a meaning (see `stages/filter.py`).
"""

import importlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.forked import run_forked
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Plot, Stage, main
from vlfoundry.infra.core.tables import read_table, write_table
from vlfoundry.infra.data.images.bulk import decode_batch, hog_features
from vlfoundry.infra.data.sources.concept_set import hash64

INGEST = "artifacts/ingest"
OUT = "artifacts/bootstrap"
LOSS = Plot(
    path=f"{OUT}/loss.json", x="step", y="loss", title="loss of bootstrap, mean of its folds"
)
FOLDS = 2
FEATURE_BATCH = 256
SCORES = ("similarity", "score", "score_alone")


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """The scorer and its training."""

    steps: int = 600
    """Optimizer steps of each fold."""
    batch_samples: int = 256
    """Records in a batch."""
    lr: float = 3e-3
    """Peak learning rate (cosine to zero)."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    warmup_steps: int = 30
    """Steps of linear warm-up."""
    vocabulary: int = 4000
    """Largest number of tokens of the scorer's BPE."""
    token_width: int = 192
    """Width of a token embedding."""
    hidden: int = 512
    """Width of the middle layer of each tower."""
    width: int = 192
    """Width of the shared space."""
    dropout: float = 0.4
    """Dropout of picture features and hidden units."""
    context_weight: float = 1.0
    """Weight of what other records say of a picture, against its pixels (0: pixels alone)."""

    def __post_init__(self) -> None:
        check_ranges(
            "bootstrap",
            self,
            whole=("vocabulary", "token_width", "hidden", "width"),
            above_zero=("lr",),
            from_zero=("weight_decay", "warmup_steps", "context_weight"),
            shares=("dropout",),
        )
        if self.steps < 1 or self.batch_samples < 2:
            raise ConfigError(
                f"bootstrap needs at least 1 step and 2 samples a batch, "
                f"got {self.steps} and {self.batch_samples}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `bootstrap` reads from params.yaml."""

    seed: int
    """Seed of weights, order of samples and random pairings."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The records as arrays. N records, U distinct pictures, C distinct captions, F features."""

    features: np.ndarray
    """float32 [U, F]."""
    image: np.ndarray
    """int64 [N], row of `features`."""
    caption: np.ndarray
    """int64 [N], index into the token lists."""
    tokens: np.ndarray
    """int64, the token ids of all captions in a row."""
    starts: np.ndarray
    """int64 [C + 1], where each caption's tokens begin."""
    group: np.ndarray
    """int64 [N]: language and kind; random pairings stay inside one."""
    vocabulary: int


def run(config: Config, context: Context) -> None:
    """Featurise, train the folds side by side, score, write."""
    columns = ["row", "image_id", "caption", "lang", "kind", "family"]
    records = read_table(context.path(f"{INGEST}/records.parquet"), columns).to_pydict()
    fold = assign_folds(records["family"])
    corpus = _corpus(config, context, records)
    # Imported before the fork, so that it is paid once; nothing is computed with it here, for
    # torch's threads would not survive the fork.
    importlib.import_module("vlfoundry.models.scorer.model")
    results = run_forked(
        {
            f"the worker of fold {number + 1}": partial(_fold, config, corpus, fold, number)
            for number in range(FOLDS)
        }
    )
    scores = {name: np.empty(len(fold), np.float32) for name in SCORES}
    for number, (columns, _) in enumerate(results):
        for name in SCORES:
            scores[name][fold == number] = columns[name]
    write_table(
        context.output(f"{OUT}/scores.parquet"),
        {"row": np.asarray(records["row"]), "fold": fold.astype(np.int8), **scores},
    )
    histories = [history for _, history in results]
    context.write_json(f"{OUT}/metrics.json", _metrics(context, records, scores, histories))
    context.write_json(LOSS.path, _mean_loss(histories))


def assign_folds(families: list[str]) -> np.ndarray:
    """The fold of each record: whole families, as even as can be. [N] int64."""
    counts = Counter(families)
    if len(counts) < FOLDS:
        raise DataError(
            f"cross-fitting needs drawings of {FOLDS} families, got {sorted(counts)}; "
            "add sources to ingest.train_sources"
        )
    sizes, place = [0] * FOLDS, {}
    for family, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        place[family] = int(np.argmin(sizes))
        sizes[place[family]] += count
    return np.array([place[family] for family in families])


def _corpus(config: Config, context: Context, records: dict[str, list[Any]]) -> Corpus:
    captions = sorted(set(records["caption"]))
    tokenizer = _train_tokenizer(captions, config.bootstrap.vocabulary)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(captions)]
    position = {caption: i for i, caption in enumerate(captions)}
    image_ids, image = np.unique(records["image_id"], return_inverse=True)
    keys = [f"{lang}/{kind}" for lang, kind in zip(records["lang"], records["kind"], strict=True)]
    return Corpus(
        features=_features(context, image_ids.tolist()),
        image=image.astype(np.int64),
        caption=np.array([position[caption] for caption in records["caption"]]),
        tokens=np.array([token for ids in encoded for token in ids], np.int64),
        starts=np.cumsum([0, *map(len, encoded)]),
        group=np.unique(keys, return_inverse=True)[1].astype(np.int64),
        vocabulary=tokenizer.get_vocab_size(),
    )


def _train_tokenizer(captions: list[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _features(context: Context, image_ids: list[str]) -> np.ndarray:
    table = read_table(context.path(f"{INGEST}/images.parquet"), ["image_id", "bytes"])
    stored = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    batches = []
    with Progress(len(image_ids), unit="pictures", label="bootstrap features") as progress:
        for start in range(0, len(image_ids), FEATURE_BATCH):
            part = image_ids[start : start + FEATURE_BATCH]
            batches.append(hog_features(decode_batch([stored[i] for i in part], 64, part)))
            progress.update(len(part))
    return np.concatenate(batches)


def _fold(
    config: Config, corpus: Corpus, fold: np.ndarray, number: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Train on all other folds, score this one: (score columns, history)."""
    import torch

    torch.manual_seed(hash64(config.seed, "bootstrap", number) % 2**63)
    model, history = _train(config, corpus, np.flatnonzero(fold != number), number)
    return _score(config, corpus, model, np.flatnonzero(fold == number)), history


def _train(
    config: Config, corpus: Corpus, rows: np.ndarray, number: int
) -> tuple[Any, dict[str, Any]]:
    import torch

    from vlfoundry.models.scorer.adamw import AdamW
    from vlfoundry.models.scorer.model import Scorer, ScorerConfig

    settings = config.bootstrap
    shape = ScorerConfig(
        token_width=settings.token_width,
        hidden=settings.hidden,
        width=settings.width,
        dropout=settings.dropout,
    )
    model = Scorer(shape, corpus.features.shape[1], corpus.vocabulary)
    # The temperature starts at 1, where the loss is ln(batch), and must get to about 15 soon.
    scales = [20.0 if name == "logit_scale" else 1.0 for name, _ in model.named_parameters()]
    optimizer = AdamW(list(model.parameters()), settings.weight_decay)
    features = torch.from_numpy(corpus.features)
    rng = np.random.default_rng(hash64(config.seed, "bootstrap order", number))
    batch, losses = min(settings.batch_samples, len(rows)), []
    order = np.empty(0, np.int64)
    label = f"bootstrap fold {number + 1}"
    with Progress(settings.steps, unit="steps", label=label, enabled=number == 0) as progress:
        for step in range(settings.steps):
            if len(order) < batch:
                order = rng.permutation(rows)
            chosen, order = order[:batch], order[batch:]
            images = model.embed_images(features[corpus.image[chosen]])
            texts = model.embed_texts(*_bag(corpus, corpus.caption[chosen]))
            loss = model.loss(images, texts, _same(corpus, chosen))
            loss.backward()
            lr = settings.lr * _schedule(step, settings)
            optimizer.step([lr * scale for scale in scales])
            losses.append(loss.item())
            progress.update(loss=f"{losses[-1]:.3f}")
    return model, {
        "batch_samples": batch,
        "loss": [round(value, 5) for value in losses],
        "trained_on_records": len(rows),
    }


def _schedule(step: int, settings: BootstrapConfig) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _bag(corpus: Corpus, captions: np.ndarray) -> tuple[Any, Any]:
    """The tokens of some captions in a row, and where each begins."""
    import torch

    parts = [corpus.tokens[corpus.starts[c] : corpus.starts[c + 1]] for c in captions]
    offsets = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(offsets)


def _same(corpus: Corpus, rows: np.ndarray) -> Any:
    """Pairs in a batch that share a picture or a caption: they are no negatives. [B, B] bool."""
    import torch

    images, captions = corpus.image[rows], corpus.caption[rows]
    same = (images[:, None] == images[None]) | (captions[:, None] == captions[None])
    np.fill_diagonal(same, False)
    return torch.from_numpy(same)


def _score(config: Config, corpus: Corpus, model: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Similarity and score of the records `rows`; see the head of this file."""
    import torch

    from vlfoundry.models.scorer import evidence

    model.eval()
    used, image = np.unique(corpus.image[rows], return_inverse=True)
    features, caption = corpus.features[used], corpus.caption[rows]
    with torch.no_grad():
        images = model.embed_images(torch.from_numpy(features)).numpy()
        texts = model.embed_texts(*_bag(corpus, np.arange(len(corpus.starts) - 1))).numpy()
    pictures = evidence.picture_vectors(
        features, images, texts, image, caption, config.bootstrap.context_weight
    )
    groups = corpus.group[rows]
    partners = evidence.random_partners(groups, hash64(config.seed, "partners"))
    columns = {
        "similarity": np.einsum("nd,nd->n", pictures, texts[caption]),
        "score": np.empty(len(rows)),
        "score_alone": np.empty(len(rows)),
    }
    for name, vectors in (("score", pictures), ("score_alone", images[image])):
        for value in np.unique(groups):
            inside = np.flatnonzero(groups == value)
            around = vectors[inside], texts[np.unique(caption[inside])]
            true = evidence.contrast(vectors[inside], texts[caption[inside]], *around)
            other = texts[caption[partners[inside]]]
            null = evidence.contrast(vectors[inside], other, *around)
            columns[name][inside] = evidence.share_below(true, null)
    return {name: column.astype(np.float32) for name, column in columns.items()}


def _metrics(
    context: Context,
    records: dict[str, list[Any]],
    scores: dict[str, np.ndarray],
    histories: list[dict[str, Any]],
) -> dict[str, Any]:
    """How well the score tells shuffled captions from true ones; the truth is only read here."""
    truth = read_table(context.path(f"{INGEST}/truth.parquet"), ["noise"]).to_pydict()["noise"]
    shuffled = np.array([noise == "shuffled" for noise in truth])
    score, by = scores["score"], defaultdict(dict)
    for column in ("lang", "kind", "family"):
        values = np.asarray(records[column])
        for value in sorted(set(records[column])):
            inside = values == value
            by[column][value] = round(_auc(score[inside & ~shuffled], score[inside & shuffled]), 4)
    return {
        "auc": round(_auc(score[~shuffled], score[shuffled]), 4),
        "auc_alone": round(
            _auc(scores["score_alone"][~shuffled], scores["score_alone"][shuffled]), 4
        ),
        "auc_by": by,
        "ln_batch": round(math.log(histories[0]["batch_samples"]), 5),
        "loss_at_step_0": [history["loss"][0] for history in histories],
        "final_loss": [round(float(np.mean(h["loss"][-20:])), 5) for h in histories],
        "folds": histories,
    }


def _mean_loss(histories: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The curve that `dvc plots` draws: at each step the mean over the folds."""
    losses = zip(*(history["loss"] for history in histories), strict=True)
    return [{"step": step, "loss": round(fmean(of), 5)} for step, of in enumerate(losses)]


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a random positive scores above a random negative (ties count half)."""
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(negative))


STAGE = Stage(
    name="bootstrap",
    config=Config,
    inputs=tuple(f"{INGEST}/{name}.parquet" for name in ("records", "images", "truth")),
    outputs=(f"{OUT}/scores.parquet", f"{OUT}/metrics.json", LOSS.path),
    plots=(LOSS,),
    run=run,
    timeout_s=3600,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
