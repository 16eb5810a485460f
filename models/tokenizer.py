"""Text to token ids and back: what all tokenizers do, and our own byte-level BPE.

A model folder has ours, or, if its weights were imported, the official one
(`models.chat.official`); `models.internvl.predict.load_tokenizer` gives either.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import collections
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.chat.control import GROUNDING, any_of, control_tokens, without_added
from vlfoundry.models.chat.dialogue import PlainDialogue, WrittenDialogue
from vlfoundry.models.chat.templates import END_IMG, IMG, IMG_CONTEXT
from vlfoundry.models.official.tokenizerfiles import read_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
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
"""in the order of their ids, which folders of trained models hold"""
PAD_ID, BOS_ID, EOS_ID, IMG_ID, END_IMG_ID, IMG_CONTEXT_ID = range(6)
"""of our own tokenizer; another has other ids, so ask the tokenizer in hand"""


ALONE = 1000
"""how often the tokenizer's training is shown by itself what it is to merge first"""


class TextTokenizer(ABC):
    """What code that has texts needs of a model's tokenizer, and of how the model is spoken to."""

    pad_id: int
    """fills rows up"""
    bos_id: int | None
    """begins a text; None: nothing does"""
    eos_id: int
    """ends a text"""
    embedded_tokens: int | None = None
    """longest text that is embedded, special tokens included; None: as long as the model sees"""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    @abstractmethod
    def dialogue(self) -> WrittenDialogue:
        """How a chat model is spoken to. Raises ModelError if that is not known."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end. Control tokens written out in it are text."""

    @abstractmethod
    def continuation(self, before: str, text: str) -> list[int]:
        """Ids of a text that goes on after another one, which has its own."""

    @abstractmethod
    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Token ids to text; padding, begin and end are left out."""

    @abstractmethod
    def save_to(self, folder: Path) -> None:
        """Write what a model folder needs; the same tokenizer gives the same bytes."""

    @property
    def begin(self) -> list[int]:
        """What a text begins with."""
        return [] if self.bos_id is None else [self.bos_id]

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
        begin, end = self.begin, [self.eos_id] if add_eos else []
        room = max_tokens - len(begin) - len(end)
        return pad(
            [[*begin, *self.encode(prefix + text)[:room], *end] for text in texts], self.pad_id
        )


class Tokenizer(TextTokenizer):
    """Our own. Every text is representable: there is no unknown token."""

    pad_id, bos_id, eos_id, context_id = PAD_ID, BOS_ID, EOS_ID, IMG_CONTEXT_ID

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
        if not Path(path).is_file():
            raise ModelError(f"{path} does not exist; a model folder needs its tokenizer.json")
        return cls(read_backend(Path(path)))

    def save(self, path: str | Path, post_processor: Any = None) -> None:
        """Write `tokenizer.json`; the same tokenizer gives the same bytes.

        Args:
            path: the file.
            post_processor: what other programs put around a text (of `tokenizers.processors`).
        """
        before = self._backend.post_processor
        self._backend.post_processor = post_processor or before
        text = self._backend.to_str(pretty=True)
        self._backend.post_processor = before
        Path(path).write_text(text + "\n", encoding="utf-8")

    def save_to(self, folder: Path) -> None:
        self.save(folder / "tokenizer.json")

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def dialogue(self) -> WrittenDialogue:
        return PlainDialogue(self)

    def encode(self, text: str) -> list[int]:
        if any_of(control_tokens()).search(text) is None:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for piece in any_of(GROUNDING).split(text):
            if piece in GROUNDING:
                ids.append(SPECIAL_TOKENS.index(piece))
            else:
                ids += self._letters.encode(piece, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _letters(self) -> Backend:
        return without_added(self._backend)

    def continuation(self, before: str, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        ids = [int(i) for i in ids]
        if keep_special:
            ids = [i for i in ids if i > EOS_ID]
        return self._backend.decode(ids, skip_special_tokens=not keep_special)

    def places(self, visual_tokens: int) -> list[int]:
        """Ids of a picture: begin, a place for each of its visual tokens, end."""
        return [IMG_ID, *[IMG_CONTEXT_ID] * visual_tokens, END_IMG_ID]


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids to ids [B, T] and mask [B, T]."""
    length = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask


def train(texts: Iterable[str], vocab_size: int, *, whole: Sequence[str] = ()) -> Tokenizer:
    """Learn merges from `texts`. The same texts in the same order give the same tokenizer.

    Args:
        texts: to learn from.
        vocab_size: tokens in all.
        whole: words or characters that are merged before anything else: each is one token where it
            stands alone, and no other token has a part of it.

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
    alone = [f"{word}\n" * ALONE for word in whole]
    backend.train_from_iterator([*texts, *alone], trainer)
    return Tokenizer(backend)


def wide_characters(texts: Iterable[str], most: int) -> list[str]:
    """The most frequent characters of several bytes, at most so many."""
    counts = collections.Counter(c for text in texts for c in text if not c.isascii())
    return sorted(c for c, _ in counts.most_common(most))
