"""Perceptual hashes: 64 bits that survive re-encoding, and a coarse colour grid beside them.

Two pictures are near-duplicates if few bits differ *and* their colours are close: the hash sees no
colour, and a red and a blue book would be the same to it.
"""

import functools

import numpy as np

from vlfoundry.infra.data.images.bulk import GREY, composite

HASH_SIDE = 32
HASH_BITS = 8
COLOUR_SIDE = 8
GROUND = (255, 255, 255)
DECIMALS = 6
"""of coefficients, whose unit is a level of 255"""


def perceptual_hash(images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 3 or 4], S a multiple of 32 -> uint64 [N].

    The lowest 8x8 cosine coefficients of the 32x32 grey picture against their median (the usual
    pHash); the constant term takes no part in the median.
    """
    small = _shrink(composite(images, GROUND).astype(np.float32), HASH_SIDE)
    basis = _cosines()
    low = basis @ (small.astype(np.float64) @ GREY.astype(np.float64)) @ basis.T
    # A drawing that is its own mirror image has coefficients of zero: without this their signs, and
    # with them a hash's bits, would be the rounding of whatever processor computes them.
    low = low.reshape(len(images), -1).round(DECIMALS)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]


def colour_grid(images: np.ndarray) -> np.ndarray:
    """Mean colours of 8x8 fields: uint8 [N, S, S, 3 or 4] -> float32 [N, 192]."""
    rgb = composite(images, GROUND).astype(np.float32)
    return _shrink(rgb, COLOUR_SIDE).reshape(len(images), -1)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes differ, with numpy's broadcasting."""
    return np.bitwise_count(a ^ b).astype(np.int64)


def near(
    hashes_a: np.ndarray, colours_a: np.ndarray, hashes_b: np.ndarray, colours_b: np.ndarray,
    max_bits: int, max_levels: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """All pairs (i, j) of near-duplicates between two lists, as two int64 arrays."""
    found_a, found_b = [], []
    chunk = max(1, 2**24 // max(len(hashes_b), 1))
    for start in range(0, len(hashes_a), chunk):
        part = hashes_a[start : start + chunk, None]
        i, j = np.nonzero(hamming(part, hashes_b[None]) <= max_bits)
        levels = np.abs(colours_a[start + i] - colours_b[j]).mean(axis=1)
        close = levels < max_levels
        found_a.append(start + i[close])
        found_b.append(j[close])
    empty = [np.empty(0, np.int64)]
    return np.concatenate(found_a or empty), np.concatenate(found_b or empty)


def connected(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest member of the group of each of `count` items, given linked pairs (union-find)."""
    parent = np.arange(count)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    return np.array([root(i) for i in range(count)], np.int64)


def _shrink(planes: np.ndarray, side: int) -> np.ndarray:
    """Area average: [N, S, S, C] -> [N, side, side, C]."""
    n, size, _, channels = planes.shape
    step = size // side
    assert size == step * side, f"side {size} is no multiple of {side}"
    return planes.reshape(n, side, step, side, step, channels).mean(axis=(2, 4))


@functools.cache
def _cosines() -> np.ndarray:
    """The first 8 rows of the 32-point DCT-II. float64 [8, 32]."""
    k, x = np.arange(HASH_BITS)[:, None], np.arange(HASH_SIDE)[None]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * HASH_SIDE))
