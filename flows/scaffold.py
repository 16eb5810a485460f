"""Writes what an extension of VLFoundry begins with: a file that registers itself, and its test."""

import keyword
import string
from collections.abc import Iterator
from pathlib import Path

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.project import PACKAGE

TEMPLATES = Path(__file__).parent / "templates" / "scaffold"
KINDS = {
    "suite": ("eval/suites", "tests/eval/test_suite_{}.py"),
    "launcher": ("infra/launch/launchers", "tests/infra/test_launcher_{}.py"),
    "family": ("models/families", "tests/models/test_{}.py"),
}
"""kind -> the folder in which one is registered by being there, and where its test goes"""


def write(kind: str, name: str, checkout: Path) -> Iterator[str]:
    """Write the two files; lines that say what was written and what to do next.

    Args:
        kind: one of `KINDS`.
        name: of the module, and what the registry knows it by.
        checkout: of VLFoundry.

    Raises:
        ConfigError: the name cannot be one, is taken, or this is no checkout of VLFoundry.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ConfigError(
            f"{name!r} cannot name a {kind}; expected lower-case letters, digits and _, not "
            "beginning with a digit, for it is the name of a Python module"
        )
    folder, test = KINDS[kind]
    if not (checkout / PACKAGE / "stages").is_dir() or not (checkout / "tests").is_dir():
        raise ConfigError(
            f"{checkout} is not a checkout of VLFoundry, in which a {kind} is a file of {folder}/; "
            "clone the repository, and run this there"
        )
    files = {f"{folder}/{name}.py": kind, test.format(name): f"{kind}_test"}
    taken = [path for path in files if (checkout / path).exists()]
    if taken:
        raise ConfigError(f"{taken[0]} is there already; choose another name")
    for path, template in files.items():
        text = string.Template((TEMPLATES / f"{template}.py.txt").read_text("utf-8"))
        written = text.substitute(name=name, title=name.title().replace("_", ""))
        (checkout / path).write_text(written, encoding="utf-8")
        yield f"wrote {path}"
    yield f"next: what is marked TODO, then `python -m pytest {test.format(name)}`"
