"""Golden folders: which group each is of, asked before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlfoundry.eval.parity.conversations import is_conversations
from vlfoundry.eval.parity.metrics import is_metrics
from vlfoundry.eval.parity.tiling import is_tiling
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.givenfiles import read_mapping


def _declares(field: str) -> Callable[[Path], bool]:
    def is_one(folder: Path) -> bool:
        config = folder / "config.json"
        return config.is_file() and field in read_mapping(config)

    return is_one


GROUPS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "vision": ("InternViT: a config.json with patch_size", _declares("patch_size")),
    "dual": ("InternVL-14B: a config.json with qllama_config", _declares("qllama_config")),
    "chat": ("InternVL-Chat: a config.json with llm_config", _declares("llm_config")),
    "tiling": ("tiling: a dynamic_preprocess.json or an image_tiles.json", is_tiling),
    "conversations": ("conversations: a conversations.json", is_conversations),
    "metrics": ("metrics: files named after the official metrics", is_metrics),
}
"""what a folder of each group holds, and whether a folder is one"""


def group_of(folder: Path) -> str:
    """The group of a golden folder.

    Raises:
        DataError: it is of none.
    """
    for name, (_, is_one) in GROUPS.items():
        if is_one(folder):
            return name
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    known = "; ".join(what for what, _ in GROUPS.values())
    raise DataError(
        f"{folder} is no golden folder of a known group: it holds {found}. Known are: {known}"
    )


def check_folders(paths: Sequence[Path]) -> None:
    """Look whether there is anything to compare.

    Raises:
        DataError: a path does not exist, none is a folder, or no folder is of a known group.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"{', '.join(missing)} does not exist; expected golden folders")
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise DataError("there is nothing to compare: no path is a folder")
    if not any(is_one(folder) for folder in folders for _, is_one in GROUPS.values()):
        group_of(folders[0])
