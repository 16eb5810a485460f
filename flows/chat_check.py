"""`vlfoundry chat-check`: what stage 3 would stop at in chat files, found before it starts."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.config import PARAMS_FILE, load_params
from vlfoundry.infra.core.errors import ConfigError, DataError, ModelError
from vlfoundry.infra.core.stage import parameters_of
from vlfoundry.models.chat.dialogue import Dialogue
from vlfoundry.models.chat.examples import Conversations
from vlfoundry.models.chat.jsonl import A_CHAT_FILE, Problem, Sample
from vlfoundry.models.chat.templates import IMAGE, Message
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.preprocess.tiling import Tiling

NOTES_SHOWN = 3
"""of each file; they are no mistakes"""
SLOW_S = 2.0
"""after which a progress bar appears"""


class PicturesAlone(Dialogue):
    """Counts the visual tokens of a conversation: where no tokenizer is at hand."""

    context_id, stop_id = -1, -2

    def question(self, text: str, visual_tokens: int) -> list[int]:
        return [self.context_id] * visual_tokens

    def exchange(
        self, question: str, answer: str, visual_tokens: int
    ) -> tuple[list[int], list[int]]:
        return self.question(question, visual_tokens), []

    def conversation(
        self, messages: Sequence[Message], visual_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        assert sum(message.text.count(IMAGE) for message in messages) == len(visual_tokens)
        ids = [self.context_id] * sum(visual_tokens)
        return ids, ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How the model at hand cuts pictures, and what it has room for."""

    tiling: Tiling
    tile_tokens: int
    """visual tokens of a tile"""
    max_tokens: int
    """longest conversation"""
    dialogue: Dialogue
    roots: dict[str, str]
    """of the pictures of each source that the parameters name"""
    told: str
    """where the limits come from, for people"""


@dataclasses.dataclass(kw_only=True)
class FileReport:
    """What was found in one chat file."""

    path: Path
    samples: int
    """lines that are no blanks"""
    wrong: int = 0
    """of them, which training would stop at"""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    """the first of them"""
    notes: int = 0
    """lines with control tokens as text, which are fine"""

    def facts(self) -> dict[str, Any]:
        """For programs."""
        found = [{"line": p.line, "field": p.field, "message": p.message} for p in self.problems]
        return {**dataclasses.asdict(self), "problems": found}


def check_places(files: Sequence[Path], root: str | None) -> None:
    """Raises DataError for a file that is not there, or a root that is no folder."""
    for file in files:
        if not file.exists():
            raise DataError(f"{file} does not exist; {A_CHAT_FILE}")
    if root and "://" not in root and not Path(root).is_dir():
        raise DataError(f"--root {root} is not a folder; expected one, or a URL")


def check(
    files: Sequence[Path],
    limits: Limits,
    *,
    root: str | None = None,
    pictures: bool = True,
    most: int = 20,
    say: Callable[[str], None] = print,
    reports: list[FileReport] | None = None,
) -> bool:
    """Whether stage 3 can train on all lines of the files; says what is wrong with others.

    root: what pictures are relative to; None: as the parameters or the place of the file say.
    pictures: look at them, too. most: problems shown of each file. reports: gets one for each
    file, and nothing is said.
    """
    told = say if reports is None else None
    found = [_check_file(file, limits, root, pictures, most, told) for file in files]
    if reports is not None:
        reports += found
    return not any(report.wrong for report in found)


