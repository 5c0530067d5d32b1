"""Errors that are the user's to fix."""

from typing import Any


class UserError(ValueError):
    """Bad input: a missing file, a wrong column, sizes that do not divide.

    The message is one line that names the file, row or field and says what to do. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class NonFiniteError(UserError):
    """A loss, gradient or score is NaN or infinite; raised on every process, before the weights are touched.

    Attributes:
        examples: what it was computed from on this process, tensors and texts; None where that is not known.
    """

    examples: Any = None
