"""`python -m vlfoundry.flows.cli`."""

from vlfoundry.flows.cli.app import main

main()
