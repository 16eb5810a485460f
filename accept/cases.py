"""Every case from outside: what its README asks for, by the command line that people use.

The folders of `VLFOUNDRY_CASES` (default: the copies in tests/cases) are run one by one; a folder
without a check fails. Cases that need a finished run use a small one.
"""

import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from accept.clone import ROOT
from accept.small import environment, small_project, vlfoundry

pytestmark = pytest.mark.accept

CASES = Path(os.environ.get("VLFOUNDRY_CASES", ROOT / "tests" / "cases"))
LIMIT_S = 120.0
QUICK_S = 20.0
"""a refusal takes imports, and no more"""
Check = Callable[["Bench"], None]
CHECKS: dict[str, Check] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    """standard output and errors"""
    seconds: float
    peak_mb: float


@dataclasses.dataclass(kw_only=True)
class Bench:
    """What a check works with."""

    case: Path
    tmp: Path
    model: Path
    """a model folder of ours, of the default architecture, untrained"""
    run: Callable[[], Path]
    """a small project after a whole run; a copy that may be spoilt"""

    def vlfoundry(self, *arguments: str | Path, cwd: Path | None = None, **env: str) -> Ended:
        """Run a command, in a project or in the checkout."""
        return command(vlfoundry(ROOT, *arguments), cwd or ROOT, **env)

    def refused(self, *arguments: str | Path, names: str, **options: Any) -> Ended:
        """A command that has to end with one line that says what is wrong, and code 2."""
        ended = self.vlfoundry(*arguments, **options)
        told = f"{arguments}: {ended}"
        assert ended.code == 2, told
        assert "Traceback" not in ended.output, told
        lines = [line for line in ended.output.splitlines() if line.startswith("vlfoundry: ")]
        assert len(lines) == 1, told
        assert re.search(names, lines[0]), f"{names} in {told}"
        assert ended.seconds < QUICK_S, told
        return ended


