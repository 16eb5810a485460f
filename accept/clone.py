"""A fresh clone of HEAD, as a new user has one."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fresh_clone(place: Path) -> Path:
    """Clone HEAD to `place` and make its environment (downloads are not part of any limit)."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    subprocess.run(["make", "setup"], cwd=place, check=True)
    return place
