"""Encoded pictures to square arrays, for what looks at pixels without a model.

Letters: N pictures, S side in pixels.
"""

from collections.abc import Sequence

import numpy as np

from vlfoundry.infra.data.images.bulk import composite, decode_rgba


def decode_squares(
    encoded: Sequence[bytes], side_px: int, *, names: Sequence[str] = (), keep_alpha: bool = False
) -> np.ndarray:
    """Decode pictures and squeeze them: uint8 [N, S, S, 3] (on white) or [N, S, S, 4].

    Raises DataError with the name of the one that cannot be read.
    """
    channels = 4 if keep_alpha else 3
    out = np.empty((len(encoded), side_px, side_px, channels), np.uint8)
    for index, data in enumerate(encoded):
        rgba = decode_rgba(data, side_px, names[index] if names else f"picture {index}")
        out[index] = rgba if keep_alpha else composite(rgba)
    return out


def pixel_key(data: bytes, where: str = "picture") -> bytes:
    """A key that is equal for pictures that look the same: colours under full alpha are ignored."""
    import hashlib

    pixels = decode_rgba(data, where=where)
    digest = hashlib.sha256(str(pixels.shape).encode())
    for row in pixels:
        digest.update(np.where(row[:, 3:] == 0, np.uint8(0), row).tobytes())
    return digest.digest()
