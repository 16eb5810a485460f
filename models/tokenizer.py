"""Byte-level BPE with the special tokens that all our models share.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from infra.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
IMG, END_IMG, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = (
    PAD,
    BOS,
    EOS,
    IMG,
    END_IMG,
    IMG_CONTEXT,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
PAD_ID, BOS_ID, EOS_ID, IMG_ID, END_IMG_ID, IMG_CONTEXT_ID = range(6)


class Tokenizer:
    """Text to token ids and back. Every text is representable: there is no unknown token."""

    def __init__(self, backend: Backend):
        self._backend = backend
        for index, token in enumerate(SPECIAL_TOKENS):
            if backend.token_to_id(token) != index:
                raise ModelError(
                    f"tokenizer has {token!r} at id {backend.token_to_id(token)}, expected "
                    f"{index}; train it with models.tokenizer.train"
                )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`. Raises ModelError if there is none, or it is not ours."""
        from tokenizers import Tokenizer as Backend

        if not Path(path).is_file():
            raise ModelError(f"{path} does not exist; a model folder needs its tokenizer.json")
        return cls(Backend.from_file(str(path)))

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`; the same tokenizer gives the same bytes."""
        Path(path).write_text(self._backend.to_str(pretty=True) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids without begin and end."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Token ids to text; padding, begin and end are left out."""
        ids = [int(i) for i in ids]
        if keep_special:
            ids = [i for i in ids if i > EOS_ID]
        return self._backend.decode(ids, skip_special_tokens=not keep_special)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        prefix: str = "",
        max_tokens: int,
        add_eos: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Begin, prefix + text, end; cut to `max_tokens`, padded on the right to the longest row.

        Returns:
            ids int64 [B, T] and mask int64 [B, T], 1 where a token is real. A text that is cut
            keeps its end token, since the feature of a text is read there.
        """
        rows = []
        room = max_tokens - 1 - add_eos
        for text in texts:
            row = [BOS_ID, *self.encode(prefix + text)[:room]]
            rows.append([*row, EOS_ID] if add_eos else row)
        return pad(rows)


def pad(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids to ids [B, T] and mask [B, T]."""
    length = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), length), PAD_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from `texts`. The same texts in the same order give the same tokenizer.

    Raises:
        ModelError: `vocab_size` leaves no room for the special tokens and the 256 bytes.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ModelError(
            f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and "
            f"256 bytes need at least {least}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
