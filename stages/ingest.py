"""Turn drawings and names into crawled records: one picture and one caption a row, with noise.

Reads a concept set (`data/`), chooses the classes, holds some concepts out entirely, pairs every
training drawing with its name and its keywords in each language, and then does to a known,
seeded share of the records what happens on the web. What was done is written to `truth.parquet`,
which no filter reads: it only serves to measure them.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlfoundry.infra.core.config import check_languages, check_ranges
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, main
from vlfoundry.infra.core.tables import write_table
from vlfoundry.infra.data.images.bulk import decode_rgba
from vlfoundry.infra.data.sources.concept_set import (
    Artwork,
    Concept,
    hash64,
    keyword_caption,
    read_artwork,
    read_concepts,
    stable_order,
)
from vlfoundry.infra.data.synthetic.noise import lossless, low_resolution, overlay_text, reencode

DATA = "data"
SOURCE_FILES = ("emojitwo", "fluent", "fluent_flat", "fxemoji", "noto", "noto_v1", "twemoji")
KINDS = ("name", "keywords")
CLEAN = ""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Shares of the clean records to which each thing happens; at most one to each."""

    shuffled: float = 0.2
    """The caption of another concept."""
    low_resolution: float = 0.1
    """A picture of 16-24 pixels, enlarged."""
    duplicate: float = 0.1
    """A second record with the same caption and the picture re-encoded."""
    overlay: float = 0.05
    """Text printed over the picture."""
    wrong_lang: float = 0.05
    """A false language tag."""

    def __post_init__(self) -> None:
        rates = vars(self)
        if min(rates.values()) < 0 or sum(rates.values()) > 1:
            raise ConfigError(f"noise rates must be >= 0 and add up to at most 1, got {rates}")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Which drawings become training records."""

    train_sources: tuple[str, ...]
    """Artwork files whose drawings are trained on."""
    families: dict[str, str] = field(default_factory=dict)
    """Source -> family, for sources that share a designer; others are a family of their own."""
    test_source: str
    """Artwork file that only evaluation looks at; a class needs a drawing there."""
    classes: int | None = 300
    """How many concepts to take (null: all that qualify)."""
    min_drawings: int = 6
    """Training drawings that a concept must have to qualify."""
    held_out: float = 0.08
    """Share of the classes of which no drawing is trained on."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def __post_init__(self) -> None:
        check_ranges("ingest", self, whole=("classes",), from_zero=("min_drawings",))
        if self.test_source in self.train_sources:
            raise ConfigError(f"test_source {self.test_source!r} is also in train_sources")
        for source in (*self.train_sources, self.test_source):
            if source not in SOURCE_FILES:
                raise ConfigError(
                    f"artwork source {source!r} is unknown; known: {', '.join(SOURCE_FILES)}"
                )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is a share below 1, got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `ingest` reads from params.yaml."""

    seed: int
    """Seed of the choice of classes and of the noise."""
    languages: tuple[str, ...]
    """Languages of the captions."""
    ingest: IngestConfig

    def __post_init__(self) -> None:
        check_languages(self.languages)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One crawled picture with its caption, and what is secretly true of it."""

    key: str
    """Identity before the rows are mixed: source, concept, language, kind (and `duplicate`)."""
    image_id: str
    caption: str
    kind: str
    lang: str
    source: str
    family: str
    concept: str
    noise: str = CLEAN
    detail: str = ""
    original: str = ""
    """Key of the record of which this is a duplicate."""


class ImageStore:
    """Distinct encoded pictures by the start of their sha256."""

    def __init__(self) -> None:
        self.images: dict[str, bytes] = {}
        self._names: dict[str, str] = {}

    def add(self, data: bytes, name: str = "a changed picture") -> str:
        """Keep the bytes once and return their id; `name` is what errors call the picture."""
        image_id = hashlib.sha256(data).hexdigest()[:16]
        self.images[image_id] = data
        self._names.setdefault(image_id, name)
        return image_id

    def decoded(self, image_id: str) -> np.ndarray:
        """uint8 [H, W, 4]. Raises DataError naming the picture."""
        return decode_rgba(self.images[image_id], where=self._names[image_id])


def run(config: Config, context: Context) -> None:
    """Choose classes, make clean records, add noise, mix the rows, write."""
    concepts = read_concepts(context.path(DATA))
    sources = {
        name: read_artwork(context.path(f"{DATA}/{name}.parquet"))
        for name in (*config.ingest.train_sources, config.ingest.test_source)
    }
    split = choose_classes(config, concepts, sources)
    context.log(f"{len(split)} classes, {Counter(split.values())['held_out']} of them held out")
    store = ImageStore()
    clean = clean_records(config, concepts, sources, split, store)
    records = add_noise(config, clean, store)
    records.sort(key=lambda record: (hash64(config.seed, "row", record.key), record.key))
    _write_records(context, records)
    _write_images(context, store, records)
    write_table(context.output(f"{OUT}/classes.parquet"), _classes_table(config, concepts, split))
    identical = identical_pairs(sources[config.ingest.test_source])
    context.write_json(f"{OUT}/identical.json", {"pairs": identical})
    metrics = _metrics(split, records, identical)
    metrics["test_source"] = config.ingest.test_source
    context.write_json(f"{OUT}/metrics.json", metrics)


