"""The benchmarks: what they report, and that what they time is what they say; benchmarks/."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import denoiser as our_denoiser
from benchmarks import common, evaluate, loader, reference, sampler, sf_operator, step
from benchmarks.common import Ceiling, Turns, take_turns
from model_jit import JiT_models
from tests.conftest import TINY
from util.flops import forward_flop
from util.generation import Sampling

OTHER = Path(__file__).parent / "reference_checkout"
CPU = torch.device("cpu")
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


# Time.


def test_variants_take_turns(monkeypatch):
    clock, calls = [0.0], []

    def variant(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setitem(common.CLOCKS, "wall", lambda: clock[0])
    turns = take_turns({"a": variant("a", 2.0), "b": variant("b", 8.0)}, 3, CPU)
    assert calls == ["a", "b"] * 4  # the first of each does not count
    assert turns.seconds == {"a": [2.0] * 3, "b": [8.0] * 3}


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
        assert result["images_per_s"] == pytest.approx(2 / result["seconds"], rel=1e-3)
    net = JiT_models[TINY](input_size=16, num_classes=10)
    assert found["gflop_per_image"] == pytest.approx(3 * forward_flop(net) / 1e9, rel=1e-3)


def test_a_step_is_a_step_of_training(monkeypatch):
    """Weights, averages and optimizer move, with Spectral Forcing and precision as asked for."""
    options = SimpleNamespace(model=TINY, img_size=16, class_num=10, batch_size=2, device="cpu")
    args, batches = step.setting(options, steps=2)
    ours = step.Steps(args, "off", 2, batches, step.World())
    before = [p.detach().clone() for p in ours.training.denoiser.parameters()]
    averages = [a.clone() for a in ours.training.emas[0].averages.values()]
    ours(False, torch.bfloat16)
    denoiser = ours.training.denoiser
    assert denoiser.spectral_forcing is None and denoiser.autocast_dtype == torch.bfloat16
    ours(True, None)
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
    found = line(sf_operator.main, [*OF_TINY, "--calls", "2"], capsys)
    results = found["results"]
    share = results["t each"]["seconds"] / 2 / results["step fp32"]["seconds"]
    low, high = results["step fp32"]["share_of_operator"]["range"]
    assert low / 5 < share < 5 * high


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


# Another checkout.


def test_another_checkout_is_imported_from_its_folder_and_ours_stay():
    other = reference.load(OTHER, "JiT-Demo/8", 32, 10, CPU, num_sampling_steps=1, cfg=1.5)
    assert Path(type(other).forward.__code__.co_filename) == OTHER / "denoiser.py"
    assert sys.modules["denoiser"] is our_denoiser and str(OTHER) not in sys.path
    assert not isinstance(other, our_denoiser.Denoiser)
    assert other.generate(torch.tensor([0, 1])).shape == (2, 3, 32, 32)
    ours = JiT_models["JiT-Demo/8"](input_size=32, num_classes=10)
    trained = [p for p in other.net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in ours.parameters())


def test_a_step_of_another_checkout_moves_its_weights_and_averages():
    other = reference.load(OTHER, "JiT-Demo/8", 32, 10, CPU)
    before = [p.detach().clone() for p in other.parameters() if p.requires_grad]
    steps = reference.Steps(other, CPU, None, 1e-3)
    steps(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1]))
    after = [p for p in other.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) > len(before) // 2
    assert any(not torch.equal(a, b) for a, b in zip(other.ema_params1, other.ema_params2, strict=True))


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(SystemExit, match=r"no model_jit.py and no denoiser.py"):
        reference.load(tmp_path, "JiT-B/16", 256, 1000, CPU)


def test_step_and_sampler_beside_another_checkout(capsys):
    other = ["--reference", str(OTHER), "--model", "JiT-Demo/8", "--batch_size", "1", "--class_num", "10"]
    for main, more in ((step.main, []), (sampler.main, ["--num_sampling_steps", "1"])):
        results = line(main, [*SMALL, *other, *more], capsys)["results"]
        assert any("reference" in key for key in results)
        assert all("speed_up over fp32" in r for key, r in results.items() if "compile" in key)


def test_a_step_compiles_what_its_variant_says_and_nothing_before(monkeypatch):
    """Also on a GPU, where a run would compile by itself."""
    options = SimpleNamespace(model=TINY, img_size=16, class_num=10, batch_size=2, device="cpu")
    assert step.setting(options, 1)[0].compile == "off"
