"""Errors that are answered with a sentence instead of a traceback."""


class UserError(Exception):
    """Something in the request cannot be: the message says what was wrong, what was expected and what to do.

    `everywhere` says that all processes raise it alike, so that one of them is enough to say it.
    """

    everywhere = False


class NonFiniteError(UserError):
    """The loss or a gradient of `steps` was not finite. No weight, average or optimizer state has taken part in it."""

    everywhere = True

    def __init__(self, message: str, steps: range):
        super().__init__(message)
        self.steps = steps