def command(argv: list[str], cwd: Path, **env: str) -> Ended:
    """Run a program to its end; its output and what it took."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            argv, cwd=cwd, env=environment(cwd if (cwd / "flows").is_dir() else ROOT, **env),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() - began > LIMIT_S * 10:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        log.seek(0)
        output = log.read()
    usage: resource.struct_rusage = found[2]
    return Ended(
        code=os.waitstatus_to_exitcode(found[1]),
        output=output,
        seconds=time.monotonic() - began,
        peak_mb=usage.ru_maxrss / 1000,
    )


def case(name: str) -> Callable[[Check], Check]:
    """Register the check of a folder."""

    def add(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return add


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternVL-C as a run has it, whose weights are what they were at the start."""
    code = """
import sys
from vlfoundry.infra.core.config import build, load_params
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.predict import save_model
from vlfoundry.models.internvl.model import build as build_model
from vlfoundry.models.tokenizer import train
config = build(InternVLConfig, load_params("params.yaml")["model"])
words = [f"word{i} number {i * 7919}" for i in range(4000)]
model = build_model(sys.argv[2], config, seed=5, spec="local")
save_model(sys.argv[1], sys.argv[2], config, model, train(words, 4096))
"""
    folder = tmp_path_factory.mktemp("model") / "internvl_c"
    argv = [str(ROOT / ".venv/bin/python"), "-c", code, str(folder), "internvl_c"]
    subprocess.run(argv, cwd=ROOT, check=True, env=environment(ROOT))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project after its first run."""
    place = small_project(tmp_path_factory.mktemp("small") / "project")
    ended = command(vlfoundry(place, "run"), place)
    assert ended.code == 0, ended.output[-4000:]
    return place


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, model: Path
) -> Iterator[Callable[[str], Bench]]:
    def run() -> Path:
        made = request.getfixturevalue("finished")
        copy = tmp_path / "project"
        subprocess.run(["cp", "-a", str(made), str(copy)], check=True)
        return copy

    yield lambda name: Bench(case=CASES / name, tmp=tmp_path, model=model, run=run)
    left = [p.cmdline() for p in psutil.process_iter() if str(tmp_path) in " ".join(_words(p))]
    assert not left, left


def _words(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.cwd()]
    except psutil.Error:
        return []


@pytest.mark.parametrize("name", sorted(p.name for p in CASES.iterdir() if p.is_dir()))
def test_case(name: str, bench: Callable[[str], Bench]) -> None:
    assert name in CHECKS, f"no check knows the case {name}"
    CHECKS[name](bench(name))


def tensors(folder: Path) -> dict[str, str]:
    """Hash of every tensor of a model folder of ours."""
    import torch
    from safetensors.torch import load_file  # NumPy has no bf16

    loaded = load_file(folder / "weights.safetensors")
    content = {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in loaded.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


# --- model folders ---------------------------------------------------------------------------


@case("bin-of-old-pytorch")
def _old_bin(bench: Bench) -> None:
    ended = bench.vlfoundry("import", bench.case / "model", bench.tmp / "out")
    assert ended.code == 0, ended
    assert "34" in ended.output
    for content, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "git-lfs"),
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    ):
        other = Path(shutil.copytree(bench.case / "model", bench.tmp / says))
        (other / "pytorch_model.bin").write_bytes(content)
        bench.refused("import", other, bench.tmp / "no", names=f"pytorch_model.bin.*{says}")
        assert not (bench.tmp / "no").exists()


@case("hf-saved-names")
def _saved_names(bench: Bench) -> None:
    for name in ("saved", "live"):
        assert bench.vlfoundry("import", bench.case / name, bench.tmp / name).code == 0
    saved, live = (bench.tmp / n / "weights.safetensors" for n in ("saved", "live"))
    assert saved.read_bytes() == live.read_bytes()
    back = bench.tmp / "back"
    assert (
        bench.vlfoundry("export", bench.tmp / "saved", back, "--format", "transformers").code == 0
    )
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as M; "
        "_, told = M.from_pretrained(sys.argv[1], output_loading_info=True); "
        "assert not told['missing_keys'] and not told['unexpected_keys'], told"
    )
    loaded = command([sys.executable, "-c", code, str(back)], ROOT, HF_HUB_OFFLINE="1")
    assert loaded.code == 0, loaded


@case("config-defaults-left-out")
def _defaults(bench: Bench) -> None:
    for name in ("model", "whole"):
        ended = bench.vlfoundry("import", bench.case / name, bench.tmp / name)
        assert ended.code == 0, ended
    one, other = (bench.tmp / name for name in ("model", "whole"))
    for file in ("config.json", "weights.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    lacking = Path(shutil.copytree(bench.case / "whole", bench.tmp / "lacking"))
    facts = json.loads((lacking / "config.json").read_text())
    del facts["llm_config"]["num_hidden_layers"], facts["llm_config"]["hidden_size"]
    (lacking / "config.json").write_text(json.dumps(facts))
    bench.refused("import", lacking, bench.tmp / "no", names=r"llm_config\.\w+")


@case("config-options-ignored")
def _options(bench: Bench) -> None:
    options = {
        "vision_quick_gelu": ("hidden_act", "quick_gelu"),
        "native_projector_relu": ("projector_hidden_act", "relu"),
        "select_layer_beyond": ("select_layer", "-9"),
        "ps_version_v3": ("ps_version", "v3"),
    }
    for name, (option, value) in options.items():
        folder = Path(shutil.copytree(bench.case / name, bench.tmp / name))
        native = CASES / "hf-saved-names/live/model.safetensors"
        chat = bench.case / "weights_chat/model.safetensors"
        shutil.copy(native if name.startswith("native") else chat, folder / "model.safetensors")
        bench.refused("import", folder, bench.tmp / "no", names=f"{option}.*{value}")
        assert not (bench.tmp / "no").exists()


@case("tied-head-stored")
def _tied(bench: Bench) -> None:
    for name in ("bin", "safetensors"):
        ended = bench.vlfoundry("import", bench.case / name, bench.tmp / name)
        assert ended.code == 0, ended
        assert re.search(r"left out:.*lm_head\.weight", ended.output), ended
        assert not [n for n in tensors(bench.tmp / name) if "head" in n]


@case("import_broken_pickle")
def _pickles(bench: Bench) -> None:
    for folder in sorted(p for p in bench.case.iterdir() if p.is_dir()):
        bench.refused("import", folder, bench.tmp / "no", names=r"pytorch_model\.bin")
        assert not (bench.tmp / "no").exists(), folder


@case("import_hostile_config")
def _hostile_config(bench: Bench) -> None:
    control = bench.vlfoundry("import", bench.case / "ok_control", bench.tmp / "ok")
    assert control.code == 0, control
    for folder in sorted(p for p in bench.case.iterdir() if p.is_dir() and p.name != "ok_control"):
        ended = bench.refused("import", folder, bench.tmp / "no", names=r"config\.json")
        assert ended.seconds < control.seconds + 5, (folder, ended)
        assert ended.peak_mb < control.peak_mb + 300, (folder, ended)
        assert not (bench.tmp / "no").exists(), folder


@case("import_hostile_index")
def _hostile_index(bench: Bench) -> None:
    for folder in sorted(p for p in bench.case.iterdir() if p.is_dir()):
        names = r"model\.safetensors\.index\.json"
        bench.refused("import", folder, bench.tmp / "no", names=names)
        assert not (bench.tmp / "no").exists(), folder


@case("broken_model_folder")
def _broken_folder(bench: Bench) -> None:
    pairs = pair_set(bench.tmp / "pairs")
    score = ("--data", pairs, "--suite", "retrieval", "--json", bench.tmp / "out.json")

    def evaluate(copy: Path, names: str) -> Ended:
        return bench.refused("evaluate", "--model", copy, *score, names=names)

    fine = bench.vlfoundry("evaluate", "--model", bench.model, *score)
    assert fine.code == 0, fine
    spoilt = sorted(path for path in bench.case.iterdir() if path.is_dir())
    for folder in spoilt:
        copy = Path(shutil.copytree(bench.model, bench.tmp / folder.name))
        for file in folder.iterdir():
            shutil.copy(file, copy / file.name)
        evaluate(copy, names=" ".join(file.name for file in folder.iterdir()))
    cut = Path(shutil.copytree(bench.model, bench.tmp / "cut"))
    weights = (cut / "weights.safetensors").read_bytes()
    (cut / "weights.safetensors").write_bytes(weights[:-1000])
    evaluate(cut, names=r"weights\.safetensors")
    deep = Path(shutil.copytree(bench.model, bench.tmp / "deep"))
    facts = json.loads((deep / "config.json").read_text())
    facts["model"]["vision"]["depth"] = 10**9
    (deep / "config.json").write_text(json.dumps(facts))
    ended = evaluate(deep, names=r"config\.json.*depth")
    assert ended.peak_mb < fine.peak_mb + 300, ended


# --- pictures --------------------------------------------------------------------------------


def tiles(bench: Bench, picture: Path, goal: str = "train") -> list[np.ndarray]:
    """What a chat model is given of a picture, by `vlfoundry pixels`."""
    out = bench.tmp / f"{picture.stem}-{goal}"
    ended = bench.vlfoundry("pixels", picture, "--for", goal, "--task", "chat", "--out", out)
    assert ended.code == 0, ended
    return [
        np.asarray(Image.open(file).convert("RGB"), float) for file in sorted(out.glob("*.png"))
    ]


@case("chat-16bit")
def _16bit(bench: Bench) -> None:
    for goal in ("train", "evaluate"):
        deep, flat = (tiles(bench, bench.case / f"pics/ramp{bits}.png", goal) for bits in (16, 8))
        assert len(deep) == len(flat)
        for one, other in zip(deep, flat, strict=True):
            assert np.abs(one - other).max() <= 2
        assert abs(np.mean([one.mean() for one in deep]) - 127) < 3


@case("chat-exif")
def _exif(bench: Bench) -> None:
    for goal in ("train", "evaluate"):
        turned, upright = (
            tiles(bench, bench.case / f"pics/{name}", goal)
            for name in ("phone6.jpg", "upright.png")
        )
        assert len(turned) == len(upright)
        for one, other in zip(turned, upright, strict=True):
            assert np.abs(one - other).mean() < 6
    checked = bench.vlfoundry("chat-check", bench.case / "exif.jsonl")
    assert checked.code == 0, checked


@case("picture_13000")
def _huge(bench: Bench) -> None:
    small = bench.vlfoundry(*_retrieval(bench, pair_set(bench.tmp / "pairs")))
    ended = bench.vlfoundry(*_retrieval(bench, bench.case / "rgb"))
    assert ended.code in (0, 2), ended
    assert "Traceback" not in ended.output
    assert ended.code == 0 or re.search(r"row|p\d|a\.parquet", ended.output), ended
    assert ended.peak_mb < small.peak_mb + 350, (ended.peak_mb, small.peak_mb)


@case("picture_starts_ghostscript")
def _ghostscript(bench: Bench) -> None:
    programs, called = bench.tmp / "bin", bench.tmp / "called"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {called}\nsleep 60\n")
    (programs / "gs").chmod(0o755)
    path = f"{programs}:{ROOT / '.venv/bin'}:{os.environ['PATH']}"
    for name in ("eps_endless", "eps_plain"):
        bench.refused(*_retrieval(bench, bench.case / name), names="PNG", PATH=path)
    chat = bench.vlfoundry("chat-check", bench.case / "chat_eps_endless/x.jsonl", PATH=path)
    assert chat.code == 1, chat
    assert re.search(r"x\.jsonl:1: image: .*PNG", chat.output), chat
    assert not called.exists()


# --- data sets -------------------------------------------------------------------------------


def _retrieval(bench: Bench, data: Path, suite: str = "retrieval") -> list[str | Path]:
    return [
        "evaluate", "--model", bench.model, "--data", data, "--suite", suite,
        "--json", bench.tmp / "out.json",
    ]  # fmt: skip


def pair_set(folder: Path) -> Path:
    """Five pictures of odd sizes with a caption each."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = []
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (31 + number, 47, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).save(out, "PNG")
        caption = [{"lang": "en", "text": f"noise number {number}"}]
        image = {"bytes": out.getvalue(), "path": None}
        rows.append({"id": f"p{number}", "image": image, "captions": caption})
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder


