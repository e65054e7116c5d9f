"""The errors that a caller can act on."""


class DataError(ValueError):
    """A file or a value that cannot be used: what and where, what was expected, what to do."""


class UsageError(DataError):
    """A wrong command line or configuration (exit code 2)."""
