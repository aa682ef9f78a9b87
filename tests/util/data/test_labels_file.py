"""A part of the classes of a data set: their images alone, numbered anew."""

import numpy as np
import pytest

import main_jit
from tests.conftest import config_of, few_digits, flags, read_log, train
from tests.util.data.image_files import make_folder
from util.data.datasets import build_dataset, of_classes, part_name
from util.data.images import DataError, read_class_names
from util.io import REPOSITORY


@pytest.fixture
def labels_file(tmp_path):
    def write(text):
        (tmp_path / "some.txt").write_text(text)
        return tmp_path / "some.txt"

    return write


def test_images_of_some_classes(labels_file):
    path = labels_file("# two digits\n7\n\n3  # a comment\n")
    whole, part = few_digits(16), of_classes(few_digits(16), path)
    assert part.class_names == ["3", "7"] and part.num_classes == 2
    expected = [i for i, label in enumerate(whole.labels) if label in (3, 7)]
    assert len(part) == len(expected) and part.labels.tolist() == [int(whole.labels[i] == 7) for i in expected]
    for i, n in enumerate(expected):
        image, label = part[i]
        assert image.equal(whole[n][0]) and label == part.labels[i]


def test_files_keep_their_paths(tmp_path, labels_file):
    folder = make_folder(tmp_path / "images" / "train", {"a": 2, "b": 3, "c": 2})
    part = build_dataset("imagefolder", folder, 16, labels_file=labels_file("c\na\n"))
    assert [part.path(i).split("/")[-2] for i in range(4)] == ["a", "a", "c", "c"]
    assert part.labels.tolist() == [0, 0, 1, 1] and part.name == "imagefolder"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "must hold names"), ("1\n1\n", "each once"), ("1\neleven\n", "names eleven, which is no class")],
)
def test_files_that_are_refused(labels_file, text, sentence):
    with pytest.raises(DataError, match=sentence):
        of_classes(few_digits(16), labels_file(text))
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names("nothing.txt")


@pytest.mark.usefixtures("tiny")
def test_a_run_on_some_classes(tmp_path, labels_file, capsys):
    path = labels_file("1\n4\n8\n")
    run = train(tmp_path / "run", labels_file=path, batch_size=4, val_split=0.2)
    config = config_of(run)
    name = part_name(path, ["8", "1", "4"])
    assert config.class_num == 3 and config.classes == ["1", "4", "8"] and config.real_images == f"digits-{name}"
    assert name.startswith("some-") and name != part_name(path, ["1", "4"])
    assert read_log(run, "val") and np.isfinite(read_log(run)[-1]["loss"])
    other = tmp_path / "other.txt"
    other.write_text("1\n4\n")
    train(run, code=2, labels_file=other, batch_size=4, val_split=0.2, epochs=3)
    assert "--labels_file" in capsys.readouterr().err
    path.write_text("0\n2\n3\n")
    train(run, code=2, labels_file=path, batch_size=4, val_split=0.2, epochs=3)
    assert "names other classes than this run was trained on" in capsys.readouterr().err
    path.unlink()  # what is sampled and evaluated does not need it
    assert main_jit.main(flags(sample=True, resume=run, labels="0,2", num_per_class=1, device="cpu")) == 0
    argv = flags(evaluate_gen=True, resume=run, labels_file=other, num_images=2, device="cpu")
    assert main_jit.main(argv) == 2 and "--labels_file" in capsys.readouterr().err


def test_imagenet100_has_100_classes():
    names = read_class_names(REPOSITORY / "recipes" / "imagenet100.txt")
    assert len(names) == 100 and names == sorted(names) and all(len(name) == 9 and name[0] == "n" for name in names)
