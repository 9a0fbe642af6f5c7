"""The exceptions that the command line prints as one line, without a traceback."""


class InputError(ValueError):
    """Bad input of the user: one line that names the file, the line or field, and the mend.

    The command line prints it as that one line, without a traceback, and exits with status 2.
    """


class RanksDied(RuntimeError):
    """Trainer ranks ended before the run did: one line says which, and how. The last checkpoint is intact."""


class DiskFull(RuntimeError):
    """A run's folder takes no more: one line says where, and how to go on. The last checkpoint is intact."""
