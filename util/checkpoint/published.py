"""Checkpoints in the published form: ours load elsewhere, and published ones load here.

A file is a torch.save'd dict: `model`, `model_ema1`, `model_ema2` (state dicts, keys prefixed "net."), `optimizer`
(AdamW; group 0 without and group 1 with weight decay), `epoch` (last finished one), `args` (a Namespace). Ours add
`run`: what the run needs to resume at the same step, as plain numbers and strings.

Files as people pass them on load as well: without EMAs, optimizer, epoch or args, a bare state dict, safetensors, keys
with "module." or "_orig_mod." in front (DDP, torch.compile) or without "net.".
"""

import json
import os
import stat
import zipfile
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from util.checkpoint import files, sharded
from util.dist.parallel import local_shard
from util.errors import UserError
from util.io import replacing
from util.operators import BLOCK_OPERATORS

WEIGHTS = {"model": "model", "ema1": "model_ema1", "ema2": "model_ema2"}  # name in a flag -> name in the file
OPTIONAL = {name: operator.flag for name, operator in BLOCK_OPERATORS.items()}  # module not in each network -> flag
OPTIONAL |= {"schedule_embedder": "--t_sampler spectral_instance", "levels": "--resolution_schedule"}
PROJ1 = "net.x_embedder.proj1.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, whose tensors are read from disk when they are used."""

    path: Path  # a file, or the folder of a sharded one
    weights: Mapping[str, Mapping[str, Tensor]]  # "model", "model_ema1", "model_ema2", as far as present -> state dict
    optimizer: dict[str, Any] | None  # param_groups, and slot -> tensor for step, exp_avg, exp_avg_sq
    epoch: int  # the last finished one, counted from 0
    args: dict[str, Any]  # the flags it was trained with; disable_dct_patchify alone if the file has none
    sf_source: str  # where that one comes from, for a message
    run: dict[str, Any]  # our additions; empty for a published file
    sf_is_guess: bool = False  # weights alone, whose patch projection a plain JiT and a run of this code both have
    notes: tuple[str, ...] = ()  # warnings, as on newer checkpoints that are damaged

    def state(self, name: str) -> Mapping[str, Tensor]:
        """Return the weights "model", "ema1" or "ema2". Raises UserError if the file lacks them."""
        if WEIGHTS[name] not in self.weights:
            there = ", ".join(flag for flag, key in WEIGHTS.items() if key in self.weights)
            raise UserError(
                f"{self.path} has no weights {name}, only {there}: choose them with --ema or --init_weights."
            )
        return self.weights[WEIGHTS[name]]

    def with_operator(self, given: Mapping[str, Any]) -> "Checkpoint":
        """Return it with the input operator that the flags name, if its own is a guess, or with a warning."""
        if not self.sf_is_guess:
            return self
        flag = next((name for name in ("input_operator", "disable_dct_patchify") if name in given), None)
        if flag is None:
            note = (
                f"{self.path} does not say whether it was trained with Spectral Forcing; it is taken as plain JiT, the "
                "published one with such weights. If one of this project's runs made it: --input_operator"
            )
            return replace(self, notes=(*self.notes, f"{note} spectral_forcing"))
        args = {name: value for name, value in self.args.items() if name != "disable_dct_patchify"}
        return replace(self, args=args, sf_source=f"--{flag} says so", sf_is_guess=False)

    @property
    def at(self) -> str:
        """Part of a file name, "-step000012345", for a checkpoint in the middle of an epoch; else empty."""
        step, length = self.run.get("step"), self.run.get("steps_per_epoch")
        return f"-step{step:09d}" if step and length and step % length else ""

    @property
    def identity(self) -> tuple[str, int, int | None]:
        """What all ranks must have in common that are to use the same checkpoint."""
        return self.path.name, self.epoch, self.run.get("step")


