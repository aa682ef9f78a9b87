"""A checkpoint as a folder that all ranks write and read together, through torch.distributed.checkpoint (DCP).

    checkpoint-last.dcp/
        shard-00001-model-00001-of-00005.safetensors   rank 0: weights (1), both EMAs (2, 3), AdamW's moments (4, 5)
        checkpoint.json                                the rest, and the SHA-256 of itself and of those files

Tensors are named "<section>.<parameter>", as in "exp_avg.net.blocks.0.attn.qkv.weight". Any number of ranks can read
what another number has written. Nothing in the folder is a pickle: DCP's own format contains one, and is never read.
"""

import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from util.errors import UserError
from util.io import file_state, json_hash, read_json, sha256_file, write_json

SETTINGS = "checkpoint.json"
WEIGHTS, MOMENTS = ("model", "model_ema1", "model_ema2"), ("exp_avg", "exp_avg_sq")


def write(path: Path, content: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Write `content` (train_state.py), as DTensors in host memory, to the folder `path`, and flush it to disk.

    All ranks of `group`, a gloo group that nothing else uses meanwhile, call this; UserError on all if one fails.
    """
    rank, groups, state = dist.get_rank(group), content["optimizer"]["param_groups"], content["optimizer"]["state"]
    names = [name for entry in groups for name in entry["params"]]
    sections = {section: content[section] for section in WEIGHTS}
    sections |= {moment: {name: state[name][moment] for name in names} for moment in MOMENTS}
    tensors, file_numbers = {"step": torch.stack([state[name]["step"] for name in names])}, {"step": 1}
    for number, (section, values) in enumerate(sections.items(), start=1):
        tensors |= {f"{section}.{name}": value for name, value in values.items()}
        file_numbers |= {f"{section}.{name}": number for name in values}

    def write_tensors() -> dict[str, dict[str, str]]:
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # DCP creates it again before any rank writes
        writer = HuggingFaceStorageWriter(str(path), file_numbers, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
        return {file.name: {"sha256": sha256_file(file)} for file in path.glob(f"shard-{rank + 1:05d}-*")}

    files = {}
    for digests in on_all_ranks(path, group, write_tensors):
        files |= digests
    about = {"epoch": content["epoch"], "args": vars(content["args"]), "run": content["run"], "files": files}
    about |= {"weights": list(content["model"]), "optimizer": groups}

    def write_settings() -> None:
        if rank == 0:
            write_json(path / SETTINGS, {**about, "sha256": json_hash(about, 64)})

    on_all_ranks(path, group, write_settings)


def on_all_ranks(path: Path, group: dist.ProcessGroup, work: Callable[[], Any]) -> list[Any]:
    """Call `work` on all ranks, and return what it returns on each. An error on one is a UserError on all."""
    value, problem = None, None
    try:
        value = work()
    except (Exception, CheckpointException) as error:  # whatever it is, the other ranks wait for this one
        problem = _reason(error)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (value, problem), group=group)
    if problems := [problem for _, problem in outcomes if problem]:
        raise UserError(f"The checkpoint cannot be written to {path}: {problems[0]}")
    return [value for value, _ in outcomes]


def settings(path: Path) -> dict[str, Any]:
    """Return everything but the tensors. It is written last, so that a folder that has it is complete."""
    about = read_json(path / SETTINGS)
    if not isinstance(about, dict) or about.pop("sha256", None) != json_hash(about, 64):
        raise UserError(f"{path} is not a complete checkpoint: {SETTINGS} is missing or damaged.")
    return about


def _digest(path: Path) -> str:
    """Return a file's SHA-256, computed again only after the file has changed."""
    return _digest_of(path, file_state(path))


@lru_cache(1024)
def _digest_of(path: Path, state: Hashable) -> str:
    return sha256_file(path)


class Section(dict[Hashable, Tensor]):
    """A state dict of meta tensors, whose values `copy_to` reads from the checkpoint that has the settings `about`.

    `names` maps its keys to names in the files, and `stored` those to meta tensors.
    """

    def __init__(self, path: Path, about: dict[str, Any], names: Mapping[Hashable, str], stored: Mapping[str, Tensor]):
        super().__init__({key: stored[name] for key, name in names.items()})
        self.path, self.about, self.names = path, about, names

    def copy_to(self, targets: Mapping[Hashable, Tensor]) -> None:
        """Fill the tensors `targets`; of a DTensor only this rank's part is read."""
        tensors = {self.names[key]: target for key, target in targets.items()}
        with _reading(self.path, self.about), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP warns that each rank reads on its own, as intended
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=True)


def load(path: Path) -> dict[str, Any]:
    """Verify a checkpoint, and return its content as published.py describes it, with `Section`s for state dicts."""
    about = settings(path)
    with _reading(path, about):
        files, found = about["files"], sorted(path.glob("*.safetensors"))
        with ThreadPoolExecutor(8) as pool:
            digests = dict(zip((file.name for file in found), pool.map(_digest, found), strict=True))
        for name in sorted(files.keys() | digests.keys()):
            if digests.get(name) != files.get(name, {}).get("sha256"):
                raise OSError(f"it is damaged: the checksum of {name} differs, or there should be no such file")
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        stored = {name: torch.empty(t.size, dtype=t.properties.dtype, device="meta") for name, t in found.items()}

        def section(name: str, keys: Mapping[Hashable, str]) -> Section:
            return Section(path, about, {key: f"{name}.{parameter}" for key, parameter in keys.items()}, stored)

        content: dict[str, Any] = {name: section(name, {key: key for key in about["weights"]}) for name in WEIGHTS}
        content |= {"epoch": about["epoch"], "args": Namespace(**about["args"]), "run": about["run"], "optimizer": None}
        if (groups := about["optimizer"]) is not None:
            slots = dict(enumerate(name for group in groups for name in group["params"]))
            steps, numbers = torch.empty(len(slots)), iter(slots)
            Section(path, about, {"step": "step"}, stored).copy_to({"step": steps})
            groups = [{**g, "betas": tuple(g["betas"]), "params": [next(numbers) for _ in g["params"]]} for g in groups]
            content["optimizer"] = {"param_groups": groups, "step": {slot: steps[slot] for slot in slots}}
            content["optimizer"] |= {moment: section(moment, slots) for moment in MOMENTS}
    return content


@contextmanager
def _reading(path: Path, about: dict[str, Any]) -> Iterator[None]:
    """Turn all errors into UserErrors, and refuse what was read if a run has put another checkpoint there meanwhile."""
    problem = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # DCP and safetensors raise many kinds
        problem = error
    if (read_json(path / SETTINGS) or {}).get("sha256") != json_hash(about, 64):
        raise UserError(
            f"{path} was replaced while it was read: a run continues in that folder. Try again, or name a checkpoint "
            "that stays with --checkpoint."
        )
    if problem is not None:
        raise UserError(f"{path} cannot be read: {_reason(problem)}") from problem


def _reason(error: BaseException) -> str:
    """The first line of an error; DCP's holds those of all ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
