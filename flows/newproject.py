"""Makes a project of one's own: parameters, data and the graph in a new folder, the code installed.

What comes with VLFoundry lies in `TEMPLATE`, what is written for a project in `templates/project`.
"""

import dataclasses
import io
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlfoundry.flows.definition import definition_text
from vlfoundry.flows.recipes import PROFILES, SECTION, TEMPLATE, profile_path, with_profile
from vlfoundry.infra.core.config import PARAMS_FILE, load_params
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.files import new_folder, require_writable_folder
from vlfoundry.infra.core.git import FALLBACK_IDENTITY, configured_identity, git, repository_of
from vlfoundry.infra.core.project import DEFINITION, PACKAGE
from vlfoundry.infra.launch.profile import FOLDER as LAUNCHERS

WRITTEN = {
    "README.md": "README.md",
    ".gitignore": "gitignore",
    ".dvcignore": "dvcignore",
    ".dvc/config": "dvc/config",
    ".dvc/.gitignore": "dvc/gitignore",
    f"{PROFILES}/README.md": "profiles/README.md",
    f"{LAUNCHERS}/README.md": "launchers/README.md",
}
"""file of a project -> its template, in `templates/project`"""
GUIDES = ("data/chat/README.md", "data/start/README.md", "data/start/.gitignore")
"""what a project has of `TEMPLATE` with data and without"""
LICENCES = "data/LICENSES"
DATA_FILE = re.compile(r"\bdata/\w+\.parquet\b")
COMMIT = "git add --all && git commit -m 'A project of VLFoundry'"
SHOWN = 5
OPENING = re.compile(r"\A(#.*\n)+")
HEAD = """\
# The profile {!r} of VLFoundry, laid over its default. DVC hashes these values; where and how wide
# a stage runs is a matter of launchers, never of this file.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewProject:
    """What is asked for. Raises ConfigError for a folder that cannot become a project, and for a
    profile that VLFoundry does not have."""

    place: Path
    """Where it is to be: nothing, or an empty folder."""
    profile: str | None = None
    """Laid over the default parameters."""
    data: bool = True
    """Whether the embedded data is copied."""

    def __post_init__(self) -> None:
        if shutil.which("git") is None:
            raise ConfigError("git is not on the PATH, and a project is a git repository")
        _check_place(self.place)
        if self.profile is not None:
            profile_path(TEMPLATE, self.profile)

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.place.resolve().name


def make_project(asked: NewProject) -> Iterator[str]:
    """Make it, all of it or nothing; lines that say what was made and what to do next.

    Raises UserError if the place cannot be written.
    """
    data = data_files()
    with new_folder(asked.place) as part:
        for path, text in _texts(asked, data).items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).write_text(text, encoding="utf-8")
        for path in _copied(asked, data):
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(TEMPLATE / path, part / path)
        committed = _commit(part)
    yield from _said(asked, data, committed)
    if around := repository_of(asked.place.resolve().parent):
        yield f"it lies in the git repository {around}, whose `git add` would take it for its own:"
        yield "    ignore it there, or move it out; it can be moved as it is"


def data_files() -> tuple[str, ...]:
    """What the default run reads of `data/`, sorted."""
    return tuple(sorted(set(DATA_FILE.findall(definition_text()))))


def with_comments(text: str, params: Mapping[str, Any]) -> str:
    """YAML text with other values, its comments kept where what they speak of is.

    Args:
        text: parameters.
        params: what they are to be; keys that `text` has besides go.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class WithNull(RoundTripRepresenter):
        """Writes null where ruamel would write nothing."""

    WithNull.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml = YAML()
    yaml.Representer = WithNull
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    document, buffer = yaml.load(text), io.StringIO()
    _lay(document, params)
    yaml.dump(document, buffer)
    return buffer.getvalue()


def _lay(document: Any, params: Mapping[str, Any]) -> None:
    for key in [key for key in document if key not in params]:
        del document[key]
    for key, value in params.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), Mapping):
            _lay(document[key], value)
        elif key not in document or document[key] != value:
            document[key] = value