@case("evaluate_wrong_types")
def _wrong_types(bench: Bench) -> None:
    for folder in sorted(p for p in bench.case.iterdir() if p.is_dir()):
        suite = "zero_shot" if folder.name.startswith("c_") else "retrieval"
        bench.refused(*_retrieval(bench, folder, suite), names=r"\.parquet, row \d+: \w+")


@case("labels-with-blanks")
def _labels(bench: Bench) -> None:
    ended = bench.vlfoundry(*_retrieval(bench, bench.case / "data", "zero_shot"))
    assert ended.code == 0, ended
    assert "are read as 'red'" in ended.output
    scores = json.loads((bench.tmp / "out.json").read_text())["scores"]
    top1 = next(score for score in scores if score["name"] == "top1")
    assert top1["chance"] == pytest.approx(1 / 3)


@case("output-path-that-cannot-be")
def _output(bench: Bench) -> None:
    (bench.tmp / "folder").mkdir()
    (bench.tmp / "file").touch()
    data = pair_set(bench.tmp / "pairs")
    for place in ("folder", "file/x.json"):
        arguments = [*_retrieval(bench, data)[:-1], bench.tmp / place]
        ended = bench.refused(*arguments, names="cannot write|is a directory")
        assert ended.seconds < 3, ended  # no model was loaded


