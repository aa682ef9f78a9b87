"""The runner of studies: each run once, resumable, failures listed, no process left behind."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from experiments import data, results, run, studies
from tests.experiments.conftest import TOY, lines_of
from util.io import REPOSITORY

pytestmark = pytest.mark.usefixtures("cifar10_of_noise")


@pytest.mark.parametrize("name", studies.STUDIES)
def test_quick(here, name, capsys, monkeypatch):
    """Each study, a few runs of it, with its table."""
    whole = studies.STUDIES[name]
    assert len({json.dumps(asdict(r)) for r in whole.runs()}) == len(whole.runs())
    chosen = replace(whole, arms=whole.arms[:2], data=whole.data[:1], lr=whole.lr[:1])
    monkeypatch.setitem(studies.STUDIES, name, chosen)
    assert run.main([name, "--quick", "--device", "cpu"]) == 0
    lines = lines_of(here / "output" / "quick" / f"{name}.jsonl")
    assert len(lines) == len(chosen.runs(quick=True))
    assert all(math.isfinite(x) for line in lines for x in results.numbers(line).values())
    assert {"commit", "hardware", "date", "versions", "command", "train_s"} <= lines[0].keys()
    capsys.readouterr()
    assert results.main([name, "--quick", "--against", whole.arms[0]]) == 0
    out = capsys.readouterr().out
    assert f"| {whole.arms[:2][-1]} |" in out and "experiments.run" in out


def test_runs_that_have_a_line_are_not_done_again(here, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    assert run.main(["toy"]) == 0 and "12 runs, 12 of them done now, 0 failed" in capsys.readouterr().out
    path = here / "toy.jsonl"
    whole = lines_of(path)
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + '\n{"run": {"da')  # killed in the sixth
    half = path.read_bytes()
    assert results.main(["toy"]) == 0 and path.read_bytes() == half  # a reader does not write: the study may go on
    capsys.readouterr()
    assert run.main(["toy", "--dry_run"]) == 0
    assert [capsys.readouterr().out.count(word) for word in ("to do",)] == [7]
    assert run.main(["toy"]) == 0
    said = capsys.readouterr()
    assert "7 of them done now" in said.out
    again = lines_of(path)
    key = lambda line: json.dumps(line["run"])  # noqa: E731
    assert [line.get("excess", line.get("loss")) for line in sorted(again, key=key)] == [
        line.get("excess", line.get("loss")) for line in sorted(whole, key=key)
    ]
    assert results.main(["toy"]) == 0
    assert capsys.readouterr().out.count("| linear |") == 2


def test_a_failed_run_is_listed(here, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    do = run.do
    monkeypatch.setattr(run, "do", lambda r, device: do(r, device) if r.seed else [][0])
    assert run.main(["toy"]) == 1 and "4 failed" in capsys.readouterr().out
    assert len(lines_of(here / "toy.jsonl")) == 12
    assert results.main(["toy"]) == 0
    out = capsys.readouterr().out
    assert out.count("failed: data") == 4 and "list index out of range" in out and "| 2 |" in out
    assert run.main(["toy"]) == 0 and "0 of them done now" in capsys.readouterr().out


def test_wrong_input(here, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["nothing"], ["cifar10", "--processes", "0"], ["gpu"]):
        with pytest.raises(SystemExit) as stop:
            run.main(words)
        assert stop.value.code == 2
    assert run.main(["gpu", "--dry_run"]) == 0 and capsys.readouterr().out.count("to do") == 8
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    assert results.main(["toy"]) == 2 and "has no results yet" in capsys.readouterr().err
    run.main(["toy"])
    assert results.main(["toy", "--against", "wiener"]) == 2 and "no run of the arm wiener" in capsys.readouterr().err
    monkeypatch.setitem(studies.STUDIES, "toy", replace(TOY, steps=(3,)))
    assert results.main(["toy"]) == 2 and "12 runs of other settings" in capsys.readouterr().err


def test_a_full_disk_ends_the_study_at_once(here, monkeypatch, capsys):
    def full(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    monkeypatch.setattr(run, "append", full)
    assert run.main(["toy"]) == 2 and "No space left on device" in capsys.readouterr().err


def test_data_that_is_missing_ends_the_study(here, monkeypatch, capsys):
    def missing(split):
        raise run.DataError("CIFAR-10 is missing: make cifar10")

    monkeypatch.setattr(data.Cifar10, "_load", staticmethod(missing))
    assert run.main(["cifar10", "--quick"]) == 2 and "make cifar10" in capsys.readouterr().err


def test_killed_or_interrupted_no_process_stays(tmp_path):
    """In a copy, in which output/ is its own. Ctrl-C ends with one sentence, and the same command goes on."""
    names = ["experiments", "spectral_ops", "util", "model_jit.py", "denoiser.py", "sampler.py", "spectral_forcing.py"]
    for name in names:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, tmp_path)
    command = [sys.executable, "-m", "experiments.run", "synthetic_long", "--quick", "--processes", "2"]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
        while len(workers := children.read_text().split()) < 3 and time.monotonic() < deadline:  # one tracks resources
            time.sleep(0.05)
        assert len(workers) == 3
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
        assert "Traceback" not in said or number == signal.SIGKILL, said  # a worker may not have read its task yet
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "interrupted; the same command goes on" in said
