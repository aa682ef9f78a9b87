"""The benchmarks: what they report, and that what they time is what they say; benchmarks/."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import evaluate, loader, memory, sampler, sf_operator, step, step_parts
from benchmarks.common import Ceiling
from benchmarks.turns import CLOCKS, Turns, Variants
from model_jit import JiT_models, SwiGLU
from tests.conftest import TINY
from util.flops import forward_flop
from util.generation import Sampling

CPU = torch.device("cpu")
WITH_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=WITH_GPU)]
SMALL = ["--device", "cpu", "--repeats", "2"]
OF_TINY = [*SMALL, "--model", TINY, "--img_size", "16", "--class_num", "10", "--batch_size", "2"]

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    def init(self, device, dtype):
        self.a = self.b = torch.ones(8, 8)
        self.product, self.calls, self.flop, self.about = torch.mm, 1, 1024, {"dtype": str(dtype)}

    monkeypatch.setattr(Ceiling, "__init__", init)


def line(main, argv, capsys) -> dict:
    """What a benchmark prints: one line."""
    capsys.readouterr()
    main(argv)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert {"date", "commit", "versions", "hardware", "command", "settings"} <= set(found)
    return found


# Time and memory.


def test_variants_take_turns(monkeypatch):
    clock, calls = [0.0], []

    def variant(name, seconds):
        def call(shared):
            calls.append((name, shared))
            clock[0] += seconds

        return call

    monkeypatch.setitem(CLOCKS, "wall", lambda: clock[0])
    variants = Variants(CPU)
    assert variants.add(lambda: "x", {"a": variant("a", 2.0), "b": variant("b", 8.0)}) == "x"
    variants.add(lambda: "y", {"c": variant("c", 1.0)})
    turns = variants.take_turns(3)
    assert calls[:6] == [("a", "x")] * 2 + [("b", "x")] * 2 + [("c", "y")] * 2  # to compile, and for the peak
    assert calls[6:] == [("a", "x"), ("b", "x"), ("c", "y")] * 3
    assert turns.seconds == {"a": [2.0] * 3, "b": [8.0] * 3, "c": [1.0] * 3}


def test_a_variant_without_memory_leaves_the_others():
    """Where it is built, in its first call, and in a turn."""
    calls = []

    def fails_at(number):
        def call(_):
            calls.append(number)
            if calls.count(number) == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried. Including non-PyTorch memory, advice\nmore")

        return call

    variants = Variants(CPU)
    assert variants.add(lambda: fails_at(1)(None), {"built": print}) is None
    calls.clear()
    variants.add(lambda: None, {"first": fails_at(1), "good": lambda _: None, "later": fails_at(4)})
    turns = variants.take_turns(3)
    assert {name: len(seconds) for name, seconds in turns.seconds.items()} == {"good": 3}
    for name in ("built", "first", "later"):
        assert turns.of(name) == {"failed": "CUDA out of memory. Tried."}


@pytest.mark.parametrize("device", DEVICES)
def test_peaks_are_of_a_variant_alone(device):
    """Each has what it shares, and its own use; what others hold is not in it."""
    million = torch.zeros(2**20).nbytes
    variants = Variants(device)
    for name, held in (("a", 16), ("b", 64)):
        uses = {f"{name} {n}": lambda _, n=n: torch.ones(n, 2**20, device=device) for n in (48, 8)}
        variants.add(lambda held=held: torch.ones(held, 2**20, device=device), uses)
    found = {name: peak / million for name, peak in variants.peaks.items()}
    assert found == pytest.approx({"a 48": 64, "a 8": 24, "b 48": 112, "b 8": 72}, abs=4)


def test_a_peak_is_over():
    """The peak of a call is not that of an earlier one."""
    before = memory.held(CPU)
    peaks = [memory.peak(lambda n=n: torch.ones(n, 2**20), CPU) - before for n in (64, 4)]
    assert peaks[0] > 250e6 and peaks[1] < 60e6


def test_ratios_are_of_neighbours():
    turns = Turns({"a": [1.0, 10.0, 4.0], "b": [2.0, 5.0, 4.0]})
    assert turns.ratio("a", "b") == {"median": 1.0, "range": [0.5, 2.0]}
    assert turns.of("a") == {"seconds": 4.0, "seconds_range": [1.0, 10.0]}
    # 60 operations in 1, 10 and 4 s against 100 in 2, 5 and 4 s
    assert turns.share("a", 60, "b", 100) == {"median": 0.6, "range": [0.3, 1.2]}


# Each of them.


def test_step(capsys):
    found = line(step.main, [*OF_TINY, "--precision", "fp32", "bf16", "--sf", "on", "off"], capsys)
    keys = {f"{p} sf {sf} compile off" for p in ("fp32", "bf16") for sf in ("on", "off")}
    assert set(found["results"]) == {"ceiling fp32", "ceiling bf16"} | keys
    for key in keys:
        result = found["results"][key]
        assert result["peak_gb"] > 0
        assert result["images_per_s"] == pytest.approx(2 / result["seconds"], rel=1e-3)
    net = JiT_models[TINY](input_size=16, num_classes=10)
    assert found["gflop_per_image"] == pytest.approx(3 * forward_flop(net) / 1e9, rel=1e-3)


def test_a_step_is_a_step_of_training(monkeypatch):
    """Weights, averages and optimizer move, with Spectral Forcing and precision as asked for."""
    options = SimpleNamespace(model=TINY, img_size=16, class_num=10, batch_size=2, device="cpu")
    args, batches = step.setting(options, steps=2)
    ours = step.Steps(args, ["off"], 2, batches, step.World())
    before = [p.detach().clone() for p in ours.training.denoiser.parameters()]
    averages = [a.clone() for a in ours.training.emas[0].averages.values()]
    ours(("off", False), False, torch.bfloat16)
    denoiser = ours.training.denoiser
    assert denoiser.spectral_forcing is None and denoiser.autocast_dtype == torch.bfloat16
    ours(("off", False), True, None)
    assert denoiser.spectral_forcing is ours.operator and denoiser.autocast_dtype is None
    assert not any(torch.equal(a, b) for a, b in zip(denoiser.parameters(), before, strict=True) if a.dim() > 1)
    assert not all(torch.equal(a, b) for a, b in zip(ours.training.emas[0].averages.values(), averages, strict=True))
    assert int(next(iter(ours.training.optimizer.state.values()))["step"]) == 4


def test_sampler(capsys):
    found = line(sampler.main, [*OF_TINY, "--num_sampling_steps", "2", "--cfg", "1", "2"], capsys)
    assert set(found["results"]) == {"ceiling fp32", "fp32 cfg 1 compile off", "fp32 cfg 2 compile off"}
    assert [found["results"][f"fp32 cfg {c} compile off"]["forward_passes"] for c in (1, 2)] == [3, 5]


@pytest.mark.parametrize(
    ("solver", "steps", "cfg", "interval", "passes"),
    [("euler", 4, 2.0, (0.0, 1.0), 8), ("heun", 2, 1.0, (0.1, 1.0), 3), ("heun", 4, 2.0, (0.3, 0.6), 9)],
)
def test_forward_passes(solver, steps, cfg, interval, passes):
    """The last: at 0, .25, .5, .75 and, second stages, .25, .5, .75; guidance at .5 alone, twice."""
    assert sampler.forward_passes(Sampling(solver, steps, cfg, interval, 0, 1)) == passes


def test_operator(capsys):
    """Five calls of 1, 2 and 6 s in all, beside steps of 10 s."""
    turns = Turns({"t each": [1.0, 2.0, 6.0], "step fp32": [10.0] * 3})
    assert sf_operator.share(turns, "step fp32", 5) == {"median": 0.04, "range": [0.02, 0.12]}
    results = line(sf_operator.main, [*OF_TINY, "--calls", "2"], capsys)["results"]
    assert results["step fp32"]["share_of_operator"]["median"] > 0
    per_image = results["t each"]["seconds"] * 1e3 / 2 / 2  # calls, images
    assert results["t each"]["milliseconds_per_image"] == pytest.approx(per_image, rel=1e-3)


def test_a_line_without_the_variants_that_have_no_memory(monkeypatch, capsys):
    real = step.Steps.__call__

    def call(self, way, spectral_forcing, dtype):
        if dtype is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(self, way, spectral_forcing, dtype)

    monkeypatch.setattr(step.Steps, "__call__", call)
    for main, bad, good in (
        (step.main, "{} sf on compile off", "images_per_s"),
        (sf_operator.main, "step {}", "share_of_operator"),
    ):
        results = line(main, [*OF_TINY, "--precision", "fp32", "bf16"], capsys)["results"]
        assert results[bad.format("fp32")] == {"failed": "CUDA out of memory."}
        assert good in results[bad.format("bf16")]
    monkeypatch.setattr(step.Steps, "__init__", lambda *_: call(None, None, None, None))
    for main in (step.main, sf_operator.main):
        results = line(main, OF_TINY, capsys)["results"]
        assert results.pop("ceiling fp32")["seconds"] > 0
        assert all(value == {"failed": "CUDA out of memory."} for value in results.values())


def test_loader_and_evaluate(capsys):
    results = line(loader.main, ["--repeats", "1", "--images", "4", "--img_size", "32"], capsys)["results"]
    assert set(results) == {"digits", "files"} and all(r["images_per_s_and_core"] > 0 for r in results.values())
    argv = ["--model", TINY, "--img_size", "16", "--num_images", "20", "--num_sampling_steps", "1", "--repeats", "1"]
    found = line(evaluate.main, ["--device", "cpu", *argv], capsys)["results"]["fp32"]
    assert found["images_per_s"] == pytest.approx(20 / found["seconds"], rel=1e-2)


@pytest.mark.slow
def test_startup():
    from benchmarks.startup import seconds_until

    with pytest.raises(SystemExit, match="ended before"):
        seconds_until(["-c", "print(1)"], "2")
    assert seconds_until(["-c", "print('there'); import time; time.sleep(60)"], "there") < 30


def test_a_step_compiles_what_its_variant_says_and_nothing_before(monkeypatch):
    """Also on a GPU, where a run would compile by itself."""
    options = SimpleNamespace(model=TINY, img_size=16, class_num=10, batch_size=2, device="cpu")
    assert step.setting(options, 1)[0].compile == "off"


def test_ways_to_compile_share_the_weights(monkeypatch):
    """Whatever the order of the turns, what is compiled is what the variant says."""
    compiled, called, real = [], [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)

        def run(*args):
            called.append(graph)
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=backend, **options))
    options = SimpleNamespace(model=TINY, img_size=16, class_num=10, batch_size=2, device="cpu")
    args, batches = step.setting(options, 1)
    ours = step.Steps(args, ["off", "block", "model"], 1, batches, step.World())
    graphs, made = {"off": 0, "block": 4 + 3, "model": 1 + 3}, []
    for mode in ("off", "block", "off", "model", "block", "model"):
        called.clear()
        ours((mode, False), True, None)
        assert len(called) == graphs[mode]  # blocks or network; and Spectral Forcing, z and v, loss
        made.append(len(compiled))
    assert made[0] == 0 and made[3] == made[-1]  # nothing is compiled twice
    assert int(next(iter(ours.training.optimizer.state.values()))["step"]) == 6


def test_padded_widths_and_batches_are_variants(capsys):
    """The widths of TINY, 85, become 88 in the padded variant alone."""
    argv = [*OF_TINY, "--sf", "on", "--pad_swiglu", "off", "on"]
    padded, real = [], SwiGLU._padded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwiGLU, "_padded", lambda self, x, extra: padded.append(extra) or real(self, x, extra))
        found = line(step.main, argv, capsys)["results"]
        assert set(found) == {"ceiling fp32", "fp32 sf on compile off", "fp32 sf on compile off padded"}
        assert padded == [3] * (4 * (2 + 2))  # blocks, turns and what comes before them
        argv = [*OF_TINY, "--pad_swiglu", "on", "--batches", "3", "--num_sampling_steps", "2", "--cfg", "1"]
        found = line(sampler.main, argv, capsys)
    assert found["results"]["fp32 cfg 1 compile off padded"]["forward_passes"] == 3
    assert len(padded) == 16 + 4 * 4 * 3 * 3  # evaluations of two steps, and batches
    with pytest.raises(SystemExit, match="no CUDA device"):
        sampler.main([*OF_TINY, "--cuda_graph", "on"])


# The profile of a step.


class Operations(TorchDispatchMode):
    """A clock that counts torch's operations."""

    done = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Operations.done += 1
        return func(*args, **(kwargs or {}))


