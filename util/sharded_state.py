"""A training in shards and its checkpoints: each process reads and writes its own rows."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from denoiser import Denoiser
from util import checkpoint_folder, sharded_checkpoint
from util.checkpoint import Checkpoint, check_fit
from util.checkpoint_folder import NEXT
from util.checkpoint_writer import CheckpointWriter
from util.distributed import gloo_group
from util.errors import UserError
from util.parallel import local_parameters, own_rows
from util.sharded_content import MOMENTS, STEP, WEIGHTS, Lazy, flatten


class HostShards:
    """How the parameters of a sharded denoiser are split, for copies of the rows in host memory.

    Making it is a collective: its gloo group is for the threads that write checkpoints, and for nothing else.
    """

    def __init__(self, denoiser: Denoiser, groups: tuple[list[str], list[str]]):
        self.groups = groups  # names of the parameters of each group of the optimizer
        self.group = gloo_group()
        self.mesh = DeviceMesh.from_group(self.group, "cpu")
        self.parameters = {name: p.detach() for name, p in denoiser.named_parameters()}

    def with_shape(self, name: str, rows: Tensor) -> Tensor:
        """A tensor called <section>.<parameter> of which `rows` are this process's; any other name as it is."""
        parameter = self.parameters.get(name.partition(".")[2])
        if parameter is None:
            return rows
        shape = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(rows, self.mesh, parameter.placements, run_check=False, **shape)

    def own_part(self, saved: Checkpoint, denoiser: Denoiser) -> Checkpoint:
        """The same checkpoint, of which only this process's rows are read, where they are asked for."""
        whole = saved.path.suffix != ".dcp"
        section = self._rows_of_whole if whole else self._rows_of_shards
        weights = {name: partial(section, saved, denoiser, name) for name in WEIGHTS}
        optimizer = saved.optimizer
        if optimizer is not None:
            state = partial(self._state_of_whole if whole else self._state_of_shards, saved)
            optimizer = Lazy({"state": state, "param_groups": lambda: saved.optimizer["param_groups"]})
        return replace(saved, weights=Lazy(weights), optimizer=optimizer)

    # From a single file: views of it, so that no more than the rows is read.

    def _rows_of_whole(self, saved: Checkpoint, denoiser: Denoiser, section: str) -> dict[str, Tensor]:
        state = saved.weights[section]
        check_fit(denoiser, state, saved.path)
        own = self.parameters
        return {name: own_rows(own[name], value) if name in own else value for name, value in state.items()}

    def _state_of_whole(self, saved: Checkpoint) -> dict[int, dict[str, Tensor]]:
        names = (name for group in self.groups for name in group)
        slots = (slot for group in saved.optimizer["param_groups"] for slot in group["params"])
        state = saved.optimizer["state"]
        return {
            slot: {
                key: own_rows(self.parameters[name], value) if key in MOMENTS else value
                for key, value in state.get(slot, {}).items()
            }
            for slot, name in zip(slots, names, strict=False)  # load_optimizer refuses other numbers of them
        }

    # From shards: DCP finds out which files hold the rows.

    def _rows_of_shards(self, saved: Checkpoint, denoiser: Denoiser, section: str) -> dict[str, Tensor]:
        theirs, ours = saved.verified["weights"], list(denoiser.state_dict())
        if different := set(theirs) ^ set(ours):
            raise UserError(f"{saved.path} does not fit the network: {sorted(different)[0]} is in one of them alone")
        own = local_parameters(denoiser)
        rows = {
            name: torch.empty_like(own.get(name, value), device="cpu") for name, value in denoiser.state_dict().items()
        }
        self._read(saved, {f"{section}.{name}": value for name, value in rows.items()})
        return rows

    def _state_of_shards(self, saved: Checkpoint) -> dict[int, dict[str, Tensor]]:
        names = [name for group in self.groups for name in group]
        step = {STEP: torch.empty(len(names))}
        rows = {
            f"{moment}.{name}": torch.empty_like(self.parameters[name].to_local(), device="cpu")
            for moment in MOMENTS
            for name in names
        }
        self._read(saved, step | rows)
        return {
            slot: {"step": step[STEP][slot], **{moment: rows[f"{moment}.{name}"] for moment in MOMENTS}}
            for slot, name in enumerate(names)
        }

    def _read(self, saved: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        tensors = {name: self.with_shape(name, value) for name, value in tensors.items()}
        sharded_checkpoint.read(saved.path, tensors, saved.verified)


@torch.no_grad()
def load_rows(denoiser: Denoiser, rows: Mapping[str, Tensor]) -> None:
    """Fill parameters and buffers of a sharded denoiser with the rows of one section of a checkpoint."""
    own = {**dict(denoiser.named_buffers()), **local_parameters(denoiser)}
    for name, value in rows.items():
        own[name].copy_(value)


class ShardedCheckpointWriter(CheckpointWriter):
    """Writes checkpoints in shards beside training. All processes have one, and call it together."""

    def __init__(self, folder: Path, keep_last: int, last_step: int | None, first_step: int, shards: HostShards):
        super().__init__(folder, keep_last, last_step, first_step)
        self.shards = shards

    def _put(self, content: dict[str, Any], step: int, keep_as_epoch: int | None) -> Path:
        tensors, about = flatten(content, self.shards.groups)
        tensors = {name: self.shards.with_shape(name, value) for name, value in tensors.items()}
        sharded_checkpoint.write(self.folder / NEXT, tensors, about, self.shards.group)
        problem: Exception | None = None
        if dist.get_rank() == 0:
            try:
                path = checkpoint_folder.put_in_place(self.folder, self._previous())
                self._arrange(path, step, keep_as_epoch)
            except OSError as error:
                problem = UserError(f"the checkpoints in {self.folder} cannot be put in order: {error}")
            except Exception as error:  # whatever it is, the others wait to hear of it
                problem = error
        said = [str(problem) or type(problem).__name__ if problem else None]
        dist.broadcast_object_list(said, src=0, group=self.shards.group)
        if problem is not None:
            raise problem
        if said[0] is not None:
            raise UserError(said[0])
        return self.folder / checkpoint_folder.NAME_SHARDED
