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


class RankError(Exception):
    """Ends a process of several of which one has failed; the message is what it says, if it is the one to say it.

    Args:
        line: of the first failure; empty where another process says it.
        code: exit code of all.
        is_stop: whether a process was asked to stop, which is no error.
    """

    def __init__(self, line: str, code: int, is_stop: bool = False) -> None:
        super().__init__(line)
        self.code, self.is_stop = code, is_stop