# --- chat files ------------------------------------------------------------------------------


@case("chat-check-pictures")
def _chat_pictures(bench: Bench) -> None:
    ended = bench.vlfoundry("chat-check", bench.case / "pictures.jsonl")
    assert ended.code == 1, ended
    found = dict(re.findall(r"pictures\.jsonl:(\d+): (\w+): ", ended.output))
    assert found == {"2": "image", "3": "image", "4": "image", "5": "width"}


@case("chat-lone-surrogate")
def _surrogate(bench: Bench) -> None:
    ended = bench.vlfoundry("chat-check", bench.case / "surrogate.jsonl")
    assert ended.code == 1, ended
    found = dict(re.findall(r"surrogate\.jsonl:(\d+): (\S+): ", ended.output))
    assert found == {"1": "conversations[0].value", "2": "conversations[1].value"}


@case("chat-special-tokens")
def _special(bench: Bench) -> None:
    """Notes for people; what is learnt is held by tests/models/test_control_tokens.py."""
    ended = bench.vlfoundry("chat-check", bench.case / "special.jsonl")
    assert ended.code == 0, ended
    assert (
        len(re.findall(r"special\.jsonl:\d: conversations\[\d\]\.value: note: ", ended.output)) == 3
    )
    code = """
import json, sys
from vlfoundry.models.tokenizer import Tokenizer
from vlfoundry.models.chat.jsonl import read
tok = Tokenizer.load(sys.argv[1])
for sample in read(sys.argv[2]):
    ids, labels = tok.dialogue.conversation(sample.messages, [48] * len(sample.images))
    learnt = [label for label in labels if label >= 0]
    ends = learnt.count(tok.eos_id), learnt[-1] == tok.eos_id
    print(json.dumps([ids.count(tok.context_id), *ends]))
"""
    files = [str(bench.model / "tokenizer.json"), str(bench.case / "special.jsonl")]
    made = command([sys.executable, "-c", code, *files], ROOT)
    assert [json.loads(line) for line in made.output.splitlines()] == [
        [48, 1, True], [48, 1, True], [0, 1, True],
    ], made  # fmt: skip


