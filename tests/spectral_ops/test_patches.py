"""Images as patches, in both orders and packed in one sequence."""

import numpy as np
import pytest
import torch

from spectral_forcing import SpectralForcing
from spectral_ops.patches import filter_patches, image_to_patches, patches_to_image
from tests.golden_inputs import normals

TIMES = torch.tensor([0.0, 0.31, 0.77, 1.0])


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_patches_are_the_image(order):
    image = normals(0, 4, 3, 8, 12)
    patches = image_to_patches(image, 4, order)
    assert patches.shape == (4, 6, 48) and patches_to_image(patches, (2, 3), order=order).equal(image)
    row, column, channel = 2, 1, 1  # of the number in the second row and last column of the grid
    number = (row * 4 + column) * 3 + channel if order == "hwc" else (channel * 4 + row) * 4 + column
    assert patches[1, 5, number] == image[1, channel, 4 + row, 8 + column]
    operator = SpectralForcing()
    filtered = filter_patches(operator, patches, TIMES, (2, 3), order=order)
    assert filtered.equal(image_to_patches(operator(image, TIMES), 4, order))


@pytest.mark.parametrize("batch", [(), (1,)])
def test_images_of_several_sizes_in_one_sequence(batch):
    operator, images = SpectralForcing(), [normals(0, 1, 2, 8, 12), normals(1, 1, 2, 4, 8)]
    packed = torch.cat([image_to_patches(image, 4)[0] for image in images]).expand(*batch, -1, -1)
    out = filter_patches(operator, packed, TIMES[1:3], [(2, 3), (1, 2)], channels=2)
    expected = [image_to_patches(operator(x, t), 4)[0] for x, t in zip(images, TIMES[1:3], strict=True)]
    assert out.shape == (*batch, 8, 32) and out.reshape(8, 32).equal(torch.cat(expected))
    for grids in (torch.tensor([[2, 3], [1, 2]]), np.array([[2, 3], [1, 2]])):
        assert filter_patches(operator, packed, TIMES[1:3], grids, channels=2).equal(out)
    one_time = filter_patches(operator, packed, 0.31, [(2, 3), (1, 2)], channels=2)
    assert one_time.reshape(8, 32)[:6].equal(expected[0])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: filter_patches(f, torch.zeros(2, 6, 48), 0.5, (2, 2)), "2 x 2 has 4 tokens, not 6"),
        (lambda f: filter_patches(f, torch.zeros(6, 48), TIMES[:3], (2, 3)), r"shape \(6, 48\); \(B, N, p p C\)"),
        (lambda f: filter_patches(f, torch.zeros(6, 48), 0.5, []), "have 0 tokens, not 6"),
        (lambda f: filter_patches(f, torch.zeros(2, 6, 50), 0.5, (2, 3)), "50 numbers is no square patch of 3"),
        (lambda f: filter_patches(f, torch.zeros(2, 6, 48), 0.5, (2, 3), order="whc"), "'whc' .* 'hwc' or 'chw'"),
        (lambda f: filter_patches(f, torch.zeros(6, 48), 0.5, [(2, 2), (1, 3)]), r"\[\(2, 2\), \(1, 3\)\] have 7 tok"),
        (lambda f: filter_patches(f, torch.zeros(6, 48), TIMES, [(2, 2), (1, 2)]), "4 times .* each of 2 grids"),
    ],
)
def test_input_that_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(SpectralForcing())
