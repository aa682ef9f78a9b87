"""What a run takes: operations against the published figures, memory against torch's own count, and the dry run."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import main_jit
from denoiser import Denoiser, LogitNormal
from spectral_forcing import SpectralForcing, dct_rings
from spectral_ops.resolution import LevelTimes, ResolutionSchedule
from tests.conftest import ONE, TINY, TINY_MODEL, arguments, listing, spectrum_of_digits, train
from util import profile as tool
from util.build import build_denoiser
from util.config import resolve
from util.io import REPOSITORY
from util.profile import TIMED, UNTIMED, Memory, count_flops, count_saved, dry_run, forward_flops, mean_flops
from util.schedules import record_spectrum

pytestmark = pytest.mark.usefixtures("tiny")

RNG_STATE = 5056  # bytes of torch's generator on the CPU, which a recomputed block keeps for dropout


@pytest.mark.parametrize(("model", "gflop"), [("JiT-B/32", 15.2), ("JiT-B/16", 50.5)])
def test_operations_are_the_published_figures(model, gflop):
    assert count_flops(model, 256) / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_a_level_takes_the_operations_of_images_of_its_size_and_a_run_the_mean():
    whole, half = count_flops("JiT-B/16", 256, num_classes=10), count_flops("JiT-B/16", 128, num_classes=10)
    assert count_flops("JiT-B/16", 256, level=1, num_classes=10) == half < whole / 2
    times = LevelTimes(LogitNormal(), ResolutionSchedule(256, [20.0] * len(dct_rings(256)[1])))
    assert times.levels == (1, 0, 0, 0, 0, 0, 0, 0)
    config = replace(resolve({"resolution_schedule": "spectrum", "class_num": 10}), resolution_power=[1.0])
    assert mean_flops(SimpleNamespace(config=config, time_sampler=times)) == (7 * whole + half) / 8
    assert mean_flops(SimpleNamespace(config=config, time_sampler=LogitNormal())) == whole


def test_dry_run_of_a_run_with_levels(tmp_path, capsys):
    """It names the levels, and expects less memory and arithmetic than without."""
    spectrum = str(spectrum_of_digits(tmp_path / "digits.npz"))
    found = []
    for settings in ({}, {"resolution_schedule": "spectrum", "spectrum_file": spectrum}):
        assert main_jit.main(arguments(dry_run=True, **settings)) == 0
        found.append(rows_of(capsys.readouterr().out))
    plain, levels = found
    assert "resolution: 8 px until t = 0.395" in levels["operators"]
    assert float(levels["arithmetic"].split()[0]) < float(plain["arithmetic"].split()[0])
    assert float(levels["memory, calculated"].split()[0]) < float(plain["memory, calculated"].split()[0])


def build(dtype):
    return Denoiser(TINY_MODEL(input_size=16, num_classes=10), SpectralForcing(16), autocast_dtype=dtype)


def kept_by_torch(denoiser: Denoiser, images: int) -> int:
    """Return the bytes that are allocated after a forward pass and were not before, its inputs left out."""
    x, t, y = torch.zeros(images, 3, 16, 16), torch.full((images,), 0.5), torch.zeros(images, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        loss = denoiser(x, y, t, x)
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages()) - loss.nbytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_counted_activations_are_what_torch_keeps(dtype, recompute):
    denoiser, images = build(dtype), 3
    total, outside, block = count_saved(denoiser, images)
    for module in denoiser.net.blocks:
        module.recompute = recompute
    kept = kept_by_torch(denoiser, images) - recompute * RNG_STATE * len(denoiser.net.blocks)
    inputs = 12 * images  # t and y, which are saved and were there before
    assert abs((outside if recompute else total) - kept) <= inputs
    assert outside + block < total


def test_counting_needs_no_memory_and_is_linear_in_images():
    memory = Memory(resolve({"model": TINY, "img_size": 16}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(TINY_MODEL(input_size=16), SpectralForcing(16), autocast_dtype=torch.bfloat16)
        seven = count_saved(denoiser, 7)
    assert seven == tuple(one + 6 * (two - one) for one, two in zip(memory.one, memory.two, strict=True))
    assert count_saved(build(torch.bfloat16), 2) == memory.two  # with memory; other class numbers save as much


def test_state_is_24_bytes_per_parameter_and_divided_by_shards():
    memory = Memory(resolve({"model": TINY, "img_size": 16}))
    parameters = sum(p.numel() for p in TINY_MODEL(input_size=16).parameters())
    copies, shards = (memory.per_gpu(8, parallel, recompute=True)[0] for parallel in ("ddp", "fsdp"))
    gathered = 4 * (6 * max(memory.blocks) + 2 * (parameters - sum(memory.blocks)))
    saved = 24 * parameters - (copies - shards + gathered)  # what is left of the state on each GPU
    assert 24 * parameters / 8 <= saved < 1.1 * 24 * parameters / 8


@pytest.mark.parametrize(
    "settings",
    [
        {"pred_param": "hybrid", "spectral_residual": "time_label", "sf_schedule": "budget"},
        {"t_sampler": "spectral_instance"},
        {"class_num": 100, "pred_param": "hybrid"},
        {"resolution_schedule": "spectrum", "sf_schedule": "snr"},
        {"disable_dct_patchify": True, "pred_param": "v"},
    ],
    ids=str,
)
def test_memory_and_operations_are_of_the_model_of_the_run(tmp_path, settings):
    spectrum = str(spectrum_of_digits(tmp_path / "digits.npz"))
    given = {"model": TINY, "dataset": "digits", "img_size": 16, "spectrum_file": spectrum, **settings}
    config = record_spectrum(resolve(given), None)
    memory, denoiser = Memory(config, None), build_denoiser(config)
    assert memory.shapes == [tuple(p.shape) for p in denoiser.parameters()]
    denoiser.resolution = None
    assert memory.two == count_saved(denoiser, 2)
    assert mean_flops(SimpleNamespace(config=config, time_sampler=LogitNormal())) == forward_flops(denoiser.net)


def test_table(capsys):
    tool.main(["--models", TINY, "--gpus", "2", "4", "--img_size", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3 and {line.count("|") for line in lines} == {10}


@pytest.mark.slow
def test_table_of_the_documentation(capsys):
    tool.main([])
    assert capsys.readouterr().out in (REPOSITORY / "docs" / "large_models.md").read_text()


# ------------------------------------------------------------------------------------------------------- the dry run


def rows_of(report: str) -> dict[str, str]:
    lines = report.splitlines()
    after = lines[lines.index("dry run: nothing was written") + 1 :]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in after)


def test_dry_run_writes_nothing_and_says_what_the_run_takes(here, capsys):
    assert main_jit.main(arguments(output_dir="out", dry_run=True, epochs=50)) == 0
    rows = rows_of(capsys.readouterr().out)
    assert "96,072 parameters" in rows["model"] and "images/s" in rows["step"]
    assert rows["steps"] == "100 are left: 50 epochs of 2, 0 done"
    assert float(rows["memory, calculated"].split()[0]) > 0
    assert listing(here) == {}


def test_dry_run_of_a_resumed_run_leaves_it_as_it_was(tmp_path, capsys):
    folder = train(tmp_path / "run", epochs=1)
    before = listing(folder)
    assert main_jit.main(arguments(output_dir=folder, dry_run=True, epochs=3)) == 0
    assert listing(folder) == before
    assert rows_of(capsys.readouterr().out)["steps"] == "4 are left: 3 epochs of 2, 2 done"


def test_projection_is_the_median_without_the_first_steps_and_those_read_ahead(monkeypatch):
    """Two workers with two batches each and four microbatches a step: one untimed step more. Steps: 9 s, then 4 s."""
    clock, steps = [0.0], []
    monkeypatch.setattr(tool.time, "perf_counter", lambda: clock[0])

    def train_step(batches, step):
        steps.append(step)
        clock[0] += 9 if len(steps) <= UNTIMED + 1 else 4
        return torch.zeros(())

    given = {"dataset": "digits", "model": TINY, "img_size": 16, "epochs": 2}
    config = resolve({**given, "batch_size": 4, "global_batch": 16, "accum_iter": 4})
    loader = SimpleNamespace(num_workers=2, prefetch_factor=2, __iter__=lambda: iter(()))
    trainer = SimpleNamespace(config=config, ctx=ONE, denoiser=build(None), step=100, steps_per_epoch=1000)
    trainer.loader = type("Loader", (), vars(loader) | {"__iter__": lambda self: iter(())})()
    trainer.sampler, trainer.total_steps = SimpleNamespace(set_epoch=lambda *_: None), 2000
    trainer.train_step, trainer.time_sampler = train_step, LogitNormal()
    rows = rows_of(dry_run(trainer))
    assert steps == list(range(100, 100 + UNTIMED + 1 + TIMED))
    assert rows["step"].startswith("4 s (4 to 4)") and rows["first step"] == "9 s"
    assert rows["training"].startswith("about 2 h 7 min")  # 1900 steps
