"""util/replicas.py: checksums against their definition in whole numbers, and replicas that have come apart."""

import pytest
import torch
from torch.distributed import TCPStore

from tests.conftest import as_torchrun
from util import replicas
from util.distributed import World, find_world, process_group
from util.errors import UserError
from util.replicas import checksums, compare

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


def random(dtype, *shape):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=g).to(dtype)


def by_hand(tensor):
    """The definition, with whole numbers of Python's that have no size."""
    size, total = tensor.element_size(), 0
    octets = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    for i in range(tensor.numel()):
        bits = int.from_bytes(bytes(octets[i * size : (i + 1) * size]), "little", signed=True)
        x = (bits + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        total += (x ^ x >> 27) * 0x94D049BB133111EB
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", TYPES)
def test_checksum_is_its_definition(dtype, monkeypatch):
    """In one piece, in pieces that do not divide the length, of a tensor that is not contiguous, and of none."""
    x = random(dtype, 7, 9)
    expected = [by_hand(x), by_hand(x.T), 0]
    for chunk in (replicas.CHUNK, 10):
        monkeypatch.setattr(replicas, "CHUNK", chunk)
        found = checksums([x, x.T, x[:0]])
        assert found.tolist() == expected and found.dtype == torch.int64
    assert expected[0] != expected[1]


@pytest.mark.parametrize("dtype", TYPES[:4])
def test_every_bit_and_every_exchange_is_noticed(dtype):
    x = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = x.view(replicas.WORDS[x.element_size()])
    seen = {int(checksums([x]))}
    for i in range(len(x)):
        for bit in range(8 * x.element_size()):
            y = bits.clone()
            y[i] ^= torch.tensor(1).bitwise_left_shift(bit).to(y.dtype)
            seen.add(int(checksums([y.view(dtype)])))
        for j in range(i):
            y = x.clone()
            y[i], y[j] = x[j], x[i]
            seen.add(int(checksums([y])))
    assert len(seen) == 1 + 6 * 8 * x.element_size() + 15


def test_zeros_of_two_signs_differ_and_nan_equals_itself():
    assert checksums([torch.zeros(3)]) != checksums([-torch.zeros(3)])
    assert checksums([torch.full((3,), torch.nan)]) == checksums([torch.full((3,), torch.nan)])


def test_one_process_is_not_compared():
    compare({"the weights": {"a": torch.zeros(2)}}, World())


def state():
    weights = {"net.a": random(torch.float32, 5, 3), "net.b": random(torch.bfloat16, 4), "n": random(torch.int64, 2)}
    return {"the weights": weights, "ema1": {name: x.clone() for name, x in weights.items()}}


def _work(rank, port, folder):
    torch.set_num_threads(1)
    as_torchrun(rank, 3, port)
    world, found = find_world("cpu"), {}
    with process_group(world):
        compare(state(), world)
        for name, spoilt in (("one", {1}), ("two", {1, 2}), ("first", {0})):
            mine = state()
            if rank in spoilt:
                mine["the weights"]["net.b"].view(torch.int16)[2] ^= rank + 1
            if rank == 2 and rank in spoilt:
                mine["ema1"]["net.a"][0, 0], mine["ema1"]["n"][1] = -1.0, 1000
            with pytest.raises(UserError) as error:
                compare(mine, world)
            assert error.value.everywhere
            found[name] = str(error.value)
        compare(state(), world)
    torch.save(found, folder / f"{rank}.pt")


def test_flipped_bits_are_named_on_all_processes(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_work, (store.port, tmp_path), nprocs=3)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert found[0] == found[1] == found[2]
    parts = {name: text.partition(": ")[2].partition(". ")[0] for name, text in found[0].items()}
    assert parts == {
        "one": "process 1 differs from process 0 in the weights (1 of 3 tensors, first: net.b)",
        "two": "process 1 differs from process 0 in the weights (1 of 3 tensors, first: net.b); process 2 differs from "
        "process 0 in the weights (1 of 3 tensors, first: net.b) and ema1 (2 of 3 tensors, first: net.a)",
        "first": "process 0 differs from process 1 in the weights (1 of 3 tensors, first: net.b)",
    }
