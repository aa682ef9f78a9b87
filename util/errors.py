"""Errors that main_jit.py answers with one sentence instead of a traceback."""


class UserError(Exception):
    """A request cannot be fulfilled. The message says what is wrong, what is accepted and what to do.

    `on_all_ranks` says that every rank raises it, so that rank 0 alone prints it.
    """

    on_all_ranks = False


class NonFiniteError(UserError):
    """The loss or a gradient of `steps` was not finite. The update was skipped on every rank."""

    on_all_ranks = True

    def __init__(self, message: str, steps: range):
        super().__init__(message)
        self.steps = steps