@case("chat_hostile_lines")
def _hostile_lines(bench: Bench) -> None:
    for file in sorted(bench.case.glob("*.jsonl")):
        ended = bench.vlfoundry("chat-check", file, "--no-images", PYTHONIOENCODING="ascii")
        line = 1 if file.stem in ("dev_zero", "width_1e400") or "video" in file.stem else 2
        assert ended.code == 1, ended
        assert "Traceback" not in ended.output
        assert re.search(rf"{file.name}:{line}: \S+: got .*, expected ", ended.output), ended
        assert "1 wrong" in ended.output.splitlines()[-1], ended


@case("video-frame-order")
def _frames(bench: Bench) -> None:
    file = next(bench.case.glob("*.jsonl"))
    code = """
import sys
from pathlib import Path
import numpy as np
from vlfoundry.models.chat.examples import Conversations
from vlfoundry.models.preprocess.tiling import Tiling
from vlfoundry.flows.chat_check import PicturesAlone
talk = Conversations(Path(sys.argv[1]), None, PicturesAlone(), tiling=Tiling(tile_px=28),
                     tile_tokens=2, max_tokens=999)
tiles = talk.example(0, np.random.default_rng(0)).pictures()
print(*[round(float(tile.mean())) for tile in tiles])
"""
    made = command([sys.executable, "-c", code, str(file)], ROOT)
    levels = [int(word) for word in made.output.split()]
    assert levels == sorted(levels), made
    assert len(set(levels)) == len(levels) >= 8


# --- runs ------------------------------------------------------------------------------------


