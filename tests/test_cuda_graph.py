"""Sampling with a recorded network: util/cuda_graph.py. What a GPU records is computed by the function itself here."""

import pytest
import torch

import main_jit
from engine_jit import Sampling, generate
from tests.conftest import flags, train
from tests.golden_inputs import normals, small_denoiser
from util import cuda_graph
from util.cuda_graph import Replayed, replayed
from util.distributed import World
from util.errors import UserError


class Recorder:
    """In the place of Recording: remembers the shapes that it was made for, and how often each was asked."""

    def __init__(self):
        self.made, self.asked = [], []

    def __call__(self, function, inputs, pool):
        self.made.append([None if x is None else tuple(x.shape) for x in inputs])

        def recording(*given):
            self.asked.append(len(given[0]))
            return function(*given)

        return recording


def test_one_recording_for_each_shape_and_type():
    recorder = Recorder()
    double = Replayed(lambda x, y: x * 2 if y is None else x * y, recorder)
    for n in (3, 3, 4, 3):
        assert torch.equal(double(torch.ones(n), None), torch.full((n,), 2.0))
    double(torch.ones(3), torch.full((1,), 5.0))
    double(torch.ones(3, dtype=torch.float64), None)
    assert recorder.made == [[(3,), None], [(4,), None], [(3,), (1,)], [(3,), None]]


def test_images_are_those_of_the_network_itself(monkeypatch):
    """Two batches of three and one of two, guided within (0.1, 1): five of six evaluations have both branches."""
    recorder, world = Recorder(), World()
    monkeypatch.setattr(cuda_graph.Replayed.__init__, "__defaults__", (recorder,))
    denoiser, labels = small_denoiser(), [0, 1, 2, 3, 4, 5, 6, 7]
    plain, recorded = (
        torch.cat(
            list(
                generate(
                    denoiser,
                    Sampling("heun", 4, 2.9, (0.1, 1.0), 0, 3, cuda_graph=on),
                    labels,
                    (3, 32, 32),
                    10,
                    world,
                )
            )
        )
        for on in (False, True)
    )
    assert torch.equal(plain, recorded)
    assert len(recorder.made) == 4 and recorder.asked == [3, 6, 6, 6, 6, 6, 6] * 2 + [2, 4, 4, 4, 4, 4, 4]
    assert "predict" not in vars(denoiser)


def test_the_network_is_back_after_an_error():
    denoiser = small_denoiser()
    with pytest.raises(KeyError), replayed(denoiser):
        raise KeyError
    assert denoiser.predict.__func__ is type(denoiser).predict


def test_refused_where_it_cannot_be(tiny, tmp_path, capsys):
    train(tmp_path / "run", code=2, cuda_graph=True)
    assert "--cuda_graph is for CUDA devices" in capsys.readouterr().err
    assert main_jit.main(flags(resume=tmp_path, sample=True, cuda_graph=True)) == 2


def test_refused_with_shards(tiny):
    from util import config

    given = {"dataset": "digits", "parallel": "fsdp", "cuda_graph": True}
    with pytest.raises(UserError, match="--parallel fsdp"):
        config.check(config.resolve(given, None, training=True), evaluates=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_recorded_network_computes_what_it_did(dtype):
    denoiser = small_denoiser(autocast_dtype=dtype).cuda()
    calls = [
        (normals(i, 4, 3, 32, 32).cuda(), torch.tensor([0.2 * i]).cuda(), torch.arange(4).cuda() + i) for i in range(4)
    ]
    with torch.no_grad(), denoiser.fixed_weights():
        plain = [denoiser.velocity(*call) for call in calls]
        with replayed(denoiser):
            recorded = [denoiser.velocity(*call) for call in calls]
    for a, b in zip(recorded, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype is None else 2e-2, atol=1e-5 if dtype is None else 2e-2)
