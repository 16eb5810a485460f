"""Parameters become frozen dataclasses, strictly."""

import dataclasses
from typing import Literal

import pytest

from vlfoundry.infra.core.config import apply_overrides, build, canonical_json, merge, to_dict
from vlfoundry.infra.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}, expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    seed: int
    names: tuple[str, ...] = ()
    limit: int | None = None
    inner: Inner = Inner()
    scale: dict[str, float] = dataclasses.field(default_factory=dict)


def test_a_config_survives_its_json_form() -> None:
    config = build(
        Outer, {"seed": 3, "names": ["a", "b"], "inner": {"rate": 1}, "scale": {"x": "1e-3"}}
    )
    assert config == Outer(seed=3, names=("a", "b"), inner=Inner(rate=1.0), scale={"x": 1e-3})
    assert build(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"sed": 1}, "unknown key 'sed'; did you mean 'seed'"),
        ({}, "'seed' is missing"),
        ({"seed": 1.5}, "seed: got 1.5, expected a whole number"),
        ({"seed": True}, "expected a whole number"),
        ({"seed": 1, "names": "ab"}, "names: got 'ab', expected a list"),
        ({"seed": 1, "inner": {"kind": "linear"}}, "inner.kind: got 'linear', expected one of"),
        ({"seed": 1, "inner": {"rate": -1}}, "inner: rate is -1.0, expected 0 or more"),
        ({"seed": 1, "limit": "many"}, "limit: got 'many', expected a whole number"),
    ],
)
def test_a_wrong_parameter_is_named(mapping: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, mapping)


def test_overrides_reach_nested_keys_and_refuse_new_ones() -> None:
    params = {"seed": 0, "train": {"lr": 1.0, "steps": 5}}
    changed = apply_overrides(params, ["train.lr=1e-3", "seed=7"])
    assert changed == {"seed": 7, "train": {"lr": 1e-3, "steps": 5}}
    assert params["seed"] == 0
    with pytest.raises(ConfigError, match=r"'train\.step' does not exist; did you mean 'steps'"):
        apply_overrides(params, ["train.step=3"])
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        apply_overrides(params, ["seed"])


def test_profiles_are_laid_over_known_keys_only() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge(base, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    with pytest.raises(ConfigError, match=r"'a\.z' does not exist"):
        merge(base, {"a": {"z": 5}})


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1})


@pytest.mark.parametrize("value", ["nan", "inf", "-.inf", float("nan"), 1e400])
def test_a_number_that_is_none_is_refused(value):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        lr: float

    with pytest.raises(ConfigError, match=r"train\.lr.*(a number|a finite number)"):
        build(Options, {"lr": value}, "train")