def choose_classes(
    config: Config, concepts: dict[str, Concept], sources: dict[str, list[Artwork]]
) -> dict[str, str]:
    """Concept -> "train" or "held_out", in the order of choice.

    Both choices depend on the seed and the concept alone, so that a larger number of classes
    contains a smaller one, with the same concepts held out.
    """
    ingest = config.ingest
    tested = {drawing.concept for drawing in sources[ingest.test_source]}
    drawn = Counter(
        concept
        for source in ingest.train_sources
        for concept in {drawing.concept for drawing in sources[source]}
    )
    qualified = [
        concept.id
        for concept in concepts.values()
        if concept.id in tested
        and drawn[concept.id] >= max(ingest.min_drawings, 1)
        and all(lang in concept.names for lang in config.languages)
    ]
    if ingest.classes is not None and len(qualified) < ingest.classes:
        raise DataError(
            f"{len(qualified)} concepts have {ingest.min_drawings} training drawings, a test "
            f"drawing and a name in {', '.join(config.languages)}; ingest.classes asks for "
            f"{ingest.classes}: lower it or ingest.min_drawings"
        )
    chosen = stable_order(qualified, config.seed, "class")[: ingest.classes]
    limit = int(ingest.held_out * 2**64)
    return {
        concept: "held_out" if hash64(config.seed, "held_out", concept) < limit else "train"
        for concept in chosen
    }


def clean_records(
    config: Config,
    concepts: dict[str, Concept],
    sources: dict[str, list[Artwork]],
    split: dict[str, str],
    store: ImageStore,
) -> list[Record]:
    """A name and a keyword record for every training drawing in every language."""
    records = []
    for source in config.ingest.train_sources:
        for drawing in sources[source]:
            if split.get(drawing.concept) != "train":
                continue
            concept = concepts[drawing.concept]
            image_id = store.add(drawing.image_bytes, f"drawing {drawing.id} of {source}")
            for lang in config.languages:
                captions = (concept.names[lang], keyword_caption(concept, lang))
                for kind, caption in zip(KINDS, captions, strict=True):
                    if caption:
                        records.append(
                            Record(
                                key=f"{drawing.id}/{lang}/{kind}", image_id=image_id,
                                caption=caption, kind=kind, lang=lang, source=source,
                                family=config.ingest.families.get(source, source),
                                concept=drawing.concept,
                            )
                        )  # fmt: skip
    return records


def add_noise(config: Config, clean: list[Record], store: ImageStore) -> list[Record]:
    """The records with noise; what happens to one depends on the seed and its key alone.

    (The caption that a shuffled record gets also depends on which other records there are.)
    """
    peers = defaultdict(list)
    for record in clean:
        peers[record.lang, record.kind].append(record)
    names = {(record.concept, record.kind, record.lang): record.caption for record in clean}
    result = []
    with Progress(len(clean), unit="records", label="ingest") as progress:
        for record in clean:
            rng = np.random.default_rng(hash64(config.seed, "noise", record.key))
            noise = _choose_noise(config.ingest.noise, rng.random())
            changed = _HANDLERS[noise](record, rng, store, peers, names, config.languages)
            result += [record, changed] if noise == "duplicate" else [changed]
            progress.update()
    return result