def load(folder: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Read the newest checkpoint of a run, or the one called `name`, without executing anything in it.

    A damaged newest one is passed over for the one before it, which `notes` says. UserError if none is intact.
    """
    newest, folder = files.find(folder), Path(folder)
    if name is not None or newest is None:
        return _read(folder / (name or files.NAME))
    problems = []
    for path in files.candidates(folder):
        try:
            checkpoint = _read(path)
        except UserError as error:
            problems.append(error)
            continue
        instead = f"using {path.name} of step {checkpoint.run.get('step', 'unknown')} instead"
        return replace(checkpoint, notes=tuple(f"{problem} ({instead})" for problem in problems))
    raise problems[0]


def _read(path: Path) -> Checkpoint:
    if not path.exists():
        others = ", ".join(other.name for other in files.candidates(path.parent)) or "no checkpoint"
        there = f"that folder has {others}" if path.parent.is_dir() else "there is no such folder"
        raise UserError(f"No checkpoint {path}: {there}.")
    if not path.is_file() and path.suffix != ".dcp":
        raise UserError(f"{path} is no file; --checkpoint names a file in the folder of the run.")
    if path.suffix == ".dcp":
        return _understand(path, sharded.load(path))
    if path.suffix == ".safetensors":
        return _understand(path, read_safetensors(path))
    files.verify(path)
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:  # torch advises to execute it all the same
        raise UserError(
            f"{path} cannot be read as a checkpoint: it holds other objects than tensors and plain settings, and "
            "loading them could execute code. Save its state dict alone, with the code that wrote it."
        ) from error
    except Exception as error:  # of many kinds: a damaged or foreign file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if isinstance(content, dict) and content.get("optimizer") is not None:
        content["optimizer"] = _adamw(content["optimizer"])
    return _understand(path, content)


def _adamw(state: Any) -> dict[str, Any] | None:
    """Return an AdamW's state by slot; None for another optimizer's, from which no training resumes."""
    try:
        groups, slots = state["param_groups"], state["state"]
        moments = {key: {slot: values[key] for slot, values in slots.items()} for key in ("step", *sharded.MOMENTS)}
    except (KeyError, TypeError, AttributeError):
        return None
    return {"param_groups": groups, **moments}


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the weights of a safetensors file, with the settings if it is an export of this project."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        settings = json.loads(about.get("config", "{}"))
        if settings and isinstance(settings, dict):
            settings.setdefault("sf_snr_floor", 1.0)  # the default when exports left it out
        if "denoiser" in about:  # an earlier export, in which two settings had other names
            settings = json.loads(about["denoiser"])
            settings["disable_dct_patchify"] = not settings.pop("spectral_forcing")
            if (fixed := settings.pop("sf_fixed_scale")) is not None:
                settings |= {"disable_dct_scale_schedule": True, "dct_fixed_scale": fixed}
        return {"model": tensors, "args": Namespace(**settings)}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def write_safetensors(path: str | Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write weights and, as strings, what is to be known of them; the file appears when it is complete.

    safetensors puts a file of its own, which the owner alone may read, in the place of the one that it is given.
    """
    with replacing(path) as file:
        save_file({name: value.contiguous() for name, value in weights.items()}, file.name, metadata=dict(about))
        os.chmod(file.name, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        with open(file.name, "rb") as written:
            os.fsync(written.fileno())


def _understand(path: Path, content: Any) -> Checkpoint:
    """Check the entries of a checkpoint, and bring them to the current form."""
    foreign = f"{path} is not a JiT checkpoint"
    if not isinstance(content, dict):
        raise UserError(f"{foreign}: it holds a {type(content).__name__}.")
    if "model" not in content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    if "model" not in content:
        raise UserError(f"{foreign}: it has no entry model, but {', '.join(map(str, list(content)[:5])) or 'nothing'}.")
    states = {key: _state_dict(content[key], foreign) for key in WEIGHTS.values() if key in content}
    args, epoch, run = content.get("args", Namespace()), content.get("epoch", -1), content.get("run")
    if not isinstance(args, Namespace) or not isinstance(epoch, int):
        raise UserError(f"{foreign}: args must be a Namespace and epoch an integer.")
    args, source, guess = dict(vars(args)), "its settings say so", False
    if "disable_dct_patchify" not in args:
        linear = any(_key(key) == PROJ1 and value.dim() == 2 for key, value in content["model"].items())
        args["disable_dct_patchify"] = not linear
        guess = not linear and "model" not in args
        source = f"its settings do not say, and its patch projection is {'linear' if linear else 'a convolution'}"
    if isinstance(args.get("batch_size"), int) and isinstance(args.get("world_size"), int):
        args.setdefault("global_batch", args["batch_size"] * args["world_size"])  # published runs do not record it
    if isinstance(args.get("window_size"), int) and args["window_size"] <= 0:
        args["window_size"] = None  # the whole image
    run = dict(run) if isinstance(run, dict) else {}
    numbers = [run.get("step", 0), run.get("steps_per_epoch", 0)]
    groups = [run.get("metrics", {}), run.get("machine", {})]
    if not all(type(n) is int and n >= 0 for n in numbers) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{foreign}: its entry run is damaged.")
    if "window" in run:  # earlier names
        run["metrics"] = {{"in_a_row": "consecutive"}.get(name, name): v for name, v in run.pop("window").items()}
    return Checkpoint(path, states, content.get("optimizer"), epoch, args, source, run, guess)


def _state_dict(state: Any, foreign: str) -> Mapping[str, Tensor]:
    """Return a state dict with this project's keys and its patch projection as a convolution."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{foreign}: its weights are not a state dict.")
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise UserError(f"{foreign}: {key} is not a dense tensor of floating-point numbers.")
    if not isinstance(state, sharded.Section):
        state = {_key(key): value for key, value in state.items()}
    if PROJ1 not in state:
        raise UserError(f"{foreign}: its weights lack {PROJ1}.")
    weight = state[PROJ1]  # convolution (bottleneck, C, p, p), or linear (bottleneck, 3*p*p) in published ones
    size = weight[0].numel() if weight.dim() in (2, 4) and len(weight) else 0
    p = weight.shape[-1] if weight.dim() == 4 else round((size / 3) ** 0.5)
    if size == 0 or weight.shape[1:] not in ((weight.shape[1], p, p), (3 * p * p,)):
        raise UserError(f"{foreign}: {PROJ1} is {list(weight.shape)}, not for square patches.")
    return state if weight.dim() == 4 else {**state, PROJ1: weight.reshape(-1, 3, p, p)}


def _key(key: str) -> str:
    """Return the name of a parameter without what DDP and torch.compile put in, and with "net." in front."""
    plain = key.replace("module.", "").replace("_orig_mod.", "")
    return plain if plain.startswith("net.") else f"net.{plain}"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path, keep: Collection[str] = ()) -> None:
    """Fill a module, sharded or not, with a state dict; the tensors named in `keep` stay as they are.

    All other keys and shapes must agree: UserError names what differs, and the module is then unchanged. It also names
    a weight that is not finite.
    """
    own = {name: value for name, value in module.state_dict().items() if name not in keep}
    check_fit(own, state, path)
    copy_into(own, state)
    check_finite(own, path)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise a UserError that names a tensor with NaN or infinite numbers."""
    for name, value in tensors.items():
        if not local_shard(value).isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite numbers. Use another checkpoint or other weights.")


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a UserError that names the keys and shapes in which a checkpoint's state dict differs from `own`."""
    wrong = [f"{k} is missing" for k in own if k not in state] + [f"{k} is unknown" for k in state if k not in own]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            wrong.append(f"{key} is {list(state[key].shape)} and the network's is {list(own[key].shape)}")
    if wrong:
        what = "; ".join(wrong[:4]) + "; ..." * (len(wrong) > 4)
        for name, flag in OPTIONAL.items():
            has, wants = (any(f".{name}." in key for key in keys) for keys in (state, own))
            what += f" (only {'the file' if has else 'the network'} has {name}: {flag})" if has != wants else ""
        raise UserError(f"{path} does not fit the network: {what}.")


@torch.no_grad()
def copy_into(targets: Mapping[Any, Tensor], state: Mapping[Any, Tensor]) -> None:
    """Fill tensors, sharded or not, from the unsharded ones of a checkpoint."""
    if isinstance(state, sharded.Section):
        return state.copy_to(targets)
    for key, target in targets.items():
        value = state[key].reshape(target.shape)  # AdamW's moments of PROJ1 may be in the linear layout
        if isinstance(target, DTensor):  # sharded by rows: no more than this rank's are read from the file
            parts, rank = value.chunk(target.device_mesh.size()), target.device_mesh.get_local_rank()
            value = parts[rank] if rank < len(parts) else value[:0]  # fewer rows than ranks
            target = target.to_local()
        target.copy_(value)


def whole(state: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return a checkpoint's state dict with unsharded tensors in host memory."""
    tensors = {key: torch.empty_like(value, device="cpu") for key, value in state.items()}
    copy_into(tensors, state)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Fill an AdamW, sharded or not, from a checkpoint's `optimizer`; UserError if groups or shapes differ."""
    own, theirs = optimizer.param_groups, state["param_groups"]
    # The checkpoint says what the optimizer computes; how it is executed is for this process to say.
    execution = {key: own[0][key] for key in ("fused", "foreach", "capturable", "differentiable")}
    try:
        values = {slot: {"step": torch.as_tensor(step).clone()} for slot, step in state["step"].items()}
        slots = [slot for group in theirs for slot in group["params"]]
        parameters = dict(zip(slots, (p for group in own for p in group["params"]), strict=True))
        for part in (values, *(state[moment] for moment in sharded.MOMENTS)):
            if part and part.keys() != parameters.keys():  # before the first step there is none
                raise ValueError("it lacks the state of some parameters")
        for moment in sharded.MOMENTS:
            targets = {slot: torch.zeros_like(parameters[slot], requires_grad=False) for slot in values}
            copy_into(targets, state[moment])
            for slot, target in targets.items():
                values[slot][moment] = target
        optimizer.load_state_dict({"state": values, "param_groups": [{**group, **execution} for group in theirs]})
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its optimizer does not fit the network: {error}") from error
