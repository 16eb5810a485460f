"""The embedded drawings and their names as arrays, for machines that read no Parquet.

    python -m benchmarks.gpu.data FILE

writes them; `VLFOUNDRY_GPU_DATA` says where the file is. Texts are UTF-8 bytes behind the special
tokens, so that no tokenizer is needed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

from benchmarks.gpu.stages import FIRST_WORD
from vlfoundry.infra.core.errors import DataError

DATA = Path(__file__).parents[2] / "data"
VARIABLE = "VLFOUNDRY_GPU_DATA"
SOURCE = "fluent"
LANGUAGES = ("en", "zh", "ja", "ar", "it")
SIDE_PX = 64
TOKENS = 48
"""of the longest text that is kept whole, with begin and end"""


def embedded() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 64, 64, 3], and their names' tokens int64 [N, languages, 48].

    Raises:
        DataError: there is neither a file of arrays nor a reader of Parquet.
    """
    path = os.environ.get(VARIABLE)
    if path:
        with np.load(path) as arrays:
            return arrays["pictures"], arrays["tokens"].astype(np.int64)
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            "pyarrow is not installed, so data/ cannot be read; run `python -m benchmarks.gpu.data "
            f"FILE` where it is, carry the file along and set {VARIABLE} to its path"
        )
    return _from_parquet()


def _from_parquet() -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet

    from vlfoundry.infra.data.images.bulk import composite, decode_rgba

    table = pyarrow.parquet.read_table(DATA / f"{SOURCE}.parquet").to_pydict()
    concepts = pyarrow.parquet.read_table(DATA / "concepts.parquet").to_pydict()
    names = {
        concept: {name["lang"]: name["text"] for name in entry}
        for concept, entry in zip(concepts["concept"], concepts["name"], strict=True)
    }
    known = [row for row, concept in enumerate(table["concept"]) if concept in names]
    drawings = [decode_rgba(table["image"][row]["bytes"], SIDE_PX) for row in known]
    pictures = composite(np.stack(drawings))
    tokens = [
        [_tokens(names[table["concept"][row]].get(lang, "")) for lang in LANGUAGES] for row in known
    ]
    return pictures, np.array(tokens, np.int64)


def _tokens(text: str) -> np.ndarray:
    """Begin, bytes, end, padding: int64 [48]."""
    row = np.zeros(TOKENS, np.int64)
    data = np.frombuffer(text.encode()[: TOKENS - 2], np.uint8)
    row[0], row[1 + len(data)] = 1, 2
    row[1 : 1 + len(data)] = data.astype(np.int64) + FIRST_WORD
    return row


if __name__ == "__main__":
    pictures, tokens = _from_parquet()
    np.savez_compressed(sys.argv[1], pictures=pictures, tokens=tokens.astype(np.uint16))
    print(f"{len(pictures)} drawings in {sys.argv[1]}")
