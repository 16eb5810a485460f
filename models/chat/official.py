"""The text side of imported models: the official tokenizer files as a `TextTokenizer`.

Which file says what has grown over the years: `added_tokens_decoder` in tokenizer_config.json,
added_tokens.json and special_tokens_map.json are all read. The pieces come from tokenizer.model
where there is one, as in the official code, which uses the slow tokenizers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.givenfiles import MOST_BYTES, brief, check_file, read_mapping, shown
from vlfoundry.models.chat.dialogue import TemplateDialogue, WrittenDialogue
from vlfoundry.models.chat.templates import TEMPLATES, named
from vlfoundry.models.chat.tokenizer import (
    ByteLevelTokenizer,
    ChatTokenizer,
    SentencePieceTokenizer,
)
from vlfoundry.models.official.tokenizerfiles import read_pieces
from vlfoundry.models.tokenizer import TextTokenizer

PIECES = ("tokenizer.model", "tokenizer.json", "vocab.json")
"""what holds a vocabulary, in the order in which it is looked for; vocab.json has a merges.txt"""
EMBEDDED_TOKENS = 80
"""longest text of the official InternVL-C and -G, special tokens included"""
EMBEDDED_PAD = 0
"""what their texts are padded with, whatever the tokenizer says"""
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
KEPT = "official"
"""folder of a model folder that has the small files of what was imported"""
SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md")
"""what is kept of a folder beside its weights; code is not"""
READ = (".json", ".model")
"""ends of names of those that are read here"""
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class OfficialTokenizer(TextTokenizer):
    """An official tokenizer, and the files that it was read from."""

    def __init__(
        self,
        backend: ChatTokenizer,
        *,
        eos: str,
        embeds: bool,
        template: str | None,
        files: Mapping[str, bytes],
    ):
        """
        Args:
            backend: text to ids and back.
            eos: the token that ends a text.
            embeds: whether it is that of an InternVL-C or -G.
            template: name of the conversation template, if the folder has one.
            files: of the folder, to be written beside what is trained on from it.
        """
        self._backend, self.template, self._files = backend, template, dict(files)
        self.bos_id, self.eos_id = backend.begin_id, backend.special_id(eos)
        self.pad_id = EMBEDDED_PAD if embeds else backend.pad_id
        self.embedded_tokens = EMBEDDED_TOKENS if embeds else None
        self._left_out = {self.bos_id, self.eos_id, self.pad_id}

    @property
    def vocab_size(self) -> int:
        return self._backend.vocab_size

    def encode(self, text: str) -> list[int]:
        return self._backend.pieces(self._backend.as_text(text))

    def continuation(self, before: str, text: str) -> list[int]:
        """As in the base class. Both are encoded as one text, as the official code does."""
        before, text = map(self._backend.as_text, (before, text))
        return self._backend.pieces(before + text)[len(self._backend.pieces(before)) :]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        special = set(self._backend.added.values())
        left_out = self._left_out if keep_special else special | self._left_out
        return self._backend.decode([int(i) for i in ids if int(i) not in left_out])

    @functools.cached_property
    def dialogue(self) -> WrittenDialogue:
        if self.template is None:
            raise ModelError(
                "the model's official/config.json names no conversation template, so it cannot be "
                f'asked anything; add "template" to it, one of: {", ".join(TEMPLATES)}'
            )
        return TemplateDialogue(self._backend, named(self.template))

    def save_to(self, folder: Path) -> None:
        kept = folder / KEPT
        kept.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (kept / name).write_bytes(content)

    @property
    def special(self) -> Mapping[str, int]:
        """Its special tokens and their ids."""
        return self._backend.added

    def require_rows(self, rows: int, where: str | Path) -> None:
        """Raises ModelError unless every id has one of the `rows` of an embedding matrix."""
        beyond = {token: i for token, i in self._backend.added.items() if i >= rows}
        if beyond:
            raise ModelError(
                f"{where}: the special tokens {brief(str(beyond), 600)} lie beyond the embedding "
                f"matrix, which has {rows} rows; the tokenizer files are of another model, or of "
                "one whose matrix was never made larger for these tokens: take them out of the "
                "files, or give the files of this model"
            )
        if self.vocab_size > rows:
            raise ModelError(
                f"{where}: the tokenizer has {self.vocab_size} tokens, and the embedding matrix "
                f"{rows} rows; expected the tokenizer files of this model"
            )


def official_tokenizer(kept: Path, *, embeds: bool) -> OfficialTokenizer:
    """The tokenizer in a folder of official files.

    Args:
        kept: the folder `official` of a model folder.
        embeds: whether it is that of an InternVL-C or -G.

    Raises:
        ModelError: there is none, or it is of a kind that is not read; says what to do.
    """
    found = next((kept / name for name in PIECES if (kept / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"{kept.parent} has no tokenizer: looked for a tokenizer.json of ours, and in {kept} "
            f"for {', '.join(PIECES[:-1])}, and vocab.json with merges.txt; copy the tokenizer "
            f"files of the official model into {kept}, or import it again from a folder with them"
        )
    special = _Special.read(kept)
    read = _sentencepiece if found.suffix == ".model" else _byte_level
    return OfficialTokenizer(
        read(found, special),
        eos=special.name("eos_token"),
        embeds=embeds,
        template=template_name(_json(kept / "config.json")),
        files={path.name: path.read_bytes() for path in small_files(kept)},
    )


def small_files(folder: Path) -> list[Path]:
    """What is kept of a model folder beside its weights.

    Raises:
        ModelError: one of them leads out of the folder, is no plain file, or is a git-lfs pointer
            or a web page in place of a file that is read; or it is too large for that.
    """
    paths = [path for pattern in SMALL for path in sorted(folder.glob(pattern))]
    found = [p for p in paths if _is_kept(p)]
    for path in found:
        check_file(path, folder, disguised=path.suffix in READ, most=MOST_BYTES)
    return found


def _is_kept(path: Path) -> bool:
    """Folders are not, but one in the place of a file that is read is refused."""
    is_read = path.suffix in READ or path.name == "merges.txt"
    return not path.name.endswith(".index.json") and (is_read or not path.is_dir())


def template_name(facts: Mapping[str, Any]) -> str | None:
    """The conversation template that an official config.json names, or that its form implies.

    LLaVA's form is that of InternVL-Chat 1.0 alone; transformers' own of InternVL 2.5 and later.
    """
    if facts.get("template"):
        return str(facts["template"])
    if facts.get("model_type") == "llava":
        return "vicuna_v1"
    return "internvl2_5" if "text_config" in facts else None


@dataclass(frozen=True, kw_only=True)
class _Special:
    """What the JSON files beside a vocabulary say of special tokens."""

    ids: dict[str, int]
    """of those whose id is told"""
    names: dict[str, str]
    """of `NAMES`, as far as there are any"""
    others: tuple[str, ...]
    """further special tokens"""
    swallow: tuple[str, ...]
    """tokens after which blanks are dropped"""
    config: dict[str, Any]
    """tokenizer_config.json"""

    @classmethod
    def read(cls, kept: Path) -> _Special:
        path = kept / "tokenizer_config.json"
        config = _json(path)
        told = _json(kept / "special_tokens_map.json") | {k: v for k, v in config.items() if v}
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(isinstance(e, dict) for e in decoder.values()):
            raise _wrong(path, "added_tokens_decoder", decoder, "a mapping of ids to tokens")
        for entry in decoder.values():
            if entry.get("lstrip"):
                raise ModelError(
                    f"{kept}: {shown(_text(path, entry))} drops the blanks before it (lstrip), "
                    "which is not built here"
                )
        ids = _ids(kept / "added_tokens.json", _json(kept / "added_tokens.json").items())
        ids |= _ids(path, ((_text(path, entry), index) for index, entry in decoder.items()))
        return cls(
            ids=ids,
            names={name: _text(path, told[name]) for name in NAMES if told.get(name)},
            others=tuple(_text(path, token) for token in _others(path, told)),
            swallow=tuple(_text(path, e) for e in decoder.values() if e.get("rstrip")),
            config=config,
        )

    def name(self, role: str) -> str:
        """The token of a role, by default LLaMA's."""
        return self.names.get(role, {"bos_token": "<s>", "eos_token": "</s>"}.get(role, "<unk>"))

    def pad(self, ids: Mapping[str, int]) -> str:
        """What rows are filled up with; it is seen by nobody."""
        candidates = (self.names.get("pad_token"), self.name("unk_token"), self.name("eos_token"))
        found = next((token for token in candidates if token in ids), None)
        if found is None:
            raise ModelError(
                f"none of {candidates} is a special token of the official tokenizer; expected "
                "a pad_token or eos_token in tokenizer_config.json or special_tokens_map.json"
            )
        return found