def _check_file(
    file: Path,
    limits: Limits,
    root: str | None,
    pictures: bool,
    most: int,
    say: Callable[[str], None] | None,
) -> FileReport:
    from tqdm import tqdm

    talks = Conversations(
        file,
        root or limits.roots.get(file.stem),
        limits.dialogue,
        tiling=limits.tiling,
        tile_tokens=limits.tile_tokens,
        max_tokens=limits.max_tokens,
    )
    report = FileReport(path=file, samples=len(talks))
    shown: list[str] = []
    # None: no bar where nobody looks at a terminal
    bar = tqdm(range(len(talks)), desc=file.name, delay=SLOW_S, leave=False, disable=None)
    for index in bar:
        problem = talks.check(index, pictures=pictures)
        if problem:
            report.wrong += 1
            if report.wrong <= most:
                report.problems.append(problem)
                shown.append(str(problem))
        elif (sample := talks.file[index]).control_tokens():
            report.notes += 1
            if report.notes <= NOTES_SHOWN:
                shown.append(_note(file, index, sample))
        while shown and say:
            bar.write(shown.pop(0))
    if say:
        _close(report, most, say)
    return report


def _close(report: FileReport, most: int, say: Callable[[str], None]) -> None:
    file, noted = report.path, report.notes
    if report.wrong > most:
        say(f"{file}: and {report.wrong - most} more (--most)")
    if noted > NOTES_SHOWN:
        say(f"{file}: and {noted - NOTES_SHOWN} more lines with control tokens as text")
    say(f"{file}: {report.samples} samples, {report.wrong} wrong")


def _note(file: Path, index: int, sample: Sample) -> str:
    field, token = sample.control_tokens()[0]
    return f"{file}:{index + 1}: {field}: note: {token} is read as text, not as a control token"


def find_limits(
    project: Path | None, *, model: str | None = None, variant: str = "simple"
) -> Limits:
    """The limits of stage 3 of a project, or of a model.

    Args:
        project: whose params.yaml says how stage 3 cuts pictures; None: there is none, so only
            the format of lines and pictures can be checked without a model.
        model: a folder or registered name; None: what stage 3 of the project starts from.
        variant: of stage 3, simple or full.

    Raises:
        ConfigError: there is no such variant.
        ModelError: the model is no chat model.
    """
    from vlfoundry.stages.sft import KIND, STAGE, WRITES, SftStageConfig

    if variant not in KIND:
        raise ConfigError(f"unknown variant {variant!r}; choose from {', '.join(KIND)}")
    config = parameters_of(STAGE, load_params(project / PARAMS_FILE)) if project else None
    options = config.sft if config else SftStageConfig
    dialogue: Dialogue | None = None
    if model is not None:
        kind, architecture, dialogue = _of_model(model)
    else:
        kind, architecture = KIND[variant], config.model if config else InternVLConfig()
    if project and config and not model:
        folder = project / config.sft.start.folders(variant)[WRITES[variant]]
        dialogue = _tokenizer(folder) if folder.is_dir() else None
    if options.max_tiles is not None:
        architecture = architecture.with_tiles(options.max_tiles)
    tiling = architecture.pictures.tiling(architecture.vision.image_px)
    tile_tokens = architecture.visual_tokens(kind)
    counted = "" if dialogue else "; texts are not counted, for no tokenizer is at hand (--model)"
    return Limits(
        tiling=tiling,
        tile_tokens=tile_tokens,
        max_tokens=options.max_tokens,
        dialogue=dialogue or PicturesAlone(),
        roots={n: s.root for n, s in config.sft.sources.items() if s.root} if config else {},
        told=f"{model or (PARAMS_FILE if project else 'defaults')}: tiles of {tiling.tile_px} px, "
        f"{tile_tokens} tokens each, at most {tiling.max_tiles} and a thumbnail; at most "
        f"{options.max_tokens} tokens in all{counted}",
    )


def _of_model(model: str) -> tuple[str, InternVLConfig, Dialogue]:
    from vlfoundry.infra.registry.gto import resolve_model
    from vlfoundry.models.internvl.config import PARTS
    from vlfoundry.models.internvl.folder import read_config

    folder = resolve_model(model)
    kind, architecture = read_config(folder)
    if "language" not in PARTS[kind]:
        raise ModelError(f"{model} is a {kind} model, expected a chat model")
    return kind, architecture, _tokenizer(folder)


def _tokenizer(folder: Path) -> Dialogue:
    from vlfoundry.models.internvl.predict import load_tokenizer

    return load_tokenizer(folder).dialogue
