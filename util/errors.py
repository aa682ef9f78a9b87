"""Errors that are answered with a sentence instead of a traceback."""


class UserError(Exception):
    """Something in the request cannot be: the message says what was wrong, what was expected and what to do."""


class NonFiniteError(UserError):
    """The loss or a gradient stopped being finite. No weight, average or optimizer state has taken part in it."""
