"""A wrong argument of any command is answered within a second, in one line.

The commands and their options are those of the program: one that is new needs an example here.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from tests.support.cpu import least_cpu_s
from tests.support.tiny_project import write_model
from vlfoundry.flows.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT_S = 1.0
CHAT = "tests/eval/golden/internvl_chat"
SCORES = "--json {new}.json"
PLAN = "plan contrastive --gpus 8 --memory 80"
PIXELS = "pixels {picture} --out {new}"

EXAMPLES: dict[str, tuple[str, str]] = {
    "new folder": ("new flows", "is not empty"),
    "new --from": ("new {new} --from nope", "no profile 'nope'"),
    "new name": ("new sweet mine", "unknown kind 'sweet'; choose from suite, launcher, family"),
    "run --stage": ("run --stage sft@nope", "no stage 'sft@nope'"),
    "run --profile": ("run --profile nope", "no profile 'nope'"),
    "run --set": ("run --set contrastive.train.lr=fast", "contrastive.train.lr: got 'fast'"),
    "run --workspace": ("run --workspace flows/nope", "--workspace"),
    "report --out": ("report --out {folder}", "is a directory"),
    "accept steps": ("accept nope --because x", "no step 'nope'"),
    "accept --because": ("accept shard --because=", "--because is empty"),
    "server --port": ("server --port 70000", "--port 70000 is no port"),
    "server --host": ("server --host nowhere.invalid", "cannot listen on nowhere.invalid:4200"),
    "deploy name": ("deploy a/b", "expected a name without any of"),
    "deploy --profile": ("deploy x --profile nope", "no profile 'nope'"),
    "deploy --set": ("deploy x --set contrastive.train.lrr=1", "did you mean 'lr'?"),
    "deploy --stage": ("deploy x --stage nope", "no stage 'nope'"),
    "deploy --cron": ("deploy x --cron R", "expected minute, hour, day of the month"),
    "deploy --every": ("deploy x --every 3y", "expected a number above 0 and a unit"),
    "deploy --timezone": ("deploy x --timezone Mars", "expected a name such as UTC"),
    "deploy --if-busy": ("deploy x --if-busy maybe", "expected one of ['wait', 'refuse']"),
    "deploy --pool": ("deploy x --pool a%b", "--pool 'a%b': expected a name without any of"),
    "worker --pool": ("worker --pool ../b", "--pool '../b': expected a name without"),
    "evaluate model": (f"evaluate nope --data data --suite retrieval {SCORES}", "no model 'nope'"),
    "evaluate --model": (
        f"evaluate --model {CHAT} --data data --suite retrieval {SCORES}", "has format None",
    ),
    "evaluate --data": (
        f"evaluate {{model}} --data nowhere --suite retrieval {SCORES}", "nowhere is not a dir",
    ),
    "evaluate --suite": (f"evaluate {{model}} --data data --suite vqa {SCORES}", "suite 'vqa'"),
    "evaluate --json": (
        "evaluate nope --data data --suite box --json {folder}", "is a directory",
    ),
    "evaluate --source": (
        f"evaluate {{model}} --data data --suite retrieval {SCORES} --source nope",
        "no source ['nope']",
    ),
    "evaluate --train-source": (
        f"evaluate {{model}} --data data --suite retrieval {SCORES} --train-source nope",
        "no source ['nope']",
    ),
    "evaluate --lang": (
        f"evaluate {{model}} --data data --suite retrieval {SCORES} --lang tlh",
        "nothing in ['tlh']",
    ),
    "parity folders": ("parity nowhere", "nowhere does not exist"),
    "import source": ("import nowhere {new}", "no model 'nowhere'"),
    "import target": (f"import {CHAT} {{file}}/x", "is not a directory"),
    "import --kind": (f"import {CHAT} {{new}} --kind nope", "a nope cannot be had"),
    "import --config": (f"import {CHAT} {{new}} --config nowhere.json", "nowhere.json does not"),
    "import --tower-config": (
        f"import {CHAT} {{new}} --tower-config nowhere.json", "nowhere.json does not exist",
    ),
    "import --stage": (f"import {CHAT} {{new}} --stage sft", "is a path, leave it out"),
    "import --profile": (f"import {CHAT} {{new}} --profile hour", "hour.yaml is there already"),
    "export model": ("export nope {new} --format internvit", "no model 'nope'"),
    "export target": ("export nope {file}/x --format internvit", "is not a directory"),
    "export --format": ("export nope {new} --format gguf", "format 'gguf' does not exist"),
    "merge model": ("merge nope {new}", "no model 'nope'"),
    "merge target": ("merge nope {file}/x", "is not a directory"),
    "register folder": ("register {folder}", "is no model folder"),
    "register --promote": ("register data --promote B1", "'B1' is not the name of a stage"),
    "fetch model": ("fetch nope", "no model 'nope'"),
    "lineage model": ("lineage nope", "no model 'nope'"),
    "lineage --rows": ("lineage nope --rows {folder}", "is a directory"),
    "plan config": ("plan nope --gpus 8 --memory 80", "nothing to plan is called 'nope'"),
    "plan --gpus": ("plan contrastive --gpus many --memory 80", "'--gpus'"),
    "plan --memory": ("plan contrastive --gpus 8 --memory=-80", "of -80 GiB"),
    "plan --mfu": (f"{PLAN} --mfu 1.5", "MFU 1.5"),
    "plan --peak-tflops": (f"{PLAN} --peak-tflops 0", "0 TFLOP/s"),
    "plan --reserve": (f"{PLAN} --reserve 90", "90 set aside"),
    "plan --profile": (f"{PLAN} --profile nope", "no profile 'nope'"),
    "plan --set": (f"{PLAN} --set contrastive.train.lrr=1", "did you mean 'lr'?"),
    "recipes name": ("recipes nope", "nothing to plan is called 'nope'"),
    "chat-check files": ("chat-check nowhere.jsonl", "nowhere.jsonl does not exist"),
    "chat-check --root": ("chat-check {file} --root nowhere", "--root nowhere is not a folder"),
    "chat-check --model": ("chat-check {file} --model nope", "no model 'nope'"),
    "chat-check --variant": ("chat-check {file} --variant nope", "unknown variant 'nope'"),
    "chat-check --most": ("chat-check {file} --most=-1", "'--most'"),
    "pixels image": ("pixels {file} --out {new}", "cannot be read as a picture"),
    "pixels --out": ("pixels {file} --out {file}/x", "cannot write the squares"),
    "pixels --model": (f"{PIXELS} --model nope", "no model 'nope'"),
    "pixels --for": (f"{PIXELS} --for fun", "--for is 'fun'"),
    "pixels --task": (f"{PIXELS} --task nope", "--task is 'nope'"),
}  # fmt: skip
"""command and argument -> a call in which that one is wrong, and some words of the answer"""
FURTHER = (
    ("evaluate nope --data nowhere --suite retrieval {new}.json", "missing option '--json'"),
    (f"evaluate {{model}} --data data --suite box {SCORES}", "box needs a model that can chat"),
    (f"evaluate a --model b --data data --suite box {SCORES}", "'a' and --model 'b'"),
    (f"evaluate --data data --suite box {SCORES}", "got no model"),
    ("new {file}", "is not a folder"),
    ("new {file}/x", "is not a directory"),
    ("new .", "holds 'vlfoundry'"),
    ("run --set nope=1", "parameter 'nope' does not exist"),
    ("run --stage nope --profile hour", "no stage 'nope'"),
    ("run --set seed=x", "seed: got 'x'"),
    ("parity flows", "no golden folder of a known group"),
    ("parity README.md", "no path is a folder"),
    ("export {model} {new} --format internvit", "is a internvl_c and cannot be written"),
    ("merge {model} {new}", "has no adapters"),
    ("lineage data", "no model 'data'"),
    ("fetch data", "data is a folder"),
    ("recipes sft@full", "is a stage, not a recipe"),
    ("lineage nope --json", "no model 'nope'"),
    ("nope", "no such command 'nope'"),
    ("plan", "missing argument"),
    ("run --nope", "no such option: --nope"),
    ("status nope", "unexpected extra argument"),
    ("-v -q status", "--verbose and --quiet"),
)  # fmt: skip


def _arguments() -> list[str]:
    """Every argument, and every option with a value, as `command name`."""
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                found.append(f"{name} {parameter.name}")
            elif not parameter.is_flag:
                found.append(f"{name} {parameter.opts[0]}")
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the calls name; `{new}` must not be there afterwards."""
    base = tmp_path_factory.mktemp("bad")
    (base / "file").touch()
    (base / "folder").mkdir()
    write_model(base / "model", "internvl_c")
    names = ("file", "folder", "model", "new")
    return {name: str(base / name) for name in names} | {"picture": "tests/cases/README.md"}


