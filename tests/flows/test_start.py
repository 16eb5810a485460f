"""Folders that training starts from, where they say they are from, and the profiles beside them."""

import importlib
import os
import shutil
from pathlib import Path

import pytest

from tests.support.start_models import CONFIG, make_folder
from tests.support.toy_project import reproduce
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.flows.start import (
    FITS,
    describe,
    import_model,
    import_with_profile,
    new_profile,
    write_profile,
)
from vlfoundry.flows.workspace import Variation
from vlfoundry.infra.core.config import load_params, to_dict
from vlfoundry.infra.core.errors import ConfigError, DataError, ModelError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.stage import ORIGIN_FILE, parameters_of, read_origin
from vlfoundry.infra.registry.gto import register_model
from vlfoundry.models.internvl.config import PARTS, internvl
from vlfoundry.models.internvl.folder import read_config
from vlfoundry.models.internvl.init_from import RULES, plan_init

pytestmark = pytest.mark.slow

FOLDERS = {name: output.folder for name, output in OUTPUTS.items()}

ROOT = Path(__file__).parents[2]
MODEL = Path("artifacts/train/a")
MADE = "artifacts/train/${item.kind}/model"
STAGES = ("ingest", "pretrain_text", "contrastive", "generative", "sft", "evaluate", "report")


def without_origin(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ORIGIN_FILE)
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


# --- folders


def test_a_registered_model_comes_whole_and_says_which_it_is(trained: Path) -> None:
    version = register_model(trained, MODEL, promote="champion")
    shutil.rmtree(trained / "artifacts")
    target = trained / "data/start/champion"
    said = import_model(trained, "champion", target)
    assert said == [f"{MODEL} of toy_a@v0.1.0 is in {target}, every file checked"]
    assert sorted(without_origin(target)) == ["config.json", "weights"]
    assert (target / "weights").read_text().startswith("train-a")
    assert read_origin(target) == {
        "format": "vlfoundry.origin.v1", "ref": "toy_a@v0.1.0", "path": str(MODEL),
        "commit": version.commit, "md5": version.md5,
    }  # fmt: skip
    import_model(trained, "toy_a@v0.1.0", trained / "data/start/again")
    assert fingerprint(trained / "data/start/again") == fingerprint(target)  # the same run key

    with pytest.raises(ModelError, match="champion is there already"):
        import_model(trained, "champion", target)
    with pytest.raises(ModelError, match=r"no model 'nobody'.*registered: toy_a@v0\.1\.0"):
        import_model(trained, "nobody", trained / "data/start/x")
    with pytest.raises(ModelError, match=r"copied as it is; leave out \['--kind'\]"):
        import_model(trained, "champion", trained / "data/start/x", kind="vision")
    with pytest.raises(DataError, match="artifacts/pretrain_text/model is not a folder that dvc"):
        import_model(trained, "champion", trained / "data/start/x", stage="pretrain_text")
    with pytest.raises(ModelError, match="registered names need a project"):
        import_model(None, "champion", trained / "data/start/x")
    for cached in (trained / ".dvc/cache/files/md5").rglob("*"):
        if cached.is_file() and cached.read_bytes().startswith(b"train-a"):
            cached.chmod(0o644)
            cached.write_text("rotten")
    with pytest.raises(DataError, match="is damaged"):
        import_model(trained, "champion", trained / "data/start/x")
    assert not (trained / "data/start/x").exists()


def test_another_model_of_a_registered_run(trained: Path) -> None:
    """What a team needs beside its champion: the text model that shares its tokenizer."""
    dvc_yaml = trained / "dvc.yaml"
    dvc_yaml.write_text(dvc_yaml.read_text().replace("artifacts/train/${item.kind}", MADE))
    work = trained / "work.py"
    work.write_text(work.read_text().replace("*sys.argv[1:])\nout", '*sys.argv[1:], "model")\nout'))
    reproduce(trained)
    register_model(trained, Path("artifacts/train/a/model"), promote="champion")
    import_model(trained, "champion", trained / "data/start/b", stage="train@b")
    assert (trained / "data/start/b/weights").read_text().startswith("train-b")
    origin = read_origin(trained / "data/start/b")
    assert origin is not None
    assert (origin["ref"], origin["path"]) == ("toy_a@v0.1.0", "artifacts/train/b/model")
    with pytest.raises(ModelError, match="--stage is for registered names"):
        import_model(
            trained, str(trained / "data/start/b"), trained / "data/start/x", stage="train@b"
        )


