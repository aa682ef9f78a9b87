"""The environment of run_jit_multinode.sh as flags of main_jit.py.

One rule: each flag is also a variable, its name in upper case (`LR=1e-4` is `--lr 1e-4`); a switch is 0 or 1; what is
unset or empty passes nothing. A name that is almost one of these is refused, since it would be ignored silently.
"""

import difflib
from collections.abc import Mapping

from util.config import all_flags, parse_args
from util.errors import UserError
from util.flags import flag_type, has_negation

#: read by the launcher, by torchrun or below, and no flag
OWN = """AUTO_SRUN CONDA_ENV_PATH DATA_ROOT DRY_RUN ENABLE_WANDB IMAGENET_ROOT JIT_DIR LOCAL_ADDR LOCAL_RANK MASTER_ADDR
    MASTER_PORT MAX_RESTARTS NNODES NODE_RANK NUM_GPUS PYTHON RANK REQUEUE WORLD_SIZE""".split()
#: names in other launchers -> the name here
ELSEWHERE = {
    "BASE_LR": "BLR",
    "BATCHSIZE": "BATCH_SIZE",
    "CFG_SCALE": "CFG",
    "EPOCH": "EPOCHS",
    "GLOBAL_BATCH_SIZE": "GLOBAL_BATCH",
    "GPUS_PER_NODE": "NUM_GPUS",
    "LEARNING_RATE": "LR",
    "NGPUS": "NUM_GPUS",
    "LRATE": "LR",
    "NEPOCHS": "EPOCHS",
    "NPROC_PER_NODE": "NUM_GPUS",
    "NUM_EPOCHS": "EPOCHS",
    "NUM_NODES": "NNODES",
    "RESUME_FROM": "RESUME",
    "RUN_NAME_BASE": "OUTPUT_DIR",
}

ALMOST = 0.88  # share of letters in common, by difflib: one or two of ten may differ
ALIKE = {"NUM_CPUS", "PATCH_SIZE"}  # names that are set for other programs, though near to one here


def flags_from(environment: Mapping[str, str], argv: list[str]) -> list[str]:
    """Return the flags that the environment stands for; flags in `argv`, which follow them, win.

    Raises:
        UserError: a switch that is not 0 or 1, a name that is almost that of a variable.
    """
    fields = {name.upper(): field for name, field in all_flags().items() if name != "dry_run"}
    refuse_misspelt(environment, [*fields, *OWN])
    words = []
    for variable, field in fields.items():
        flag, value = f"--{field.name}", environment.get(variable)
        if variable == "DATA_PATH":
            value = _data_path(environment, argv)
        if not value:
            continue
        if flag_type(field) is not bool:
            words += [f"{flag}={value}"] if value.startswith("-") else [flag, value]  # "-1e-1" alone is no value
        elif _is_on(variable, value):
            words.append(flag)
        elif has_negation(field):
            words.append(f"--no-{field.name}")
    wandb = environment.get("ENABLE_WANDB")
    if wandb and not _is_on("ENABLE_WANDB", wandb):
        words += ["--wandb_mode", "disabled"]
    return words


def _is_on(variable: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise UserError(f"{variable} is {value!r}; it must be 0 or 1.")
    return value == "1"


def _data_path(environment: Mapping[str, str], argv: list[str]) -> str | None:
    """Return DATA_PATH, DATA_ROOT or, for image folders, IMAGENET_ROOT, which clusters set for everybody."""
    path = environment.get("DATA_PATH") or environment.get("DATA_ROOT")
    if not path and (root := environment.get("IMAGENET_ROOT")):
        data_set = parse_args(argv).get("dataset") or environment.get("DATASET")
        return root if data_set in (None, "", "imagefolder") else None
    return path


def refuse_misspelt(environment: Mapping[str, str], known: list[str]) -> None:
    """Raise a UserError for a variable whose name is one or two letters from a known one, or another launcher's."""
    joined = {name.replace("_", ""): name for name in known if "_" in name}
    for variable in sorted(environment.keys() - set(known)):
        likely = ELSEWHERE.get(variable, joined.get(variable.replace("_", "").upper()))
        if likely is None and "_" in variable and variable not in ALIKE:  # of single words too many are alike
            likely = next(iter(difflib.get_close_matches(variable, known, n=1, cutoff=ALMOST)), None)
        if likely is not None:
            raise UserError(f"{variable} is set, which nothing here reads. Did you mean {likely}? Otherwise unset it.")
