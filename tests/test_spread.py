"""How far runs lie apart, and that the gate's limits stand below that."""

import json
import math

import pytest

from benchmarks import spread
from vlfoundry.eval.compare.scores import mean_score, write_scores
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.infra.core.config import load_params


def finished(root, hits, passed=True):
    """A folder that looks like a finished run: one score a model, `hits` of 50 right."""
    score = mean_score("box", "accuracy", [1.0] * hits + [0.0] * (50 - hits), chance=0.1)
    for variant in OUTPUTS:
        file = root / OUTPUTS[variant].scores
        file.parent.mkdir(parents=True)
        write_scores(file, [score], model={}, data={})
    (root / "artifacts/gate").mkdir()
    gate = {"passed": passed, "reasons": [] if passed else ["box"], "warnings": []}
    (root / "artifacts/gate/gate.json").write_text(json.dumps(gate))
    return root


def test_a_limit_may_stand_two_standard_errors_below_the_mean(tmp_path, monkeypatch, capsys):
    runs = {"seed 0": 40, "seed 1, avx2": 20}
    named = [f"{name}={finished(tmp_path / name, hits)}" for name, hits in runs.items()]
    out = tmp_path / "spread.json"
    monkeypatch.setattr("sys.argv", ["spread", *named, "--out", str(out)])
    assert spread.main() == 0
    document = json.loads(out.read_text())
    assert document["runs"]["seed 1, avx2"]["passed"]
    line = document["scores"]["chat_full"]["box/accuracy"]
    assert line["values"] == [0.8, 0.4]
    assert line["mean"] == pytest.approx(0.6)
    deviation = math.sqrt(2 * 0.2**2)  # of two values, 0.2 to each side
    assert line["deviation"] == pytest.approx(deviation, abs=1e-4)
    assert line["low"] == pytest.approx(0.6 - 2 * deviation, abs=1e-3)
    assert "chat_full box/accuracy: 60.0% (28.3), 3.4%" in capsys.readouterr().out


def test_runs_that_agree_are_still_as_uncertain_as_their_items(tmp_path):
    folders = {name: finished(tmp_path / name, 25) for name in ("a", "b")}
    line = spread.spread(folders)["scores"]["internvl_c"]["box/accuracy"]
    assert line["deviation"] == 0
    assert line["low"] == pytest.approx(0.5 - 2 * math.sqrt(0.25 / 50), abs=2e-3)


@pytest.mark.parametrize("runs", [["one=."], ["a=x", "a=y"], ["=x", "b=y"], ["x", "y"]])
def test_runs_need_names(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["spread", *runs])
    with pytest.raises(SystemExit):
        spread.main()
    assert "at least two runs, each as NAME=DIR" in capsys.readouterr().err


def test_what_is_no_finished_run_is_said(tmp_path, monkeypatch, capsys):
    whole = finished(tmp_path / "a", 30)
    half = finished(tmp_path / "b", 30)
    (half / "artifacts/gate/gate.json").unlink()
    for wrong, message in ((half, "gate.json: expected what the gate"), ("x", "does not exist")):
        monkeypatch.setattr("sys.argv", ["spread", f"a={whole}", f"b={wrong}"])
        with pytest.raises(SystemExit):
            spread.main()
        assert message in capsys.readouterr().err


def test_limits_of_the_gate_stand_below_what_runs_reach():
    """By two standard errors of one run, so that a run is not refused by bad luck."""
    runs = json.loads(spread.OUT.read_text("utf-8"))["scores"]
    rules = [
        r for r in load_params(spread.ROOT / "params.yaml")["gate"]["rules"] if "at_least" in r
    ]
    assert len(rules) > 5
    for rule in rules:
        line = runs[rule["variant"]][rule["score"]]
        assert (line["chance"] or 0) < rule["at_least"] <= line["low"], rule