def _sentencepiece(path: Path, special: _Special) -> SentencePieceTokenizer:
    processor = read_pieces(path)
    ids = dict(special.ids)
    for token in dict.fromkeys((*map(special.name, NAMES[:3]), *special.others)):
        index = processor.piece_to_id(token)
        if processor.id_to_piece(index) == token:
            ids.setdefault(token, index)
    named_ones = [*map(special.name, NAMES[:3]), special.pad(ids), *special.others]
    begins = special.config.get("add_bos_token", True)
    if begins:
        _require(path, special.name("bos_token"), ids)
    blank_once = special.config.get("legacy") is False
    return SentencePieceTokenizer(
        path,
        added=ids,
        pad=special.pad(ids),
        begin=special.name("bos_token") if begins else None,
        blank_once=blank_once,
        swallow_blanks_after=special.swallow,
        no_blank_before=named_ones,
    )


def _byte_level(path: Path, special: _Special) -> ByteLevelTokenizer:
    ids, begin = dict(special.ids), special.names.get("bos_token")
    facts = _json(path) if path.name == "tokenizer.json" else {}
    added = facts.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise _wrong(path, "added_tokens", added, "a list of tokens")
    ids |= _ids(path, ((_text(path, token), token.get("id")) for token in added))
    if not facts and special.config.get("tokenizer_class") not in QWEN2:
        raise ModelError(
            f"{path} is of a {brief(str(special.config.get('tokenizer_class')))}; of vocab.json "
            f"and merges.txt only {' and '.join(QWEN2)} are read: give a tokenizer.json, which "
            "says how it cuts texts into words (transformers writes one)"
        )
    begins = special.config.get("add_bos_token")
    begins = _opens_with(begin, facts.get("post_processor")) if begins is None else begins
    if begins:
        _require(path, begin, ids)
    return ByteLevelTokenizer(
        path, added=ids, pad=special.pad(ids), begin=begin if begins else None
    )


