"""What a run takes: operations against the formulae, memory against autograd, and the dry run."""

import pytest

import main_jit
from tests.conftest import arguments, listing, train

pytestmark = pytest.mark.usefixtures("tiny")


def test_dry_run_writes_nothing_and_says_what_the_run_takes(here, capsys):
    assert main_jit.main(arguments(output_dir="out", dry_run=True, epochs=3)) == 0
    out = capsys.readouterr().out
    assert "dry run: nothing was written" in out and "96,072 parameters" in out and "images/s" in out
    assert listing(here) == {}


def test_dry_run_of_a_resumed_run_leaves_it_as_it_was(tmp_path, capsys):
    folder = train(tmp_path / "run", epochs=1)
    before = listing(folder)
    assert main_jit.main(arguments(output_dir=folder, dry_run=True, epochs=3)) == 0
    assert listing(folder) == before and "dry run" in capsys.readouterr().out