def identical_pairs(drawings: Sequence[Artwork]) -> list[list[str]]:
    """Pairs of concepts whose drawings are the same picture, pixel by pixel."""
    same = defaultdict(list)
    for drawing in drawings:
        rgba = decode_rgba(drawing.image_bytes, where=f"drawing {drawing.id}").copy()
        rgba[rgba[..., 3] == 0] = 0  # colour that cannot be seen makes no difference
        same[rgba.shape, rgba.tobytes()].append(drawing.concept)
    pairs = []
    for concepts in same.values():
        ordered = sorted(set(concepts))
        pairs += [[a, b] for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
    return sorted(pairs)


def _choose_noise(noise: NoiseConfig, draw: float) -> str:
    for name, rate in vars(noise).items():
        if draw < rate:
            return name
        draw -= rate
    return CLEAN


def _keep(record: Record, *_: Any) -> Record:
    return record


def _shuffle(
    record: Record, rng: Any, store: Any, peers: Any, names: Any, languages: Any
) -> Record:
    others = peers[record.lang, record.kind]
    start = int(rng.integers(len(others)))
    for step in range(len(others)):
        other = others[(start + step) % len(others)]
        if other.concept != record.concept and other.caption != record.caption:
            return replace(
                record, caption=other.caption, noise="shuffled", detail=f"of {other.concept}"
            )
    return record


def _lower(record: Record, rng: Any, store: ImageStore, *_: Any) -> Record:
    rgba, side = low_resolution(store.decoded(record.image_id), rng)
    image_id = store.add(lossless(rgba))
    return replace(record, image_id=image_id, noise="low_resolution", detail=f"{side} px")


def _duplicate(record: Record, rng: Any, store: ImageStore, *_: Any) -> Record:
    image_id = store.add(reencode(store.decoded(record.image_id), rng))
    return replace(
        record, key=f"{record.key}/duplicate", image_id=image_id, noise="duplicate",
        detail=f"of {record.image_id}", original=record.key,
    )  # fmt: skip


def _overlay(record: Record, rng: Any, store: ImageStore, *_: Any) -> Record:
    rgba = overlay_text(store.decoded(record.image_id), rng)
    return replace(record, image_id=store.add(lossless(rgba)), noise="overlay")


def _mistag(record: Record, rng: Any, store: Any, peers: Any, names: Any, languages: Any) -> Record:
    false = [  # a tag is only false if the text would be another one in that language
        lang
        for lang in languages
        if lang != record.lang and names.get((record.concept, record.kind, lang)) != record.caption
    ]
    if not false:
        return record
    lang = false[int(rng.integers(len(false)))]
    return replace(record, lang=lang, noise="wrong_lang", detail=f"is {record.lang}")


_HANDLERS = {
    CLEAN: _keep,
    "shuffled": _shuffle,
    "low_resolution": _lower,
    "duplicate": _duplicate,
    "overlay": _overlay,
    "wrong_lang": _mistag,
}


def _write_records(context: Context, records: list[Record]) -> None:
    rows = {record.key: row for row, record in enumerate(records)}
    columns = ("image_id", "caption", "kind", "lang", "source", "family", "concept")
    numbers = np.arange(len(records))
    table = {"row": numbers, **{c: [getattr(r, c) for r in records] for c in columns}}
    write_table(context.output(f"{OUT}/records.parquet"), table)
    truth = {
        "row": numbers,
        "noise": [record.noise for record in records],
        "detail": [record.detail for record in records],
        "original": np.array([rows.get(record.original, -1) for record in records]),
    }
    write_table(context.output(f"{OUT}/truth.parquet"), truth)


def _write_images(context: Context, store: ImageStore, records: list[Record]) -> None:
    ids = sorted({record.image_id for record in records})
    sizes = [store.decoded(i).shape for i in ids]
    table = {
        "image_id": ids,
        "bytes": [store.images[i] for i in ids],
        "width": np.array([width for _, width, _ in sizes], np.int32),
        "height": np.array([height for height, _, _ in sizes], np.int32),
        "sha256": [hashlib.sha256(store.images[i]).hexdigest() for i in ids],
    }
    write_table(context.output(f"{OUT}/images.parquet"), table)


def _classes_table(
    config: Config, concepts: dict[str, Concept], split: dict[str, str]
) -> dict[str, Any]:
    chosen = [concepts[concept] for concept in split]
    table: dict[str, Any] = {
        "concept": list(split),
        "split": list(split.values()),
        "group": [concept.group for concept in chosen],
        "subgroup": [concept.subgroup for concept in chosen],
    }
    for lang in config.languages:
        table[f"name_{lang}"] = [concept.names[lang] for concept in chosen]
        table[f"keywords_{lang}"] = [list(concept.keywords.get(lang, ())) for concept in chosen]
    return table


def _metrics(
    split: dict[str, str], records: list[Record], identical: list[list[str]]
) -> dict[str, Any]:
    def count(name: str) -> dict[str, int]:
        return dict(Counter(getattr(record, name) or "clean" for record in records))

    return {
        "classes": dict(Counter(split.values())),
        "records": len(records),
        "images": len({record.image_id for record in records}),
        "identical_test_pairs": len(identical),
        "by_noise": count("noise"),
        "by_language": count("lang"),
        "by_source": count("source"),
    }


OUT = "artifacts/ingest"
STAGE = Stage(
    name="ingest",
    config=Config,
    inputs=(f"{DATA}/concepts.parquet", *(f"{DATA}/{name}.parquet" for name in SOURCE_FILES)),
    outputs=tuple(
        f"{OUT}/{name}"
        for name in (
            "records.parquet",
            "images.parquet",
            "truth.parquet",
            "classes.parquet",
            "identical.json",
            "metrics.json",
        )
    ),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
