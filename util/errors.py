"""Errors that main_jit.py answers with one sentence instead of a traceback."""


def printable(text: str) -> str:
    """Return a text without characters that would act on a terminal, such as the escape in a file name."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A request cannot be fulfilled. The message says what is wrong, what is accepted and what to do.

    `on_all_ranks` says that every rank raises it, so that rank 0 alone prints it.
    """

    on_all_ranks = False

    def __init__(self, message: str):
        super().__init__(printable(message))
