"""The plan of measurements for a GPU: order, what is there, time, failures; benchmarks/on_gpu.py. No GPU is needed."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.on_gpu import PLAN, Measurement
from model_jit import JiT_models

GOOD = """print('noise'); print('{"benchmark": "x", "commit": "unknown"}')"""
SLOW = "import sys, time; print('before', file=sys.stderr, flush=True); time.sleep(60)"
BAD = "import sys; print('first', file=sys.stderr); sys.exit('the last line')"


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A GPU, and processes that run a line of Python: `argv` of a Measurement."""
    monkeypatch.setattr(on_gpu, "gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(Measurement, "command", lambda self: [sys.executable, "-S", "-c", self.argv])
    return tmp_path / "nvidia-h200.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def names(file):
    return [line["measurement"] for line in lines(file)]


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert on_gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.count("to do") == len(PLAN)


def test_each_is_measured_once_in_the_order_of_the_plan(here, capsys):
    plan = [Measurement(name, 1, GOOD) for name in "cab"]
    assert on_gpu.main(["--commit", "abc"], plan) == 0
    assert names(here) == ["c", "a", "b"]
    first = lines(here)[0]
    assert first["benchmark"] == "x" and first["commit"] == "abc" and first["sources"] == on_gpu.sources()
    assert on_gpu.main([], [*plan, Measurement("new", 1, GOOD)]) == 0
    assert names(here) == ["c", "a", "b", "new"]
    assert "1 measured, 0 failed, 3 were there before, 0 are left" in capsys.readouterr().out


def test_another_command_or_other_sources_are_measured_again(here, monkeypatch):
    on_gpu.main([], [Measurement("a", 1, GOOD)])
    on_gpu.main([], [Measurement("a", 1, GOOD + " ")])
    monkeypatch.setattr(on_gpu, "sources", lambda: "other")
    on_gpu.main([], [Measurement("a", 1, GOOD)])
    assert names(here) == ["a", "a", "a"]


def test_what_fails_is_recorded_and_the_others_go_on(here, capsys):
    plan = [Measurement("bad", 1, BAD), Measurement("slow", 0.02, SLOW)]
    plan += [Measurement("silent", 1, ""), Measurement("good", 1, GOOD)]
    assert on_gpu.main([], plan) == 1
    assert names(here) == ["bad", "slow", "silent", "good"]
    found = lines(here)
    assert (
        found[0]["failed"] == "the last line" and found[0]["exit_code"] == 1 and found[0]["hardware"] == "NVIDIA H200"
    )
    assert found[1]["failed"] == "not done after 0.02 minutes" and found[2]["failed"] == "its last line is no JSON"
    assert found[0]["said"] == ["first", "the last line"] and found[1]["said"] == ["before"]
    assert "failed" not in found[3] and "first" in capsys.readouterr().err
    plan.append(Measurement("new", 1, GOOD))
    assert on_gpu.main([], plan) == 1
    assert names(here)[4:] == ["new", "bad", "slow", "silent"]  # what failed before is last


def test_a_measurement_starts_only_if_its_limit_fits(here, capsys):
    plan = [Measurement("long", 5, GOOD), Measurement("short", 1, GOOD)]
    assert on_gpu.main(["--minutes", "3"], plan) == 0
    assert names(here) == ["short"]
    assert "1 are left (of up to 5 minutes)" in capsys.readouterr().out
    assert on_gpu.main(["--minutes", "6"], plan) == 0
    assert names(here) == ["short", "long"]


def test_nothing_of_a_measurement_goes_on_after_its_limit(here, tmp_path):
    """Neither it nor a process that it has started."""
    started = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {!r}])"
    child = f"import time; open({str(tmp_path / 'early')!r}, 'w'); time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    on_gpu.main([], [Measurement("slow", 0.03, started.format(child))])
    time.sleep(3)
    assert (tmp_path / "early").exists() and not (tmp_path / "late").exists()


def test_temporary_files_of_a_measurement_are_removed(here, tmp_path):
    where = tmp_path / "where"
    argv = f"import os, time; open({str(where)!r}, 'w').write(os.environ['TMPDIR']); time.sleep(60)"
    on_gpu.main([], [Measurement("slow", 0.02, argv)])
    assert where.read_text() and not Path(where.read_text()).exists()


def test_list(here, capsys):
    plan = [Measurement("good", 1, GOOD), Measurement("bad", 1, BAD)]
    on_gpu.main([], plan)
    capsys.readouterr()
    on_gpu.main(["--list"], [*plan, Measurement("new", 1, GOOD)])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["done", "good"],
        ["failed", "bad"],
        ["to", "do"],
    ]
    assert len(lines(here)) == 2


class _Parsed(Exception):
    pass


def test_variables_before_a_command():
    command = Measurement("a", 1, "SOME_2=1 step --like A=1").command()
    assert command == ["env", "SOME_2=1", sys.executable, "-m", "benchmarks.step", "--like", "A=1"]
    assert Measurement("a", 1, "step --like A=1").command() == command[2:]


@pytest.mark.parametrize("measurement", PLAN, ids=lambda m: m.name)
def test_the_commands_of_the_plan(measurement, monkeypatch):
    """Their flags are those of the benchmarks, and each fits into a call of 9 minutes."""
    real = argparse.ArgumentParser.parse_args

    def parse(self, argv=None, namespace=None):
        raise _Parsed(real(self, argv, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    command = measurement.command()
    module, *flags = command[command.index("-m") + 1 :]
    with pytest.raises(_Parsed) as found:
        importlib.import_module(module).main(flags)
    assert getattr(found.value.args[0], "model", "JiT-B/16") in JiT_models
    assert measurement.minutes < 9 and [m.name for m in PLAN].count(measurement.name) == 1


def test_a_measurement_of_the_plan_is_one_line(monkeypatch, tmp_path):
    """The real process, on the CPU."""
    monkeypatch.setattr(on_gpu, "gpu", lambda: "NVIDIA H200")
    file = tmp_path / "lines.jsonl"
    argv = "loader --repeats 1 --images 2 --sources digits"
    assert on_gpu.main(["--results", str(file)], [Measurement("loader", 1, argv)]) == 0
    assert lines(file)[0]["benchmark"] == "loader"
