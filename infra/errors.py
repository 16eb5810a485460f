"""Mistakes that a user can mend. Anything else that goes wrong is a bug and keeps its traceback."""


class UserError(Exception):
    """The message says what is wrong, what was got, what was expected, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class ConfigError(UserError):
    """A parameter is unknown, missing, or of the wrong type or range."""


class DataError(UserError):
    """A data file is missing, unreadable or not in the documented format."""


class LayoutError(UserError):
    """A parallel layout cannot work for this model on this number of ranks."""


class ModelError(UserError):
    """A model folder is incomplete, or a model cannot do what was asked of it."""
