"""How much a command tells."""

import enum


class Verbosity(enum.IntEnum):
    """What `-q`, neither, and `-v` ask for."""

    QUIET = 0
    """warnings, errors, and results that were asked for"""
    NORMAL = 1
    """also how it goes on"""
    VERBOSE = 2
    """also what libraries say of themselves, and what caused a user's mistake"""
