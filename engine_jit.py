"""Training, top to bottom: build, one step, an epoch, checkpoints, samples and evaluations, the run.

    images x, labels y  ->  flip, time t, noise e  ->  denoiser: mean of (v - v_pred)^2  ->  AdamW  ->  two EMAs

Time, noise, label drop and flip of an image are functions of (seed, step, position in the global batch). So the numbers
do not depend on how many ranks and microbatches share a step, nor on interruptions (with dropout: on the ranks, too).

Shapes: B images of a microbatch on one rank; images (B, 3, H, W), labels and positions (B,).
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoiser import sample_step
from util.build import autocast_dtype, build_denoiser, describe_operators
from util.checkpoint import files
from util.checkpoint.published import Checkpoint
from util.checkpoint.train_state import load_initial_weights, load_train_state, train_state
from util.checkpoint.writer import CheckpointWriter
from util.compile import check_compiler, compile_denoiser
from util.config import check, describe, run_name
from util.cpu_layers import speed_up_on_cpu
from util.data.images import Images, describe_labels
from util.data.loader import DataTimer, GlobalBatchSampler, ImageLoader, open_images, positions
from util.dist import preemption
from util.dist.context import (
    DistContext,
    all_reduce_mean,
    assert_same_across_ranks,
    barrier,
    error_on_all_ranks,
    process_group,
    raise_on_all_ranks,
    run_on_rank0,
)
from util.dist.parallel import (
    assert_equal_replicas,
    build_sharded,
    grad_norm,
    init_sharded,
    no_sync,
    unsharded,
    wrap_ddp,
)
from util.dist.preemption import Preempted, StepVotes
from util.errors import UserError
from util.evaluation import gates
from util.evaluation.decode import decoder
from util.evaluation.evaluate import EvalTarget, build_suite, evaluate_and_write, loggable, metric_line, report_exists
from util.evaluation.generate import sample_grid, setting_name
from util.evaluation.images import spread_labels
from util.evaluation.metrics import MetricSuite
from util.evaluation.validation import Validation, hold_out, init_overlap_warnings, parse_split
from util.io import commit, hardware, provenance, versions, wait_for_file, write_json
from util.log import LOG_NAME, WANDB_ID_NAME, RunLog, duration, progress, read_log, wandb_settings, warn
from util.optim import EMA, build_optimizer, learning_rate, peak_lr
from util.profile import dry_run
from util.resume import init_warnings, load_for_training, start_step
from util.rng import CounterRNG
from util.run_lock import RunLock
from util.schedules import build_time_sampler, other_images_warnings
from util.train_metrics import TrainMetrics, finite_or_none

FIRST_LINE, NEXT_LINE = 15.0, 30.0  # seconds after which the terminal shows a line that the log does not have
Data = tuple[Images, Validation | None, GlobalBatchSampler]


def train(given: Mapping[str, Any], ctx: DistContext) -> str:
    """Train as the flags say, from a checkpoint if there is one. Return a line that names what was written.

    Raises:
        UserError: settings that cannot work, data that cannot be read, a loss that is not finite.
        Preempted: on all ranks, when one was asked to stop; the run is saved.
    """
    config, _, _ = load_for_training(given, ctx)  # refuses what cannot work before the ranks wait for each other
    with ExitStack() as stack:
        stack.enter_context(process_group(ctx, config.dist_timeout, single_process=config.parallel == "fsdp"))

        def hold_folder() -> None:
            stack.enter_context(RunLock(config.output_dir))

        if not config.dry_run:
            run_on_rank0(ctx, hold_folder)
        # Only now is the folder this run's own, and what is read from it will not change.
        config, checkpoint, source, data, step = raise_on_all_ranks(ctx, lambda: open_run(given, ctx))
        finished = checkpoint and config.start_epoch >= config.epochs
        if checkpoint is None and config.start_epoch >= config.epochs:
            raise UserError(f"--start_epoch {config.start_epoch} leaves nothing of --epochs {config.epochs}.")
        if finished and not (
            samples_are_missing(config, config.start_epoch) or validation_is_missing(config, config.start_epoch)
        ):
            run = checkpoint.path.parent
            return (
                f"Nothing to train: {run} has finished {config.start_epoch} of {config.epochs} epochs. "
                f"EPOCHS={config.epochs * 2} continues, RESUME={run} EVALUATE_GEN=1 evaluates. "
                f"Its samples and metrics are in {run}/samples and {run}/eval."
            )
        assert_same_across_ranks("run", (run_name(config), step, len(data[0])), ctx)
        trainer = Trainer(config, given, data, step, checkpoint, source, ctx)
        del checkpoint, source  # their memory, and the disk space of a file that is replaced
        if config.dry_run:
            report = dry_run(trainer)
            del trainer  # DDP must be destroyed before its process group
            return report
        products = trainer.run()
        del trainer
    return "   ".join(f"{name}: {path}" for name, path in products.items())


def open_run(given: Mapping[str, Any], ctx: DistContext) -> tuple[Any, Checkpoint | None, Checkpoint | None, Data, int]:
    """Return configuration, checkpoint to resume, checkpoint to start from, data, and the number of finished steps.

    What cannot work is refused here, before an image is read; what metrics need is looked for later.
    """
    config, checkpoint, source = load_for_training(given, ctx)
    warn(check(config, config.online_eval) + check_compiler(config.compile, ctx.device), ctx)
    warn(checkpoint.notes if checkpoint else (), ctx)
    images = open_images(config)
    warn(images.notes, ctx)
    if checkpoint is None:
        warn(other_images_warnings(config, np.asarray(images.labels)), ctx)
    images, validation = hold_out(images, config)
    sampler = GlobalBatchSampler(
        len(images), config.batch_size, ctx.rank, ctx.world_size, config.accum_iter, config.seed
    )
    step = start_step(checkpoint, config.start_epoch, sampler.steps_per_epoch)
    known = checkpoint.run.get("images") if checkpoint else None
    if known not in (None, found := describe_labels(images.labels)):
        other = f"This run was trained on {known}, and now there are {found}"
        if step % sampler.steps_per_epoch or isinstance(parse_split(config.val_split or "val"), float):
            raise UserError(
                f"{other}: images would be repeated, left out, or both trained on and held out. Restore the data, or "
                "start a new run from these weights (--init_from)."
            )
        warn([other], ctx)
    return config, checkpoint, source, (images, validation, sampler), step


class Trainer:
    """A training run. The constructor builds it; `run` trains to the end."""

    # ---------------------------------------------------------------------------------------------------------- build

    def __init__(
        self,
        config: Any,
        given: Mapping[str, Any],
        data: Data,
        step: int,
        checkpoint: Checkpoint | None,
        source: Checkpoint | None,
        ctx: DistContext,
    ):
        """Build everything that training needs, on all ranks together.

        Args:
            config: the resolved configuration.
            given: the flags on the command line.
            data: training images, validation images, order of the training images.
            step: number of finished steps.
            checkpoint: what the run resumes from; None for a new run.
            source: the checkpoint whose weights a new run starts from; None for fresh weights.
        """
        self.config, self.given, self.ctx = config, given, ctx
        self.folder = Path(config.output_dir)
        self.sharded = config.parallel == "fsdp"

        # Data: uint8 images in an order that (seed, epoch) decides.
        self.images, self.validation, self.sampler = data
        self.loader = ImageLoader(self.images, self.sampler, config.num_workers, ctx.device.type == "cuda")
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = step
        if source is not None:
            warn(init_warnings(config, source) + init_overlap_warnings(config, source.args), ctx)
        self.suite = build_online_suite(config, ctx) if config.online_eval else None
        warn(
            [
                *(self.suite.warnings if self.suite else ()),
                *ema_warnings(config, self.total_steps, new=checkpoint is None),
            ],
            ctx,
        )
        raise_on_all_ranks(ctx, lambda: decoder(config, ctx.device))  # samples need the VAE of latents

        # Model: network and operators, replicated or sharded, with the weights of a checkpoint or fresh ones.
        self.denoiser = self._build_denoiser(fresh=checkpoint is None)
        self.emas = EMA(self.denoiser, config.ema_decay1), EMA(self.denoiser, config.ema_decay2)
        self.optimizer = build_optimizer(self.denoiser, config.weight_decay, (config.beta1, config.beta2))
        self.metrics = TrainMetrics(config.skip_nonfinite)
        self.started_from = raise_on_all_ranks(ctx, lambda: self._load(checkpoint, source))
        for block in self.denoiser.net.blocks:
            block.recompute = config.activation_checkpointing
        if ctx.device.type == "cpu" and not self.sharded:
            speed_up_on_cpu(self.denoiser)
        compile_denoiser(self.denoiser, config.compile, ctx.device)
        self.time_sampler = build_time_sampler(config, ctx.device)
        self.model = self.denoiser if self.sharded else wrap_ddp(self.denoiser, ctx)

        # Checkpoints: the one that has the present weights, and the step of the newest intact one in this folder.
        self.loaded_from = checkpoint.path if checkpoint else None  # until the first save
        here = checkpoint is not None and checkpoint.path.parent.resolve() == self.folder.resolve()
        self.newest_step = self.step if here and checkpoint.path.name in files.NEWEST else None
        self.newest = self.folder / (files.NAME_SHARDED if self.sharded else files.NAME)

    def _build_denoiser(self, fresh: bool) -> torch.nn.Module:
        def build() -> torch.nn.Module:
            torch.manual_seed(self.config.seed)
            return build_denoiser(self.config, autocast_dtype(self.config, self.ctx.device))

        if not self.sharded:
            return build().to(self.ctx.device)
        denoiser = build_sharded(build, self.ctx)
        if fresh:
            init_sharded(denoiser, build, self.ctx)
        return denoiser

    def _load(self, checkpoint: Checkpoint | None, source: Checkpoint | None) -> str:
        """Load weights, EMAs and optimizer. Return a phrase on where the run starts from."""
        if checkpoint is not None:
            load_train_state(checkpoint, self.denoiser, self.optimizer, self.emas)
            self.metrics.load_state_dict(checkpoint.run.get("metrics", {}))
            before, now = checkpoint.run.get("machine", {}), self._machine()
            changed = [
                f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]
            ]
            if changed:
                warn([f"resumed under other conditions, so numbers agree to rounding: {', '.join(changed)}"], self.ctx)
            return f"resumed {checkpoint.path}"
        if source is None:
            return "fresh weights"
        added = load_initial_weights(source, self.config.init_weights, self.denoiser)
        for ema in self.emas:
            ema.load(self.denoiser.state_dict())
        return "; ".join([f"weights {self.config.init_weights} of {source.path}", *added])

    # ------------------------------------------------------------------------------------------------------- one step

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]], step: int) -> Tensor:
        """Do one optimizer step on the next `accum_iter` microbatches. Return the norm of the gradient.

        If loss or gradient is not finite on any rank, no rank changes weights or optimizer. The device decides that and
        the host does not wait for it. Without --skip_nonfinite the EMAs go on; the run stops before they are saved.
        """
        config, ctx = self.config, self.ctx
        if config.attn_dropout or config.proj_dropout:  # only dropout uses torch's generator
            torch.manual_seed(((config.seed * 1_000_003 + step) * 65_537 + ctx.rank) % 2**63)
        total, images = torch.zeros((), device=ctx.device), 0
        for micro in range(config.accum_iter):
            x, y = (part.to(ctx.device, non_blocking=True) for part in next(batches))
            where = positions(ctx.rank, ctx.world_size, micro, len(x))
            rng = CounterRNG(config.seed, step, torch.arange(where.start, where.stop, device=ctx.device))
            x = self.images.prepare(x, rng, config.flip)  # (B, C, H, W)
            time_sampler = self.time_sampler.for_images(x)
            s = sample_step(rng, y, config.image_shape, time_sampler, config.label_drop_prob, config.null_class)
            last = micro == config.accum_iter - 1
            with nullcontext() if last else no_sync(self.model):
                total += self.add_gradient(x, s.y, s.t, s.noise, s.level, s.weight)
            images += len(x) * ctx.world_size
        total = all_reduce_mean(total, ctx)

        parameters = list(self.denoiser.parameters())
        norm = grad_norm(parameters)
        if config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        found_inf = (~torch.isfinite(total + norm)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.steps_per_epoch)
        self.optimizer.found_inf = found_inf
        self.optimizer.step()
        self.optimizer.zero_grad()
        for ema in self.emas:
            ema.update(found_inf if config.skip_nonfinite else None)
        self.metrics.add(step, total, found_inf, images)
        return norm

    def add_gradient(self, *of_microbatch: Any) -> Tensor:
        """Do the forward and backward pass of a microbatch (see Denoiser.forward). Return its part of the loss."""
        loss = self.model(*of_microbatch) / self.config.accum_iter
        loss.backward()
        return loss.detach()

    # ------------------------------------------------------------------------------------------------------- an epoch

    def train_one_epoch(self, epoch: int) -> None:
        """Train from `self.step` to the end of the epoch.

        Raises:
            UserError: on all ranks, for a loss that is not finite, naming step and learning rate.
            Preempted: on all ranks, once the run is saved.
        """
        config, end = self.config, (epoch + 1) * self.steps_per_epoch
        self.denoiser.train()
        self.sampler.set_epoch(epoch, self.step - epoch * self.steps_per_epoch)
        batches = DataTimer(self.loader)
        first, start = self.step, time.perf_counter()
        self.metrics.start = start  # what happens between two epochs is no training
        bar = progress(range(first, end), self.ctx, end - first, f"epoch {epoch + 1}/{config.epochs}", "step")
        for step in bar:
            norm = self.train_step(batches, step)
            self.step = step + 1
            if self.ctx.device.type == "cpu":
                self._stop_if_non_finite()  # there is nothing to wait for
            log_due = self.step % config.log_freq == 0 or self.step == end
            if log_due:
                self._stop_if_non_finite()
            if log_due or self._line_is_due():
                pace = (time.perf_counter() - start) / (self.step - first)
                self._log_step(epoch, norm, batches, pace, bar, log_due)
            self._after_step()

    def _line_is_due(self) -> bool:
        """Whether the terminal, which may show no line for many slow steps, needs one between two lines of the log."""
        seconds = FIRST_LINE if self.shown_at == self.began else NEXT_LINE
        return self.ctx.is_main and time.perf_counter() - self.shown_at > seconds

    def _log_step(self, epoch: int, norm: Tensor, batches: DataTimer, pace: float, bar: Any, to_file: bool) -> None:
        """Show progress; with `to_file` also write a line of the log, on the mean loss since the last one."""
        step, end, grad_norm = self.step - 1, (epoch + 1) * self.steps_per_epoch, float(norm)
        lr = learning_rate(self.config, step, self.steps_per_epoch)
        values = {"epoch": epoch, **self.metrics.read(), "lr": lr, "grad_norm": finite_or_none(grad_norm)}
        if to_file:
            values["data_wait"] = round(batches.share(), 4)
            self.metrics.reset()
            self.log.log("train", step, values)
        self.shown_at = time.perf_counter()
        loss = float("nan") if values["loss"] is None else values["loss"]
        text = f"loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3g}  {values['images_per_s']:.0f} images/s"
        text += f"  {values['data_wait']:.0%} waiting for data" if values.get("data_wait", 0) >= 0.1 else ""
        text += f"  {values['skipped']} non-finite steps skipped" if "skipped" in values else ""
        epochs = f"epoch {epoch + 1}/{self.config.epochs}"
        run_left = f"{duration(pace * (self.total_steps - self.step))} left"
        if self.step == end:
            self.log.info(f"{epochs} done  step {self.step}/{self.total_steps}  {text}  {run_left}")
        elif hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(f"{text}  {run_left}")
        else:
            epoch_left = f"{duration(pace * (end - self.step))} of the epoch"
            self.log.info(f"{epochs}  step {self.step}/{self.total_steps}  {text}  {run_left}, {epoch_left}")

    def _after_step(self) -> None:
        """Save and stop if it is due, after the same step on all ranks."""
        config = self.config
        self._log_saves()
        if self.step % config.log_freq == 0:
            self._report_bad_images()
        minutes = (time.monotonic() - self.saved_at) / 60
        wishes = {
            "stop": preemption.requested() is not None,
            "save": self.ctx.is_main and minutes >= config.save_every_minutes,
        }
        decided = self.votes(wishes)
        self.stopping |= "stop" in decided
        # A vote is read some steps later on a GPU: a save in between has fulfilled it.
        self.save_due |= "save" in decided and self.step - self.votes.lag > self.saved_step
        self.save_due |= bool(config.save_every_steps) and self.step % config.save_every_steps == 0
        if self.step % self.steps_per_epoch:  # at the end of an epoch there is more to do before
            if self.save_due or self.stopping:
                self.save()
            if self.stopping:
                self._stop()

    def _report_bad_images(self) -> None:
        if self.images.bad_image_log is not None:  # --on_bad_image skip
            self.images.bad_image_log.report(self.ctx, self.log, self.step)

    def _stop_if_non_finite(self) -> None:
        """Wait for the device; raise a UserError after more consecutive non-finite steps than tolerated."""
        steps = self.metrics.non_finite_steps()
        if steps is None:
            return
        step, count = steps[0], len(steps)
        path = self.folder / f"nonfinite-step{step:09d}.json"
        where = f"The images and times of the step are in {path}"
        if self.ctx.is_main:
            try:
                write_json(path, {"steps": [self._describe_step(s) for s in steps]})
            except (OSError, UserError) as error:
                where = f"The images and times of the step could not be written ({error})"
        raise error_on_all_ranks(
            f"The loss or a gradient is not finite at step {step} (epoch {step // self.steps_per_epoch}), "
            f"learning rate {learning_rate(self.config, step, self.steps_per_epoch):.3g}"
            f"{f', and in {count} consecutive steps' if count > 1 else ''}. No weight was changed by it, and the last "
            "checkpoint is intact. Usual remedies are a lower BLR, a longer warm-up or --attn_fp32; --skip_nonfinite "
            f"tolerates single steps. {where}."
        )

    def _describe_step(self, step: int) -> dict[str, Any]:
        """Return what the global batch of a step was made of, in the order of its positions."""
        config, device = self.config, self.ctx.device
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.sampler.global_batch
        self.sampler.set_epoch(epoch)
        index = self.sampler.permutation()[within * size : (within + 1) * size].tolist()
        labels = torch.as_tensor(self.images.labels[index], device=device)
        x = torch.stack([self.images[i][0] for i in index]) if config.t_sampler == "spectral_instance" else None
        rng = CounterRNG(config.seed, step, torch.arange(size, device=device))
        x = None if x is None else self.images.prepare(x.to(device), rng, config.flip)
        time_sampler = self.time_sampler if x is None else self.time_sampler.for_images(x)
        s = sample_step(rng, labels, (1, 1, 1), time_sampler, config.label_drop_prob, config.null_class)
        found = {"step": step, "epoch": epoch, "lr": learning_rate(config, step, self.steps_per_epoch)}
        found |= {"index": index, "t": s.t.tolist(), "label": labels.tolist(), "label_after_drop": s.y.tolist()}
        return found if self.images.in_memory else {**found, "file": [self.images.path(i) for i in index]}

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self, keep_as_epoch: int | None = None) -> None:
        """Copy the state to host memory and write it in the background; with `keep_as_epoch` keep it for good."""
        self._report_bad_images()
        self._stop_if_non_finite()
        barrier(self.ctx, self.config.dist_timeout)  # names a rank that does not come
        self.save_due, self.saved_step, self.saved_at = False, self.step, time.monotonic()
        if not self.sharded:
            states = {"model": dict(self.denoiser.named_parameters())}
            states |= {f"ema{i}": ema.shadow for i, ema in enumerate(self.emas, start=1)}
            assert_equal_replicas(self.ctx, states)
        run = {"metrics": self.metrics.state_dict(), "commit": commit(), "versions": versions()}
        run |= {"machine": self._machine(), "images": describe_labels(self.images.labels)}
        state = train_state(
            self.denoiser, self.optimizer, self.emas, self.step, self.steps_per_epoch, self.config.as_dict(), run
        )
        self.writer.save(state, self.step, keep_as_epoch)
        self.loaded_from = None

    def _machine(self) -> dict[str, Any]:
        """Return what decides how sums are rounded: a run that resumes elsewhere agrees to rounding, not to the bit."""
        ranks, microbatches = self.ctx.world_size, self.config.accum_iter
        return {"hardware": hardware(self.ctx.device), "ranks": ranks, "microbatches": microbatches}

    def _log_saves(self) -> None:
        for saved in self.writer.finished():
            epoch, step = divmod(saved.step, self.steps_per_epoch)
            at = f"epoch {epoch}" + (f", step {step} of the next" if step else "")
            self.log.info(f"saved {saved.path} ({at}, blocked training {saved.blocked:.2f} s)")
            seconds = {"blocked_s": round(saved.blocked, 4), "seconds": round(saved.seconds, 3)}
            self.log.log("save", saved.step, {**seconds, "bytes": saved.num_bytes})

    def _wait_for_saves(self) -> None:
        run_on_rank0(self.ctx, self.writer.wait)
        self._log_saves()

    def _keeps(self, epochs_done: int) -> bool:
        """Whether the checkpoint after so many epochs is kept for good."""
        every = self.config.keep_every_epochs
        if every is None:
            every = 100 if self.config.epochs >= 200 else 0
        return every > 0 and epochs_done % every == 0

    def _stop(self) -> None:
        self._wait_for_saves()
        barrier(self.ctx)
        reason = run_on_rank0(self.ctx, preemption.requested) or "another rank"
        raise Preempted(
            f"Stopped by {reason} after step {self.step} of {self.total_steps}, saved in {self.newest}. "
            "The same command resumes."
        )

    # ------------------------------------------------------------------------------------------ samples and evaluation

    def sample_and_evaluate(self, epoch: int) -> None:
        """Draw a grid of samples and, with --online_eval, compute the metrics, with the weights that --ema names."""
        config, ctx = self.config, self.ctx
        step = (epoch + 1) * self.steps_per_epoch
        ema = {"ema1": self.emas[0], "ema2": self.emas[1]}.get(config.ema)
        grid = self.folder / "samples" / f"{setting_name(config, epoch)}.png"
        self.products["samples"] = grid
        with ema.applied() if ema else nullcontext():
            with unsharded(self.denoiser):
                self.products |= gates.record(self.denoiser.net, config, epoch, step, self.folder, ctx, self.log)
            labels = spread_labels(config.wandb_num_vis, config.class_num)
            sample_grid(
                self.denoiser, config, labels, ctx, grid, f"{config.model}  epoch {epoch + 1}  cfg {config.cfg:g}"
            )
            self.log.image("samples", step, grid)
            if self.suite is None:
                return
            target = EvalTarget(self.denoiser, config, epoch, self.loaded_from or self.newest)
            report, self.products["metrics"] = evaluate_and_write(target, self.suite, self.folder / "eval", ctx)
        self.log.log("eval", step, loggable(report))
        self.log.info(f"epoch {epoch + 1}: {metric_line(report)}")

    def _write_samples(self, epoch: int) -> None:
        try:
            self.sample_and_evaluate(epoch)
        except OSError as error:
            raise UserError(f"The samples cannot be written to {self.folder}: {error}.") from error

    def _validate(self, epoch: int) -> None:
        start, step = time.perf_counter(), (epoch + 1) * self.steps_per_epoch
        values = self.validation.measure(self.denoiser, self.emas, self.ctx, self.time_sampler)
        seconds = time.perf_counter() - start
        count = len(self.validation.images)
        self._report_bad_images()
        self.log.log("val", step, {"epoch": epoch, "num_images": count, "seconds": round(seconds, 3), **values})
        text = "  ".join(f"{name} {values[f'loss_{name}']:.4f}" for name in ("model", "ema1", "ema2"))
        self.log.info(
            f"epoch {epoch + 1}/{self.config.epochs}: validation loss {text}  ({count} images, {seconds:.1f} s)"
        )

    # -------------------------------------------------------------------------------------------------------- the run

    def run(self) -> dict[str, Path]:
        """Train to the last epoch. Return what was written: name -> path."""
        config, ctx = self.config, self.ctx
        run_on_rank0(ctx, self._prepare_folder)
        self.log = self._open_log()
        self._log_start()
        self.writer = CheckpointWriter(
            self.folder, config.keep_last, self.newest_step, self.step, ctx, sharded=self.sharded
        )
        self.products: dict[str, Path] = {"checkpoint": self.newest, "log": self.folder / LOG_NAME}
        self.votes = StepVotes(ctx, ("stop", "save"))
        self.stopping = self.save_due = False
        self.saved_step = self.step
        self.saved_at = time.monotonic()
        exit_code = 1
        try:
            self._resume_end_of_epoch()
            self.began = self.shown_at = time.perf_counter()
            for epoch in range(self.step // self.steps_per_epoch, config.epochs):
                self.train_one_epoch(epoch)
                self._report_bad_images()
                self._end_epoch(epoch)
            exit_code = 0
        except Preempted:
            exit_code = 0  # for Weights & Biases the run has not failed
            raise
        finally:
            self.loader.close()
            self.writer.close()
            self.log.close(exit_code)
        return self.products

    def _resume_end_of_epoch(self) -> None:
        """Make up for what an interruption at the end of an epoch left undone."""
        epochs_done, within = divmod(self.step, self.steps_per_epoch)
        if within or not epochs_done:
            return
        if self._keeps(epochs_done) and self.ctx.is_main:
            self.writer.keep(epochs_done - 1)
        if run_on_rank0(self.ctx, lambda: validation_is_missing(self.config, epochs_done)):
            self._validate(epochs_done - 1)
        if run_on_rank0(self.ctx, lambda: samples_are_missing(self.config, epochs_done)):
            self.log.info(f"Samples for epoch {epochs_done} are missing; generating them first.")
            self._write_samples(epochs_done - 1)

    def _end_epoch(self, epoch: int) -> None:
        config, done = self.config, epoch + 1
        last, samples_due, keeps = done == config.epochs, samples_are_due(config, done), self._keeps(done)
        due = last or samples_due or keeps or self.stopping or self.save_due or done % config.save_last_freq == 0
        if due:  # a checkpoint first: what is interrupted after it can be made up for
            self.save(keep_as_epoch=epoch if keeps else None)
        if self.stopping:
            self._stop()
        if validation_is_due(config, done):
            self._validate(epoch)
        if samples_due:
            self._wait_for_saves()
            self._write_samples(epoch)

    def _open_log(self) -> RunLog:
        try:
            settings = wandb_settings(self.config, run_name(self.config))
            return RunLog(self.folder, self.ctx, settings, self.step, self.config.tensorboard)
        except OSError as error:
            raise UserError(f"The output folder {self.folder} cannot be written: {error}.") from error

    def _prepare_folder(self) -> None:
        """Put in order what a killed run left, refuse a disk without room, and write the resolved configuration."""
        needed = 20 * sum(p.numel() for p in self.denoiser.parameters())  # bytes: weights, two EMAs, two moments
        content = {"args": self.config.as_dict(), "resolved": self._resolved(), **provenance(self.ctx.device)}
        try:
            for folder in (self.folder, self.folder / "samples", self.folder / "eval"):
                if folder.exists() and not folder.is_dir():
                    raise UserError(f"{folder} is a file where the run needs a folder. Move it away.")
            for name in (LOG_NAME, WANDB_ID_NAME, files.NAME, files.NEXT):
                if (path := self.folder / name).exists() and not path.is_file():
                    raise UserError(f"{path} is no file, and the run writes one of that name. Move it away.")
            self.folder.mkdir(parents=True, exist_ok=True)
            files.recover(self.folder, self.newest_step)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise UserError(
                    f"The disk of {self.folder} is too full for a checkpoint: {needed / 1e9:.3g} GB are needed and "
                    f"{free / 1e9:.3g} GB are free. Make room, or name an --output_dir on another disk."
                )
            write_json(self._config_path(), content)
        except OSError as error:
            raise UserError(f"The output folder {self.folder} cannot be written: {error}.") from error

    def _config_path(self) -> Path:
        return self.folder / (f"config-from-step{self.step:09d}.json" if self.step else "config.json")

    def _resolved(self) -> dict[str, Any]:
        """Return what follows from the settings, the data and the machine."""
        return {
            "peak_lr": peak_lr(self.config),
            "steps_per_epoch": self.steps_per_epoch,
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "ranks": self.ctx.world_size,
            "device": str(self.ctx.device),
            "operators": describe_operators(self.config),
            "started_from": self.started_from,
        }

    def _log_start(self) -> None:
        """Log the resolved configuration, and print its summary."""
        config, ctx, path, resolved = self.config, self.ctx, self._config_path(), self._resolved()
        if self.suite is not None and not wait_for_file(path):
            raise UserError(f"{self.folder} must be a folder that all ranks share, or set ONLINE_EVAL=0.")
        self.log.log("start", self.step, resolved)
        within = self.step % self.steps_per_epoch
        at = f" (from its step {within + 1})" if within else ""
        self.log.info(
            f"{config.model} at {config.img_size} px, {resolved['parameters']:,} parameters, "
            f"{ctx.world_size} x {ctx.device.type}, {self.started_from}\n"
            f"  {resolved['operators']}\n"
            f"  global batch {config.global_batch} = {config.batch_size} x {ctx.world_size} ranks x "
            f"{config.accum_iter} microbatches, learning rate {resolved['peak_lr']:.3g}, "
            f"{self.steps_per_epoch} steps per epoch\n"
            f"  epochs {config.start_epoch + 1}{at} to {config.epochs}, in {self.folder} ({path.name})\n"
            f"settings that differ from the defaults:\n{describe(config, self.given, ctx.world_size)}"
        )


def build_online_suite(config: Any, ctx: DistContext) -> MetricSuite:
    """Build the metrics of --online_eval. Their errors say how to train without."""
    try:
        return build_suite(config, ctx, config.num_images)
    except UserError as error:
        error.args = (f"{error} ONLINE_EVAL=0 (--no-online_eval) trains without an evaluation.",)
        raise


def samples_are_due(config: Any, epochs_done: int) -> bool:
    return epochs_done == config.epochs or epochs_done % config.eval_freq == 0


def samples_are_missing(config: Any, epochs_done: int) -> bool:
    """Whether the run was interrupted between the checkpoint of an epoch and the samples and metrics made from it."""
    folder = Path(config.output_dir)
    if epochs_done == 0 or not samples_are_due(config, epochs_done) or not files.find(folder):
        return False
    if not any((folder / "samples").glob(f"epoch{epochs_done:04d}-*.png")):
        return True
    return config.online_eval and not report_exists(folder / "eval", config, epochs_done - 1)


def validation_is_due(config: Any, epochs_done: int) -> bool:
    return config.val_split is not None and (epochs_done == config.epochs or epochs_done % config.val_freq == 0)


def validation_is_missing(config: Any, epochs_done: int) -> bool:
    """Whether the run was interrupted between the checkpoint of an epoch and its validation loss, by the log."""
    folder = Path(config.output_dir)
    if epochs_done == 0 or not validation_is_due(config, epochs_done) or not files.find(folder):
        return False
    return epochs_done - 1 not in (line.get("epoch") for line in read_log(folder) if line.get("event") == "val")


def ema_warnings(config: Any, total_steps: int, new: bool) -> list[str]:
    """Warn if an EMA averages over more steps than the run has: it still consists of the initial weights."""
    found = []
    for name in ("ema_decay1", "ema_decay2"):
        decay = getattr(config, name)
        if (1 - decay) * total_steps < 1:
            horizon = f"{1 / (1 - decay):.0f}" if decay < 1 else "infinitely many"
            advice = f"--{name} {max(0.0, 1 - 5 / total_steps):.3g} averages over a fifth of the run"
            found.append(
                f"--{name} {decay} averages over about {horizon} steps and the run has {total_steps}: its samples will "
                f"look like the initial weights, grey. {advice if new else '--sample --ema model samples the weights'}"
            )
    return found
