"""The tokenizer of a model folder, read without PyTorch."""

from __future__ import annotations

from pathlib import Path

from vlfoundry.models.chat.official import KEPT, official_tokenizer
from vlfoundry.models.internvl.config import PARTS
from vlfoundry.models.internvl.folder import read_config
from vlfoundry.models.tokenizer import TextTokenizer, Tokenizer


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The text side of a model folder: our own tokenizer, or the official one of an import.

    Raises:
        ModelError: it has neither, or the tokenizer is of another model.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder / "tokenizer.json")
    kind, config = read_config(folder)
    chats = "language" in PARTS[kind]
    tokenizer = official_tokenizer(folder / KEPT, embeds=not chats)
    tokenizer.require_rows((config.chat if chats else config.text).vocab_size, folder)
    return tokenizer
