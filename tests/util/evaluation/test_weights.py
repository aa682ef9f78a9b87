"""Files of weights: where they are looked for, what is fetched, what is refused."""

import socket
from dataclasses import replace

import pytest
import torch

from util.errors import UserError
from util.evaluation import weights as module
from util.evaluation.weights import WEIGHTS
from util.io import sha256_file

pytestmark = pytest.mark.usefixtures("no_network")
CLIP = WEIGHTS["clip"]
DOWNLOAD = torch.hub.download_url_to_file


@pytest.fixture
def file(tmp_path):
    """A published file of a few bytes, which lies nowhere yet; and a function that puts it somewhere."""
    original = tmp_path / "original"
    original.write_bytes(b"weights")

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return path

    return replace(CLIP, sha256=sha256_file(original)), put


def test_addresses_and_hashes_are_those_of_torch_fidelity():
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert WEIGHTS["inception"].url == URL_INCEPTION_V3
    assert (
        CLIP.url == MODEL_URLS["clip-vit-l-14-336px"] and CLIP.sha256 == MODEL_METADATA["clip-vit-l-14-336px"]["hash"]
    )
    for file in WEIGHTS.values():
        assert file.url.endswith(f"/{file.name}")


def test_the_address_of_dinov2_is_the_one_that_timm_has():
    from timm.models import get_pretrained_cfg

    assert WEIGHTS["dinov2"].url == get_pretrained_cfg("vit_large_patch14_dinov2.lvd142m").url


def test_flag_variable_folder_and_cache_are_looked_at_in_this_order(file, tmp_path, monkeypatch):
    file, put = file
    cached = put(tmp_path / "hub" / "checkpoints" / file.name)
    assert file.find({})[0] == cached and file.origin(file.find({})[1]) == "published by OpenAI"
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "empty"))
    assert file.find({})[0] == cached  # the folder lacks it
    in_variable = put(tmp_path / "variable" / file.name)
    monkeypatch.setenv("WEIGHTS_DIR", str(in_variable.parent))
    assert file.find({})[0] == in_variable
    in_folder = put(tmp_path / "folder" / file.name)
    assert file.find({"weights_dir": in_folder.parent, "clip_weights": None})[0] == in_folder
    monkeypatch.setenv("CLIP_WEIGHTS", str(put(tmp_path / "named")))
    assert file.find({"weights_dir": in_folder.parent})[0] == tmp_path / "named"
    assert file.find({"clip_weights": cached})[0] == cached


@pytest.mark.parametrize("file", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_file_that_is_named_must_be_readable(file, by, tmp_path, monkeypatch):
    source = f"--{file.flag}" if by == "flag" else file.flag.upper()
    for path in (tmp_path / "none.pth", tmp_path):  # missing; a folder
        monkeypatch.setenv(file.flag.upper(), str(path if by == "variable" else "unused"))
        with pytest.raises(UserError, match=rf"{path} \({source}\) cannot be read.*{file.url}"):
            file.find({file.flag: path} if by == "flag" else {})


def test_without_a_network_the_error_says_what_to_do(tmp_path):
    for settings, place in (({}, tmp_path / "hub" / "checkpoints"), ({"weights_dir": str(tmp_path)}, tmp_path)):
        message = (
            rf"clip weights \(934 MB\) are not in {place}, .*no network.*{CLIP.url} .*--clip_weights .*CLIP_WEIGHTS"
        )
        with pytest.raises(UserError, match=message) as error:
            CLIP.find(settings)
        folder = f" --weights_dir {tmp_path}" if settings else ""
        assert f"`python -m tools.fetch_weights clip{folder}`" in str(error.value)


def test_what_is_there_and_cannot_be_read_is_not_called_missing(tmp_path):
    (tmp_path / CLIP.name).mkdir()
    with pytest.raises(UserError, match=rf"clip weights {tmp_path / CLIP.name} cannot be read: .*directory"):
        CLIP.find({"weights_dir": tmp_path})


def test_a_file_whose_hash_only_begins_like_the_published_one_is_refused(file, tmp_path, monkeypatch):
    """By torch's own download as well, here from a file: address."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", DOWNLOAD)
    file = replace(file[0], url=(tmp_path / "original").as_uri())
    assert file.find({"weights_dir": tmp_path / "good"})[1] == file.sha256
    other = replace(file, sha256=file.sha256[:8] + "0" * 56)
    assert other.origin(file.sha256) == "not the published file"
    with pytest.raises(UserError, match="cannot be downloaded: invalid hash"):
        other.find({"weights_dir": tmp_path / "bad"})
    with pytest.raises(UserError, match="damaged"):
        other.find({"weights_dir": tmp_path / "good"})
    assert all(len(file.sha256) == 64 for file in WEIGHTS.values())


def test_a_folder_has_published_files_only_and_a_path_any(file, tmp_path):
    file, _ = file
    (tmp_path / file.name).write_bytes(b"others")
    with pytest.raises(UserError, match=r"is damaged, or another file of that name .*--clip_weights names"):
        file.find({"weights_dir": tmp_path})
    path, sha256 = file.find({"clip_weights": tmp_path / file.name})
    assert path == tmp_path / file.name and file.origin(sha256) == "not the published file"


def test_a_missing_file_is_fetched_once_into_the_folder(file, tmp_path, monkeypatch):
    file, put = file
    fetched, timeout = [], socket.getdefaulttimeout()

    def download(url, path, hash_prefix, progress):
        assert socket.getdefaulttimeout() == 30 and hash_prefix == file.sha256
        fetched.append((url, put(module.Path(path))))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert file.find({"weights_dir": tmp_path / "new"})[0] == tmp_path / "new" / file.name
    assert fetched == [(file.url, tmp_path / "new" / file.name)] and socket.getdefaulttimeout() == timeout
