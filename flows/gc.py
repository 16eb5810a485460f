"""`vlfoundry gc`: the one command that deletes training state, and only when told to."""

import dataclasses
import datetime
import shutil
from pathlib import Path

from infra.stage import SET_ASIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
    """Training state that was set aside because its run key was no longer asked for."""

    folder: Path
    size_bytes: int
    used: datetime.datetime
    """when something in it was last written"""

    def line(self, root: Path) -> str:
        """One row of the list."""
        size = self.size_bytes / 1e6
        return f"{self.folder.relative_to(root)}  {size:,.1f} MB  last written {self.used:%Y-%m-%d}"


def leftovers(root: Path) -> list[Leftover]:
    """State set aside in a checkout and in the workspaces below it, the oldest first."""
    places = (root / "work", *(root / "work" / "workspaces").glob("*/work"))
    folders = [p for place in places for p in place.glob(f"*{SET_ASIDE}*") if p.is_dir()]
    return sorted(map(_leftover, folders), key=lambda found: (found.used, found.folder))


def delete(found: list[Leftover]) -> int:
    """Delete them; bytes that this freed."""
    for leftover in found:
        shutil.rmtree(leftover.folder)
    return sum(leftover.size_bytes for leftover in found)


def _leftover(folder: Path) -> Leftover:
    facts = [path.stat() for path in folder.rglob("*") if path.is_file()]
    newest = max((fact.st_mtime for fact in facts), default=folder.stat().st_mtime)
    return Leftover(
        folder=folder,
        size_bytes=sum(fact.st_size for fact in facts),
        used=datetime.datetime.fromtimestamp(newest),
    )
