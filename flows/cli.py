"""The command `vlfoundry`. Every command imports what it needs itself: `--help` stays quick."""

import io
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from infra.errors import ConfigError, UserError, one_line
from infra.files import refused
from infra.interrupts import heed_interrupts
from infra.project import find_root
from infra.space import no_space

EXIT_USER_ERROR = 2

AT_HOME = re.compile(r"(--[\w-]+=)?~(/.*)?", re.DOTALL)


class _AtHome(TyperGroup):
    """`~/x` is a place at home also where a shell leaves it alone: quoted, or in `--option=~/x`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        home = os.path.expanduser("~")
        found = [AT_HOME.fullmatch(argument) for argument in args]
        return super().parse_args(
            ctx,
            [
                f"{match[1] or ''}{home}{match[2] or ''}" if match else argument
                for argument, match in zip(args, found, strict=True)
            ],
        )

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


app = typer.Typer(
    name="vlfoundry",
    cls=_AtHome,
    help="Retrain InternVL-class vision-language models, stage by stage, as one pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelRef = Annotated[
    str,
    typer.Argument(
        help="a registered name (internvl_c, internvl_c@v0.1.0, internvl_c#champion, champion) "
        "or the path of a model folder"
    ),
]


@app.command()
def run(
    stage: Annotated[
        list[str] | None, typer.Option(help="run this stage and what it needs, not all")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="a file of profiles/, merged over params.yaml")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: change a parameter for this run")
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option(help="where a run with its own parameters lives; named after them by default"),
    ] = None,
) -> None:
    """Run what changed, from the raw pairs to the report.

    With --profile, --set or --workspace the run gets a copy of the sources of its
    own with its own params.yaml, and shares DVC's cache; params.yaml here stays as it is.
    """
    from flows.launch import run_pipeline
    from flows.workspace import Variation

    variation = Variation(profile=profile, overrides=tuple(set_ or ()))
    raise typer.Exit(
        run_pipeline(
            find_root(),
            stages=tuple(stage or ()),
            variation=variation,
            workspace=workspace,
        )
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="a registered name or a model folder")],
    data: Annotated[
        str, typer.Option(help="folder or URL (s3://...) with a concept set or a pair set")
    ],
    suite: Annotated[
        list[str], typer.Option(help="one of zero_shot, retrieval, linear_probe, ...")
    ],
    json: Annotated[Path, typer.Option(help="where the scores go")],
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
    from eval.run import evaluate_folder
    from eval.scores import score_line

    if len(suite) > 1:
        raise ConfigError(f"got --suite {len(suite)} times, expected one suite a call")
    scores = evaluate_folder(
        model,
        data,
        suite[0],
        json,
        languages=lang or None,
        sources=source or None,
        train_sources=train_source or None,
    )
    for score in scores:
        typer.echo(score_line(score))
    typer.echo(f"written to {json}")


@app.command()
def parity(
    folders: Annotated[list[Path], typer.Argument(help="folders of recorded numbers")],
) -> None:
    """Compare our numbers with recorded ones, tensor by tensor.

    Ends with code 1 if anything misses its tolerance or cannot be compared. Paths that are no
    folders are skipped.
    """
    # What was recorded is fp32 on a CPU; said before anything asks whether there is a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from eval.parity.run import compare_folders

    raise typer.Exit(0 if compare_folders(folders, typer.echo) else 1)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="a folder with config.json and safetensors or .bin files; or a .pth; or a model "
            "folder of ours, or a registered name"
        ),
    ],
    target: Annotated[Path, typer.Argument(help="the model folder to make")],
    kind: Annotated[
        str | None,
        typer.Option(help="only this of it: vision, or internvl_c of an InternVL-14B"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="of a .pth: the official config.json; default: beside it")
    ] = None,
    tower_config: Annotated[
        Path | None,
        typer.Option(help="of a folder in LLaVA's form: the config.json of its vision tower"),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="of a registered name: what this stage of its run made, pretrain_text"),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="also write this file of profiles/, to train on from TARGET; of a registered "
            "InternVL-C with the text model of its run (TARGET-text)"
        ),
    ] = None,
) -> None:
    """Make a model folder of official weights, or of a model of ours, to train on from.

    Every tensor is accounted for, and kept in the type it has. Code in a pickle is never run.
    """
    from flows.start import bring, bring_with_profile, new_profile
    from infra.files import require_writable_folder

    asked: dict[str, Any] = {
        "stage": stage, "kind": kind, "config_file": config, "tower_config": tower_config,
    }  # fmt: skip
    require_writable_folder(target, "the model")
    if profile:
        root = find_root()
        path = new_profile(root, profile, target)
        said = bring_with_profile(root, source, target, path, **asked)
    else:
        said = bring(_root_or_none(), source, target, **asked)
    for line in said:
        typer.echo(one_line(line))


def _root_or_none() -> Path | None:
    try:
        return find_root()
    except ConfigError:
        return None


@app.command()
def export(
    model: ModelRef,
    target: Annotated[Path, typer.Argument(help="the folder to make")],
    format: Annotated[
        str,
        typer.Option(
            help="internvit, internvl_14b, internvl_chat, transformers, llava, llava_full, "
            "internvit_pth or internvl_c_pth"
        ),
    ],
) -> None:
    """Write a model as official code or transformers reads it."""
    from infra.files import require_writable_folder
    from infra.registry import resolve_model
    from models.internvl.convert import export_model

    require_writable_folder(target, "the model")
    done = export_model(resolve_model(model), target, format)
    typer.echo(f"{model} ({done.kind}) is in {target} as {done.format}: {done.summary}")
    if done.note:
        typer.echo(f"mind: {done.note}")


@app.command()
def merge(
    model: ModelRef,
    target: Annotated[Path, typer.Argument(help="the model folder to make")],
) -> None:
    """Fold a model's LoRA adapters into its weights (export does that too)."""
    from infra.files import require_writable_folder
    from infra.registry import resolve_model
    from models.internvl.convert import merge_model

    require_writable_folder(target, "the model")
    changed = merge_model(resolve_model(model), target)
    typer.echo(f"{model} is in {target}, the adapters of {changed} weights folded in")


