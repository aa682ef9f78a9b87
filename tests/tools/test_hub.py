"""Models as folders and on the hub: to the bit the run's, with a card that says what the run says."""

import dataclasses
import json
import os
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

import main_jit
from tests.conftest import ONE, TINY, config_of, flags, raw, train
from tests.tools.test_export import inputs, of_run
from tools.export import export_folder, main
from tools.hub import SpectralJiT
from tools.model_card import command_of, find_samples
from util.build import denoiser_settings
from util.checkpoint.files import NAME
from util.checkpoint.published import WEIGHTS, load
from util.config import resolve
from util.errors import UserError
from util.evaluation.generate import generate_all

pytestmark = pytest.mark.usefixtures("tiny")
LABELS = [3, 1, 4, 1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """As with HF_HUB_OFFLINE=1, and a connection is an error."""

    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has drawn samples and has an evaluation of each EMA. Read it, do not write to it."""
    pytest.importorskip("sklearn")
    folder = train(tmp_path_factory.mktemp("hub") / "run", eval_freq=2, cfg=1.5)
    for ema in ("ema1", "ema2"):
        argv = flags(evaluate_gen=True, resume=folder, num_images=20, ema=ema, device="cpu", seed=7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["main_jit.py", *argv])  # which the report records
            assert main_jit.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def hub(run, tmp_path_factory):
    """The folder exported from it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    export_folder(run, folder)
    return folder


def edited(hub, to, **changes):
    """A copy of the folder with other settings; None removes one."""
    shutil.copytree(hub, to)
    config = json.loads((to / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if name not in changes or value is not None}
    (to / "config.json").write_text(json.dumps(kept))
    return to


@pytest.mark.parametrize("choice", list(WEIGHTS))
def test_a_folder_computes_the_runs_velocity_to_the_bit(run, tmp_path, choice):
    export_folder(run, tmp_path / "hub", choice)
    model = SpectralJiT.from_pretrained(tmp_path / "hub")
    velocities = {key: of_run(run, key).velocity(*inputs()) for key in WEIGHTS.values()}
    assert [key for key, v in velocities.items() if torch.equal(model(*inputs()), v)] == [WEIGHTS[choice]]
    assert not model.training
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(SpectralJiT.from_pretrained(tmp_path / "again")(*inputs()), velocities[WEIGHTS[choice]])


@pytest.mark.parametrize(
    "settings",
    [{"disable_dct_patchify": True}, {"sf_c_min": 0.2}, {"spectral_residual": "time"}, {"pred_param": "v"}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_folder_has_all_that_decides_the_velocity(hub, tmp_path, settings):
    """The network behind its operators, not the network alone: a setting more or less is another function."""
    run = train(tmp_path / "run", epochs=1, **settings)
    export_folder(run, tmp_path / "hub", "model")
    model = SpectralJiT.from_pretrained(tmp_path / "hub")
    assert torch.equal(model(*inputs()), of_run(run).velocity(*inputs()))
    if "spectral_residual" not in settings:  # which adds weights
        plain = SpectralJiT.from_pretrained(hub)
        plain.denoiser.load_state_dict(model.denoiser.state_dict(), strict=False)
        assert not torch.equal(model(*inputs()), plain(*inputs()))


def test_settings_are_readable_and_name_no_folder(run, hub):
    content = (hub / "config.json").read_text()
    settings, config = json.loads(content), config_of(run)
    assert denoiser_settings(config).items() <= settings.items()
    assert settings["precision"] == "auto" and SpectralJiT(settings).denoiser.autocast_dtype is None
    assert SpectralJiT(settings | {"precision": "bf16"}).denoiser.autocast_dtype is torch.bfloat16
    assert (settings["cfg"], settings["num_sampling_steps"], settings["model"]) == (1.5, 2, TINY)
    assert content.count("\n") == len(settings) + 2 and "/tmp" not in content and str(run) not in content


def test_the_card_says_what_the_run_says(run, hub):
    card = ModelCard.load(hub / "README.md")
    assert card.data.library_name == "spectral-jit" and card.data.license is None
    rows = [line[2:-2].partition(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    said = {name: value for name, _, value in rows}
    start, reports = json.loads((run / "config.json").read_text()), {}
    for path in (run / "eval").glob("*.json"):
        report = json.loads(path.read_text())
        reports[report["ema"]] = report
    assert said["network"] == f"{TINY}, {start['resolved']['parameters']:,} parameters"
    assert (said["steps"], said["epochs"], said["batch size"]) == ("4", "2", "16")
    assert (said["learning rate"], said["weights"]) == (
        "0.001 after 0.5 epochs of warm-up, constant",
        "ema1, decay 0.9",
    )
    assert said["operators"] == start["resolved"]["operators"] and said["data"] == "digits, 10 classes"
    assert (said["solver"], said["guidance"]) == ("heun, 2 steps, uniform grid", "1.5 for t from 0.1 to 1")
    assert (said["commit"], said["torch"]) == (start["commit"], start["versions"]["torch"])
    metrics = said["2"].split(" | ")  # the row of the evaluation, after its epoch
    assert metrics[0] == "ema1" and metrics[-2] == f"{reports['ema1']['metrics']['class_agreement']:.5g}"
    assert " ema2 " not in card.text and "--ema ema2" not in card.text
    assert "--num_images 20 --ema ema1" in card.text and str(run.parent) not in card.text
    assert (hub / "samples.png").read_bytes() == next((run / "samples").glob("*-ema1-*.png")).read_bytes()


def test_the_card_claims_nothing_else(run, hub, tmp_path):
    """Neither of evaluations and samples of other weights, nor of a run whose records are gone."""
    folder = shutil.copytree(run, tmp_path / "run")
    content = raw(folder)
    content["model_ema1"] = {name: 2 * value for name, value in content["model_ema1"].items()}
    torch.save(content | {"epoch": 2}, folder / NAME)
    (folder / "config.json").unlink()
    out = shutil.copytree(hub, tmp_path / "hub")
    export_folder(folder, out)
    text = (out / "README.md").read_text()
    assert "No evaluation of these weights was found." in text and "# not recorded" in text
    assert "class_agreement" not in text and "commit" not in text and "hardware" not in text
    assert "samples.png" not in text and not (out / "samples.png").exists()


def test_the_newest_grid_of_the_same_weights(run, tmp_path):
    checkpoint = load(run)
    middle = dataclasses.replace(checkpoint, run={"step": 5, "steps_per_epoch": 2})
    assert find_samples(tmp_path, checkpoint, "ema1") is None
    names = ["0002-ema1-a.png", "0002-ema1-b/grid.png", "0002-ema1-c-step000000005/grid.png", "0001-ema1-d.png"]
    for i, name in enumerate(names):
        path = tmp_path / "samples" / f"epoch{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (i, i))
    assert find_samples(tmp_path, checkpoint, "ema1").parent.name == "epoch0002-ema1-b"
    assert find_samples(tmp_path, middle, "ema1").parent.name == "epoch0002-ema1-c-step000000005"
    assert find_samples(tmp_path, checkpoint, "ema2") is None


def test_samples_are_those_of_the_run(run, hub, tmp_path):
    model = SpectralJiT.from_pretrained(hub)
    images = model.sample(LABELS, seed=5, num_sampling_steps=3)
    config = resolve({"seed": 5, "num_sampling_steps": 3}, vars(raw(run)["args"]), training=False)
    assert torch.equal(images, generate_all(of_run(run, "model_ema1"), config, LABELS, ONE))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    for other in ({"seed": 6}, {"cfg": 3.0}, {"sampling_method": "euler"}):
        assert not torch.equal(images, model.sample(LABELS, **{"seed": 5, "num_sampling_steps": 3, **other}))
    argv = flags(sample=True, resume=run, output_dir=tmp_path, labels="3,1,4,1", num_per_class=1, seed=5, device="cpu")
    assert main_jit.main([*argv, "--num_sampling_steps", "3"]) == 0
    files = sorted(tmp_path.rglob("0*.png"))
    written = np.stack([np.asarray(Image.open(path)) for path in files])  # (4, H, W, 3)
    assert len(files) == 4 and np.abs(written.astype(int) - images.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_wrong_requests_are_one_sentence(hub, trained):
    model = SpectralJiT.from_pretrained(hub)
    for labels, settings, message in (
        ([10], {}, r"\[10\] are no classes; the classes are 0 to 9"),
        ([-1], {}, "no classes"),
        ("3,1,4", {}, "'3,1,4' must be a list of class numbers"),
        (3, {}, "3 must be a list"),
        ([1.5], {}, r"\[1.5\] must be a list"),
        ([1], {"steps": 3}, "steps: no setting of sampling"),
        ([1], {"model": TINY}, "no setting of sampling"),
        ([1], {"num_sampling_steps": 0}, "at least 1"),
        ([1], {"sampling_grid": "spectral_global", "num_sampling_steps": 5}, "spectrum_file=PATH"),
    ):
        with pytest.raises(UserError, match=message):
            model.sample(labels, **settings)
    with pytest.raises(TypeError):
        SpectralJiT.from_pretrained(hub, torch_dtype=torch.float16)


def test_folders_that_are_no_model(hub, tmp_path):
    for name, changes, message in (
        ("foreign", {"model": None, "hidden_size": 768}, "names no model of this project"),
        ("unknown", {"sf_new": 1}, "does not know: sf_new"),
        ("other network", {"model": "JiT-Nothing/3"}, "JiT-Nothing/3 is unknown"),
        ("type", {"img_size": "large"}, "must be of the type int"),
        ("patches", {"img_size": 20}, "not divisible"),
        ("size", {"img_size": 24}, "does not fit the network"),
        ("operator", {"spectral_residual": "time"}, "does not fit the network"),
    ):
        with pytest.raises(UserError, match=message):
            SpectralJiT.from_pretrained(edited(hub, tmp_path / name, **changes))
    folder = shutil.copytree(hub, tmp_path / "files")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "net.extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="extra is unknown"):
        SpectralJiT.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        SpectralJiT.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        SpectralJiT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config"):
        SpectralJiT.from_pretrained(folder)
    for name in (tmp_path / "missing", "user/name"):
        with pytest.raises(UserError, match="is no folder, and no model that the hub gives"):
            SpectralJiT.from_pretrained(name)


def test_a_model_of_the_hub(hub, tmp_path):
    """As it lies in the cache after a download. Saved or pushed again, it keeps its card and samples."""
    cached = tmp_path / "models--user--name"
    shutil.copytree(hub, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    model = SpectralJiT.from_pretrained("user/name", cache_dir=tmp_path)
    assert torch.equal(model(*inputs()), SpectralJiT.from_pretrained(hub)(*inputs()))
    model.save_pretrained(tmp_path / "again")
    for path in hub.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_as_a_program(run, hub, tmp_path, monkeypatch, capsys):
    out = tmp_path / "missing" / "hub"
    argv = ["export", *flags(resume=run, out=out, format="hub")]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 0 and TINY in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md", "samples.png"}
    assert main() == 2 and "--overwrite" in capsys.readouterr().err
    (out / "README.md").write_text("earlier")
    monkeypatch.setattr(sys, "argv", [*argv, "--overwrite"])
    assert main() == 0 and (out / "README.md").read_bytes() == (hub / "README.md").read_bytes()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(sys, "argv", ["export", *flags(resume=run, out=empty, format="hub")])
    assert main() == 0 and (empty / "config.json").exists()
    before = (run / "config.json").read_bytes()
    for resume, to in ((run, run), (tmp_path, tmp_path / "x"), (run, out / "config.json")):
        monkeypatch.setattr(sys, "argv", ["export", *flags(resume=resume, out=to, format="hub"), "--overwrite"])
        assert main() == 2 and capsys.readouterr().err.startswith("tools.export: error: ")
    assert (run / "config.json").read_bytes() == before and not (tmp_path / "x").exists()


def test_commands_are_without_folders():
    words = [
        "main_jit.py",
        "--data_path",
        "/data/imagenet/",
        "--output_dir=/home/me/runs/b16",
        "--labels",
        "0-9",
        "a b",
    ]
    assert command_of({"command": words}) == (
        "python main_jit.py --data_path imagenet/ --output_dir=b16 --labels 0-9 'a b'"
    )
    assert command_of({}) is None


def test_a_pipeline_of_diffusers(hub, tmp_path):
    pytest.importorskip("diffusers")
    from tools.pipeline import SpectralJiTPipeline

    pipe = SpectralJiTPipeline.from_pretrained(hub).to("cpu")

    def images(seed):
        generator = torch.Generator().manual_seed(seed)
        both = [pipe(class_labels=LABELS, num_inference_steps=3, guidance_scale=3.0, generator=generator) for _ in "ab"]
        return [np.stack([np.asarray(image) for image in out.images]) for out in both]

    first, second = images(0)
    assert first.shape == (4, 16, 16, 3) and not np.array_equal(first, second)
    assert np.array_equal(first, images(0)[0]) and not np.array_equal(first, images(1)[0])
    seed = int(torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(0)))
    expected = SpectralJiT.from_pretrained(hub).sample(LABELS, seed, num_sampling_steps=3, cfg=3.0)
    assert np.array_equal(first, expected.permute(0, 2, 3, 1).numpy())
    pipe.save_pretrained(tmp_path / "again")
    assert torch.equal(SpectralJiTPipeline.from_pretrained(tmp_path / "again").model(*inputs()), pipe.model(*inputs()))
