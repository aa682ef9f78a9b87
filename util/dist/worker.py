"""The main function of a worker: it maps how the work ended to an exit code and one sentence."""

import atexit
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed import is_initialized

from util.dist.context import find_context
from util.dist.launch import AT_ONCE
from util.dist.preemption import EXIT_CODE, Preempted, finish, listening
from util.errors import UserError

LOST = ("Connection closed by peer", "Connection reset by peer")  # of gloo: another rank has ended


def run_main(run: Callable[[Sequence[str] | None], str | None], argv: Sequence[str] | None = None) -> int:
    """Call `run`; print the line that it returns, or why it ended. Return the exit code for this process's parent.

    0: done; 2: a UserError, explained in a sentence; 1: any other error; 75: asked to stop; 130: a second Ctrl-C.
    """
    ctx = find_context("cpu")
    with listening():
        try:
            line = run(argv)
            if ctx.is_main and line:
                print(line, flush=True)
            return finish(0)
        except Preempted as stop:
            sentence, code, on_all_ranks = str(stop), EXIT_CODE, True
        except UserError as error:
            sentence, code, on_all_ranks = f"error: {error}", 2, error.on_all_ranks or ctx.world_size == 1
        except Exception as error:
            lost = ctx.world_size > 1 and is_initialized() and any(text in str(error) for text in LOST)
            if not lost:  # else the traceback says nothing, and that of the other rank does
                traceback.print_exc()
            sentence, code, on_all_ranks = f"rank {ctx.rank}: {type(error).__name__}: {error}", 1, False
        except KeyboardInterrupt:
            sentence, code, on_all_ranks = "interrupted; the same command resumes", AT_ONCE, False
    code = finish(code, on_all_ranks)
    if is_initialized():
        atexit.register(os._exit, code)  # no destructor may wait for the other ranks
    elif code == 2 and not ctx.is_main:  # every rank has this error: rank 0 says it, and torchrun ends the others
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        time.sleep(10)
    if ctx.is_main or not on_all_ranks:
        print(f"main_jit.py: {sentence}", file=sys.stderr, flush=True)
    if code and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        summary = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}  # of torchrun
        Path(path).write_text(json.dumps({"message": summary}))
    return code
