"""Errors that are the user's to fix."""


class UserError(ValueError):
    """Bad input: a missing file, a wrong column, sizes that do not divide.

    The message is one line that names the file, row or field and says what to do. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class NonFiniteError(UserError):
    """A loss, gradient or score is NaN or infinite; raised before the weights are touched."""
