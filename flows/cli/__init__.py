"""The command `vlfoundry`. Every command imports what it needs itself: `--help` stays quick.

A group of commands is a module here with `commands = typer.Typer()`, named in `app.GROUPS`.
"""

from vlfoundry.flows.cli.app import app, main

__all__ = ["app", "main"]
