"""What the suites ask of a model, in batches and checked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder
from vlfoundry.eval.reference import NearestPicture
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.data.images.decode import Picture

IMAGE_BATCH = 64
TEXT_BATCH = 256


class Model(Protocol):
    """The part of `models.internvl.predict.Model` that evaluation uses.

    It is handed pictures as they are stored: what it makes of them is its own affair.
    """

    kind: str
    capabilities: frozenset[str]

    def embed_images(self, images: Sequence[Picture], task: str = ...) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def image_features(self, images: Sequence[Picture], task: str = ...) -> np.ndarray: ...

    def match(
        self, images: Sequence[Picture], texts: Sequence[str], task: str = ...
    ) -> np.ndarray: ...

    def generate(
        self, images: Sequence[Picture], prompts: Sequence[str], max_new_tokens: int
    ) -> list[str]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalContext:
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
    return _checked(_of_pictures(model, "embed_images", data, task), "images")


def probe_features(model: Model, data: DataFolder, task: str) -> np.ndarray:
    """Mean patch tokens of all pictures: float32 [N, W]."""
    return _checked(_of_pictures(model, "image_features", data, task), "images")


def embed_texts(model: Model, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts: float32 [M, D]; each distinct text is embedded once."""
    distinct = list(dict.fromkeys(texts))
    starts = range(0, len(distinct), TEXT_BATCH)
    parts = in_batches(model, "embed_texts", [(distinct[i : i + TEXT_BATCH],) for i in starts])
    vectors = _checked(np.concatenate(parts), "texts")
    position = {text: index for index, text in enumerate(distinct)}
    return vectors[[position[text] for text in texts]]


def in_batches(model: Model, method: str, batches: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a method of the model answers to each batch of arguments, shared by all ranks that hold
    the model (`eval.ranks`)."""
    if hasattr(model, "in_batches"):
        return model.in_batches(method, batches)
    return [getattr(model, method)(*batch) for batch in batches]


def _of_pictures(model: Model, method: str, data: DataFolder, task: str) -> np.ndarray:
    """Rows that a method makes of all pictures, each file shown once: [N, ...]."""
    shown, which = data.files
    starts = range(0, len(shown), IMAGE_BATCH)
    parts = in_batches(model, method, [(shown[i : i + IMAGE_BATCH], task) for i in starts])
    return np.concatenate(parts)[which]


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
