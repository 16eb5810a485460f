"""From embeddings to evidence that a caption belongs to its picture.

Letters: N records, U distinct pictures, C distinct captions, F picture features, D shared width.
All vectors are of unit length.
"""

import numpy as np

NEAR = 0.7
"""Pictures with a smaller cosine of their features say nothing about each other."""
NEAR_SCALE = 0.05
"""How fast the weight of another picture falls with 1 - cosine."""
CHUNK = 1024


def picture_vectors(
    features: np.ndarray,
    image_vectors: np.ndarray,
    text_vectors: np.ndarray,
    image: np.ndarray,
    caption: np.ndarray,
    weight: float,
) -> np.ndarray:
    """What a record's picture shows, from its pixels and from what others call it. [N, D].

    To the picture's own vector come, with `weight`, the captions of the *other* records of that
    picture and of pictures that look much like it, each weighted by likeness. Records with the
    very same caption do not count: a copied page is no second witness.

    Args:
        features, image_vectors: [U, F], [U, D].
        text_vectors: [C, D].
        image, caption: [N], rows of the former two and of the latter.
    """
    said = np.zeros((len(features), text_vectors.shape[1]), np.float32)
    np.add.at(said, image, text_vectors[caption])
    around = np.empty_like(said)
    for start in range(0, len(features), CHUNK):
        part = slice(start, start + CHUNK)
        around[part] = likeness(features[part] @ features.T) @ said
    own = _same_caption_weight(features, image, caption)
    context = around[image] - own[:, None] * text_vectors[caption]
    return _unit(image_vectors[image] + weight * context)


def likeness(cosine: np.ndarray) -> np.ndarray:
    """Weight of another picture by the cosine of the features; 1 for the same picture."""
    return np.where(cosine > NEAR, np.exp((cosine - 1.0) / NEAR_SCALE), 0.0).astype(np.float32)


def _same_caption_weight(
    features: np.ndarray, image: np.ndarray, caption: np.ndarray
) -> np.ndarray:
    """Summed likeness of the records with the same caption, the record itself included. [N]."""
    total = np.empty(len(image), np.float32)
    order = np.argsort(caption, kind="stable")
    borders = np.flatnonzero(np.diff(caption[order])) + 1
    for members in np.split(order, borders):
        rows = features[image[members]]
        total[members] = likeness(rows @ rows.T).sum(axis=1)
    return total


def contrast(
    pictures: np.ndarray,
    captions: np.ndarray,
    all_pictures: np.ndarray,
    all_captions: np.ndarray,
) -> np.ndarray:
    """How far a pair's cosine stands out: mean of two standard scores. [N, D] x 2 -> [N].

    One among all captions for its picture, one among all pictures for its caption. A picture that
    resembles everything, or a caption that fits everything, gets no credit for it.
    """
    cosine = np.einsum("nd,nd->n", pictures, captions)
    among_captions = _standard(cosine, pictures, all_captions)
    among_pictures = _standard(cosine, captions, all_pictures)
    return 0.5 * (among_captions + among_pictures)


def share_below(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Share of the null values that lie below each value, strictly inside 0..1. [N]."""
    ordered = np.sort(null)
    return (np.searchsorted(ordered, values) + 0.5) / (len(ordered) + 1)


def random_partners(group: np.ndarray, seed: int) -> np.ndarray:
    """For each record some record of the same group, drawn without replacement. [N] int64."""
    rng = np.random.default_rng(seed)
    partner = np.empty(len(group), np.int64)
    for value in np.unique(group):
        members = np.flatnonzero(group == value)
        partner[members] = rng.permutation(members)
    return partner


def _standard(cosine: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    mean = rows @ others.mean(axis=0)
    variance = np.einsum("nd,de,ne->n", rows, np.cov(others.T), rows, optimize=True)
    return (cosine - mean) / np.sqrt(np.maximum(variance, 1e-8))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
