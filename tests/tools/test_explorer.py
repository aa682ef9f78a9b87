"""python -m tools.explorer: what it shows is what sampling, operators and files say, and it shows no other files."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.fft import dctn

from sampler import SOLVERS
from spectral_forcing import SCHEDULES, SpectralForcing
from tests.conftest import ONE, Payload, spectrum_of_digits, train
from tests.tools.test_export import inputs, of_run
from tests.tools.test_report import made_up, write
from tools.explorer import plane, runs, trajectory
from tools.explorer.__main__ import main
from tools.explorer.runs import Folders
from tools.export import export, export_folder
from util.checkpoint.files import NAME
from util.data.images import quantise
from util.errors import UserError
from util.evaluation.generate import generate_all
from util.io import REPOSITORY

pytestmark = pytest.mark.usefixtures("tiny")
PAGE = Path(trajectory.__file__).with_name("page.py")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def output(trained, tmp_path_factory):
    """A folder with a run, its samples and an evaluation, and both forms of export. Read it, do not write to it."""
    root = tmp_path_factory.mktemp("explorer")
    run = shutil.copytree(trained, root / "run")
    export(run, root / "exported.safetensors")
    export_folder(run, root / "hub")
    write(run, "eval/x.json", made_up())
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "epoch0003-ema1.png")
    return root


def follow(folder, labels=(3, 1, 4), **settings):
    """Denoiser, configuration and trajectory of a run's ema1."""
    denoiser, config = trajectory.load_network(Folders([folder]), folder, "ema1", CPU)
    config = trajectory.with_settings(config, {"num_sampling_steps": 4, "cfg": 2.0, "seed": 5, **settings})
    return denoiser, config, trajectory.follow(denoiser, config, labels)


# --------------------------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_images_are_those_of_sampling(trained, solver):
    denoiser, config, found = follow(trained, sampling_method=solver, interval_min=0.3, interval_max=0.7)
    assert torch.equal(quantise(found.x), generate_all(denoiser, config, [3, 1, 4], ONE))


