"""Which check a golden folder gets, and what `vlfoundry parity` prints.

    vlfoundry parity golden/*

The recorded numbers are fp32 on a CPU, and so are ours: the command leaves a GPU alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vlfoundry.eval.parity.chat import chat_model, check_chat, check_chat_stages
from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.conversations import check_conversations
from vlfoundry.eval.parity.dual import check_dual, check_dual_stages, dual_model
from vlfoundry.eval.parity.folders import check_folders, group_of
from vlfoundry.eval.parity.layouts import check_layouts
from vlfoundry.eval.parity.metrics import check_metrics
from vlfoundry.eval.parity.tiling import check_tiling
from vlfoundry.eval.parity.vision import check_vision, check_vision_stages, vision_model
from vlfoundry.infra.backend.devices import find_device
from vlfoundry.infra.core.errors import DataError, UserError

CHECKS: dict[str, Callable[[Path], list[Check]]] = {
    "vision": check_vision,
    "dual": check_dual,
    "chat": check_chat,
    "tiling": check_tiling,
    "conversations": check_conversations,
    "metrics": check_metrics,
}
"""the comparison of each group of `folders.GROUPS`"""
STAGED = {
    check_vision: (check_vision_stages, vision_model),
    check_dual: (check_dual_stages, dual_model),
    check_chat: (check_chat_stages, chat_model),
}
"""a model's comparison, that of what goes through a pipeline, and which model it is"""


def check_folder(folder: Path) -> list[Check]:
    """Compare everything that a golden folder holds.

    Raises:
        DataError: the folder is of no known group, or nothing is recorded in it.
        UserError: this process computes on a GPU.
    """
    import torch

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected a golden folder")
    check = CHECKS[group_of(folder)]
    device = find_device()
    if device.kind != "cpu":
        raise UserError(
            f"recorded numbers are fp32 on a CPU, but this process computes in {device.precision} "
            f"on {device.kind}; start it with CUDA_VISIBLE_DEVICES set to nothing"
        )
    # Ranks are forked from this process, which must not have computed with several threads.
    torch.set_num_threads(1)
    checks = check(folder)
    if check in STAGED:
        checks += check_layouts(folder, check, *STAGED[check])
    if not checks:
        raise DataError(f"{folder} has no file of recorded results; see the README beside it")
    return checks


def compare_folders(paths: Sequence[Path], say: Callable[[str], None]) -> bool:
    """Compare folder by folder and print a table of each; True if everything passed.

    Raises:
        DataError: as `folders.check_folders`.
    """
    check_folders(paths)
    folders = [path for path in paths if path.is_dir()]
    for path in paths:
        if path not in folders:
            say(f"skipped {path}: no folder")
    failed, total, missed = [], 0, 0
    for number, folder in enumerate(folders, 1):
        say(f"[{number}/{len(folders)}] {folder.name}: comparing ...")
        started = time.monotonic()
        try:
            checks = check_folder(folder)
        except UserError as error:
            say(f"  cannot be compared: {error}")
            failed.append(folder.name)
            continue
        compared = [check for check in checks if check.applies]
        misses = sum(not check.passed for check in compared)
        for line in table(checks):
            say(f"  {line}")
        say(
            f"  {len(compared) - misses} of {len(compared)} pass{worst(checks)} "
            f"({time.monotonic() - started:.1f} s)"
        )
        total, missed = total + len(compared), missed + misses
        if misses:
            failed.append(folder.name)
    verdict = f"; not passed: {', '.join(failed)}" if failed else ""
    say(f"{total - missed} of {total} pass in {len(folders)} folder(s){verdict}")
    return not failed


def table(checks: Sequence[Check]) -> list[str]:
    """A line for each check: name, largest absolute and relative error, verdict, note.

    The verdict is pass, MISS, or n/a where there is nothing to compare.
    """
    width = max(len(check.name) for check in checks)
    lines = [f"{'':{width}}  {'absolute':>9}  {'relative':>9}"]
    for check in checks:
        verdict = ("pass" if check.passed else "MISS") if check.applies else "n/a "
        errors = f"{_number(check.worst_abs)}  {_number(check.worst_rel)}"
        errors = errors if check.applies else f"{'-':>9}  {'-':>9}"
        lines.append(f"{check.name:{width}}  {errors}  {verdict}  {check.note}".rstrip())
    return lines


def worst(checks: Sequence[Check]) -> str:
    """The largest errors, in words; empty where nothing but equality was compared."""
    parts = []
    for what, key in (("absolute", "worst_abs"), ("relative", "worst_rel")):
        values = [value for check in checks if (value := getattr(check, key)) is not None]
        if values:
            parts.append(f"{what} {max(values):.1e}")
    return f"; largest error: {', '.join(parts)}" if parts else ""


def _number(value: float | None) -> str:
    return f"{'equal' if value is None else f'{value:.1e}':>9}"
