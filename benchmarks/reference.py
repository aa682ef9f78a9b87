"""Another checkout of the JiT family beside ours, in a process of its own (reference_process.py).

It needs `model_jit.py` with JiT_models, and `denoiser.py` with Denoiser(args), whose forward(x, labels) is the loss,
with generate(labels) and update_ema(). Nothing is copied from it. What those files do not hold is written in
reference_process.py as such checkouts have it: the loss is read and the device waited for at each step, AdamW is
torch's default, autocast is around forward() and generate(), or within them where the checkout has it there. A float32
attention product or decorators of torch.compile are theirs. TF32 is on as in ours.

On a CPU the decorators are taken off while the files are imported, and autocast("cuda") in them does nothing; bf16 is
then an autocast around the whole, which their autocast(enabled=False) for CUDA does not switch off. On a GPU both
processes hold their memory at the same time.
"""

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import Variants

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULTS = {
    **{"attn_dropout": 0.0, "proj_dropout": 0.0, "label_drop_prob": 0.1, "P_mean": -0.8, "P_std": 0.8, "t_eps": 0.05},
    **{"noise_scale": 1.0, "ema_decay1": 0.9999, "ema_decay2": 0.9996, "pred_param": "x"},
    **{
        "batches": 1,
        "sampling_method": "heun",
        "num_sampling_steps": 50,
        "cfg": 2.9,
        "interval_min": 0.1,
        "interval_max": 1.0,
    },
}


class Reference:
    """Variants of the checkout in options.reference, name -> precision; a context, which ends the process.

    Args:
        task: "step", with `steps` and `lr` in `flags`, or "sampler", with `batches` and its flags of sampling.
        decorators: whether its decorators of torch.compile stay.
    """

    def __init__(self, options: argparse.Namespace, task: str, variants: dict[str, str], decorators: bool, **flags):
        folder = Path(options.reference).resolve()
        missing = [name for name in ("model_jit.py", "denoiser.py") if not (folder / name).is_file()]
        if missing:
            raise SystemExit(f"--reference {folder}: it has no {' and no '.join(missing)}")
        same = ("model", "img_size", "class_num", "batch_size", "device", "clock")
        setting = DEFAULTS | flags | {name: getattr(options, name) for name in same}
        setting |= {"folder": str(folder), "task": task, "variants": variants, "decorators": decorators}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reference_process"],
            **{"cwd": REPOSITORY, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        )
        self.there = self._ask(setting)

    def join(self, variants: Variants) -> None:
        """Take turns with these."""
        variants.peaks |= self.there["peaks"]
        variants.failed |= self.there["failed"]
        variants.turns |= {name: lambda name=name: self._turn(name) for name in self.there["peaks"]}

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()  # the end of its input is the end of it

    def _turn(self, name: str) -> float:
        """Seconds, by its own clock."""
        answer = self._ask(name)
        if "failed" in answer:
            raise torch.OutOfMemoryError(answer["failed"])
        return answer["seconds"]

    def _ask(self, what: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has ended, which the next line finds
            print(json.dumps(what), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of --reference ended with {self.process.wait()}; what it said is above")
        return json.loads(line)
