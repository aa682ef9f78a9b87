"""Another checkout beside ours: what it finds, what is timed, what is refused; benchmarks/reference*.py."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import reference_process, sampler, step
from benchmarks.reference import DEFAULTS, Reference
from benchmarks.turns import Variants
from tests.test_benchmarks import DEVICES

OTHER = Path(__file__).parent / "reference_checkout"
CPU = torch.device("cpu")

# A checkout with a package of our name, which it also imports while torch.compile traces the first call.
PUBLISHED = {
    "util/__init__.py": "",
    "util/model_util.py": """
import torch
SCALE = 2.0
def scaled(x):
    return x * SCALE
""",
    "util/later.py": """
def shifted(x):
    return x + 1
""",
    "model_jit.py": """
import torch
from torch import nn
from util.model_util import scaled

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    @torch.compile(backend="eager")
    def forward(self, x):
        from util.later import shifted
        return shifted(scaled(self.linear(x)))

JiT_models = {"JiT-B/16": Block}
""",
    "denoiser.py": """
import sys
import torch
from pathlib import Path
from torch import nn
from model_jit import JiT_models

class Denoiser(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.net = JiT_models[args.model]()
        print("made")

    def forward(self, x, labels):
        loss = self.net(x[..., None]).square().mean()
        here = Path(__file__).parent
        for name in ("model_jit", "util", "util.model_util", "util.later"):
            assert Path(sys.modules[name].__file__).is_relative_to(here), name
        return loss

    def generate(self, labels):
        return self.net(labels[:, None].float())

    def update_ema(self):
        pass
""",
}


@pytest.fixture
def published(tmp_path):
    for name, text in PUBLISHED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def options(folder, **changes) -> Namespace:
    about = {"model": "JiT-B/16", "img_size": 8, "class_num": 10, "batch_size": 2, "device": "cpu", "clock": "wall"}
    return Namespace(**about | {"reference": folder} | changes)


def test_another_checkout_finds_its_own_modules_while_it_is_compiled(published):
    """Also by their names, as dynamo does: ours have the same."""
    import util.acceleration  # noqa: F401  ours are there

    variants = Variants(CPU)
    with Reference(options(published), "step", {"theirs": "fp32"}, decorators=True, steps=2, lr=1e-3) as other:
        other.join(variants)
        turns = variants.take_turns(2)
    assert len(turns.seconds["theirs"]) == 2 and min(turns.seconds["theirs"]) > 0
    assert turns.failed == {}
    with Reference(options(published), "sampler", {"theirs": "bf16"}, decorators=True) as other:
        other.join(variants)


def test_an_error_of_another_checkout_is_seen(published, capfd):
    (published / "util" / "later.py").unlink()
    with pytest.raises(SystemExit, match="the process of --reference ended with 1"):
        Reference(options(published), "step", {"theirs": "fp32"}, decorators=True, steps=1, lr=1e-3)
    assert "No module named 'util.later'" in capfd.readouterr().err


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(SystemExit, match=r"no model_jit.py and no denoiser.py"):
        Reference(options(tmp_path), "step", {}, decorators=False)


@pytest.mark.parametrize("device", DEVICES)
def test_step_and_sampler_beside_another_checkout(capsys, device):
    common = ["--device", device.type, "--repeats", "2", "--reference", str(OTHER), "--model", "JiT-Demo/8"]
    common += ["--batch_size", "1", "--class_num", "10", "--precision", "fp32", "bf16"]
    for main, more in ((step.main, ["--sf", "on"]), (sampler.main, ["--num_sampling_steps", "1"])):
        capsys.readouterr()
        main([*common, *more])
        results = json.loads(capsys.readouterr().out)["results"]
        theirs = {key: value for key, value in results.items() if "reference" in key}
        assert len(theirs) == 2 and all(value["peak_gb"] > 0 for value in theirs.values())
        for key, value in results.items():
            if "compile" in key:
                assert {"speed_up over fp32", "speed_up over bf16"} < set(value)


# In the process.


class Small(nn.Module):
    """A Denoiser that notes under which autocast it and its network are called; `own` is a cast of its own."""

    def __init__(self, own=None):
        super().__init__()
        self.own, self.net, self.seen = own, nn.Linear(3, 3), []
        self.net.register_forward_hook(lambda module, x, y: self.seen.append(("net", y.dtype)))
        self.averages = [p.detach().clone() for p in self.parameters()]

    def forward(self, x, labels):
        self.seen.append(("outside", torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", dtype=self.own, enabled=self.own is not None or torch.is_autocast_enabled("cpu")):
            return self.net(x.mean((2, 3))).float().square().mean()

    def generate(self, labels):
        return self(torch.ones(len(labels), 3, 2, 2), labels)

    def update_ema(self):
        self.averages = [0.5 * a + 0.5 * p.detach() for a, p in zip(self.averages, self.parameters(), strict=True)]


def settings(**changes) -> Namespace:
    about = {"model": "", "img_size": 8, "class_num": 10, "batch_size": 2, "device": "cpu", "clock": "wall", "lr": 1e-2}
    about |= {"task": "step", "steps": 3, "decorators": False, "variants": {"a": "fp32", "b": "bf16"}}
    return Namespace(**DEFAULTS | about | changes)


@pytest.mark.parametrize("task", ["step", "sampler"])
def test_autocast_is_around_what_casts_nothing(monkeypatch, task):
    made = []
    monkeypatch.setattr(reference_process, "load", lambda args: made.append(Small()) or made[-1])
    variants = reference_process.build(settings(task=task))
    assert set(variants.turns) == {"a", "b"} and variants.failed == {}
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        made[-1].seen.clear()
        variants.turns[name]()
        assert set(made[-1].seen) == {("outside", name == "b"), ("net", dtype)}


@pytest.mark.parametrize("task", ["step", "sampler"])
def test_autocast_is_not_around_what_casts_by_itself(monkeypatch, task):
    """Once, not twice; and what is bf16 whatever one asks for is not reported as float32."""
    made = []
    monkeypatch.setattr(reference_process, "load", lambda args: made.append(Small(torch.bfloat16)) or made[-1])
    variants = reference_process.build(settings(task=task))
    assert set(variants.turns) == {"b"} and variants.failed == {"a": "it casts to bfloat16 by itself"}
    made[-1].seen.clear()
    variants.turns["b"]()
    assert set(made[-1].seen) == {("outside", False), ("net", torch.bfloat16)}


def test_another_checkout_without_memory(monkeypatch):
    """For itself, or beside ours: its variants say so, and ours have their turns."""

    def fails(args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(reference_process, "load", fails)
    variants = reference_process.build(settings())
    assert variants.turns == {} and variants.failed == dict.fromkeys("ab", "CUDA out of memory.")


def test_training_of_another_checkout_moves_weights_averages_and_optimizer():
    denoiser = Small()
    before = [[v.detach().clone() for v in values] for values in (denoiser.parameters(), denoiser.averages)]
    training = reference_process.Training(denoiser, settings())
    training(torch.autocast("cpu", enabled=False))
    after = list(denoiser.parameters()), denoiser.averages
    for old, new in zip(before, after, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert isinstance(training.optimizer, torch.optim.AdamW)
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {3}
