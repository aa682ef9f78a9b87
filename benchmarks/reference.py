"""A checkout of the published JiT or Spectral Forcing release, as it is, in turns with this code:

    python -m benchmarks.step ... --reference DIR

It needs model_jit.py, denoiser.py, whose Denoiser(args) returns the loss of (images, labels) and has update_ema(), and
main_jit.py, whose flags' defaults complete args; they are read from its source, as its imports may be missing here.
What those files do not hold is done as its engine does: torch's AdamW, autocast around the loss, which is read at each
step, and a wait for the device before the EMAs. Its modules have the names of ours: it runs in a process of its own,
this file, which imports none of ours. Nothing of it is compiled on a CPU.
"""

import ast
import copy
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def flag_defaults(script: Path) -> dict[str, Any]:
    """Read the defaults of a script's flags from its source, which is not run; None for those that are computed."""
    found = {}
    for call in (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", "") == "add_argument":
            given = {}
            for keyword in call.keywords:
                with suppress(ValueError):  # not a literal
                    given[keyword.arg] = ast.literal_eval(keyword.value)
            name = ast.literal_eval(call.args[-1]).lstrip("-").replace("-", "_")
            found[name] = given.get("default", False if given.get("action") == "store_true" else None)
    return found


class Release:
    """A turn of the release: `steps` training steps in its process. `peak_gb` is its peak memory on a GPU so far."""

    def __init__(self, folder: Path, config: Any, bf16: bool, steps: int, device: torch.device):
        if missing := [n for n in ("main_jit.py", "model_jit.py", "denoiser.py") if not (folder / n).is_file()]:
            raise SystemExit(f"--reference {folder} lacks {', '.join(missing)}. Name a checkout of a release.")
        given = {name: getattr(config, name) for name in ("model", "img_size", "class_num", "batch_size")}
        args = flag_defaults(folder / "main_jit.py") | given | {"device": device.type, "bf16": bf16, "steps": steps}
        no_compiler = {"TORCHDYNAMO_DISABLE": "1"} if device.type == "cpu" else {}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(args)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())} | no_compiler,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak_gb = None

    def __call__(self) -> None:
        with suppress(BrokenPipeError):  # the process has ended: there is no answer
            print("turn", file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            code = self.process.wait()
            raise SystemExit(f"The process of --reference ended with exit code {code}; see its error above.")
        self.peak_gb = json.loads(line)["peak_gb"]


def main() -> None:
    """Do the steps of a turn for each line of the standard input, which ends with the process that started this one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the release prints is no answer
    from denoiser import Denoiser

    args = Namespace(**json.loads(sys.argv[1]))
    cuda, device = args.device == "cuda", torch.device(args.device)
    torch.set_float32_matmul_precision("high" if cuda else "highest")  # as this code does
    denoiser = Denoiser(args).to(device).train()
    denoiser.ema_params1, denoiser.ema_params2 = (copy.deepcopy(list(denoiser.parameters())) for _ in range(2))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    images = torch.randint(0, 256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8)
    images, labels = (x.pin_memory() if cuda else x for x in (images, torch.arange(args.batch_size) % args.class_num))
    for _ in sys.stdin:
        for _ in range(args.steps):
            x = images.to(device, non_blocking=True).float().div_(255) * 2 - 1
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
                loss = denoiser(x, labels.to(device, non_blocking=True))
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
            denoiser.update_ema()
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None
        print(json.dumps({"peak_gb": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
