"""The worked example of docs/extending.md works as it stands, from outside of the source tree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import main_jit
from tests.conftest import raw, read_log

ROOT = Path(main_jit.__file__).parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The page's Python block as a file in a folder of its own."""
    path = tmp_path_factory.mktemp("outside") / "gaussian_blur.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    return path


def run(script, *words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=env, cwd=script.parent, capture_output=True, text=True, timeout=240)


def test_the_operator_is_a_gaussian_blur(script):
    """Against scipy, which truncates the kernel at the same radius and normalises it."""
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import gaussian_blur as g, torch; "
    code += "torch.manual_seed(0); z = torch.randn(2, 3, 16, 16); "
    code += "blur = g.GaussianBlur(1.5); "
    code += "torch.save((z, blur(z, torch.tensor([0.0, 0.5])), blur(z, torch.ones(2))), 'out.pt')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=script.parent, env=env, check=True, timeout=120)
    z, blurred, same = torch.load(script.parent / "out.pt")
    assert torch.equal(same, z)
    for b, sigma in enumerate((1.5, 0.75)):
        for c in range(3):
            expected = gaussian_filter(z[b, c].double().numpy(), sigma, mode="nearest", radius=4)
            np.testing.assert_allclose(blurred[b, c].numpy(), expected, atol=1e-5)


def test_training_sampling_and_resuming_with_it(script):
    """The page's commands, for one epoch; its flag is in --help, in the checkpoint, and locked."""
    assert "--blur_sigma" in run(script, "--help").stdout
    command = re.search(r"gaussian_blur.py (--dataset.*?)\nPYTHONPATH", PAGE, re.DOTALL)[1].replace("\\\n", " ")
    words = [*command.split(), "--epochs", "1", "--wandb_num_vis", "4", "--num_sampling_steps", "2"]
    done = run(script, *words)
    assert done.returncode == 0, done.stderr
    folder = script.parent / "output" / "blur"
    assert np.isfinite(read_log(folder)[-1]["loss"])
    args = raw(folder)["args"]
    assert (args.input_operator, args.blur_sigma) == ("gaussian_blur", 1.5)
    sampled = run(script, "--sample", "--resume", "output/blur", "--labels", "3", "--num_sampling_steps", "2")
    assert sampled.returncode == 0 and "gaussian_blur" in sampled.stdout, sampled.stderr
    refused = run(script, *words[: words.index("1.5")], "2.0", *words[words.index("1.5") + 1 :], "--epochs", "2")
    assert refused.returncode == 2 and "--blur_sigma 2.0 (the checkpoint has 1.5)" in refused.stderr
    plain = run(ROOT / "main_jit.py", "--sample", "--resume", str(folder), "--labels", "3", "--device", "cpu")
    assert plain.returncode == 2 and "--input_operator gaussian_blur is unknown" in plain.stderr