def _opens_with(begin: str | None, processor: Any) -> bool:
    """Whether the post-processor of a tokenizer.json puts the begin token in front of a text.

    What is no post-processor at all is refused where the file is read as a whole.
    """
    processor = processor if isinstance(processor, dict) else {}
    steps = [s for s in processor.get("processors") or [processor] if isinstance(s, dict)]
    singles = [s["single"] for s in steps if isinstance(s.get("single"), list) and s["single"]]
    first = [single[0] for single in singles if isinstance(single[0], dict)]
    return begin is not None and {"id": begin, "type_id": 0} in [
        item.get("SpecialToken") for item in first
    ]


def _others(path: Path, told: Mapping[str, Any]) -> list[Any]:
    """Further special tokens: a list, or since transformers 5 perhaps by name."""
    found = told.get("additional_special_tokens") or told.get("extra_special_tokens") or []
    found = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise _wrong(path, "additional_special_tokens", found, "a list of tokens")
    return found


def _ids(path: Path, pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    ids = {}
    for token, index in pairs:
        digits = isinstance(index, str) and index.isascii() and index.isdigit()
        number = int(index) if digits and len(index) < 10 else index
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not isinstance(token, str) or not token or not whole or not 0 <= number < 1 << 31:
            raise _wrong(path, shown(token), index, "a special token and its id")
        ids[token] = number
    return ids


def _text(path: Path, token: Any) -> str:
    """A token, told as a text or as a mapping with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise _wrong(path, "a special token", token, "a text, or a mapping with its content")
    return content


def _require(path: Path, begin: str | None, ids: Mapping[str, int]) -> None:
    if begin not in ids:
        raise _wrong(path, "bos_token", begin, f"one of the special tokens: {sorted(ids)[:9]}")


def _wrong(path: Path, name: str, value: Any, expected: str) -> ModelError:
    return ModelError(
        f"{path} is damaged: {name} is {shown(value)}, expected {expected}; get the tokenizer "
        "files of the model again"
    )


def _json(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}
