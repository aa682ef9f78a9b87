"""The counter-based generator against its published vectors and a second implementation: util/rng.py."""

import itertools
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from torch._dynamo.testing import CompileCounter

from util import rng
from util.rng import Stream, normal, philox, uniform

SAMPLES = 20_000


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
    blocks = [(b, index % 2**32, step, (index >> 32) + (int(stream) << 24)) for b in range((n + 3) // 4)]
    return np.array([w for block in blocks for w in philox_by_integers(block, key)][:n], dtype=np.float64)


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


# Philox itself. The three vectors are those of Random123's `kat_vectors`.
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
    out = philox(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in out] == expected
    assert list(philox_by_integers(tuple(counter), tuple(key))) == expected


def test_philox_against_python_integers():
    g = np.random.default_rng(0)
    counters, keys = g.integers(0, 2**32, (25, 4)), g.integers(0, 2**32, (5, 2))
    for key in keys.tolist():
        out = torch.stack(philox(tuple(torch.from_numpy(counters).unbind(1)), tuple(key)), dim=1)
        assert out.tolist() == [list(philox_by_integers(tuple(c), tuple(key))) for c in counters.tolist()]


# Which numbers a sample gets.
ADDRESSES = [
    (0, Stream.TIME, 0, 0),
    (1, Stream.NOISE, 7, 3),
    (2**64 - 1, Stream.FLIP, 2**32 - 1, 2**32 - 1),
    (2**40 + 5, Stream.START_NOISE, 123_456, 2**32 + 9),
    (77, Stream.START_NOISE, 1, 2**55 + 2**33 + 1),
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_uniform_against_python_integers(address):
    seed, stream, step, i = address
    expected = (np.floor(words_by_integers(*address, 9) / 2**9) + 0.5) / 2**23
    np.testing.assert_array_equal(uniform(seed, stream, step, index(i), 9)[0].double().numpy(), expected)


@pytest.mark.parametrize("address", ADDRESSES)
def test_normal_against_python_integers(address):
    """Box and Muller in float64, as the real and imaginary part of a complex exponential."""
    seed, stream, step, i = address
    words = words_by_integers(*address, 12).reshape(-1, 2)
    pairs = np.sqrt(-2 * np.log((words[:, 0] + 0.5) / 2**32)) * np.exp(2j * np.pi * words[:, 1] / 2**32)
    expected = np.stack([pairs.real, pairs.imag], axis=1).reshape(-1)
    np.testing.assert_allclose(normal(seed, stream, step, index(i), 12)[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_sample_has_its_numbers_whatever_is_drawn_with_it(draw):
    """Order and size of the batch and how many numbers are asked for do not matter."""
    together = draw(3, Stream.NOISE, 5, index(0, 9, 4, 2**33), 11)
    assert together.shape == (4, 11) and together.dtype == torch.float32
    for row, i in enumerate((0, 9, 4, 2**33)):
        for n in (1, 2, 3, 4, 5, 11):
            assert draw(3, Stream.NOISE, 5, index(i), n)[0].equal(together[row, :n])
    assert draw(3, Stream.NOISE, 5, index(7)).shape == (1, 1)


def test_torchs_own_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first = normal(0, Stream.TIME, 0, index(0, 1), 8)
    assert torch.random.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert normal(0, Stream.TIME, 0, index(0, 1), 8).equal(first)


def test_streams_have_their_own_fixed_numbers():
    """A stream's number is part of every random number; changing one changes what a seed means."""
    expected = {"TIME": 0, "NOISE": 1, "LABEL_DROP": 2, "FLIP": 3, "START_NOISE": 4, "VALIDATION": 5, "SCHEDULE": 6}
    assert {s.name: int(s) for s in Stream} == expected


# Distribution.


def test_uniform_is_in_the_open_interval():
    """At both ends of the words' range: the least and the greatest number that can come out."""
    numbers = uniform(0, Stream.TIME, 0, torch.arange(SAMPLES), 4)
    assert 0 < numbers.min() < 1e-3 and 1 - 1e-3 < numbers.max() < 1


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)])
def test_ends_of_the_uniform_distribution(monkeypatch, word, expected):
    monkeypatch.setattr("util.rng.philox", lambda counter, key: (torch.full_like(counter[1], word),) * 4)
    assert float(uniform(0, Stream.TIME, 0, index(0))) == expected
    assert normal(0, Stream.TIME, 0, index(0), 4).isfinite().all()


@pytest.mark.parametrize(("draw", "law"), [(uniform, "uniform"), (normal, "norm")])
def test_distribution(draw, law):
    over_samples = draw(5, Stream.NOISE, 1, torch.arange(SAMPLES))[:, 0].numpy()
    over_numbers = draw(5, Stream.NOISE, 1, index(3), SAMPLES)[0].numpy()
    over_steps = np.concatenate([draw(5, Stream.NOISE, s, torch.arange(20))[:, 0].numpy() for s in range(200)])
    for numbers in (over_samples, over_numbers, over_steps):
        assert scipy.stats.kstest(numbers, law).pvalue > 0.01


def test_normal_moments():
    x = normal(1, Stream.NOISE, 0, torch.arange(100), 1000).double()
    deviation = 1 / np.sqrt(x.numel())
    assert abs(x.mean()) < 4 * deviation
    assert abs(x.square().mean() - 1) < 4 * np.sqrt(2) * deviation
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96) * deviation


def test_different_addresses_are_uncorrelated():
    """Seeds, streams, steps, indices and positions within a sample, each against all others."""
    rows = [normal(0, stream, 0, index(0), SAMPLES)[0] for stream in Stream]
    rows += [normal(seed, Stream.TIME, 0, index(0), SAMPLES)[0] for seed in (1, 2, 2**32, 2**63)]
    rows += [normal(0, Stream.TIME, step, index(0), SAMPLES)[0] for step in (1, 2, 2**31)]
    rows += list(normal(0, Stream.TIME, 0, index(1, 2, 2**24, 2**32, 2**33), SAMPLES))
    rows += [rows[0].roll(shift) for shift in (1, 2, 3, 4)]
    correlation = np.corrcoef(np.stack([row.numpy() for row in rows]))
    off_diagonal = correlation[np.triu_indices(len(rows), 1)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(SAMPLES)


def test_no_number_twice():
    """Pairs of words of many addresses, neighbours in each coordinate, are all different."""
    seen = set()
    addresses = itertools.product((0, 1, 2**32), Stream, (0, 1, 5), (0, 1, 2**32, 2**32 + 1))
    for seed, stream, step, i in addresses:
        seen.update(map(tuple, uniform(seed, stream, step, index(i), 8).view(4, 2).tolist()))
    assert len(seen) == 3 * len(Stream) * 3 * 4 * 4


# Errors.


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize("draw", [uniform, normal])
def test_seed_out_of_range(draw, seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        draw(seed, Stream.TIME, 0, index(0))


# Pieces.


def test_pieces_do_not_change_a_number(monkeypatch):
    """Neither where a sample is cut into several pieces nor where samples share one."""
    whole = normal(7, Stream.NOISE, 3, index(0, 5, 2**33), 103)
    for piece in (1, 7, 26, 40):
        monkeypatch.setattr("util.rng.PIECE", piece)
        assert torch.equal(normal(7, Stream.NOISE, 3, index(0, 5, 2**33), 103), whole)


# Other devices.


def on_device(function, step=3, samples=(0, 5, 2**33), n=103, seed=2**63 + 7):
    """What `normal` draws on another device, here on tensors of the CPU."""
    block = torch.arange(-(-n // 4))
    return function(rng._counter(Stream.NOISE, step, index(*samples), block), rng._key(seed)).flatten(1)[:, :n]


DRAWS = [(rng._normal_on_device, normal), (rng._uniform_on_device, uniform)]


@pytest.mark.parametrize(("theirs", "ours"), DRAWS)
def test_numbers_of_a_cpu_are_those_of_other_devices(theirs, ours):
    """To the bit where logarithm and sine are; they compute with 64-bit integers throughout."""
    assert torch.equal(on_device(theirs), ours(2**63 + 7, Stream.NOISE, 3, index(0, 5, 2**33), 103))


@pytest.mark.parametrize(("theirs", "_"), DRAWS)
def test_numbers_are_one_graph_for_all_steps(theirs, _):
    counter = CompileCounter()
    compiled = torch.compile(theirs, backend=counter, dynamic=False, fullgraph=True)
    for step in range(3):
        assert torch.equal(on_device(compiled, step), on_device(theirs, step))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_noise():
    """The integers are the same; logarithm and sine are those of another library."""
    rng._compiled.cache_clear()
    difference = on_device(rng._compiled(rng._normal_on_device)) - on_device(rng._normal_on_device)
    assert difference.abs().max() < 1e-5
