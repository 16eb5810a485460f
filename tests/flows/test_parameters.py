"""A wrong parameter of any stage ends a run before its server is started."""

import io

import pytest

import flows.launch
from flows.parameters import check_parameters
from flows.terminal import Terminal
from infra.errors import ConfigError
from tests.tiny import ROOT


@pytest.fixture
def project(tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[noto, noto_v1,", "[mycrawl, noto_v1,", "source 'mycrawl' is unknown; known: emojitwo"),
        ("\nseed: 0", "\nseed: many", "seed"),
        ("unmasked_share: ", "unmasked_share: 7 #", "unmasked_share is 7"),
        ("candidate: internvl_c", "candidate: internvl_x", r"no model \['internvl_x'\]"),
    ],
)
def test_every_stage_is_asked(project, monkeypatch, old, new, message):
    text = (project / "params.yaml").read_text("utf-8")
    check_parameters(project)
    assert old in text
    (project / "params.yaml").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ConfigError, match=message):
        check_parameters(project)

    def too_late(*_, **__):
        raise AssertionError("a server was started first")

    monkeypatch.setattr(flows.launch, "server", too_late)
    with pytest.raises(ConfigError, match=message):
        flows.launch.run_pipeline(project, terminal=Terminal(io.StringIO()))


@pytest.mark.parametrize("text", ["ranks: two\n", "x: [1\n", "prometheus: 127.0.0.1:99999\n"])
def test_the_launcher_is_looked_at_as_well(project, monkeypatch, text):
    (project / "odd.yaml").write_text(text)
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(project / "odd.yaml"))
    with pytest.raises(ConfigError, match="odd"):
        check_parameters(project)
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "nope")
    with pytest.raises(ConfigError, match="no launcher profile 'nope'"):
        check_parameters(project)
