"""DVC's cache of a checkout: where it is, where its objects are, and how another checkout uses it.

An object is named by the MD5 of its content. DVC itself does not look whether it still has that.
Where the cache is, DVC's own reader of its settings says: those of the machine and of the user
count too.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.files import write_atomic

if TYPE_CHECKING:
    from dvc.config import Config

LOCAL = Path(".dvc/config.local")


def cache_folder(root: Path) -> Path:
    """DVC's cache of a checkout. Raises ConfigError if DVC cannot read its settings."""
    folder = read_settings(root)["cache"].get("dir")
    return Path(folder).resolve() if folder else root / ".dvc" / "cache"


def object_path(cache: Path, md5: str) -> Path:
    """Where a cache has an object, if it has it."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def md5_of(path: Path) -> str:
    """Hexadecimal MD5 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def share_settings(root: Path, place: Path) -> None:
    """Let the checkout `place` use the cache and the remotes of `root`, with its keys.

    What git does not know comes along, for nobody else's eyes; a path that is relative to `root`
    becomes absolute.

    Raises:
        ConfigError: DVC cannot read the settings.
    """
    from configobj import ConfigObj
    from dvc.config_schema import RelPath

    settings = read_settings(root)
    shared: Any = ConfigObj(str(root / LOCAL), encoding="utf-8")
    for level in ("repo", "local"):
        for name, options in settings.load_one(level)["remote"].items():
            for option, value in options.items():
                if isinstance(value, RelPath):
                    shared.setdefault(f'remote "{name}"', {})[option] = str(value)
    shared.setdefault("cache", {})["dir"] = str(cache_folder(root).resolve())
    text = io.BytesIO()
    shared.write(text)
    write_atomic(place / LOCAL, text.getvalue(), mode=0o600)


def _find_home(root: Path) -> None:
    """Give DVC a folder where it looks for the user's settings, if HOME is none: /dev/null, as
    services have it."""
    home = Path.home()
    if home.exists() and not home.is_dir():
        os.environ["HOME"] = str(root / ".dvc" / "tmp" / "home")


def read_settings(root: Path) -> Config:
    """All settings that count for a checkout. Raises ConfigError if DVC cannot read them."""
    _find_home(root)
    from configobj import ConfigObjError
    from dvc.config import Config
    from dvc.config import ConfigError as Refused

    try:
        return Config(str(root / ".dvc"))
    except (Refused, ConfigObjError, TypeError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        if not isinstance(error, Refused):  # DVC itself ends in a traceback then
            said += "; a value with a comma needs quotes, and one with `%(` cannot be read"
        raise ConfigError(
            f"DVC cannot read its settings for {root} (.dvc/config, .dvc/config.local, or those "
            f"of the user): {said}"
        ) from error
