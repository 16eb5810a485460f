"""What starts runs at set times: the server, deployments, the worker."""

from typing import Annotated

import typer

from vlfoundry.flows.cli.options import Overrides, Profile, Stages
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.project import find_root

commands = typer.Typer()


@commands.command()
def server(
    port: Annotated[int, typer.Option(help="where it answers")] = 4200,
    host: Annotated[
        str,
        typer.Option(
            help="the address that it answers on; others than this machine's own "
            "loopback let other machines in"
        ),
    ] = "127.0.0.1",
    env: Annotated[
        bool,
        typer.Option("--env", help="print how a shell reaches the one that runs"),
    ] = False,
) -> None:
    """Start and keep a Prefect server for the project: pages, schedules, the record of all runs.

    It runs until Ctrl-C or SIGTERM. Runs of the project find it by themselves.
    """  # fmt: skip
    from vlfoundry.flows.kept import START_ONE, keep, kept

    root = find_root()
    if not env:
        keep(root, host, port, typer.echo)
    elif found := kept(root):
        typer.echo("\n".join(found.exports()))
    else:
        raise UserError(f"no Prefect server is kept for {root}: {START_ONE}")


@commands.command()
def deploy(
    name: Annotated[str, typer.Argument(help="of the deployment; deploying it again changes it")],
    profile: Profile = None,
    set_: Overrides = None,
    stage: Stages = None,
    cron: Annotated[str | None, typer.Option(help='when: "0 3 * * *" is every night at 3')] = None,
    every: Annotated[str | None, typer.Option(help="how often: 1d, 12h, 30m or 90s")] = None,
    timezone: Annotated[str, typer.Option(help="of --cron, e.g. Europe/Berlin")] = "UTC",
    if_busy: Annotated[
        str, typer.Option(help="what a run does that finds another one at work: wait or refuse")
    ] = "wait",
    pool: Annotated[
        str | None, typer.Option(help="Prefect's work pool; default: named after the project")
    ] = None,
) -> None:
    """Let `vlfoundry worker` run the pipeline at set times, or whenever Prefect is asked to.

    It is registered on the server that PREFECT_API_URL names, or on the one of `vlfoundry server`.
    """
    from vlfoundry.flows.deploy import Deployment, register

    asked = Deployment(
        name=name, profile=profile, overrides=tuple(set_ or ()), stages=tuple(stage or ()),
        cron=cron, every=every, timezone=timezone, if_busy=if_busy, pool=pool,
    )  # fmt: skip
    for line in register(find_root(), asked):
        typer.echo(line)


@commands.command()
def worker(
    pool: Annotated[
        str | None, typer.Option(help="Prefect's work pool; default: named after the project")
    ] = None,
) -> None:
    """Run what is deployed, when its time has come, until Ctrl-C or SIGTERM.

    Runs that it stops keep what they have; the next one goes on from there.
    """
    from vlfoundry.flows.worker import work

    work(find_root(), pool, typer.echo)