@case("bootstrap_worker_killed")
def _worker(bench: Bench) -> None:
    project = bench.run()
    script = bench.case / "kill.py"
    (project / ".venv").unlink()
    (project / ".venv").symlink_to(ROOT / ".venv")
    params = project / "params.yaml"
    short = params.read_text("utf-8")
    # The small run's workers are done in half a second, and then there is nobody left to kill.
    long = re.sub(r"(?m)^(bootstrap:.*\n  steps:) \d+", r"\1 5000", short)
    assert long != short
    params.write_text(long, "utf-8")
    for worker in (0, 1):
        ended = command([sys.executable, str(script), str(project), str(worker), "0.5"], project)
        assert "HANG" not in ended.output, ended
        ((code, seconds),) = re.findall(r"-> (-?\d+) ([\d.]+) s", ended.output)
        assert int(code) != 0, ended
        assert float(seconds) < 10, ended
    params.write_text(short, "utf-8")
    went_on = command([sys.executable, "-m", "vlfoundry.stages.bootstrap"], project)
    assert went_on.code == 0, went_on


@case("guard_leaves_stage")
def _guard(bench: Bench) -> None:
    ended = command([sys.executable, str(bench.case / "try.py"), str(ROOT)], bench.case)
    assert ended.code == 0, ended
    assert "left something behind: 0 of 12" in ended.output


def started(project: Path, *arguments: str, log: str = "log") -> subprocess.Popen:
    """`vlfoundry run` in the background; its output is in a file beside the project."""
    with (project.parent / log).open("w") as stream:
        return subprocess.Popen(
            vlfoundry(project, "run", *arguments), cwd=project, env=environment(project),
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def wait_for(project: Path, text: str, log: str = "log", limit_s: float = LIMIT_S) -> str:
    """Until a run has said something; its output."""
    deadline = time.monotonic() + limit_s
    while text not in (output := (project.parent / log).read_text()):
        assert time.monotonic() < deadline, output[-3000:]
        time.sleep(0.1)
    return output


def steps_of(workspace: Path, stage: str = "pretrain_text") -> int:
    """Steps that a stage has trained, by its history."""
    history = json.loads((workspace / f"artifacts/{stage}/history.json").read_text())
    return history["steps"][-1]["step"] + (1 if history["steps"][0]["step"] == 0 else 0)


@case("second-run-changes-the-first")
def _second_run(bench: Bench) -> None:
    project, place = bench.run(), bench.tmp / "W"
    common = ["--workspace", str(place), "--stage", "pretrain_text", "--set", "bootstrap.steps=4"]
    asked = ["--set", "pretrain_text.train.warmup_steps=1", "--set", "seed=9"]
    first = started(project, *common, *asked, "--set", "pretrain_text.train.steps=3")
    wait_for(project, "▶ ")
    before = {n: (place / n).read_bytes() for n in ("params.yaml", "stages/ingest.py")}
    second = command(
        vlfoundry(project, "run", *common, *asked, "--set", "pretrain_text.train.steps=5"), project
    )
    assert second.code == 2, second
    assert re.search(r"a run \(process \d+\)", second.output), second
    assert before == {n: (place / n).read_bytes() for n in before}
    assert first.wait(600) == 0, (project.parent / "log").read_text()[-3000:]
    assert steps_of(place) == 3
    lineage = json.loads((place / "artifacts/pretrain_text/lineage.json").read_text())
    assert lineage["parameters"]["pretrain_text"]["train"]["steps"] == 3


@case("refused_run_changes_workspace")
def _refused_run(bench: Bench) -> None:
    project = bench.run()
    varied = ["--set", "evaluate.scenes=22", "--stage", "pretrain_text", "--set", "seed=11"]
    first = started(project, *varied)
    output = wait_for(project, "▶ ")
    place = Path(re.findall(r"workspace: (.+)", output)[0])
    held = {n: (place / n).read_bytes() for n in ("params.yaml", "infra/core/progress.py")}
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("classes: 40", "classes: 41"))
    (project / "infra/core/progress.py").write_text(
        (project / "infra/core/progress.py").read_text() + "\n# changed\n"
    )
    second = command(vlfoundry(project, "run", *varied), project)
    assert second.code == 2, second
    assert held == {n: (place / n).read_bytes() for n in held}
    assert first.wait(600) == 0, (project.parent / "log").read_text()[-3000:]
    assert held == {n: (place / n).read_bytes() for n in held}


