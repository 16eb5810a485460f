"""A wrong parameter of any stage ends a run before its server is started."""

import functools
import io

import pytest

import vlfoundry.flows.launch
from tests.support.tiny_project import ROOT
from vlfoundry.flows.parameters import check_parameters
from vlfoundry.flows.terminal import Terminal
from vlfoundry.infra.core.config import apply_overrides, load_params
from vlfoundry.infra.core.errors import ConfigError

pytestmark = pytest.mark.slow


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
        ("languages: [en, zh,", "languages: [en, zh, en,", "languages has en twice"),
        ("languages: [en, zh, ja, ar, it]", "languages: []", "languages is empty; expected at"),
        ("unmasked_share: ", "unmasked_share: 7 #", "unmasked_share is 7"),
        ("candidate: internvl_c", "candidate: internvl_x", r"no model \['internvl_x'\]"),
        ("score: zero_shot/top1", "score: zeroshot/top1", "no score 'zeroshot/top1/en"),
        (
            "chat_full, score: colour",
            "internvl_c, score: colour",
            r"suites of internvl_c .* are \[",
        ),
        ("score: zero_shot/top5/en,", "score: zero_shot/top5/fr,", "did you mean 'zero_shot/top5/"),
        ("score: zero_shot/top5/en,", "score: zero_shot,", "there will be no score 'zero_shot'"),
        ("score: matching/accuracy, ", "score: matching/acuracy, ", "mean 'matching/accuracy'"),
        ("not_below: internvl_c", "not_below: chat_full", "rule on chat_full: there will be no"),
        ("languages: [en, zh, ja, ar, it]", "languages: [en]", "no score 'zero_shot/top5/zh'"),
        ("suites: [zero_shot, ", "suites: [", "no score 'zero_shot/top1/ensemble'"),
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

    monkeypatch.setattr(vlfoundry.flows.launch, "server", too_late)
    with pytest.raises(ConfigError, match=message):
        vlfoundry.flows.launch.run_pipeline(project, terminal=Terminal(io.StringIO()))


def numbers(node, path=()):
    """Where the numbers of a tree of parameters are."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        elif type(value) in (int, float):
            yield (*path, key)


NUMBERS = list(numbers(load_params(ROOT / "params.yaml")))


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_no_number_may_be_negative(project, path):
    """Each is a count, a size, a rate or a share."""
    assert len(NUMBERS) > 60
    params = load_params(project / "params.yaml")
    node = functools.reduce(dict.__getitem__, path[:-1], params)
    node[path[-1]] = -5
    with pytest.raises(ConfigError, match="-5"):
        check_parameters(project, params)


def test_no_classes_at_all_are_refused(project):
    params = apply_overrides(load_params(project / "params.yaml"), ["ingest.classes=0"])
    with pytest.raises(ConfigError, match=r"ingest\.classes is 0; expected a number of at least 1"):
        check_parameters(project, params)


@pytest.mark.parametrize("seed", [1 << 32, 10**20])
def test_a_seed_beyond_the_streams_is_refused(project, seed):
    params = apply_overrides(load_params(project / "params.yaml"), [f"seed={seed}"])
    with pytest.raises(ConfigError, match=f"seed is {seed}, expected 0 to 4294967295"):
        check_parameters(project, params)


@pytest.mark.parametrize("text", ["ranks: two\n", "x: [1\n", "prometheus: 127.0.0.1:99999\n"])
def test_the_launcher_is_looked_at_as_well(project, monkeypatch, text):
    (project / "odd.yaml").write_text(text)
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(project / "odd.yaml"))
    with pytest.raises(ConfigError, match="odd"):
        check_parameters(project)
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "nope")
    with pytest.raises(ConfigError, match="no launcher profile 'nope'"):
        check_parameters(project)


def test_the_launcher_is_the_project_s_wherever_we_are(project, monkeypatch):
    (project / "launchers").mkdir()
    (project / "launchers/mine.yaml").write_text("ranks: 3\ntensor: 2\n")
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "mine")
    with pytest.raises(ConfigError, match="launcher mine: 3 ranks cannot be shared"):
        check_parameters(project)
    (project / "launchers/mine.yaml").write_text("ranks: 3\n")
    check_parameters(project)
