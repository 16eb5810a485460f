"""Long acceptance checks, a module a subject: `make accept SUBJECT=pipeline`."""
