"""What every parity check reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Check:
    """One recorded result against ours."""

    name: str
    """which tensor, case or number, unique in its folder"""
    passed: bool
    worst_abs: float | None = None
    """largest absolute difference; None where results are equal or not (tokens, texts, grids)"""
    worst_rel: float | None = None
    """largest difference over the largest recorded magnitude of the tensor"""
    note: str = ""
    """why it did not pass, or what is particular about it"""
    applies: bool = True
    """False: there is nothing to compare, for the reason in `note`; it counts neither way"""


def close(
    name: str,
    got: np.ndarray,
    wanted: np.ndarray,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    note: str = "",
) -> Check:
    """Compare arrays of one shape; at least one limit is given, and each one given must hold.

    A shape that differs, or a value that is not finite on one side alone, does not pass.
    """
    if atol is None and rtol is None:
        raise ValueError(f"{name}: a comparison needs atol or rtol")
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape:
        return Check(name=name, passed=False, note=f"shape {got.shape}, expected {wanted.shape}")
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(
        got[~finite], wanted[~finite], equal_nan=True
    ):
        return Check(
            name=name, passed=False, note="not finite where the recorded value is, or the reverse"
        )
    worst = float(np.abs(got - wanted)[finite].max(initial=0.0))
    scale = float(np.abs(wanted[finite]).max(initial=0.0))
    relative = worst / scale if scale else worst
    passed = (atol is None or worst <= atol) and (rtol is None or relative <= rtol)
    return Check(name=name, passed=passed, worst_abs=worst, worst_rel=relative, note=note)


def same(name: str, got: object, wanted: object, note: str = "") -> Check:
    """Compare values that must be equal; the note shows both if they are not."""
    if got == wanted:
        return Check(name=name, passed=True, note=note)
    return Check(name=name, passed=False, note=f"got {got!r}, expected {wanted!r}"[:400])