def refused(call: str, places: dict[str, str]) -> str:
    """The one line that a call ends with."""
    words = [word.format(**places) for word in call.split()]
    ended: list[subprocess.CompletedProcess[str]] = []

    def run() -> None:
        command = [sys.executable, "-m", "vlfoundry", *words]
        ended.append(
            subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
            )
        )

    spent = least_cpu_s(run, enough=LIMIT_S)
    last = ended[-1]
    assert last.returncode == 2, last.stdout + last.stderr
    assert last.stdout == ""
    lines = last.stderr.splitlines()
    assert [line.startswith("vlfoundry: ") for line in lines] == [True], last.stderr
    assert not list(Path(places["new"]).parent.glob("new*"))
    assert spent < LIMIT_S, f"{spent:.2f} CPU-s: {call}"
    return lines[0]


@pytest.mark.parametrize("argument", _arguments())
def test_every_argument(argument: str, places: dict[str, str]) -> None:
    if argument not in EXAMPLES:
        pytest.fail(f"add an example for `vlfoundry {argument}` to EXAMPLES")
    call, words = EXAMPLES[argument]
    assert words in refused(call, places)


def test_no_example_is_of_an_argument_that_is_gone() -> None:
    assert EXAMPLES.keys() <= set(_arguments())


@pytest.mark.parametrize(("call", "words"), FURTHER)
def test_further_mistakes(call: str, words: str, places: dict[str, str]) -> None:
    assert words in refused(call, places)
