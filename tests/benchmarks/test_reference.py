"""A release in a process of its own: its flags, modules, training and errors; benchmarks/reference.py."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import reference

RELEASE = {  # with a package of our name, which it also imports while it runs, and an import that is missing here
    "main_jit.py": """
import no_such_package
def get_args_parser():
    parser.add_argument("--model", default="JiT-B/16", type=str)
    parser.add_argument("-b", "--hybrid_x_weight_max", default=1.0, type=float)
    parser.add_argument("--window-size", type=int)
    parser.add_argument("--disable_dct_patchify", action="store_true")
    parser.add_argument("--output_dir", default=no_such_package.folder)
""",
    "util/__init__.py": "",
    "util/later.py": "FACTOR = 2.0",
    "model_jit.py": "OURS = False",
    "denoiser.py": """
import torch
from model_jit import OURS

class Denoiser(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.net, self.steps = torch.nn.Linear(3, 3), 0
        print("built with", args.hybrid_x_weight_max)

    def forward(self, x, labels):
        from util.later import FACTOR
        if self.steps:  # the optimizer and both EMAs have moved
            assert not torch.equal(self.before, self.net.weight)
            assert not torch.equal(self.ema_params1[0], self.ema_params2[0])
        if self.steps == 4:
            raise RuntimeError("enough")
        self.before = self.net.weight.detach().clone()
        assert x.shape == (2, 3, 16, 16) and -1 <= x.min() and x.max() <= 1 and labels.tolist() == [0, 1]
        out = self.net(x.mean((2, 3)))
        assert out.dtype == torch.bfloat16
        return FACTOR * out.float().square().mean()

    def update_ema(self):
        self.steps += 1
        for decay, weights in ((0.9, self.ema_params1), (0.5, self.ema_params2)):
            for ema, p in zip(weights, self.parameters()):
                ema.detach().mul_(decay).add_(p.detach(), alpha=1 - decay)
""",
}
CONFIG = SimpleNamespace(model="JiT-B/16", img_size=16, class_num=10, batch_size=2)


@pytest.fixture
def release(tmp_path):
    for name, text in RELEASE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_flags_are_read_from_the_source(release):
    found = reference.flag_defaults(release / "main_jit.py")
    expected = {"model": "JiT-B/16", "hybrid_x_weight_max": 1.0, "window_size": None, "disable_dct_patchify": False}
    assert found == {**expected, "output_dir": None}


def test_a_release_trains_with_its_own_modules_and_its_error_is_seen(release, capfd):
    turn = reference.Release(release, CONFIG, bf16=True, steps=2, device=torch.device("cpu"))
    turn()
    turn()
    assert turn.peak_gb is None
    with pytest.raises(SystemExit, match="ended with exit code 1"):
        turn()
    said = capfd.readouterr().err
    assert "built with 1.0" in said and "RuntimeError: enough" in said


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"lacks main_jit.py, model_jit.py, denoiser.py. Name a checkout"):
        reference.Release(tmp_path, CONFIG, False, 1, torch.device("cpu"))
