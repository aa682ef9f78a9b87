"""The counter-based generator against its published vectors and a second implementation: util/rng.py."""

from functools import cache

import numpy as np
import pytest
import scipy.stats
import torch
from torch._dynamo.testing import CompileCounter

from util import rng
from util.rng import STREAMS, CounterRNG, philox, to_normal, to_uniform

SAMPLES = 20_000
DRAWS = {"uniform": CounterRNG.uniform, "norm": CounterRNG.normal}


def philox_by_integers(counter, key):
    """Philox-4x32-10 on Python's integers, from the definition in the paper."""
    for i in range(10):
        k = [(key[j] + i * weyl) % 2**32 for j, weyl in enumerate((0x9E3779B9, 0xBB67AE85))]
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = (high1 ^ counter[1] ^ k[0], low1, high0 ^ counter[3] ^ k[1], low0)
    return counter


def words_by_integers(seed, stream, step, index, n):
    """Words of one sample. Which counter belongs to which number is part of what makes a run repeatable."""
    key = (seed % 2**32, seed >> 32)
    blocks = [(b, index % 2**32, step, (index >> 32) + (STREAMS[stream] << 24)) for b in range((n + 3) // 4)]
    return np.array([w for block in blocks for w in philox_by_integers(block, key)][:n], dtype=np.float64)


def numbers(seed=0, step=0, index=(0,)):
    return CounterRNG(seed, step, torch.as_tensor(index))


# The three vectors are those of Random123's `kat_vectors`.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    assert [int(word) for word in philox(tuple(torch.tensor([word]) for word in counter), key)] == expected
    assert list(philox_by_integers(tuple(counter), tuple(key))) == expected


@pytest.mark.parametrize(
    "address",
    [
        *((0, "time", 0, 0), (2**64 - 1, "flip", 2**32 - 1, 2**32 - 1)),
        *((2**40 + 5, "noise", 123_456, 2**32 + 9), (77, "schedule", 1, 2**55 + 2**33 + 1)),
    ],
)
def test_numbers_against_python_integers(address):
    """Box and Muller in float64, as the real and imaginary part of a complex exponential."""
    seed, stream, step, index = address
    words = words_by_integers(*address, 12)
    found = numbers(seed, step, [index])
    np.testing.assert_array_equal(found.uniform(stream, 9)[0].double(), (np.floor(words[:9] / 2**9) + 0.5) / 2**23)
    a, b = words.reshape(-1, 2).T
    pairs = np.sqrt(-2 * np.log((a + 0.5) / 2**32)) * np.exp(2j * np.pi * b / 2**32)
    expected = np.stack([pairs.real, pairs.imag], axis=1).reshape(-1)
    np.testing.assert_allclose(found.normal(stream, 12)[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_sample_has_its_numbers_whatever_is_drawn_with_it(draw, monkeypatch):
    """Neither order and size of the batch nor pieces nor torch's own generator matter, and the latter is left alone."""
    indices, before = (0, 9, 4, 2**33), torch.random.get_rng_state()
    together = draw(numbers(3, 5, indices), "noise", 103)
    assert together.shape == (4, 103) and together.dtype == torch.float32
    for row, index in enumerate(indices):
        for n in (1, 2, 3, 4, 5, 11):
            assert draw(numbers(3, 5, [index]), "noise", n)[0].equal(together[row, :n])
    for blocks in (1, 60):
        monkeypatch.setattr(rng, "CPU_BLOCKS", blocks)
        assert draw(numbers(3, 5, indices), "noise", 103).equal(together)
    assert draw(numbers(index=torch.arange(0)), "noise", 3).shape == (0, 3)
    assert torch.random.get_rng_state().equal(before)


def test_streams_have_their_own_fixed_numbers():
    """A stream's number is part of every random number; changing one changes what a seed means."""
    names = "time noise label_drop flip start_noise validation schedule solver latent"
    assert list(STREAMS) == names.split()
    assert list(STREAMS.values()) == list(range(9))


@pytest.mark.parametrize("law", DRAWS)
def test_distribution(law):
    """And at the ends of the words' range no number is infinite, 0 or 1."""
    words = (torch.tensor([[0, 2**32 - 1]]),) * 4
    assert to_normal(words).isfinite().all() and to_uniform(words)[0, :, 0].tolist() == [2.0**-24, 1 - 2.0**-24]
    over_samples = DRAWS[law](numbers(5, 1, range(SAMPLES)), "noise")
    over_numbers = DRAWS[law](numbers(5, 1, [3]), "noise", SAMPLES)
    over_steps = torch.stack([DRAWS[law](numbers(5, step, range(20)), "noise") for step in range(200)])
    for drawn in (over_samples, over_numbers, over_steps):
        assert scipy.stats.kstest(drawn.flatten().numpy(), law).pvalue > 0.01


def test_different_addresses_are_uncorrelated():
    """Seeds, streams, steps, indices and positions within a sample, each against all others."""
    rows = [numbers().normal(stream, SAMPLES)[0] for stream in STREAMS]
    rows += [numbers(seed=seed).normal("time", SAMPLES)[0] for seed in (1, 2, 2**32, 2**63)]
    rows += [numbers(step=step).normal("time", SAMPLES)[0] for step in (1, 2, 2**31)]
    rows += list(numbers(index=(1, 2, 2**24, 2**32, 2**33)).normal("time", SAMPLES))
    rows += [rows[0].roll(shift) for shift in (1, 2, 3, 4)]
    off_diagonal = np.corrcoef(np.stack(rows))[np.triu_indices(len(rows), 1)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(SAMPLES)


@pytest.mark.parametrize("address", [{"seed": -1}, {"seed": 2**64}, {"step": -1}, {"step": 2**32}])
def test_address_out_of_range(address):
    with pytest.raises(ValueError, match="it must be in 0"):
        numbers(**address)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_one_graph_draws_the_same_numbers_in_all_steps(draw, monkeypatch):
    kernel, graphs = rng._kernel, CompileCounter()
    options = {"backend": graphs, "dynamic": False, "fullgraph": True}
    compiled = cache(lambda transform, _: torch.compile(kernel(transform, False), **options))
    for step in (3, 4):
        source = numbers(2**63 + 7, step, (0, 5, 2**33))
        expected = draw(source, "noise", 103)
        with monkeypatch.context() as patch:
            patch.setattr(rng, "_kernel", compiled)
            assert draw(source, "noise", 103).equal(expected)
    assert graphs.frame_count == 1
