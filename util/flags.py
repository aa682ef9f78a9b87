"""Command-line flags from dataclasses: a field is a flag, and says its default, help, range and lock once."""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from util.errors import UserError

# What happens when a checkpoint's value differs from the one given on the command line:
LOCKED = "locked"  # refused
LOCKED_FOR_TRAINING = "locked for training"  # refused when training resumes, overridable when the model is evaluated
OVERRIDABLE = "overridable"  # the given value wins; the checkpoint's value applies where none is given
PER_CALL = "per call"  # the checkpoint's value never applies

MAX_LENGTH = 1000  # characters of a text
RANGES = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("above", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("below", lambda value, bound: value < bound),
}


def flag(default: Any, lock: str, help: str, choices: Sequence[str] = (), added: bool = False, **ranges: float) -> Any:
    """Declare a field that is a flag.

    Args:
        choices: the accepted values, a live view if the caller passes one.
        added: the flag is newer than the first release: a checkpoint without it was trained with the default.
        ranges: `ge`, `gt`, `le`, `lt`: bounds of the value; None is always accepted.
    """
    metadata = {"lock": lock, "help": help, "choices": choices, "added": added, "ranges": ranges}
    return dataclasses.field(default=default, metadata=metadata)


def recorded() -> Any:
    """Declare a field that is no flag: training settles it, and a checkpoint carries it."""
    return dataclasses.field(default=None, metadata={"lock": None})


def flags_of(group: type) -> dict[str, dataclasses.Field]:
    """Return the flags that a dataclass declares, by name."""
    hints, found = typing.get_type_hints(group), {}
    for field in dataclasses.fields(group):
        if field.metadata["lock"] is not None:
            field.type = hints[field.name]  # of a group whose annotations are strings
            found[field.name] = field
    return found


def flag_type(field: dataclasses.Field) -> type:
    """Return the type of a flag's value; that of `int | None` is int."""
    kinds = typing.get_args(field.type) or (field.type,)
    return next(kind for kind in kinds if kind is not types.NoneType)


def has_negation(field: dataclasses.Field) -> bool:
    """Whether a switch has a form --no-NAME: where it is on by default, or may differ from a checkpoint's."""
    return field.default is not False or field.metadata["lock"] == OVERRIDABLE


class _Parser(argparse.ArgumentParser):
    """An error is one sentence, which torchrun repeats at its end, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `python main_jit.py --help` lists the flags.")


def build_parser(groups: Sequence[type], description: str) -> argparse.ArgumentParser:
    """Build a parser whose Namespace holds only the flags that were given; the groups' docstrings are their titles."""
    parser = _Parser(
        usage="%(prog)s [--FLAG VALUE ...]",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for group in groups:
        section = parser.add_argument_group(group.__doc__.strip().partition("\n")[0].rstrip("."))
        for name, field in flags_of(group).items():
            text = field.metadata["help"].replace("%", "%%")
            if field.default is not None and field.default is not False:
                text += f" (default: {field.default})"
            if flag_type(field) is bool:
                action: Any = argparse.BooleanOptionalAction if has_negation(field) else "store_true"
                section.add_argument(f"--{name}", action=action, default=argparse.SUPPRESS, help=text)
            else:
                choices = tuple(field.metadata["choices"]) or None
                section.add_argument(f"--{name}", type=flag_type(field), choices=choices, help=text)
    return parser


def check_value(name: str, field: dataclasses.Field, value: Any) -> None:
    """Raise a UserError if a flag's value is not among its choices or outside of its range."""
    choices, kind = tuple(field.metadata["choices"]), flag_type(field)
    if not isinstance(value, (kind, types.NoneType)) and not (kind is float and isinstance(value, int)):
        raise UserError(f"--{name} {value!r} must be of the type {kind.__name__}.")
    if isinstance(value, str) and ("\0" in value or len(value) > MAX_LENGTH):
        raise UserError(f"--{name} has {len(value)} characters; at most {MAX_LENGTH} are accepted, and no NUL.")
    if choices and value not in choices:
        raise UserError(f"--{name} {value} is unknown; it must be one of {', '.join(choices)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {value} is out of range; it must be a finite number.")
    for key, bound in field.metadata["ranges"].items():
        words, holds = RANGES[key]
        if value is not None and not holds(value, bound):
            raise UserError(f"--{name} {value} is out of range; it must be {words} {bound:g}.")
