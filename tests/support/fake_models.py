"""Models that need no network: one that knows every answer, and one that guesses."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder
from vlfoundry.eval.datasets.pairing import keyword_caption
from vlfoundry.eval.questions import Question
from vlfoundry.infra.data.images.bulk import composite
from vlfoundry.infra.data.images.decode import pixels
from vlfoundry.infra.data.images.geometry import squeeze

SIDE_PX = 32
LANGUAGES = ("en", "zh")
CAN = {
    "internvl_c": frozenset({"embed"}),
    "internvl_g": frozenset({"embed", "match", "generate"}),
    "chat_simple": frozenset({"generate"}),
    "chat_full": frozenset({"generate"}),
}


def looks(picture) -> bytes:
    """What a picture looks like, whether it is stored or composed."""
    return composite(pixels(picture)).tobytes()


class Oracle:
    """Embeds a picture and its texts at the same place; answers questions by looking them up."""

    def __init__(
        self, data: DataFolder, questions: Sequence[Question] = (), kind: str = "internvl_g"
    ) -> None:
        self.kind = kind
        self.capabilities = CAN[kind]
        self._places: dict[object, set[int]] = {}
        self._width = len(data) + 1  # one place is nobody's
        for index, picture in enumerate(data.pictures):
            place = index
            if isinstance(data, ConceptSet):
                place = data.drawn.index(picture.concept)
            for key in (looks(picture.data), *self._texts(data, picture)):
                self._places.setdefault(key, set()).add(place)
        self._answers = {(looks(q.image), q.prompt): q.answer for q in questions}

    @staticmethod
    def _texts(data, picture):
        if not isinstance(data, ConceptSet):
            return [text for _, text in picture.captions] + [picture.label]
        concept = data.concepts[picture.concept]
        names = [*concept.names.values()]
        return names + [
            keyword_caption(concept.names.get(lang, ""), words)
            for lang, words in concept.keywords.items()
        ]

    def embed_images(self, images, task="retrieval") -> np.ndarray:
        return self._embed([looks(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed(texts)

    def _embed(self, keys) -> np.ndarray:
        out = np.zeros((len(keys), self._width), np.float32)
        for row, key in enumerate(keys):
            out[row, sorted(self._places.get(key, {self._width - 1}))] = 1
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def image_features(self, images, task="linear_probe") -> np.ndarray:
        squares = np.stack([squeeze(composite(pixels(image)), SIDE_PX) for image in images])
        return squares.reshape(len(images), -1).astype(np.float32)[:, ::7]

    def match(self, images, texts, task="retrieval") -> np.ndarray:
        return (self.embed_images(images) * self.embed_texts(texts)).sum(1)

    def generate(self, images, prompts, max_new_tokens):
        return [
            self._answers.get((looks(image), prompt), "")
            for image, prompt in zip(images, prompts, strict=True)
        ]


class Guesser:
    """Gives every input a vector, and every question an answer, that has nothing to do with it."""

    def __init__(self, kind: str = "internvl_g", width: int = 32, reply: str = "no idea") -> None:
        self.kind, self.width, self.reply = kind, width, reply
        self.capabilities = CAN[kind]

    def embed_images(self, images, task="retrieval") -> np.ndarray:
        return np.stack([self._vector(looks(image)) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._vector(text.encode()) for text in texts])

    def image_features(self, images, task="linear_probe") -> np.ndarray:
        return self.embed_images(images)

    def match(self, images, texts, task="retrieval") -> np.ndarray:
        pairs = zip(images, texts, strict=True)
        return np.array([self._vector(looks(i) + t.encode())[0] > 0 for i, t in pairs], np.float32)

    def generate(self, images, prompts, max_new_tokens):
        return [self.reply] * len(prompts)

    def _vector(self, data: bytes) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        vector = np.random.default_rng(seed).normal(size=self.width)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


class Constant(Guesser):
    """Gives the same vector to everything: ties must earn it nothing."""

    def _vector(self, data: bytes) -> np.ndarray:
        return np.full(self.width, self.width**-0.5, np.float32)


def drawing(index: int, shift: int = 0, side: int = 40) -> Image.Image:
    """A drawing of its own for each index: blocks of colour with a transparent border."""
    rng = np.random.default_rng(index)
    pixels = np.zeros((side, side, 4), np.uint8)
    blocks = rng.integers(0, 256, (4, 4, 3)).repeat((side - 8) // 4, 0).repeat((side - 8) // 4, 1)
    pixels[4 + shift : 4 + shift + blocks.shape[0], 4 : 4 + blocks.shape[1], :3] = blocks
    pixels[4 + shift : 4 + shift + blocks.shape[0], 4 : 4 + blocks.shape[1], 3] = 255
    return Image.fromarray(pixels, "RGBA")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    import io

    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_concept_set(
    folder: Path, count: int = 12, sources: Sequence[str] = ("test",), twins: bool = False
) -> Path:
    """A concept set of `count` classes; with `twins`, the first two look the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for shift, source in enumerate(sources):
        rows = [
            {
                "id": f"{source}/{index}",
                "concept": f"c{index:02d}",
                "image": {
                    "bytes": encoded(drawing(0 if twins and index == 1 else index, shift)),
                    "path": f"{source}/{index}.png",
                },
            }
            for index in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{source}.parquet")
    concepts = [
        {
            "concept": f"c{index:02d}",
            "char": "",
            "group": f"group {index % 3}",
            "subgroup": "",
            "name": [{"lang": lang, "text": f"{lang} thing {index}"} for lang in LANGUAGES],
            "keywords": [
                {"lang": lang, "text": [f"{lang} thing {index}", f"{lang}word{index}", "same"]}
                for lang in LANGUAGES
            ],
        }
        for index in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(concepts), folder / "concepts.parquet")
    return folder


def write_pair_set(folder: Path, rows: list[dict], name: str = "pairs") -> Path:
    """A pair set of the given rows."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder
