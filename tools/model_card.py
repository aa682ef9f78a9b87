"""The model card of exported weights: what the files of their run say, and nothing else."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tools.hub import LIBRARY, SAMPLES, TAGS, needs_spectrum
from tools.report import row_of, text
from util.build import describe_operators
from util.checkpoint.published import Checkpoint
from util.evaluation.evaluate import weights_hash
from util.io import read_json
from util.optim import peak_lr


def find_samples(run: Path, checkpoint: Checkpoint, ema: str) -> Path | None:
    """Return the newest grid of samples of these weights in the folder of the run, or None."""
    samples, name = run / "samples", f"epoch{checkpoint.epoch + 1:04d}-{ema}-*"
    grids = [*samples.glob(f"{name}.png"), *samples.glob(f"{name}/grid.png")]
    if checkpoint.at:  # weights of the middle of an epoch
        grids = [grid for grid in grids if checkpoint.at in str(grid.relative_to(samples))]
    else:
        grids = [grid for grid in grids if "-step" not in str(grid.relative_to(samples))]
    return max(grids, key=lambda grid: grid.stat().st_mtime, default=None)


def model_card(
    run: Path, checkpoint: Checkpoint, config: Any, ema: str, parameters: int, grid: Path | None
) -> ModelCard:
    """Return the card of the weights `ema` of a checkpoint: what the run's files say, and nothing else."""
    starts = [read_json(path) for path in sorted(run.glob("config*.json"))]  # one for each start of the run
    starts = [start for start in starts if isinstance(start, dict)]
    facts = {name: value for name, value in facts_of(checkpoint, config, ema, parameters, starts).items() if value}
    reports = [read_json(path) for path in sorted(run.glob("eval/*.json"))]
    own = {"weights": weights_hash(checkpoint.path), "ema": ema}  # others are of an earlier epoch or another EMA
    reports = [report for report in reports if isinstance(report, dict) and own.items() <= report.items()]
    metrics = table([row_of(report) for report in reports]) if reports else "No evaluation of these weights was found."
    commands = [command for record in (*starts, *reports) if (command := command_of(record))]
    picture = (
        f"![Samples]({SAMPLES})\n\nSamples of these weights, `{grid.relative_to(run / 'samples')}`\n\n" if grid else ""
    )
    forcing = config.input_operator == "spectral_forcing"
    filtered = ", behind Spectral Forcing ([2606.15236](https://arxiv.org/abs/2606.15236))" if forcing else ""
    spectrum = ", spectrum_file=PATH" if needs_spectrum(config) else ""
    body = f"""# {config.model}, {config.dataset}, {config.img_size} px

A class-conditional diffusion model of {"latents" if config.latents else "pixels"}: JiT ([arXiv 2511.13720](https://arxiv.org/abs/2511.13720)){filtered}.

{picture}{table([{"": name, "of this model": value} for name, value in facts.items()])}

## Load

In a checkout of the code that made it, with its requirements:

```python
from tools.hub import SpectralJiT
model = SpectralJiT.from_pretrained("path/to/this/folder")  # or user/name
images = model.sample({list(range(min(3, config.class_num)))}, seed=0{spectrum})  # uint8 (B, 3, H, W)
```

## Metrics

{metrics}

## Commands

Those of training and evaluation, without absolute folders.

```bash
{chr(10).join(dict.fromkeys(commands)) or "# not recorded"}
```
"""
    tags = [tag for tag in TAGS if not (config.latents and tag == "pixel-space")]
    return ModelCard(f"---\n{ModelCardData(library_name=LIBRARY, tags=tags).to_yaml()}\n---\n\n{body}")


def facts_of(
    checkpoint: Checkpoint, config: Any, ema: str, parameters: int, starts: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """Return name -> value of what is known of the model and its training; None where the run does not say."""

    def recorded(name: str) -> str:
        return ", ".join(dict.fromkeys(str(start[name]) for start in starts if start.get(name)))

    step, said = checkpoint.run.get("step"), checkpoint.args
    prediction = {"x": "the data", "v": "the velocity", "hybrid": "data and velocity"}[config.pred_param]
    decay = said.get({"ema1": "ema_decay1", "ema2": "ema_decay2"}.get(ema))
    torch_versions = dict.fromkeys(start["versions"]["torch"] for start in starts if "versions" in start)
    latents = None
    if config.latents:
        vae = config.latents["vae"]
        latents = f"{config.channels} x {config.img_size} x {config.img_size}, of the VAE {Path(vae['name']).name}"
        latents += f" (sha256 {vae['sha256'][:12]}...), which decodes samples"
    warmup = f"{config.warmup_epochs:g} epochs" if config.warmup_steps is None else f"{config.warmup_steps} steps"
    rate = f"{peak_lr(config):.3g} after {warmup} of warm-up, {config.lr_schedule}"
    return {
        "data": f"{config.dataset}, {config.class_num} classes" if "dataset" in said else None,
        "image size": f"{config.pixels} px",
        "latents": latents,
        "network": f"{config.model}, {parameters:,} parameters",
        "operators": describe_operators(config),
        "prediction": prediction,
        "steps": f"{step:,}" if step else None,
        "epochs": f"{checkpoint.epoch + 1:,}" if checkpoint.epoch >= 0 else None,
        "batch size": f"{config.global_batch:,}" if config.global_batch else None,
        "learning rate": rate if "lr" in said and config.global_batch else None,
        "weights": ema if decay is None else f"{ema}, decay {decay}",
        "solver": f"{config.sampling_method}, {config.num_sampling_steps} steps, {config.sampling_grid} grid",
        "guidance": f"{config.cfg:g} for t from {config.interval_min:g} to {config.interval_max:g}",
        "commit": recorded("commit"),
        "torch": ", ".join(torch_versions),
        "hardware": recorded("hardware"),
        "licence of the weights": "not stated",
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows {column: value} as a Markdown table; a value that a row lacks is a dash."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([text(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)


def command_of(record: Mapping[str, Any]) -> str | None:
    """Return the recorded command as it can be typed, without the folders of the machine that it ran on."""
    words = [re.sub(r"(^|=)[~/].*/(?=.)", r"\1", word) for word in record.get("command") or ()]
    return f"python {shlex.join(words)}" if words else None
