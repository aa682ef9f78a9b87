"""The page and its server: everything is shown, one sentence for each mistake, to this machine alone."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.tools.test_report import write
from tools.explorer import plane, trajectory
from tools.explorer.__main__ import main
from util.checkpoint.files import NAME
from util.io import REPOSITORY

pytestmark = pytest.mark.usefixtures("tiny")
PAGE = Path(trajectory.__file__).with_name("page.py")


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
    assert "12.346" in app.code[0].value and "epoch 200" in app.code[0].value  # the table of tools.report
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
    damaged = ("truncated", "x.json is skipped", "as a picture")
    assert [message in error.value for message, error in zip(damaged, app.error, strict=True)] == [True] * 3
    assert all("!\\[x\\](run)" in error.value for error in app.error)
    next(slider for slider in app.slider if slider.label == "c_min").set_value(1.0)
    next(slider for slider in app.slider if slider.label == "c_max").set_value(0.5)
    assert any("1.0 must not exceed" in error.value for error in app.run().error) and not app.exception
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not page(empty).exception


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
