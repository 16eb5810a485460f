"""`python -m vlfoundry`: the command `vlfoundry`, by the interpreter that is to run it."""

from vlfoundry.flows.cli import main

main()