def test_a_folder_of_ours_comes_whole_and_keeps_its_origin(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "artifacts/contrastive/model", "internvl_c")
    digest = fingerprint(made)
    import_model(tmp_path, str(made), tmp_path / "data/start/one")
    one = tmp_path / "data/start/one"
    assert without_origin(one) == without_origin(made)
    assert fingerprint(made) == digest
    origin = read_origin(one)
    assert describe(origin) == f"copy of artifacts/contrastive/model (sha256 {digest[:12]})"
    import_model(tmp_path, str(one), tmp_path / "data/start/two")
    assert read_origin(tmp_path / "data/start/two") == origin
    elsewhere = import_model(tmp_path / "data", str(made), tmp_path / "three")
    assert "three" in elsewhere[0]
    origin = read_origin(tmp_path / "three")
    assert origin is not None
    assert origin["folder"] == "model"  # no word about this machine
    assert sorted(p.name for p in (tmp_path / "data/start").iterdir()) == ["one", "two"]


@pytest.mark.parametrize("harm", ["cut", "noise", "gone"])
def test_a_damaged_folder_of_ours_is_not_brought(tmp_path: Path, harm: str) -> None:
    made = make_folder(tmp_path / "made", "internvl_c")
    weights = made / "weights.safetensors"
    content = weights.read_bytes()
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content[: len(content) // 2] if harm == "cut" else b"\x99" * 1000)
    with pytest.raises(ModelError, match="is damaged" if harm != "gone" else "does not exist"):
        import_model(None, str(made), tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_of_ours_does_not_bring_what_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    source = make_folder(tmp_path / "ours", "internvl_c")
    (source / "official").mkdir()
    (source / "official" / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ModelError, match=r"is a link to .*secret\.json, outside of"):
        import_model(None, str(source), tmp_path / "target")
    (source / "official" / "tokenizer_config.json").unlink()
    os.mkfifo(source / "official" / "tokenizer_config.json")
    with pytest.raises(ModelError, match="is a named pipe, expected a file"):
        import_model(None, str(source), tmp_path / "target")
    (source / "official" / "tokenizer_config.json").unlink()
    # A cache of DVC that artifacts are links into is the checkout's own.
    cached = tmp_path / ".dvc" / "cache" / "object"
    cached.parent.mkdir(parents=True)
    (source / "weights.safetensors").rename(cached)
    (source / "weights.safetensors").symlink_to(cached)
    import_model(tmp_path, str(source), tmp_path / "target")
    assert not (tmp_path / "target" / "weights.safetensors").is_symlink()


def test_official_weights_say_what_they_were(tmp_path: Path) -> None:
    golden = ROOT / "tests/eval/golden/internvl_chat"
    target = tmp_path / "data/start/chat"
    said = import_model(tmp_path, str(golden), target)
    assert "(internvl_chat) is the chat_simple in" in said[0]
    assert describe(read_origin(target)) == "imported from internvl_chat (internvl_chat)"
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    write_profile(tmp_path, new_profile(tmp_path, "chat", target), target)
    check_profile(tmp_path, "chat", target)


# --- profiles


def slots(kind: str, address: str) -> set[str]:
    """What a profile sets of a stage's `start`."""
    prefix = f"{address.replace('@', '.start.')}." if "@" in address else f"{address}.start."
    return {key.removeprefix(prefix) for key in FITS[kind] if key.startswith(prefix)}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def check_profile(root: Path, name: str, folder: Path) -> None:
    """Every stage can be built with it, and those that it sets go on from the folder; what is made
    of the folder's kind is compared with it."""
    params = Variation(profile=name).apply(root)
    kind, config = read_config(folder)
    relative = folder.relative_to(root).as_posix()
    named = set()
    for stage_name in STAGES:
        stage = importlib.import_module(f"vlfoundry.stages.{stage_name}").STAGE
        built = parameters_of(stage, params)
        for variant in stage.variants or (None,):
            bound = stage.bind(variant)
            if relative in bound.inputs(built):
                named.add(bound.address)
            if "model" in stage.parameters:
                assert built.model == config
    goes_on = {address for address in RULES if slots(kind, address)}
    assert named == goes_on | ({f"evaluate@{kind}"} if kind in OUTPUTS else set())


@pytest.mark.parametrize("kind", PARTS)
def test_a_profile_goes_on_from_its_folder(checkout: Path, kind: str) -> None:
    folder = make_folder(checkout / "data/start" / kind, kind)
    path = new_profile(checkout, f"on-{kind}", folder)
    command = write_profile(checkout, path, folder)
    stage = FITS[kind][0].partition(".")[0]
    assert command.startswith(f"vlfoundry run --profile on-{kind} --stage {stage}")
    assert command in path.read_text("utf-8").splitlines()[1]
    check_profile(checkout, f"on-{kind}", folder)
    again = Variation(profile=f"on-{kind}", overrides=("seed=7",)).apply(checkout)
    assert again["seed"] == 7
    assert again["model"] == to_dict(CONFIG)


def test_a_profile_may_hold_what_params_yaml_does_not_mention(checkout: Path) -> None:
    """The 6B's: a language model of its own, drop path, a connector that is no pixel shuffle."""
    from vlfoundry.models.internvl.folder import write_config

    folder = checkout / "data/start/big"
    write_config(folder, "chat_full", internvl("paper"))
    write_profile(checkout, new_profile(checkout, "big", folder), folder)
    check_profile(checkout, "big", folder)


@pytest.mark.parametrize("kind", PARTS)
def test_what_profiles_set_is_what_stages_take(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path / "start", kind)
    for address, rule in RULES.items():
        chosen = slots(kind, address)
        assert chosen <= set(rule.takes)
        if chosen:
            make_folder(tmp_path / address, rule.kind)
            make_folder(tmp_path / "text", "text")
            make_folder(tmp_path / "c", "internvl_c")
            rest = {"model": "c", "head": "text", "language": "text", "vision": "c"}
            folders = {slot: rest.get(slot, address) for slot in rule.takes}
            start = plan_init(address, CONFIG, folders | dict.fromkeys(chosen, "start"), tmp_path)
            assert any(part_source.folder == "start" for part_source in start.part_sources)


class Run:
    """A registered InternVL-C and the text model of its run."""

    ref, commit, path = "internvl_c@v0.1.0", "c" * 40, OUTPUTS["internvl_c"].folder

    def __init__(self, source: Path) -> None:
        make_folder(source / "internvl_c", "internvl_c")
        make_folder(source / "text", "text")
        self.source, self.lacks_text, self.fetched = source, False, []

    def fetch(self, _root: Path, _version: "Run", folder: Path, made: str) -> str:
        kind = "text" if "pretrain_text" in made else "internvl_c"
        if kind == "text" and self.lacks_text:
            raise DataError("DVC's cache lacks it")
        shutil.copytree(self.source / kind, folder)
        self.fetched.append(made)
        return "m" * 32


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(tmp_path / "made")
    monkeypatch.setattr("vlfoundry.flows.start.find_version", lambda _root, _ref: run)
    monkeypatch.setattr("vlfoundry.flows.start.fetch_version", run.fetch)
    return run


def test_the_text_model_of_its_run_comes_with_a_champion(checkout: Path, registered: Run) -> None:
    """What `--profile` of a registered InternVL-C sets: the stages after stage 1 too."""
    folder = checkout / "data/start/champion"
    said = import_with_profile(
        checkout, "champion", folder, new_profile(checkout, "weekly", folder)
    )
    assert said[-1] == "profiles/weekly.yaml is written: vlfoundry run --profile weekly"
    assert read_origin(folder)["path"] == OUTPUTS["internvl_c"].folder
    params = Variation(profile="weekly").apply(checkout)
    assert params["contrastive"]["start"] == {"model": "data/start/champion"}
    assert params["evaluate"]["baseline"] == FOLDERS | {"internvl_c": "data/start/champion"}
    assert params["generative"]["start"] == {
        "model": "artifacts/contrastive/model", "head": "data/start/champion-text",
    }  # fmt: skip
    assert params["sft"]["start"]["simple"] == {
        "vision": "artifacts/contrastive/model", "language": "data/start/champion-text",
    }  # fmt: skip

    a_path = checkout / "data/start/copy"  # nobody knows its run
    import_with_profile(checkout, str(folder), a_path, new_profile(checkout, "copy", a_path))
    assert not (checkout / "data/start/copy-text").exists()
    shutil.rmtree(registered.source / "internvl_c")
    make_folder(registered.source / "internvl_c", "internvl_g")  # has a head of its own
    other = checkout / "data/start/g"
    import_with_profile(checkout, "champion", other, new_profile(checkout, "g", other))
    assert not (checkout / "data/start/g-text").exists()


def test_a_profile_takes_no_name_that_there_is(checkout: Path) -> None:
    folder = checkout / "data/start/x"
    (checkout / "profiles").mkdir(exist_ok=True)
    (checkout / "profiles/own.yaml").touch()
    with pytest.raises(ConfigError, match=r"profiles/own\.yaml is there already"):
        new_profile(checkout, "own", folder)
    with pytest.raises(ConfigError, match="VLFoundry has a profile 'hour' already"):
        new_profile(checkout, "hour", folder)


def test_an_import_with_a_profile_leaves_all_or_nothing(checkout: Path, registered: Run) -> None:
    folder = checkout / "data/start/champion"
    profile = new_profile(checkout, "weekly", folder)
    before = sorted(checkout.rglob("*"))
    registered.lacks_text = True
    with pytest.raises(DataError, match="lacks it"):
        import_with_profile(checkout, "champion", folder, profile)
    assert list(folder.parent.iterdir()) == []
    shutil.rmtree(checkout / "data")
    assert sorted(checkout.rglob("*")) == before

    import_model(checkout, "champion", folder)  # killed here; or before the profile was written
    registered.lacks_text = False
    for fetched in (1, 0):
        registered.fetched.clear()
        import_with_profile(checkout, "champion", folder, profile)
        assert len(registered.fetched) == fetched
        profile.unlink()
    (folder / "origin.json").unlink()
    with pytest.raises(ModelError, match="champion is there already"):
        import_with_profile(checkout, "champion", folder, profile)
    assert (folder / "config.json").is_file()  # not ours to delete


def test_profiles_are_not_overwritten_and_can_be_named(checkout: Path) -> None:
    folder = checkout / "data/start/c"
    make_folder(folder, "internvl_c")
    write_profile(checkout, new_profile(checkout, "c", folder), folder)
    with pytest.raises(ConfigError, match=r"profiles/c\.yaml is there already"):
        new_profile(checkout, "c", folder)
    with pytest.raises(ConfigError, match="expected letters, digits"):
        new_profile(checkout, "../c", folder)
    with pytest.raises(ConfigError, match=r"folders inside of .*expected e\.g\. data/start/NAME"):
        new_profile(checkout, "d", checkout.parent / "c")


def test_a_recipe_starts_where_params_yaml_says(checkout: Path) -> None:
    shutil.copytree(ROOT / "profiles", checkout / "profiles")
    params = Variation(
        profile="internvl-g", overrides=("generative.start.model=data/start/c",)
    ).apply(checkout)
    assert params["generative"]["start"]["model"] == "data/start/c"
    assert params["generative"]["start"]["head"] == "artifacts/pretrain_text/model"
    recipe = load_params(ROOT / "profiles/internvl-g.yaml")["generative"]
    assert {k: v for k, v in params["generative"].items() if k != "start"} == recipe
