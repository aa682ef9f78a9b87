"""What reaches the terminal cannot act on it."""

import pytest

import main_jit
from tests.conftest import ONE, arguments
from util.errors import UserError, printable
from util.log import warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: ünïcode, 漢字 and\ntwo lines", "plain: ünïcode, 漢字 and\ntwo lines"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\rb\x9b", r"a\rb\x9b"),
        ("\udcff", r"\udcff"),  # a byte of a file name that is no UTF-8
    ],
)
def test_printable(text, shown, capsys):
    assert printable(text) == str(UserError(text)) == shown
    warn([text], ONE)
    assert capsys.readouterr().err == f"warning: {shown}\n"


@pytest.mark.usefixtures("tiny")
def test_a_hostile_file_name_is_shown_and_not_executed(here, capsys):
    bad = here / "train" / "a" / "\x1b[2Jx.png"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no image")
    argv = arguments(dataset="imagefolder", data_path=here, class_num=1, batch_size=1, num_workers=0, output_dir="out")
    assert main_jit.main(argv) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and r"\x1b[2Jx.png" in err
