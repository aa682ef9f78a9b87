"""From the first step of a call to its last: epochs, checkpoints, looks at samples, requests to stop."""

import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from denoiser import draw
from engine_jit import Recipe, Training, stop_if_non_finite, train_one_epoch
from spectral_conditioning import InstanceTimes
from util import bad_images, gates, preemption, provenance, replicas, watch
from util import checkpoint as ckpt
from util.build import DenoiserConfig
from util.checkpoint_folder import NAME_SHARDED
from util.checkpoint_writer import CheckpointWriter
from util.data import Images, to_float
from util.distributed import World, from_main, wait_for_all
from util.errors import NonFiniteError
from util.evaluation import Subject, evaluate_and_write, loggable, metric_line, report_name
from util.generation import Sampling, setting_name
from util.held_out import HeldOut
from util.loader import GlobalBatchSampler
from util.logger import LOG_NAME, RunLog
from util.metrics import MetricSuite
from util.parallel import gathered, local
from util.preemption import Preempted
from util.preparation import draw_grid, spread_labels
from util.votes import Votes


@dataclass
class Loop:
    """A run in progress. `suite` is there with --online_eval, `held_out` with --val_split.

    `writer` is there on rank 0, and on all where the network is in shards. `newest` is the checkpoint that it writes.
    """

    training: Training
    images: Images
    loader: DataLoader
    sampler: GlobalBatchSampler
    recipe: Recipe
    args: Namespace
    shape: DenoiserConfig
    world: World
    log: RunLog
    writer: CheckpointWriter | None
    suite: MetricSuite | None
    held_out: HeldOut | None
    products: dict[str, Path] = field(default_factory=dict)  # what was written: name -> path

    def __post_init__(self):
        self.folder = Path(self.args.output_dir)
        self.newest = self.folder / (NAME_SHARDED if self.args.parallel == "fsdp" else ckpt.NAME)
        self.votes = Votes(("stop", "save"), self.world)
        self.stopping, self.save_is_due = False, False
        self.saved_step, self.saved_at = 0, time.monotonic()

    def run(self, step: int) -> dict[str, Path]:
        """Everything from `step` on, the number of steps that are done, to the end.

        Raises:
            Preempted: on all processes, when one was asked to stop; the run is saved.
            UserError: a loss that is not finite, a checkpoint that cannot be written.
        """
        self.step = step
        self.products = {"checkpoint": self.newest, "log": self.folder / LOG_NAME}
        length = self.recipe.steps_per_epoch
        self.saved_step = step
        if self.world.main and step and step % length == 0 and self._keeps(step // length):
            self.writer.keep(step // length - 1)  # an interruption may have come between the checkpoint and this
        if step % length == 0 and from_main(self.world, lambda: look_is_missing(self.args, step // length)):
            self.log.say(f"the look at samples after epoch {step // length} was due and is missing: it comes first")
            with watch.paused(f"the look at samples after epoch {step // length}"):
                self._look(step // length - 1)
        self.first_step, self.began = step, time.perf_counter()
        for epoch in range(step // length, self.recipe.epochs):
            start = time.perf_counter()
            self.sampler.set_epoch(epoch, self.step - epoch * length)
            try:
                train_one_epoch(
                    self.training, self.loader, epoch, self.step, self.recipe, self.world, self.log, self._after_step
                )
            except NonFiniteError as error:
                raise self._with_its_batches(error) from None
            self._report_bad_images()
            self.log.say(f"epoch {epoch + 1}/{self.args.epochs} done in {time.perf_counter() - start:.1f} s")
            self._end_epoch(epoch)
        return self.products

    def _after_step(self, step: int) -> None:
        self.step = step
        if step == self.first_step + 1:
            self._say_first_step()
        self._tell_what_is_written()
        if step % self.args.log_freq == 0:
            self._report_bad_images()
        minutes = (time.monotonic() - self.saved_at) / 60
        decided = self.votes(
            {
                "stop": preemption.requested() is not None,
                "save": self.world.main and minutes >= self.args.save_every_minutes,
            }
        )
        self.stopping |= "stop" in decided
        every = self.args.save_every_steps
        asked_since = step - self.votes.lag > self.saved_step  # else a save has come between the wish and its answer
        self.save_is_due |= ("save" in decided and asked_since) or bool(every and step % every == 0)
        if step % self.recipe.steps_per_epoch:  # the end of an epoch has more to do before it can be saved
            if self.save_is_due or self.stopping:
                self._save()
            if self.stopping:
                self._stop()

    def _say_first_step(self) -> None:
        """How long it took, with what happens once (workers start, blocks are compiled), and where the next line is."""
        stop_if_non_finite(self.training.window, self.recipe)  # waits for the device, where the step may only be queued
        seconds, every, length = time.perf_counter() - self.began, self.recipe.log_freq, self.recipe.steps_per_epoch
        logged = min(-(-self.step // n) * n for n in (every, length))
        follows = f"; the loss follows at step {logged}" if logged > self.step else ""
        self.log.say(f"first step done {seconds:.1f} s after training began{follows}")

    def _end_epoch(self, epoch: int) -> None:
        args, done = self.args, epoch + 1
        last, looks = done == args.epochs, look_is_due(done, args)
        keeps = self._keeps(done)
        if self.held_out and (last or done % args.val_freq == 0):
            watch.arrived(f"the held-out loss of epoch {done}")
            self.held_out.record(self.training, epoch, self.recipe, self.world, self.log)
        # With a checkpoint, a look that is interrupted can be completed.
        if last or looks or keeps or self.stopping or self.save_is_due or done % args.save_last_freq == 0:
            self._save(keep_as_epoch=epoch if keeps else None)
        if self.stopping:
            self._stop()
        if looks:
            with watch.paused(f"the look at samples after epoch {done}"):
                self._finish_writing()
                self._look(epoch)

    def _keeps(self, epochs_done: int) -> bool:
        """Whether the checkpoint after so many epochs is kept for good."""
        return bool(self.args.keep_every_epochs) and epochs_done % self.args.keep_every_epochs == 0

    def _report_bad_images(self) -> None:
        bad_images.report(self.loader.replaced, self.world, self.log, self.step)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, keep_as_epoch: int | None = None) -> None:
        self._report_bad_images()
        stop_if_non_finite(self.training.window, self.recipe)
        self.save_is_due, self.saved_step, self.saved_at = False, self.step, time.monotonic()
        watch.arrived(f"the checkpoint of step {self.step}")
        if self.args.parallel == "ddp":  # else there are none
            replicas.compare(self._replicas(), self.world)
        if self.writer is not None:
            content = checkpoint_content(self.training, self.step, self.recipe.steps_per_epoch, self.args)
            self.writer.save(content, self.step, keep_as_epoch)

    def _replicas(self) -> dict[str, dict[str, Tensor]]:
        ema1, ema2 = self.training.emas
        weights = dict(self.training.denoiser.named_parameters())
        return {"the weights": weights, "ema1": ema1.averages, "ema2": ema2.averages}

    def _tell_what_is_written(self) -> None:
        for written in self.writer.finished() if self.writer else ():
            epoch, step = divmod(written.step, self.recipe.steps_per_epoch)
            at = f"epoch {epoch}" if step == 0 else f"epoch {epoch}, step {step} of the next"
            self.log.say(f"saved {written.path} ({at}); training waited {written.blocked:.2f} s for it")
            seconds = {"blocked_s": round(written.blocked, 4), "seconds": round(written.seconds, 3)}
            self.log.record("save", written.step, {**seconds, "bytes": written.num_bytes})

    def _finish_writing(self) -> None:
        """Until all processes know that everything is on the disk."""
        from_main(self.world, lambda: self.writer and self.writer.wait())
        self._tell_what_is_written()

    def _stop(self) -> None:
        with watch.paused(f"the checkpoint of step {self.step}"):
            self._finish_writing()
            wait_for_all(self.world)
        reason = from_main(self.world, preemption.requested) or "another process"
        raise Preempted(
            f"stopped by {reason} after step {self.step} of {self.recipe.epochs * self.recipe.steps_per_epoch}, which "
            f"is saved in {self.newest}; the same command goes on"
        )

    def _with_its_batches(self, error: NonFiniteError) -> NonFiniteError:
        """The same error, after rank 0 has written which images, at which t, the steps were made of."""
        path = self.folder / f"nonfinite-step{error.steps[0]:09d}.json"
        if self.world.main:
            provenance.write_json(path, {"steps": [self._batch(step) for step in error.steps]})
        return NonFiniteError(f"{error}. The images and times of that step are in {path}", error.steps)

    def _batch(self, step: int) -> dict[str, Any]:
        """What the global batch of a step was made of, in the order of its positions."""
        recipe, images = self.recipe, self.images
        epoch, within = divmod(step, recipe.steps_per_epoch)
        self.sampler.set_epoch(epoch)
        size = self.sampler.global_batch
        index = self.sampler.permutation()[within * size : (within + 1) * size]
        labels, device = torch.from_numpy(np.asarray(images.labels)[index]), self.world.device
        density = recipe.density
        if isinstance(density, InstanceTimes):
            density = density.of_images(to_float(torch.stack([images[i][0] for i in index])).to(device))
        d = draw(
            *(recipe.seed, step, torch.arange(size, device=device), labels.to(device), (1, 1, 1)),
            *(density, recipe.label_drop_prob, recipe.null_class),
        )
        about = {"step": step, "epoch": epoch, "lr": recipe.lr(step), "index": index.tolist(), "t": d.t.tolist()}
        about |= {"label": labels.tolist(), "label_after_drop": d.y.tolist()}
        return about if images.in_memory else {**about, "file": [images.path(i) for i in index]}

    # ---- looks ------------------------------------------------------------------------------------------------------

    def _look(self, epoch: int) -> None:
        """A grid of samples and, with --online_eval, the metrics, of the weights that --ema names."""
        args, denoiser, world, log = self.args, self.training.denoiser, self.world, self.log
        step = (epoch + 1) * self.recipe.steps_per_epoch
        average = {"ema1": self.training.emas[0], "ema2": self.training.emas[1]}.get(args.ema)
        sampling = Sampling.from_args(args)
        grid = self.folder / "samples" / f"{setting_name(epoch, args.ema, sampling)}.png"
        self.products["samples"] = grid
        with average.applied_to(denoiser) if average else gathered(denoiser):
            labels = spread_labels(args.wandb_num_vis, args.class_num)
            title = f"{args.model}  epoch {epoch + 1}  cfg {args.cfg:g}"
            self.products |= gates.record(denoiser.net, args.ema, epoch, step, self.folder, args.model, world, log)
            draw_grid(denoiser, self.shape, args, labels, world, grid, title)
            log.image("samples", step, grid)
            if self.suite is None:
                return
            checkpoint = from_main(world, lambda: ckpt.find(self.folder))
            subject = Subject(denoiser, self.shape, args.ema, epoch, checkpoint)
            report, self.products["metrics"] = evaluate_and_write(
                *(subject, sampling, args.num_images, self.suite, self.folder / "eval", world),
                keep_features=args.keep_features,
            )
        log.record("eval", step, loggable(report))
        log.say(f"epoch {epoch + 1}: {metric_line(report)}  ({args.num_images} images)")


def checkpoint_content(training: Training, step: int, steps_per_epoch: int, args: Namespace) -> dict[str, Any]:
    """What util/checkpoint.py describes, after `step` steps; the tensors are those that training goes on to change.

    Of sharded ones they are this process's rows.
    """
    denoiser, (ema1, ema2) = training.denoiser, training.emas
    return {
        "model": {name: local(value) for name, value in denoiser.state_dict().items()},
        "model_ema1": ema1.state_dict(denoiser),
        "model_ema2": ema2.state_dict(denoiser),
        "optimizer": training.optimizer.state_dict(),
        "epoch": step // steps_per_epoch - 1,
        "args": args,
        "run": {
            "step": step,
            "steps_per_epoch": steps_per_epoch,
            "window": training.window.state_dict(),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
        },
    }


def look_is_due(epochs_done: int, args: Namespace) -> bool:
    return epochs_done == args.epochs or epochs_done % args.eval_freq == 0


def look_is_missing(args: Namespace, epochs_done: int) -> bool:
    """Whether the run was interrupted between a checkpoint at the end of an epoch and what is made from it."""
    folder = Path(args.output_dir)
    if epochs_done == 0 or not look_is_due(epochs_done, args) or not ckpt.find(folder):
        return False
    if not any((folder / "samples").glob(f"epoch{epochs_done:04d}-*.png")):
        return True
    name = report_name(epochs_done - 1, args.ema, Sampling.from_args(args), args.num_images)
    return args.online_eval and not (folder / "eval" / f"{name}.json").is_file()
