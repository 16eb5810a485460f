"""Long acceptance checks of the issues: `make accept`."""
