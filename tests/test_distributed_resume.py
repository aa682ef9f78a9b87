"""Three ranks on CPUs (gloo), one of which is asked to stop: all stop at the same step and resume exactly.

With three the order in which a sum is taken decides its last bit; with two it does not.
"""

import gc
import os

import pytest
import torch

import engine_jit
import main_jit
from tests.conftest import arguments, as_torchrun, raw, read_log, register, run_on, state_differences, train
from util.dist import context, preemption

pytestmark = pytest.mark.usefixtures("tiny")

RANKS = 3
RUN = {"batch_size": 4, "epochs": 3}  # 3 steps an epoch


def _work(rank: int, folder, ports: list[int]) -> None:
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    codes = {}

    def call(name, where, **changes):
        as_torchrun(rank, RANKS, ports.pop())
        codes[name] = main_jit.main(arguments(output_dir=folder / where, **RUN, **changes))
        if torch.distributed.is_initialized():  # a process that is asked to stop leaves its group to the end
            gc.collect()
            torch.distributed.destroy_process_group()
            context._patient = None

    call("whole", "whole")
    for i, step in enumerate((2, 3, 7)):  # in the middle of an epoch, at its end, and again
        with pytest.MonkeyPatch.context() as patch:
            _ask_to_stop(patch, step, asked=rank == i)
            call(f"stopped {i}", "parts")
    call("rest", "parts")
    torch.save(codes, folder / f"codes-{rank}.pt")
    os._exit(0)


def _ask_to_stop(patch, at: int, asked: bool) -> None:
    """A signal for one process alone."""
    real, now = engine_jit.Trainer._after_step, {"step": 0}

    def after_step(self):
        now["step"] = self.step
        real(self)

    patch.setattr(engine_jit.Trainer, "_after_step", after_step)
    patch.setattr(preemption, "requested", lambda: "SIGUSR1" if asked and now["step"] >= at else None)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    run_on(RANKS, _work, folder, calls=5)
    return folder


def test_all_stop_at_the_same_step_when_one_is_asked(three):
    for rank in range(RANKS):
        codes = torch.load(three / f"codes-{rank}.pt")
        assert codes == {"whole": 0, **{f"stopped {i}": preemption.EXIT_CODE for i in range(3)}, "rest": 0}
    assert [line["step"] for line in read_log(three / "parts", "start")] == [0, 2, 3, 7]


def test_three_processes_that_go_on_are_three_that_were_not_interrupted(three):
    assert raw(three / "parts")["run"]["step"] == 9
    assert state_differences(three / "whole", three / "parts") == []
    assert read_log(three / "whole") == read_log(three / "parts")


def test_one_process_has_the_same_losses(three, tmp_path):
    one = train(tmp_path, **{**RUN, "batch_size": 12})
    for a, b in zip(read_log(one), read_log(three / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
