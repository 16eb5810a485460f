"""What the suites ask of a model, in batches and checked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from eval.datasets import ConceptSet, DataFolder
from eval.reference import NearestPicture
from infra.decode import Picture
from infra.errors import ModelError

IMAGE_BATCH = 64
TEXT_BATCH = 256


class Model(Protocol):
    """The part of `models.internvl.load.Model` that evaluation uses.

    It is handed pictures as they are stored: what it makes of them is its own affair.
    """

    kind: str
    capabilities: frozenset[str]

    def embed_images(self, images: Sequence[Picture], task: str = ...) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def image_features(self, images: Sequence[Picture], task: str = ...) -> np.ndarray: ...

    def generate(
        self, images: Sequence[Picture], prompts: Sequence[str], max_new_tokens: int
    ) -> list[str]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a suite needs besides the model and the data under test."""

    languages: tuple[str, ...]
    """Languages to score."""
    seed: int
    """Seed of everything drawn."""
    items_dir: Path
    """Where the per-item files go."""
    train: ConceptSet | None = None
    """Pictures that training saw: for the probe, and for references."""
    nearest: NearestPicture | None = None
    """The reference without learning, or None where there is no picture to learn from."""
    held_out: frozenset[str] = frozenset()
    """Concepts that training never saw under any source."""
    scenes: int = 250
    """Number of questions of each kind on composed scenes."""


def embed_pictures(model: Model, data: DataFolder, task: str) -> np.ndarray:
    """Unit vectors of all pictures: float32 [N, D]."""
    found = data.by_file(lambda batch: model.embed_images(batch, task), IMAGE_BATCH)
    return _checked(found, "images")


def probe_features(model: Model, data: DataFolder, task: str) -> np.ndarray:
    """Mean patch tokens of all pictures: float32 [N, W]."""
    found = data.by_file(lambda batch: model.image_features(batch, task), IMAGE_BATCH)
    return _checked(found, "images")


def embed_texts(model: Model, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts: float32 [M, D]; each distinct text is embedded once."""
    distinct = list(dict.fromkeys(texts))
    parts = [
        model.embed_texts(distinct[start : start + TEXT_BATCH])
        for start in range(0, len(distinct), TEXT_BATCH)
    ]
    vectors = _checked(np.concatenate(parts), "texts")
    position = {text: index for index, text in enumerate(distinct)}
    return vectors[[position[text] for text in texts]]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _checked(vectors: np.ndarray, what: str) -> np.ndarray:
    bad = int((~np.isfinite(vectors)).any(axis=1).sum())
    if bad:
        raise ModelError(
            f"the model gave {bad} of {len(vectors)} embeddings of {what} that are not finite, "
            "expected numbers; its training has probably diverged"
        )
    return np.asarray(vectors, np.float32)
