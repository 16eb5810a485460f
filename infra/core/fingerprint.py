"""Content fingerprints: sha256, so that equal fingerprints mean equal bytes."""

import hashlib
from pathlib import Path

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.files import files_below


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(path: str | Path) -> str:
    """Hexadecimal sha256 of a file, or of a folder's sorted (relative name, sha256) pairs.

    What file managers leave in folders does not count, nor does it for DVC (.dvcignore).

    Raises DataError if there is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        return _sha256_file(path)
    if not path.is_dir():
        raise DataError(f"{path} does not exist; run the stage that makes it first")
    digest = hashlib.sha256()
    for file in files_below(path):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
