"""Models as folders that training can start from: official ones, our own, registered ones.

A folder made here says in `origin.json` where it came from; lineage reads that. A profile beside it
holds its architecture and makes the stage that fits its kind go on from it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.flows.recipes import PROFILES, profiles
from vlfoundry.flows.workspace import yaml_text
from vlfoundry.infra.core.config import to_dict
from vlfoundry.infra.core.dvccache import cache_folder
from vlfoundry.infra.core.errors import ConfigError, ModelError, one_line
from vlfoundry.infra.core.files import new_folder, write_atomic
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.givenfiles import check_inside
from vlfoundry.infra.core.stage import ORIGIN_FILE, read_origin
from vlfoundry.infra.registry.gto import fetch_version, find_version
from vlfoundry.models.internvl.folder import (
    check_shapes,
    is_model_folder,
    read_config,
    refuse_overwriting,
)

ORIGIN_FORMAT = "vlfoundry.origin.v1"
PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FITS = {
    "text": ("contrastive.start.model", "generative.start.head", "sft.start.simple.language"),
    "vision": ("sft.start.simple.vision",),
    "internvl_c": ("contrastive.start.model",),
    "internvl_g": ("generative.start.model", "generative.start.head", "sft.start.simple.vision"),
    "chat_simple": ("sft.start.simple.vision", "sft.start.simple.language"),
    "chat_full": ("sft.start.full.qllama", "sft.start.full.chat"),
}
"""what a profile sets: the stage that makes a model's kind goes on from it, and what came of
stages before that one does not come into it"""


def import_model(
    root: Path | None,
    source: str,
    target: Path,
    *,
    stage: str | None = None,
    kind: str | None = None,
    config_file: Path | None = None,
    tower_config: Path | None = None,
    again: bool = False,
) -> list[str]:
    """Make a model folder of an official one, one of ours or a registered one; what was done.

    Args:
        root: the project whose registry is asked and whose paths are named; None: there is none.
        source: a path, or where nothing has it, a registered name.
        target: a folder that is to be.
        stage: of a registered model: take what this stage of the same run made ("sft@simple").
        kind: as `models.internvl.convert.import_model` takes it, and the next two.
        again: a target that is this very registered model already is as good.

    Raises:
        ModelError: there is no such model, or it cannot be had as asked.
    """
    path = Path(source)
    if not source:
        raise ModelError("the model to import has no name; expected a path or a registered name")
    if path.exists() and stage:
        raise ModelError(f"--stage is for registered names; {source} is a path, leave it out")
    if path.exists() and not is_model_folder(path):
        return _import(path, target, kind, config_file, tower_config)
    asked = {"--kind": kind, "--config": config_file, "--tower-config": tower_config}
    needless = [name for name, value in asked.items() if value is not None]
    if needless:
        raise ModelError(f"{source} is one of our models, copied as it is; leave out {needless}")
    if path.exists() or not again:
        refuse_overwriting(target)
    if path.exists():
        return _copy(root, path, target)
    if root is None:
        raise ModelError(f"{source} does not exist, and registered names need a project to ask")
    return _fetch(root, source, target, stage)


def import_with_profile(
    root: Path, source: str, target: Path, profile: Path, **asked: Any
) -> list[str]:
    """`import_model`, the text model that goes with it, and a profile for both; what was done.

    After an error nothing is left of them. An import that was killed can be repeated.

    Args:
        profile: as `new_profile` gives it.
        asked: as `import_model` takes it.
    """
    text = target.with_name(f"{target.name}-text")
    made = [folder for folder in (target, text) if not folder.exists()]
    try:
        said = import_model(root, source, target, again=True, **asked)
        has_text = bring_text(root, source, target, text)
        said += [f"the text model of the same run is in {text}"] if has_text else []
        command = write_profile(root, profile, target, text if has_text else None)
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return [*said, f"{PROFILES}/{profile.name} is written: {command}"]


def bring_text(root: Path, source: str, target: Path, text: Path) -> bool:
    """Bring the text model of a registered InternVL-C's own run: later stages need its head and its
    language model, and it has the same tokenizer. False: `source` is no such model."""
    if Path(source).exists() or read_config(target)[0] != "internvl_c":
        return False
    import_model(root, source, text, stage="pretrain_text", again=True)
    return True


def describe(origin: dict[str, str] | None) -> str:
    """What an origin says, in words."""
    if origin is None:
        return "nothing says where it came from"
    if "ref" in origin:
        return f"{origin['ref']} (commit {origin['commit'][:12]}, {origin['path']})"
    if "imported" in origin:
        return f"imported from {origin['imported']} ({origin['format_there']})"
    return f"copy of {origin['folder']} (sha256 {origin['sha256'][:12]})"


def new_profile(root: Path, name: str, target: Path) -> Path:
    """Where the profile of a folder that is to be goes.

    Raises:
        ConfigError: it is there already, has no name of a file, or could not name the folder.
    """
    path = root / PROFILES / f"{name}.yaml"
    if not PROFILE_NAME.fullmatch(name):
        raise ConfigError(
            f"--profile {name!r}: expected letters, digits, '.', '-' and '_', e.g. internvl_g"
        )
    if path.exists():
        raise ConfigError(f"{PROFILES}/{name}.yaml is there already; name another profile")
    if name in profiles(root):
        raise ConfigError(f"VLFoundry has a profile {name!r} already; name another one")
    if not target.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"a profile can only name folders inside of {root}, not {target}; expected e.g. "
            "data/start/NAME"
        )
    return path


def write_profile(root: Path, path: Path, target: Path, text: Path | None = None) -> str:
    """Write the profile of a model folder, maybe with a text model for what the folder lacks; the
    command that uses it. What is made from the folder is compared with it."""
    kind, config = read_config(target)
    folder = _place(root, target)
    content: dict[str, Any] = {"model": to_dict(config)}
    for key in FITS[kind]:
        _set(content, key, folder)
    for output in OUTPUTS.values():
        if output.kind == kind:
            _set(content, f"evaluate.baseline.{output.name}", folder)
    stage = FITS[kind][0].split(".")
    address = f"{stage[0]}@{stage[2]}" if stage[0] == "sft" else stage[0]
    command = f"vlfoundry run --profile {path.stem} --stage {address}"
    if text:
        command = f"vlfoundry run --profile {path.stem}"
        for key in FITS["text"]:
            if key not in FITS[kind]:
                _set(content, key, _place(root, text))
    head = f"# On from {folder} ({kind}), in its own architecture. Not a published run.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"{head}#   {command}\n{yaml_text(content)}")
    return command


def _set(content: dict[str, Any], key: str, value: str) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[leaf] = value


def _import(
    source: Path,
    target: Path,
    kind: str | None,
    config_file: Path | None,
    tower_config: Path | None,
) -> list[str]:
    from vlfoundry.models.internvl.convert import import_model

    done = import_model(
        source, target, kind=kind, config_file=config_file, tower_config=tower_config
    )
    _write_origin(target, imported=source.resolve().name, format_there=done.format)
    said = [f"{source} ({done.format}) is the {done.kind} in {target}: {done.summary}"]
    said += [one_line(f"left out: {', '.join(done.left_out)}")] if done.left_out else []
    unknown = one_line(", ".join(done.unknown))
    return [*said, *([f"fields of config.json that are not known here: {unknown}"] * bool(unknown))]


def _fetch(root: Path, source: str, target: Path, stage: str | None) -> list[str]:
    """A registered model, or what a stage of its run made. It is not fetched again."""
    version = find_version(root, source)
    made = f"artifacts/{stage.replace('@', '/')}/model" if stage else version.path
    facts = {"ref": version.ref, "commit": version.commit, "path": made}
    if facts.items() <= (read_origin(target) or {}).items():
        return [f"{made} of {version.ref} is in {target} already"]
    refuse_overwriting(target)
    with new_folder(target) as part:
        part.rmdir()  # it appears again when it is complete
        md5 = fetch_version(root, version, part, made)
        _write_origin(part, **facts, md5=md5)
    return [f"{made} of {version.ref} is in {target}, every file checked"]


def _copy(root: Path | None, source: Path, target: Path) -> list[str]:
    """Appears when it is complete. What already says where it came from goes on saying that."""
    check_shapes(source, *read_config(source))
    _refuse_links(root, source)
    with new_folder(target) as part:
        shutil.copytree(source, part, dirs_exist_ok=True)
        digest = fingerprint(source)
        if fingerprint(part) != digest:
            raise ModelError(f"{source} changed while it was copied; try again when it is at rest")
        if not (part / ORIGIN_FILE).is_file():
            _write_origin(part, folder=_place(root, source), sha256=digest)
    return [f"{source} is in {target}, sha256 {digest[:12]}"]


def _refuse_links(root: Path | None, source: Path) -> None:
    """Of files of a folder that are links, only those to DVC's cache in the checkout are followed.

    Raises:
        ModelError: a link leads elsewhere, or a file is none.
    """
    cache = [cache_folder(root)] if root else []
    for path in sorted(source.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            check_inside(path, source, *cache)


def _place(root: Path | None, folder: Path) -> str:
    """Relative to the checkout; of a folder elsewhere its name alone."""
    folder = folder.resolve()
    if root and folder.is_relative_to(root.resolve()):
        return folder.relative_to(root.resolve()).as_posix()
    return folder.name


def _write_origin(target: Path, **facts: str) -> None:
    text = json.dumps({"format": ORIGIN_FORMAT, **facts}, indent=2, sort_keys=True)
    (target / ORIGIN_FILE).write_text(text + "\n", encoding="utf-8")
