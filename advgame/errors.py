"""The one exception that bad input raises."""


class InputError(ValueError):
    """Bad input of the user: one line that names the file, the line or field, and the mend.

    The command line prints it as that one line, without a traceback, and exits with status 2.
    """
