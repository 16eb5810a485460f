"""The tokenizers that official chat models come with, read from their own files.

Our own models have `models.tokenizer`; `models.chat.official` finds out which of these a folder
has, and makes of it what the rest of the code takes.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.chat.control import GUARD, any_of, control_tokens, guarded, without_added
from vlfoundry.models.official.tokenizerfiles import read_backend, read_merges, read_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BLANK = "▁"
"""how sentencepiece writes a space"""
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""normalizer_spec {add_dummy_prefix: false}; protobuf merges it into the model it is appended to"""


class ChatTokenizer(ABC):
    """Text to ids and back, with the ids that begin and pad a sequence."""

    begin_id: int | None = None
    pad_id: int
    added: dict[str, int]
    """special tokens and their ids"""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @abstractmethod
    def pieces(self, text: str) -> list[int]:
        """Ids of a text that opens a sequence, without the begin id."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, special tokens kept. Blanks beside special tokens may differ."""

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after a special token."""
        return self.pieces(text)

    def encode(self, text: str) -> list[int]:
        """Begin id, where there is one, and the ids of the text."""
        return [*self.begin, *self.pieces(text)]

    @functools.cached_property
    def control(self) -> frozenset[str]:
        """The tokens that texts of people never hold, however they are written."""
        by_role = {self.begin_id, self.pad_id}
        roles = {token for token, index in self.added.items() if index in by_role}
        return frozenset(roles | (control_tokens() & set(self.added)))

    def as_text(self, text: str) -> str:
        """What somebody wrote, so that `pieces` takes the control tokens in it for text."""
        return guarded(text, self.control) if self.control else text

    def special_id(self, token: str) -> int:
        """Id of a special token. Raises ModelError if there is no such one."""
        if token not in self.added:
            raise ModelError(
                f"the tokenizer has no {token!r}, which the model's template needs; it has "
                f"{sorted(self.added)}"
            )
        return self.added[token]

    @property
    def begin(self) -> list[int]:
        return [] if self.begin_id is None else [self.begin_id]


class ByteLevelTokenizer(ChatTokenizer):
    """A `tokenizer.json`, or a `vocab.json` with its `merges.txt` (Qwen and others)."""

    def __init__(
        self, path: str | Path, *, added: Mapping[str, int], pad: str, begin: str | None = None
    ):
        """`added`: special tokens and their ids, those that the file already holds included."""
        self._backend = _backend(_existing(path))
        self._backend.add_special_tokens(sorted(added, key=added.__getitem__))
        for token, index in added.items():
            if self._backend.token_to_id(token) != index:
                raise ModelError(
                    f"{path}: {token!r} got id {self._backend.token_to_id(token)}, expected {index}"
                )
        self.added = dict(added)
        self.pad_id = added[pad]
        self.begin_id = None if begin is None else added[begin]

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._backend.get_vocab().values())

    def pieces(self, text: str) -> list[int]:
        if GUARD not in text:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for piece in any_of(frozenset(self.added)).split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                letters = self._letters.encode(piece.replace(GUARD, ""), add_special_tokens=False)
                ids += letters.ids
        return ids

    @functools.cached_property
    def _letters(self) -> Backend:
        return without_added(self._backend)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)


class SentencePieceTokenizer(ChatTokenizer):
    """A `tokenizer.model` (InternLM2, LLaMA, Phi-3).

    Special tokens are cut out first, and each text between them is encoded on its own. A model
    with a dummy prefix then puts a blank in front of each of these texts; with `blank_once` only
    the sequence starts with one (what transformers calls `legacy=False`).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        added: Mapping[str, int],
        pad: str,
        begin: str | None = "<s>",
        blank_once: bool = False,
        swallow_blanks_after: Iterable[str] = (),
        no_blank_before: Iterable[str] = (),
    ):
        """
        Args:
            added: special tokens and their ids, those of the model file included.
            swallow_blanks_after: special tokens after which blanks and newlines are dropped.
            no_blank_before: special tokens that may open a text without the blank before them.
        """
        self._processor = read_pieces(_existing(path), NO_DUMMY_PREFIX if blank_once else b"")
        self.added = dict(added)
        self._texts = {index: token for token, index in added.items()}
        self._cut = any_of(frozenset(added))
        self._blank_once = blank_once
        self._swallow = frozenset(swallow_blanks_after)
        self._no_blank_before = frozenset(no_blank_before)
        self.pad_id = added[pad]
        self.begin_id = None if begin is None else added[begin]

    @property
    def vocab_size(self) -> int:
        return max(self._processor.get_piece_size(), *(i + 1 for i in self.added.values()))

    def pieces(self, text: str) -> list[int]:
        if not self._blank_once or not text:
            return self.continuation(text)
        special = self._cut.match(text)
        opens_special = special is not None and special[0] in self._no_blank_before
        return self.continuation(text if opens_special else BLANK + text)

    def continuation(self, text: str) -> list[int]:
        ids: list[int] = []
        before = ""
        for piece in self._cut.split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                piece = piece.lstrip() if before in self._swallow else piece
                ids += self._run(piece.replace(GUARD, ""))
            before = piece
        return ids

    def _run(self, text: str) -> list[int]:
        """Ids of a text between special tokens. A vocabulary may have a user-defined piece, such as
        `[UNUSED_TOKEN_146]`, under the id of one: written out it is spelt letter by letter."""
        ids = self._processor.encode(text)
        if self._texts.keys().isdisjoint(ids):
            return ids
        spelt: list[int] = []
        for index in ids:
            literal = self._processor.id_to_piece(index)
            spelt += self._spelt(literal) if self._is_control(index, literal, text) else [index]
        return spelt

    def _is_control(self, index: int, literal: str, text: str) -> bool:
        return self._texts.get(index) in self.control and literal in text

    def _spelt(self, literal: str) -> list[int]:
        """Ids of the single letters of a text, or of their bytes."""
        ids: list[int] = []
        for letter in literal:
            index = self._processor.piece_to_id(letter)
            if self._processor.is_unknown(index):
                by_byte = [f"<0x{byte:02X}>" for byte in letter.encode()]
                ids += map(self._processor.piece_to_id, by_byte)
            else:
                ids.append(index)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text, run = "", []
        for index in ids:
            if index in self._texts:
                text += self._processor.decode(run) + self._texts[index]
                run = []
            elif index < self._processor.get_piece_size():  # a matrix may have rows for no piece
                run.append(index)
        return text + self._processor.decode(run)


def has_dummy_prefix(path: str | Path) -> bool:
    """Whether a sentencepiece model puts a blank in front of every text."""
    processor = read_pieces(_existing(path))
    return processor.encode("a", out_type=str)[0].startswith(BLANK)


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""how Qwen2's tokenizer, whose older folders have no tokenizer.json, cuts a text into words"""


def _backend(path: Path) -> Backend:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    if path.name != "vocab.json":
        return read_backend(path)
    backend = Tokenizer(read_merges(path, _existing(path.with_name("merges.txt"))))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ModelError(
            f"{path} does not exist; a chat tokenizer is read from the model's own file"
        )
    return Path(path)
