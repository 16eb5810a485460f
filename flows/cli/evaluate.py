"""What scores models, and compares our numbers with recorded ones."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from vlfoundry.flows.cli import complete
from vlfoundry.flows.cli.common import note
from vlfoundry.flows.cli.options import MODEL
from vlfoundry.infra.core.errors import ConfigError

commands = typer.Typer()

STDOUT = Path("-")


@commands.command()
def evaluate(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="folder or URL (s3://...) with a concept set or a pair set")
    ],
    suite: Annotated[
        str,
        typer.Option(
            help="one of zero_shot, retrieval, linear_probe, ...", autocompletion=complete.suites
        ),
    ],
    json: Annotated[
        Path, typer.Option(help="the file for the scores; `-`: print it, and nothing else")
    ],
    model: Annotated[str | None, typer.Argument(help=MODEL, autocompletion=complete.models)] = None,
    model_option: Annotated[
        str | None,
        typer.Option("--model", help="the same as MODEL", autocompletion=complete.models),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="only these Parquet files of DATA (their stems)")
    ] = None,
    train_source: Annotated[
        list[str] | None,
        typer.Option(help="Parquet files of DATA that linear_probe and references learn from"),
    ] = None,
    lang: Annotated[list[str] | None, typer.Option(help="only these languages")] = None,
) -> None:
    """Score a model on a folder of pictures, and write the scores as JSON."""
    asked = _one_model(model, model_option)
    from vlfoundry.eval.compare.scores import score_line
    from vlfoundry.eval.runner import evaluate_folder

    with tempfile.TemporaryDirectory(prefix="vlfoundry-") as scratch:
        out = Path(scratch) / "scores.json" if json == STDOUT else json
        scores = evaluate_folder(
            asked,
            data,
            suite,
            out,
            languages=lang or None,
            sources=source or None,
            train_sources=train_source or None,
            log=lambda line: typer.echo(line, err=True) if json == STDOUT else note(context, line),
        )
        if json == STDOUT:
            typer.echo(out.read_text("utf-8").rstrip())
            return
    for score in scores:
        typer.echo(score_line(score))
    note(context, f"written to {json}")


def _one_model(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise ConfigError(
            f"got the model {argument!r} and --model {option!r}; expected one of the two"
        )
    if argument is None and option is None:
        raise ConfigError("got no model, expected `vlfoundry evaluate MODEL ...`")
    return argument if argument is not None else str(option)


@commands.command()
def parity(
    folders: Annotated[list[Path], typer.Argument(help="folders of recorded numbers")],
) -> None:
    """Compare our numbers with recorded ones, tensor by tensor.

    Ends with code 1 if anything misses its tolerance or cannot be compared. Paths that are no
    folders are skipped.
    """
    from vlfoundry.eval.parity.folders import check_folders

    check_folders(folders)
    # What was recorded is fp32 on a CPU; said before anything asks whether there is a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from vlfoundry.eval.parity.run import compare_folders

    raise typer.Exit(0 if compare_folders(folders, typer.echo) else 1)
