"""What run_jit_multinode.sh becomes on each node: python -m tools.launch ARGUMENTS-OF-TORCHRUN main_jit.py FLAGS.

The environment becomes flags (util/environment.py), and torchrun runs in this process (util/dist/launch.py). With
DRY_RUN=1 the command is checked and printed, and nothing starts.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from util.dist.launch import block_signals, launch
from util.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Launch, or check. Return the exit code: that of the work, or 2 after an error that a sentence explains."""
    block_signals()  # before torch starts threads, which would get them
    from util.environment import flags_from

    at = next(i for i, word in enumerate(arguments) if word.endswith("main_jit.py"))
    torchrun, flags = list(arguments[: at + 1]), list(arguments[at + 1 :])
    try:
        flags = flags_from(os.environ, flags) + flags
        command = shlex.join([sys.executable, "-P", "-m", "tools.launch", *torchrun, *flags])
        if os.environ.get("DRY_RUN") == "1":
            check(torchrun, flags)
            print(command)
            return 0
    except UserError as error:
        print(f"run_jit_multinode.sh: error: {error}", file=sys.stderr)
        return 2
    print(f"run_jit_multinode.sh: {command}", file=sys.stderr, flush=True)
    return launch([*torchrun, *flags])


def check(torchrun: Sequence[str], flags: Sequence[str]) -> None:
    """Raise a UserError for settings, checkpoints and data that a start would refuse; print warnings."""
    from main_jit import check_start
    from util.config import parse_args
    from util.dist.context import find_context

    numbers = dict(re.findall(r"--(nproc_per_node|nnodes)=(\d+)", " ".join(torchrun)))
    world_size = int(numbers["nproc_per_node"]) * int(numbers.get("nnodes", 1))
    given = parse_args(flags)
    check_start(given, replace(find_context(given.get("device")), world_size=world_size))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
