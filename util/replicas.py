"""Whether the processes still have the same network, bit for bit, as data parallelism takes for granted.

A checksum is a sum over elements i, modulo 2^64, of h(bits_i + i c). h is a bijection that mixes 64-bit numbers (two
rounds of xor-shift and multiply) and c is odd, both with the constants of splitmix64 (Steele, Lea, Flood, 2014): one
changed element always changes it, and so do, but for chance (2^-64), several or exchanged ones. All in integers: the
order of summation does not matter, and -0 and 0 and the kinds of NaN are told apart.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from util.distributed import World
from util.errors import UserError

CHUNK = 1 << 22  # elements that are hashed at a time: 32 MiB for each of a few temporary tensors
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of that size
STEP = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """int64, one for each tensor, on their device; nothing waits for it."""
    return torch.stack([_checksum(tensor) for tensor in tensors])


def _checksum(tensor: Tensor) -> Tensor:
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        x = torch.arange(start, start + len(part), device=tensor.device).mul_(STEP).add_(part)
        for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier)
        total += x.sum()
    return total


def compare(named: Mapping[str, Mapping[str, Tensor]], world: World) -> None:
    """Compare tensors over the processes; all of them call it.

    Args:
        named: what it is -> name -> tensor, with the same names in the same order on all processes, as in
            {"the weights": dict(denoiser.named_parameters())}.

    Raises:
        UserError: on all processes, naming those that differ from most, and in what.
    """
    if world.size == 1:
        return
    labels = [(what, name) for what, tensors in named.items() for name in tensors]
    mine = checksums(tensor for tensors in named.values() for tensor in tensors.values())
    gathered = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(gathered, mine)
    rows = [tuple(row.tolist()) for row in gathered]
    if len(set(rows)) == 1:
        return
    usual = Counter(rows).most_common(1)[0][0]
    reference = rows.index(usual)
    found = []
    for rank, row in enumerate(rows):
        wrong = [label for label, a, b in zip(labels, row, usual, strict=True) if a != b]
        parts = [_part(what, [name for w, name in wrong if w == what], len(named[what])) for what in named]
        if wrong:
            found.append(f"process {rank} differs from process {reference} in {' and '.join(filter(None, parts))}")
    error = UserError(
        f"the processes no longer have the same network: {'; '.join(found)}. The memory or the device of the node "
        "may be at fault: go on from the last checkpoint, and without that node if it happens again"
    )
    error.everywhere = True
    raise error


def _part(what: str, wrong: list[str], n: int) -> str:
    return f"{what} ({len(wrong)} of {n} tensors, first: {wrong[0]})" if wrong else ""