def _check_place(place: Path) -> None:
    real = place.resolve()
    if real.exists() and not real.is_dir():
        raise ConfigError(f"{place} is not a folder; name one that is to be the project")
    names = sorted(path.name for path in real.iterdir()) if real.is_dir() else []
    taken = [name for name in names if name in (PACKAGE, f"{PACKAGE}.py")]
    if taken:
        raise ConfigError(
            f"{place} holds {taken[0]!r}, which no project may: its steps start in its folder, and "
            "Python would take that for the code of VLFoundry; name a new folder"
        )
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise ConfigError(
            f"{place} is not empty: it holds {', '.join(names[:SHOWN])}{more}; name a new folder"
        )
    if real.is_mount() or Path.cwd().is_relative_to(real):
        raise ConfigError(
            f"{place} {'is a mount point' if real.is_mount() else 'is where you are'} and cannot "
            "be replaced by a complete project; name a folder that is to be, such as "
            f"{place / 'myteam'}"
        )
    require_writable_folder(real.parent, "the project")


def _texts(asked: NewProject, data: tuple[str, ...]) -> dict[str, str]:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from vlfoundry.flows.deploy import prefect_yaml

    environment = Environment(
        loader=PackageLoader("vlfoundry.flows", "templates/project"), undefined=StrictUndefined,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    facts = {
        "name": asked.name,
        "profile": asked.profile,
        "data": asked.data,
        "drawings": [Path(path).name for path in data if not path.endswith("concepts.parquet")],
    }
    written = WRITTEN if asked.data else {**WRITTEN, "data/README.md": "data/README.md"}
    texts = {path: environment.get_template(name).render(facts) for path, name in written.items()}
    return texts | {
        PARAMS_FILE: _parameters(asked.profile),
        DEFINITION: definition_text(),
        "prefect.yaml": prefect_yaml(asked.place.resolve()),
    }


def _parameters(profile: str | None) -> str:
    text = (TEMPLATE / PARAMS_FILE).read_text("utf-8")
    if profile is None:
        return text
    default = load_params(TEMPLATE / PARAMS_FILE)
    changes = load_params(profile_path(TEMPLATE, profile))
    params = with_profile(default, TEMPLATE, profile)
    if SECTION not in changes:  # fields of the model that neither of them has are defaults
        params = _named(params, default, changes)
    return HEAD.format(profile) + with_comments(OPENING.sub("", text), params)


def _named(params: Mapping[str, Any], *sources: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parameters whose keys one of the sources has."""
    found = {}
    for key, value in params.items():
        given = [source[key] for source in sources if key in source]
        if given:
            mappings = [entry for entry in given if isinstance(entry, Mapping)]
            found[key] = _named(value, *mappings) if isinstance(value, Mapping) else value
    return found


def _copied(asked: NewProject, data: tuple[str, ...]) -> Iterator[str]:
    yield from GUIDES
    if asked.data:
        yield "data/README.md"
        yield from data
        yield from (
            path.relative_to(TEMPLATE).as_posix() for path in (TEMPLATE / LICENCES).glob("[!.]*")
        )


def _commit(place: Path) -> bool:
    """Make it a git repository; whether there is a first commit, for which git must know a name."""
    git(place, "init", "--quiet")
    if configured_identity(place).keys() != FALLBACK_IDENTITY.keys():
        return False
    # Forced: what somebody ignores everywhere, *.parquet perhaps, belongs to this project.
    git(place, "add", "--all", "--force")
    git(place, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", "A project of VLFoundry")
    return True


def _said(asked: NewProject, data: tuple[str, ...], committed: bool) -> Iterator[str]:
    from importlib.metadata import version

    origin = f"the profile {asked.profile!r}" if asked.profile else "the default run"
    yield f"{asked.place}: a project of VLFoundry {version(PACKAGE)}, with {origin} in params.yaml"
    if asked.data:
        size = sum((TEMPLATE / path).stat().st_size for path in data) / 1e6
        yield f"data/: the embedded drawings, {size:.0f} MB (data/README.md says whose they are)"
    else:
        yield f"data/: empty; before a run it needs {', '.join(Path(path).name for path in data)}"
        yield "    data/README.md says what is in them"
    if not committed:
        yield "no commit yet, for git knows no user.name and user.email; when it does:"
        yield f"    {COMMIT}"
    yield f"next: cd {shlex.quote(str(asked.place))} && vlfoundry run"
