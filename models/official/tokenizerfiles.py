"""Files of vocabularies, read by the libraries that they are of; a broken one is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.givenfiles import MOST_BYTES, check_file, read_mapping

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def read_backend(path: Path) -> Backend:
    """A `tokenizer.json`. Raises ModelError if it is damaged or something else."""
    from tokenizers import Tokenizer as Backend

    read_mapping(path)
    return _told(path, "tokenizer.json", lambda: Backend.from_file(str(path)))


def read_merges(vocabulary: Path, merges: Path) -> Any:
    """A BPE of `vocab.json` and `merges.txt`. Raises ModelError if one of them is damaged."""
    from tokenizers import models

    read_mapping(vocabulary)
    check_file(merges, most=MOST_BYTES)
    return _told(
        merges, "list of merges", lambda: models.BPE.from_file(str(vocabulary), str(merges))
    )


def read_pieces(path: Path, more: bytes = b"") -> Any:
    """A sentencepiece model with something appended. Raises ModelError if it is damaged."""
    from sentencepiece import SentencePieceProcessor

    content = check_file(path, most=MOST_BYTES).read_bytes() + more
    try:
        return SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise _damaged(path, "sentencepiece model", error) from None


def _told(path: Path, what: str, make: Any) -> Any:
    try:
        return make()
    except Exception as error:
        # The library raises nothing narrower; what is, is not about the file.
        if type(error) is not Exception:
            raise
        raise _damaged(path, what, error) from None


def _damaged(path: Path, what: str, error: Exception) -> ModelError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return ModelError(
        f"{path} is damaged, or not a {what}: {reason}; copy it again from the model it belongs to"
    )
