"""Every stage says what it reads, writes and can be told."""

import dataclasses
import functools
import importlib
import subprocess
import sys
import typing
from collections.abc import Iterator

import pytest

from tests.support.cpu import least_cpu_s
from vlfoundry.infra.core.stage import EXIT_USER_ERROR, main

pytestmark = pytest.mark.slow

STAGES = (
    "ingest", "bootstrap", "filter", "dedup", "decontaminate", "shard", "pretrain_text",
    "contrastive", "generative", "sft", "evaluate", "gate", "report",
)  # fmt: skip


def leaves(config: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", STAGES)
def test_help(name: str, capsys: pytest.CaptureFixture) -> None:
    stage = importlib.import_module(f"vlfoundry.stages.{name}").STAGE
    assert main(stage, ["--help"]) == 0
    shown = capsys.readouterr().out
    for path in (*stage.inputs, *stage.outputs, *stage.variants):
        assert path in shown
    for key in leaves(stage.config):
        assert f"\n  {key}: " in shown
    assert "memory at" not in shown  # no default is shown as an address


@pytest.mark.parametrize("name", STAGES)
def test_help_does_not_wait_for_torch(name: str) -> None:
    command = [sys.executable, "-m", f"vlfoundry.stages.{name}", "--help"]
    run = functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    assert least_cpu_s(run, enough=1) < 1


def test_docstrings_of_parameters_are_shown(capsys: pytest.CaptureFixture) -> None:
    from vlfoundry.stages import contrastive, ingest

    main(contrastive.STAGE, ["-h"])
    assert "  model.text.width: int = 128\n      channels of a token\n" in capsys.readouterr().out
    main(ingest.STAGE, ["--help"])
    shown = capsys.readouterr().out
    assert "Share of the classes of which no drawing is trained on." in shown
    assert "data/twemoji.parquet" in shown


def test_another_option_is_refused(capsys: pytest.CaptureFixture) -> None:
    from vlfoundry.stages import ingest

    assert main(ingest.STAGE, ["--halp"]) == EXIT_USER_ERROR
    assert "got '--halp', expected --dry-run, --help or key=value" in capsys.readouterr().err
