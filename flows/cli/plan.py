"""What a machine can train, and the published training runs."""

from typing import Annotated

import typer

from vlfoundry.flows.cli import complete
from vlfoundry.flows.cli.common import Json, print_json
from vlfoundry.flows.cli.options import Overrides, Profile
from vlfoundry.infra.core.project import find_root

commands = typer.Typer()


@commands.command()
def plan(
    config: Annotated[
        str,
        typer.Argument(
            help="a recipe (`vlfoundry recipes`) or a stage: contrastive, sft@full",
            autocompletion=complete.plannable,
        ),
    ],
    gpus: Annotated[int, typer.Option(help="how many")],
    memory: Annotated[float, typer.Option(help="of each, in GiB")],
    mfu: Annotated[float, typer.Option(help="share of the peak that is reached")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(help="of each; 989: an H100 in bf16")] = 989.0,
    reserve: Annotated[
        float, typer.Option(help="GiB of each set aside: context, workspaces, fragmentation")
    ] = 4.0,
    fp32: Annotated[bool, typer.Option("--fp32", help="not bf16")] = False,
    profile: Profile = None,
    set_: Overrides = None,
    json: Json = False,
) -> None:
    """Say which layouts fit a machine, what each rank holds, and how long a step takes."""
    from vlfoundry.flows.plan import find_job, machine_of, make_plan, plan_lines
    from vlfoundry.flows.planfacts import plan_facts

    machine = machine_of(gpus, memory, mfu, peak_tflops, fp32=fp32, reserve=reserve)
    job = find_job(find_root(), config, profile=profile, overrides=tuple(set_ or ()))
    found = make_plan(job, machine)
    if json:
        print_json("plan", plan_facts(job, found, machine))
        return
    for line in plan_lines(job, found, machine):
        typer.echo(line)


@commands.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="show this one", autocompletion=complete.recipes)
    ] = None,
    json: Json = False,
) -> None:
    """List the published training runs, or show one: numbers, command, cost, memory plan."""
    from vlfoundry.flows.plan import recipe_lines, show_lines
    from vlfoundry.flows.planfacts import recipe_facts, recipes_facts

    root = find_root()
    if json and name:
        print_json("recipe", recipe_facts(root, name))
        return
    if json:
        print_json("recipes", recipes_facts(root))
        return
    for line in show_lines(root, name) if name else recipe_lines(root):
        typer.echo(line)