@app.command()
def plan(
    config: Annotated[
        str, typer.Argument(help="a recipe (`vlfoundry recipes`) or a stage: contrastive, sft@full")
    ],
    gpus: Annotated[int, typer.Option(help="how many")],
    memory: Annotated[float, typer.Option(help="of each, in GiB")],
    mfu: Annotated[float, typer.Option(help="share of the peak that is reached")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(help="of each; 989: an H100 in bf16")] = 989.0,
    reserve: Annotated[
        float, typer.Option(help="GiB of each set aside: context, workspaces, fragmentation")
    ] = 4.0,
    fp32: Annotated[bool, typer.Option("--fp32", help="not bf16")] = False,
    profile: Annotated[
        str | None, typer.Option(help="a file of profiles/, merged over params.yaml")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: change a parameter")
    ] = None,
) -> None:
    """Say which layouts fit a machine, what each rank holds, and how long a step takes."""
    from flows.plan import find_job, machine_of, make_plan, plan_lines

    job = find_job(find_root(), config, profile=profile, overrides=tuple(set_ or ()))
    machine = machine_of(gpus, memory, mfu, peak_tflops, fp32=fp32, reserve=reserve)
    for line in plan_lines(job, make_plan(job, machine), machine):
        typer.echo(line)


@app.command()
def chat_check(
    files: Annotated[list[Path], typer.Argument(help="chat files (.jsonl)")],
    root: Annotated[
        str | None,
        typer.Option(
            help="folder or URL that pictures are relative to, `/` where they are absolute paths; "
            "default: what params.yaml says of the file (sft.sources), or the file's folder"
        ),
    ] = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="decode every picture")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(help="the chat model that is to be trained; default: the project's"),
    ] = None,
    variant: Annotated[str, typer.Option(help="of stage 3: simple or full")] = "simple",
    most: Annotated[int, typer.Option(help="problems shown of each file")] = 20,
) -> None:
    """Check chat files as stage 3 will read them: format, pictures, lengths.

    Names file, line and field of whatever training would stop at, and ends with code 1 if there is
    anything.
    """
    from flows.chat_check import check, find_limits

    limits = find_limits(_root_or_none(), model=model, variant=variant)
    good = check(files, limits, root=root, pictures=images, most=most, say=typer.echo)
    raise typer.Exit(0 if good else 1)


