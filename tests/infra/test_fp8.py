"""What a run may ask of FP8."""

import pytest

from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig

TRAIN = {"steps": 4, "batch_samples": 8, "lr": 1e-3}


def test_the_layers_in_the_middle():
    assert [i for i in range(5) if Fp8Config().covers(i, 5)] == [1, 2, 3]
    assert [i for i in range(5) if Fp8Config(first_layers=2, last_layers=0).covers(i, 5)] == [
        2, 3, 4,
    ]  # fmt: skip
    assert not any(Fp8Config().covers(i, 2) for i in range(2))


def test_from_params():
    config = build(TrainConfig, {**TRAIN, "fp8": {"recipe": "delayed", "amax_history": 16}})
    assert config.fp8 == Fp8Config(recipe="delayed", amax_history=16)
    assert build(TrainConfig, TRAIN).fp8 is None


@pytest.mark.parametrize(
    ("fp8", "message"),
    [
        ({"recipe": "mxfp8"}, "expected one of"),
        ({"first_layers": -1}, "train.fp8.first_layers is -1; expected 0 or more"),
        ({"amax_history": 0}, "train.fp8.amax_history is 0; expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(fp8, message):
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {**TRAIN, "fp8": fp8})


def test_there_must_be_something_to_leave():
    with pytest.raises(ConfigError, match=r"has no train.fp8 to leave; use rollback"):
        TrainConfig(**TRAIN, on_bad_step="higher_precision")
    assert TrainConfig(**TRAIN, fp8=Fp8Config(), on_bad_step="higher_precision").goes_back
