"""The frequency-time plane and what is left of an image are those of the operator."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from spectral_forcing import SCHEDULES
from tools.explorer import plane
from util.errors import UserError


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
