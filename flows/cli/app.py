"""The command line as a whole: its groups of commands, what they are told, how they end."""

import io
import itertools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from vlfoundry.flows.cli import code, data, evaluate, models, plan, project, run, schedule
from vlfoundry.flows.verbosity import Verbosity
from vlfoundry.infra.core.errors import ConfigError, UserError
from vlfoundry.infra.core.files import refused
from vlfoundry.infra.core.interrupts import heed_interrupts
from vlfoundry.infra.core.space import no_space

GROUPS = (project, run, code, schedule, evaluate, models, plan, data)
"""modules that each have `commands`; in the order in which `--help` shows them"""

EXIT_USER_ERROR = 2

AT_HOME = re.compile(r"(--[\w-]+=)?~(/.*)?", re.DOTALL)


class CommandLine(TyperGroup):
    """What Typer's group of commands does not do by itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`~/x` is a place at home also where a shell leaves it alone: quoted, or in
        `--option=~/x`."""
        home = os.path.expanduser("~")
        found = [AT_HOME.fullmatch(argument) for argument in args]
        at_home = [
            f"{match[1] or ''}{home}{match[2] or ''}" if match else argument
            for argument, match in zip(args, found, strict=True)
        ]
        return super().parse_args(ctx, at_home or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """An option that takes one value and is given two would keep the last, without a word."""
        name, command, rest = super().resolve_command(ctx, args)
        given = [argument.partition("=")[0] for argument in itertools.takewhile("--".__ne__, rest)]
        options = [p for p in command.params if p.param_type_name == "option"] if command else []
        for option in options:
            times = sum(argument in option.opts for argument in given)
            if times > 1 and not option.multiple:
                raise ConfigError(f"got {option.opts[0]} {times} times, expected one")
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """With --verbose, where a user's mistake was found is told before what it is."""
        try:
            return super().invoke(ctx)
        except UserError:
            if ctx.obj is Verbosity.VERBOSE:
                traceback.print_exc()
            raise


app = typer.Typer(
    name="vlfoundry",
    cls=CommandLine,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in GROUPS:
    app.add_typer(group.commands)


def _versions(asked: bool) -> None:
    """Print the versions of what computes, without importing any of it."""
    from importlib.metadata import version

    if asked:
        typer.echo(
            f"vlfoundry {version('vlfoundry')} (Python {sys.version.split()[0]}, "
            f"torch {version('torch')}, megatron-core {version('megatron-core')})"
        )
        raise typer.Exit


@app.callback()
def whole(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_versions, help="Say it, and exit."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="Show also what DVC and Prefect say, and where errors come from.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("-q", "--quiet", help="Show warnings, errors and results alone."),
    ] = False,
) -> None:
    """Retrain InternVL-class vision-language models, stage by stage, as one pipeline."""
    if verbose and quiet:
        raise ConfigError("got --verbose and --quiet, expected one of them")
    ctx.obj = Verbosity(1 + verbose - quiet)


def main() -> None:
    """Entry point: a user's mistake is a message and exit code 2, anything else a traceback."""
    heed_interrupts("vlfoundry: stopped")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters that data have
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(prog_name="vlfoundry", standalone_mode=False))
    except UserError as error:
        _refuse(error)
    except typer.TyperException as error:
        _refuse(_misused(error))
    except Exception as error:
        mistake = no_space(error, Path("work"), Path("artifacts"))
        if mistake is None and isinstance(error, OSError):
            mistake = refused(error)
        if mistake is None:
            raise
        _refuse(mistake)


def _misused(error: typer.TyperException) -> UserError:
    """What Typer says of an argument, in the form of our own errors."""
    said = error.format_message().strip().removesuffix(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "vlfoundry"
    return UserError(f"{said[:1].lower()}{said[1:]}; `{command} --help` says what it takes")


def _refuse(error: UserError) -> NoReturn:
    print(f"vlfoundry: {error}", file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR) from None
