"""--dry_run: what it says, and that nothing of the run is written: util/dry_run.py."""

import re
from types import SimpleNamespace

import pytest

import main_jit
from model_jit import JiT_models
from tests.conftest import TINY, arguments, listing, state_differences, train
from util import dry_run
from util.distributed import World
from util.flops import forward_flop

pytestmark = pytest.mark.usefixtures("tiny")


def said(capsys, **changes) -> dict[str, str]:
    capsys.readouterr()
    assert main_jit.main([*arguments(**changes), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("dry run: nothing was written")
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[start + 1 :])


def test_a_fresh_run(here, capsys):
    table = said(capsys, epochs=50, output_dir=here / "run")
    assert listing(here) == {}
    net = JiT_models[TINY](input_size=16, num_classes=10)
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in table["model"]
    assert table["arithmetic"].startswith(f"{forward_flop(net) / 1e9:.3g} GFLOP")
    assert table["steps"] == "100 are left: 50 epochs of 2, 0 done"
    assert float(re.match(r"[\d.]+", table["memory, calculated"])[0]) > 0
    assert re.match(r"about \d+ (s|min)", table["training"])


def test_a_run_that_goes_on_is_left_as_it_was(tmp_path, capsys):
    folder, untouched = (train(tmp_path / name) for name in ("run", "untouched"))
    before = listing(folder)
    assert said(capsys, epochs=5, output_dir=folder)["steps"] == "6 are left: 5 epochs of 2, 4 done"
    assert listing(folder) == before
    assert state_differences(train(folder, epochs=3), train(untouched, epochs=3)) == []


def test_fewer_steps_than_it_would_time(tmp_path, capsys):
    assert "1 epochs of 2" in said(capsys, epochs=1, output_dir=tmp_path / "run")["steps"]


def test_the_projection_is_steps_times_their_median(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "seconds_of_steps", lambda *_: ([3.0, 4.0, 50.0], 60.0))
    table = said(capsys, epochs=900, output_dir=tmp_path / "run")  # 1800 steps of 4 s
    assert table["training"].startswith("about 2 h 0 min") and table["first step"] == "60 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.0, "59 s"),
        (61, "2 min"),
        (3600, "1 h 0 min"),
        (90_000, "1 days 1 h"),
        (864_000, "10 days 0 h"),
    ],
)
def test_duration(seconds, text):
    assert dry_run.duration(seconds) == text


def test_steps_that_live_on_what_was_read_ahead_are_not_timed(monkeypatch):
    """2 workers with 2 batches each, and 4 passes a step: one step more."""
    seen = []

    def epoch(training, loader, epoch, first, recipe, world, log, after_step):
        for step in range(first, 10_000):
            seen.append(step)
            after_step(step + 1)

    monkeypatch.setattr(dry_run, "train_one_epoch", epoch)
    recipe = SimpleNamespace(epochs=1, steps_per_epoch=1000, accum_iter=4)
    for loader, more in (([], 0), (SimpleNamespace(num_workers=2, prefetch_factor=2), 1)):
        seen.clear()
        seconds, _ = dry_run.seconds_of_steps(None, loader, 0, recipe, World())
        assert len(seen) == dry_run.UNTIMED + more + dry_run.TIMED and len(seconds) == dry_run.TIMED