def test_states_are_those_of_heun_with_guidance(trained):
    """Against a second implementation, of the solver, of guidance and of the prediction."""
    denoiser, config, found = follow(trained, sample_t_eps=0.4)
    y, none, grid = torch.tensor([3, 1, 4]), torch.full((3,), config.null_class), torch.linspace(0, 1, 5)

    def predict(z, t):
        c, u = (denoiser.predict(z, t.expand(3), labels) for labels in (y, none))
        return u + (2.0 if config.interval_min < t < config.interval_max else 1.0) * (c - u)

    def v(z, t):
        return (predict(z, t) - z) / (1 - t).clamp_min(0.4)

    z = found.z[0]
    assert abs(float(z.std()) - 1) < 0.1 and found.t[:, 0].tolist() == [0, 0.25, 0.5, 0.75]
    with torch.no_grad():
        for i in range(4):
            torch.testing.assert_close(found.z[i], z, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.predicted[i], predict(z, grid[i]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.seen[i], SpectralForcing(16)(z, grid[i]), rtol=1e-4, atol=1e-4)
            first = v(z, grid[i])
            second = v(z + 0.25 * first, grid[i + 1]) if i < 3 else first
            z = z + 0.25 * (first + second) / 2
    torch.testing.assert_close(found.x, z, rtol=1e-4, atol=1e-4)
    assert found.x.shape == (3, 3, 16, 16) and found.labels == (3, 1, 4)


def test_a_plain_network_that_predicts_v(tmp_path):
    run = train(tmp_path / "run", disable_dct_patchify=True, pred_param="v", t_eps=0.0, epochs=1)
    _, _, found = follow(run, sampling_method="euler", cfg=1.0)
    assert torch.equal(found.seen, found.z)
    torch.testing.assert_close(found.z[1], 0.75 * found.z[0] + 0.25 * found.predicted[0])  # a straight line to x


def test_each_image_may_have_its_own_times(trained, tmp_path):
    file = spectrum_of_digits(tmp_path / "spectrum.npz")
    settings = {"sampling_grid": "spectral_instance", "spectrum_file": str(file)}
    denoiser, config, found = follow(trained, num_sampling_steps=9, **settings)
    assert found.t.shape == (6, 3) and len(set(found.t[3].tolist())) == 3
    assert torch.equal(quantise(found.x), generate_all(denoiser, config, [3, 1, 4], ONE))
    trajectory.draw(found, 1, trajectory.power_range(found, 1))


def test_columns_that_rows_share_are_said_once():
    rows = [{"run": "a", "N": 5, "cfg": 1.0, "fid": 2.0}, {"run": "b", "N": 5, "cfg": 2.0, "fid": 2.0}]
    assert runs.shared(rows) == ({"N": 5}, [{k: row[k] for k in ("run", "cfg", "fid")} for row in rows])
    assert runs.shared([{"run": "a", "N": 5}, {"run": "a"}]) == ({}, [{"run": "a", "N": 5}, {"run": "a"}])


def test_a_network_is_not_sampled_with_another_spectrum_than_its_own(tmp_path):
    file = spectrum_of_digits(tmp_path / "elsewhere.npz")
    run = train(
        tmp_path / "runs" / "one", sampling_grid="spectral_global", spectrum_file=file, num_sampling_steps=3, epochs=1
    )
    with pytest.raises(UserError, match=r"uses .*elsewhere\.npz, which leads out of the given folders"):
        trajectory.load_network(Folders([tmp_path / "runs"]), run, "ema1", CPU)
    trajectory.load_network(Folders([tmp_path]), run, "ema1", CPU)


def test_a_computation_ends_when_its_reader_has_left(trained):
    """The page raises in `on_step`."""
    denoiser, config, _ = follow(trained)
    times = []

    def on_step(t):
        times.append(t)
        if t > 0.3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trajectory.follow(denoiser, config, [1], 3, on_step)
    assert times == [0, 0.25, 0.25, 0.5] and not denoiser.training


# ------------------------------------------------------------------------------------------------------------- networks


def test_networks_of_a_folder(output, trained):
    folders = Folders([output])
    assert set(folders.networks()) == {output / "run", output / "exported.safetensors", output / "hub"}
    assert folders.runs() == [output / "run"] == Folders([output / "run"]).runs()
    expected = of_run(trained, "model_ema1").velocity(*inputs())
    for path in folders.networks():
        denoiser, config = trajectory.load_network(folders, path, "ema1", CPU)
        assert torch.equal(denoiser.velocity(*inputs()), expected) and config.img_size == 16


def test_networks_that_cannot_be_used_are_one_sentence(output, tmp_path):
    run = shutil.copytree(output / "run", tmp_path / "run")
    content = torch.load(run / NAME, weights_only=False)
    weights = load_file(output / "exported.safetensors")
    save_file(weights, tmp_path / "bare.safetensors")
    shutil.copytree(output / "hub", tmp_path / "hub")
    save_file({**weights, "net.more": torch.zeros(1)}, tmp_path / "hub" / "model.safetensors")

    def load(name):
        with pytest.raises(UserError) as found:
            trajectory.load_network(Folders([tmp_path]), tmp_path / name, "ema1", CPU)
        return str(found.value)

    assert "weights without settings" in load("bare.safetensors") and "net.more is unknown" in load("hub")
    torch.save({**content, "model_ema1": {"net.other": torch.zeros(1)}}, run / NAME)
    assert "lack" in load("run")
    torch.save({**content, "extra": Payload(tmp_path / "executed")}, run / NAME)
    assert "could execute code" in load("run") and not (tmp_path / "executed").exists()
    os.truncate(run / NAME, 1000)
    assert "truncated" in load("run")


# ----------------------------------------------------------------------------------------------------------------- runs


def test_nothing_outside_of_the_folders_is_read(output, tmp_path):
    """Links that lead out of them: to a run, to a checkpoint, to a log, to a picture, to an evaluation."""
    secret = shutil.copytree(output / "run", tmp_path / "secret")
    root = tmp_path / "given"
    for name in ("samples", "eval"):
        (root / "run" / name).mkdir(parents=True)
    shutil.copytree(output / "run", root / "own")
    (root / "all").symlink_to(secret)
    (root / "inside").symlink_to(root / "own")
    for name in ("log.jsonl", NAME, "samples/epoch0003-ema1.png", "eval/x.json"):
        (root / "run" / name).symlink_to(secret / name)
    folders = Folders([root])
    assert folders.runs() == [root / "own", root / "run"] and root / "all" not in folders.networks()
    with pytest.raises(UserError, match="leads out of the given folders"):
        runs.read_log(folders, root / "run")
    with pytest.raises(UserError, match="leads out of the given folders"):
        trajectory.load_network(folders, root / "run", "ema1", CPU)
    assert runs.sample_grids(folders, root / "run") == [] and runs.evaluations(folders, root / "run") == ([], [])
    assert len(runs.sample_grids(folders, root / "own")) == 2 and len(runs.evaluations(folders, root / "own")[0]) == 1
    assert not folders.holds(root / ".." / "secret") and not folders.holds(Path("/etc/passwd"))
    assert folders.holds(root / "inside" / "log.jsonl") and not folders.holds(tmp_path / "given2")


def test_curves_are_those_of_the_log(tmp_path):
    lines = [
        {"event": "start", "step": 0, "steps_per_epoch": 4},
        {"event": "train", "step": 1, "epoch": 0, "loss": 2.0, "lr": 0.1, "images_per_s": 50},
        {"event": "train", "step": 3, "epoch": 0, "loss": None, "lr": 0.2, "images_per_s": 60},
        {"event": "val", "step": 4, "epoch": 0, "loss_ema1": 3.0},
        {"event": "eval", "step": 4, "loss": 9.0},
        {"event": "train", "step": "many"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n\x00\xff\n{"event": "train", "st'
    (tmp_path / "log.jsonl").write_text(text)
    found = runs.curves(runs.read_log(Folders([tmp_path]), tmp_path))
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in found.items()} == {
        "loss": ([0.5], [2.0]),
        "lr": ([0.5, 1.0], [0.1, 0.2]),
        "images_per_s": ([0.5, 1.0], [50, 60]),
        "loss_ema1": ([1.0], [3.0]),
    }
    axes = runs.draw_curves({"a": found, "b": {}}).axes
    assert [len(ax.lines) for ax in axes] == [2, 1, 1] and axes[2].get_ylabel() == "images / s"
    assert runs.curves([{"event": "train", "step": 1, "loss": 2.0}]) == {}  # without the length of an epoch


def test_damaged_files_of_a_run_are_one_sentence_each(tmp_path):
    write(tmp_path, "eval/x.json", "{")
    write(tmp_path, "samples/epoch0001.png", "no picture")
    (rows, warnings), (grid,) = (f(Folders([tmp_path]), tmp_path) for f in (runs.evaluations, runs.sample_grids))
    assert rows == [] and len(warnings) == 1 and "x.json is skipped" in warnings[0]
    with pytest.raises(UserError, match="cannot be read as a picture"):
        runs.picture(grid)


# --------------------------------------------------------------------------------------------------- frequency and time


def test_rows_are_those_of_the_operator():
    x, times = plane.photograph(32), (0.1, 0.7)
    for schedule in SCHEDULES:
        power, dct_power = plane.powers_of_image(x)
        operator = plane.build(schedule, 32, power, dct_power, alpha=2.0, snr_floor=0.1, fixed_scale=0.5)
        rows = plane.rows(x, operator, times)
        e = (rows["z"][0] - 0.1 * x[0]) / 0.9
        torch.testing.assert_close(rows["z"][1], 0.7 * x[0] + 0.3 * e)
        for i, t in enumerate(times):
            torch.testing.assert_close(rows["SF(x)"][i], operator(x, t)[0])
            of_z = dctn(rows["z"][i].numpy(), axes=(1, 2), norm="ortho") * rows["mask"][i].numpy()
            np.testing.assert_allclose(dctn(rows["SF(z)"][i].numpy(), axes=(1, 2), norm="ortho"), of_z, atol=1e-4)
        assert torch.equal(rows["mask"][0], rows["mask"][1]) == (schedule == "linear")  # whose time is fixed
        assert len(plane.draw_rows(rows, times).axes) == 8
        figure = plane.draw_plane(power, {schedule: operator}, schedule, "title")
        line = figure.axes[0].lines[-1]
        t = torch.sigmoid(torch.from_numpy(line.get_xdata()) / 2)
        np.testing.assert_allclose(line.get_ydata() * operator.radius_per_cycle, operator.cutoff(t), atol=1e-6)


def test_powers_of_an_image():
    x = plane.photograph(32)
    power, dct_power = plane.powers_of_image(x)
    modes = np.abs(np.fft.fft2(x[0].numpy(), norm="ortho")) ** 2
    assert power[0] == pytest.approx(modes[:, 0, 0].mean(), rel=1e-5)
    total = np.square(dctn(x[0].numpy(), axes=(1, 2), norm="ortho")).sum()  # Parseval; colour axes are orthonormal
    counts = torch.tensor([((np.hypot(*np.mgrid[:32, :32]) // 2) == k).sum() for k in range(dct_power.shape[1])])
    assert float((dct_power * counts).sum()) == pytest.approx(total, rel=1e-5)
    assert plane.power_law(3.0 / torch.arange(0.5, 23) ** 2)[1] == pytest.approx(2, abs=0.5)


def test_wrong_inputs_of_the_plane_are_one_sentence(tmp_path):
    power, dct_power = plane.powers_of_image(plane.photograph(32))
    with pytest.raises(UserError, match="must not exceed c_max"):
        plane.build("snr", 32, power, dct_power, c_min=0.9, c_max=0.5)
    for content in (b"", b"no picture"):
        with pytest.raises(UserError, match="The file cannot be used"):
            plane.upload(content, 32)
    (tmp_path / "x.npz").write_text("nothing")
    with pytest.raises(UserError, match="holds no spectrum"):
        plane.powers_of_file(tmp_path / "x.npz")
    Image.fromarray(np.full((40, 60, 3), 255, np.uint8)).save(tmp_path / "white.png")
    white = plane.upload((tmp_path / "white.png").read_bytes(), 32)
    assert torch.equal(white, torch.ones(1, 3, 32, 32))


# ----------------------------------------------------------------------------------------------------------------- page


@pytest.fixture
def page(monkeypatch):
    """page(folder): the whole page, run without a browser; the plane, which takes seconds, is drawn elsewhere."""
    testing = pytest.importorskip("streamlit.testing.v1")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # Streamlit puts the page in its place
    for name in ("draw_plane", "draw_rows"):
        monkeypatch.setattr(plane, name, lambda *args: Figure())

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["page.py", "cpu", str(folder)])
        app = testing.AppTest.from_file(PAGE, default_timeout=60)
        app.session_state["opened"] = {"A network", "Runs"}
        return app.run()

    return run


def test_the_page_shows_everything(page, output):
    app = page(output)
    assert not app.exception and not app.error
    next(button for button in app.button if button.label == "Sample").click()
    next(field for field in app.text_input if field.label == "Classes").set_value("3,1")
    app.run()
    assert not app.exception and not app.error
    assert len(app.session_state["sampled"]) == 1 and app.session_state["sampled"][0][3].x.shape == (2, 3, 16, 16)


def test_damaged_runs_are_sentences_on_the_page(page, output, tmp_path):
    run = shutil.copytree(output / "run", tmp_path / "![x](run)")  # Markdown for a picture
    os.truncate(run / NAME, 1000)
    (run / "samples" / "epoch0003-ema1.png").write_text("no picture")
    write(run, "eval/x.json", "{")
    app = page(tmp_path)
    assert not app.exception
    assert "truncated" in app.error[0].value and "as a picture" in app.error[1].value
    assert all("!\\[x\\](run)" in error.value for error in app.error)
    assert len(app.error) == 2 and "x.json is skipped" in app.warning[0].value
    next(slider for slider in app.slider if slider.label == "c_min").set_value(1.0)
    next(slider for slider in app.slider if slider.label == "c_max").set_value(0.5)
    assert any("1.0 must not exceed" in error.value for error in app.run().error) and not app.exception
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not page(empty).exception


# --------------------------------------------------------------------------------------------------------------- server


@contextlib.contextmanager
def serving(folder, stderr=None):
    """Serve the page of a folder; the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tools.explorer", str(folder), "--no_browser", "--port", str(port)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=stderr) as server:
        try:
            end = time.monotonic() + 60
            while server.poll() is None and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    if get(port, "/_stcore/health")[0] == 200:
                        break
                time.sleep(0.1)
            yield port
            assert server.poll() is None, "the server has ended"
        finally:
            server.terminate()


def get(port, path, **headers):
    """Status and body of a request; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    if response.status == 101:
        return 101, b""
    return response.status, response.read()


@pytest.fixture(scope="module")
def server(output, tmp_path_factory):
    pytest.importorskip("streamlit")
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    secret.write_text("SECRET-OF-ELSEWHERE")
    root = shutil.copytree(output, secret.parent / "output")
    (root / "run" / "samples" / "link.png").symlink_to(secret)
    (root / "static").symlink_to(secret.parent)
    with serving(root) as port:
        yield port, root, secret


def test_no_request_reads_a_file(server):
    port, root, secret = server
    assert b"<html" in get(port, "/")[1]
    ways = ["", "/static/", "/app/static/", "/media/", "/component/", "/_stcore/component/", "/_stcore/upload_file/"]
    targets = [f"{'../' * 12}{secret}", f"{'%2e%2e%2f' * 12}{str(secret)[1:]}", f"{'..%5c' * 12}{secret}"]
    targets += [str(secret), f"/{secret}", f"file://{secret}", "link.png", "secret.txt", "run/config.json"]
    targets += [str(root / "run" / "config.json"), "../tools/explorer/page.py", "page.py"]
    for way in ways:
        for target in targets:
            body = get(port, f"{way}{target}" if way else f"/{target}")[1]
            assert b"SECRET" not in body and b"model" not in body[:2000] and b"import" not in body[:200], (way, target)


def test_it_listens_and_answers_on_this_machine_alone(server):
    port, *_ = server
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=2):
        pass
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    upgrade |= {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    own, other = f"http://127.0.0.1:{port}", "http://other.example"
    assert get(port, "/_stcore/stream", Origin=own, **upgrade)[0] == 101
    assert get(port, "/_stcore/stream", Origin=other, **upgrade)[0] == 403
    rebound = {"Host": f"other.example:{port}", "Origin": f"{other}:{port}"}
    assert get(port, "/_stcore/stream", **rebound, **upgrade)[0] in (400, 403)


def test_a_port_in_use_is_one_sentence(server, output, capsys):
    port, *_ = server
    assert main([str(output), "--port", str(port), "--no_browser"]) == 2
    assert f"Port {port} of 127.0.0.1 cannot be used: another program uses it" in capsys.readouterr().err
    for argv in ([str(output), "--port", "70000"], [str(output), "--host", "no.such.host.invalid"]):
        assert main(argv) == 2 and "cannot be used" in capsys.readouterr().err
    assert main([str(output / "missing")]) == 2 and "There is no folder" in capsys.readouterr().err


def test_it_starts_without_telemetry(output, monkeypatch):
    bootstrap = pytest.importorskip("streamlit.web.bootstrap")
    net_util, started = pytest.importorskip("streamlit.net_util"), []
    monkeypatch.setattr(net_util, "get_external_ip", lambda: "asked a web service")
    monkeypatch.setattr(bootstrap, "load_config_options", lambda options: None)
    monkeypatch.setattr(bootstrap, "run", lambda *args: started.append(args))
    assert main([str(output), "--no_browser", "--port", "0"]) == 0
    (script, _, args, options), *_ = started
    assert Path(script) == PAGE and args == ["cpu", str(output)]
    assert options["browser.gatherUsageStats"] is False and options["server.address"] == "127.0.0.1"
    assert net_util.get_external_ip() is None and options["server.headless"]


def test_a_missing_package_is_named(output, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "streamlit", None)
    assert main([str(output), "--no_browser"]) == 2 and "--extra explorer" in capsys.readouterr().err