def test_parts_of_a_step_add_up(monkeypatch):
    """In operations instead of seconds: each is in one part, and nearly none is between parts."""
    monkeypatch.setitem(CLOCKS, "wall", lambda: Operations.done)
    options = SimpleNamespace(model=TINY, img_size=16, class_num=10, batch_size=2, device="cpu")
    args, batches = step.setting(options, steps=3)
    ours = step.Steps(args, ["off"], 3, batches, step.World())
    marks = step_parts.Marks(CPU, "wall")
    before = [getattr(owner, name) for _, owner, name in step_parts.PLACES]
    with Operations(), step_parts.marked(ours, marks):
        marks.around("all", ours)(("off", False), True, None)
    assert [getattr(owner, name) for _, owner, name in step_parts.PLACES] == before
    found = step_parts.parts(marks, 3)
    assert set(found) == {*step_parts.PARTS, "all", "rest"}
    assert 0 <= found["rest"] < 0.05 * found["all"]
    assert all(found[part] > 0 for part in step_parts.PARTS if part != "zero_grad")  # which gives memory back
    assert found["backward"] > found["forward"] > found["Spectral Forcing"]
    outermost = sorted(
        span for part in marks.marks if part not in ("Spectral Forcing", "all") for span in marks.marks[part]
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(outermost))
    counts = {part: len(spans) // 3 for part, spans in marks.marks.items() if part not in ("zero_grad", "all")}
    assert counts == dict.fromkeys(counts, 1) | {"images": 2, "averages": 2}
    assert ours.training.denoiser.spectral_forcing.module is ours.operator


def test_shares_of_products():
    a, b = torch.randn(2, 512, 512)
    assert step_parts.shares(lambda: torch.mm(a, b), CPU)["matrix products"] > 0.5
    assert step_parts.shares(lambda: torch.add(a, b), CPU) == {"matrix products": 0.0, "attention": 0.0}


@pytest.mark.parametrize("device", DEVICES)
def test_step_parts(capsys, device):
    argv = [*OF_TINY, "--precision", "fp32", "bf16", "--steps", "2", "--device", device.type]
    found = line(step_parts.main, argv, capsys)["results"]
    assert set(found) == {"fp32", "bf16"}
    for result in found.values():
        assert set(step_parts.PARTS) | {"all", "rest"} == set(result["milliseconds"])
        assert 0 < result["shares"]["matrix products"] < 1
        assert result["milliseconds"]["rest"] > 0