@case("server_dies")
def _server_dies(bench: Bench) -> None:
    project = bench.run()
    running = started(project, "--set", "contrastive.train.steps=60", "--set", "seed=3")
    wait_for(project, "contrastive │", limit_s=300)
    server = "prefect.server.api.server:create_app"
    servers = [
        process
        for process in psutil.process_iter()
        if server in " ".join(words := _words(process))
        and str(project) in " ".join([*words, _home(process)])
    ]
    assert servers
    for process in servers:
        process.kill()
    code = running.wait(900)
    output = (project.parent / "log").read_text()
    assert code == 0, output[-4000:]
    assert len(output.encode()) < 60_000
    assert "EventsWorker" not in output
    assert "Traceback" not in output
    assert output.count("record") >= 1
    for said in ("total ", "champion: ", "report: "):
        assert said in output, output[-3000:]


def _home(process: psutil.Process) -> str:
    try:
        return process.environ().get("PREFECT_HOME", "")
    except psutil.Error:
        return ""


@case("damaged_cache_object")
def _damaged(bench: Bench) -> None:
    project = bench.run()
    weights = project / "artifacts/contrastive/model/weights.safetensors"
    before = weights.read_bytes()
    md5 = hashlib.md5(before).hexdigest()
    item = project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    item.chmod(0o644)
    with item.open("r+b") as file:
        file.seek(len(before) // 2)
        byte = file.read(1)
        file.seek(len(before) // 2)
        file.write(bytes([byte[0] ^ 0x55]))
    item.chmod(0o444)
    weights.unlink()
    ended = command(vlfoundry(project, "run"), project)
    assert ended.code == 0, ended.output[-3000:]
    assert "damaged" in ended.output
    assert weights.read_bytes() == before
    again = command(vlfoundry(project, "run"), project)
    assert "nothing to do" in again.output


@case("lineage-of-another-model")
def _lineage(bench: Bench) -> None:
    project = bench.run()
    folder = "artifacts/sft/simple/model"
    assert command(vlfoundry(project, "lineage", folder), project).code == 0
    short = ["variant=simple", "sft.train.simple.steps=2", "sft.train.simple.batch_samples=2",
             "sft.train.simple.warmup_steps=1"]  # fmt: skip
    by_hand = command([sys.executable, "-m", "vlfoundry.stages.sft", *short], project)
    assert by_hand.code == 0, by_hand
    rows = project.parent / "rows.parquet"
    ended = command(vlfoundry(project, "lineage", folder, "--rows", str(rows)), project)
    assert ended.code == 2, ended
    assert "is not what dvc.lock says" in ended.output
    assert not rows.exists()


@case("checkout-in-a-subfolder")
def _subfolder(bench: Bench) -> None:
    outer = bench.tmp / "mono"
    inner = outer / "vlf"
    inner.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "x"], cwd=inner, input=archive.stdout, check=True)
    subprocess.run(["git", "init", "--quiet"], cwd=outer, check=True)
    for arguments in (
        ["run", "--stage", "ingest"],
        ["run", "--stage", "ingest", "--set", "ingest.classes=12"],
        ["register", "artifacts/contrastive/model", "--promote", "champion"],
        ["evaluate", "--model", "champion", "--data", "data", "--suite", "zero_shot",
         "--json", str(bench.tmp / "x.json")],
        ["lineage", "champion"],
    ):  # fmt: skip
        ended = command(vlfoundry(inner, *arguments), inner)
        assert ended.code == 2, ended
        assert "root of its own" in ended.output, ended
        assert "Traceback" not in ended.output
    assert not (inner / "work").exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=outer, capture_output=True, text=True)
    assert listed.stdout.count("\n") == 1
