"""Files of small networks with random weights."""

import pytest
import torch

from tests.util.evaluation.networks import dinov2_state, use_one_block, write_clip


@pytest.fixture
def dinov2_file(tmp_path, monkeypatch):
    """A state dict for SmallDinoV2."""
    use_one_block(monkeypatch)
    torch.save(dinov2_state(), tmp_path / "dinov2.pth")
    return tmp_path / "dinov2.pth"


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory):
    """The same weights as a TorchScript archive and as a state dict."""
    return write_clip(tmp_path_factory.mktemp("clip"))
