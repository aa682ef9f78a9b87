"""The scripts in experiments/ run as their documentation says, and print what it shows."""

import subprocess
import sys

import pytest

from util.io import REPOSITORY


def run(script, *words):
    command = [sys.executable, str(REPOSITORY / "experiments" / script), *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_schedule_gaps_of_cifar10():
    """The table of the specification, for the spectrum of CIFAR-10."""
    rows = run("schedule_gaps.py", "--spectrum", "tests/golden/cifar10_spectrum.json").splitlines()
    uniform = [float(cell) for cell in rows[2].split("|")[2:-1]]
    logsnr = [float(cell) for cell in next(row for row in rows if row.startswith("| logsnr")).split("|")[2:-1]]
    assert uniform == pytest.approx([1.309, 0.729, 0.466, 0.295, 0.143, 1.326, 0.698, 0.315], abs=2e-3)
    assert logsnr == pytest.approx([0.549, 0.256, 0.162, 0.109, 0.064, 0.324, 0.048, 0.017], abs=2e-3)


@pytest.mark.usefixtures("tiny")
def test_pictures_are_drawn(tmp_path, trained):
    run("what_the_network_sees.py", "--out", tmp_path / "a.png", "--size", 32)
    run("plot_log.py", trained, "--out", tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 2000 for name in ("a.png", "b.png"))