@app.command()
def pixels(
    image: Annotated[Path, typer.Argument(help="a picture")],
    out: Annotated[Path, typer.Option(help="the folder to make, with one PNG a square")],
    model: Annotated[
        str | None, typer.Option(help="a registered name or a model folder; default: params.yaml")
    ] = None,
    purpose: Annotated[str, typer.Option("--for", help="train or evaluate")] = "evaluate",
    task: Annotated[
        str | None, typer.Option(help="zero_shot, linear_probe, retrieval, caption or chat")
    ] = None,
) -> None:
    """Write what a model is given of a picture: its tiles, or its one square."""
    from flows.pixels import write_pixels

    write_pixels(
        image, out, model=model, purpose=purpose, task=task, root=find_root, say=typer.echo
    )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="show this one")] = None,
) -> None:
    """List the published training runs, or show one: numbers, command, cost, memory plan."""
    from flows.plan import recipe_lines, show_lines

    for line in show_lines(find_root(), name) if name else recipe_lines(find_root()):
        typer.echo(line)


@app.command()
def report(
    out: Annotated[Path | None, typer.Option(help="where; default work/report/index.html")] = None,
) -> None:
    """Draw the report of the last run again, as one page that works offline."""
    from eval.report.page import PAGE, render
    from infra.files import require_writable

    require_writable(out or find_root() / PAGE, "the report")
    typer.echo(render(find_root(), out))


@app.command()
def models() -> None:
    """List the registered models and what stands where."""
    from infra.registry import list_models

    rows = list_models(find_root())
    if not rows:
        typer.echo("no model is registered yet; `make run` registers the one that the gate passes")
    for row in rows:
        stages = ", ".join(f"#{name}" for name in row.stages)
        typer.echo(f"{row.name}@{row.version}  {row.commit[:10]}  {row.created}  {stages}")


@app.command()
def register(
    folder: Annotated[Path, typer.Argument(help="a model folder inside DVC's outputs")],
    promote: Annotated[
        str | None, typer.Option(help="also assign this stage, e.g. champion")
    ] = None,
) -> None:
    """Give a trained model a version."""
    from infra.registry import register_model

    version = register_model(find_root(), folder, promote=promote)
    typer.echo(f"{version.name}@{version.version} is {version.path} at {version.commit[:10]}")


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="a registered name")],
    everything: Annotated[
        bool, typer.Option("--all", help="all that its run made, not the model alone")
    ] = False,
) -> None:
    """Get a registered model from DVC's remote into the cache, e.g. on a second machine."""
    from flows.fetch import fetch as fetch_model

    typer.echo(fetch_model(find_root(), model, everything=everything))


@app.command()
def lineage(
    model: ModelRef,
    rows: Annotated[
        Path | None, typer.Option(help="also write the records it was trained on, as Parquet")
    ] = None,
) -> None:
    """Walk back from a model to the rows that it was trained on."""
    from flows.lineage import lineage_lines, write_rows
    from infra.files import require_writable

    if rows:
        require_writable(rows, "the rows")
    for line in lineage_lines(find_root(), model):
        typer.echo(line)
    if rows:
        typer.echo(f"{write_rows(find_root(), model, rows)} rows written to {rows}")


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete it; without: only list")] = False,
) -> None:
    """List training state that changed parameters or sources set aside, or delete it.

    Nothing else deletes a checkpoint. State of the current parameters is never listed.
    """
    from flows.gc import delete as delete_all
    from flows.gc import leftovers

    root = find_root()
    found = leftovers(root)
    for leftover in found:
        typer.echo(leftover.line(root))
    if delete:
        typer.echo(f"{delete_all(found) / 1e6:,.1f} MB freed")
    else:
        typer.echo(f"{len(found)} folders" + ("; `vlfoundry gc --delete`" if found else ""))


@app.command()
def status() -> None:
    """Say which stages would run, and why."""
    from flows.graph import load_graph

    graph = load_graph(find_root())
    for node in graph.nodes:
        reason = graph.changed.get(node.name)
        upstream = sorted(set(node.upstream) & graph.stale)
        if reason is None and upstream:
            reason = f"after {', '.join(upstream)}"
        typer.echo(f"{node.name:28s} {'up to date' if reason is None else reason}")


def main() -> None:
    """Entry point: a user's mistake is a message and exit code 2, anything else a traceback."""
    heed_interrupts("vlfoundry: stopped")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters that data have
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        _refuse(error)
    except Exception as error:
        mistake = no_space(error, Path("work"), Path("artifacts"))
        if mistake is None and isinstance(error, OSError):
            mistake = refused(error)
        if mistake is None:
            raise
        _refuse(mistake)


def _refuse(error: UserError) -> NoReturn:
    print(f"vlfoundry: {error}", file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR) from None


if __name__ == "__main__":
    main()
