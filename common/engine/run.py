"""Owns the run directory. All ranks take every decision (save, stop, give up) at the same step."""

import contextlib
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .. import distributed, features
from ..multicrop import MEAN, STD, TRIES
from . import checkpoint, options
from .errors import ArgumentError, CheckpointError, DataError, Diverged, Stopped, border, say
from .files import claim, same_parent, write_assignments, write_json
from .launch import autocast_dtype
from .log import Log, Meter, step_line
from .stops import Stops
from .unreadable import Unreadable

NOT_OURS = "is not what a run has written"
MANY = 20_000_000  # with more images, "auto" keeps no clusters


class Run:
    """Owns one run directory: logs, saves, resumes, stops.

    A training loop uses only images, device, steps, autocast, log, features and timed. docs/copy.md shows ten
    lines that replace them in another project.

    config: a RunOptions. clusters: number per head that the log counts (default: config.prototypes).
    model: has `backbone`, the trunk that is saved and evaluated. eval_cluster.py also needs `prototypes` (one
        or several linear layers), and uses a `projection_head` (linear layers, batch norm, ReLU).
    memory: everything else that the next step depends on, or None. All ranks call its state_dict(), which may
        gather over ranks, and load_state_dict(). The state holds tensors and plain values, in data-set order,
        so that another number of ranks can load it.
    remedy: advice that follows a warning of the log. assignments: whether to keep the cluster of each image:
    "on", "off" or "auto". about: more entries for the info in backbone.pt, such as sobel=True.
    Every epoch has len(images) // batch_size steps.
    """

    def __init__(self, config, method, images, model, optimizer, memory=None, remedy="", heads=1,
                 clusters=None, assignments="on", **about):
        c = self.config = config
        self.method, self.images, self.model, self.memory, self.remedy = method, images, model, memory, remedy
        self.device = next(model.parameters()).device
        self.dtype = autocast_dtype(c.precision, self.device)
        self.kept = assignments == "on" or (assignments == "auto" and len(images) <= MANY)
        self.meter = Meter(clusters or c.prototypes, len(images) * self.kept, heads, self.device)
        self.objects = {"meter": self.meter, "model": model, "optimizer": optimizer}
        self.objects |= {} if memory is None else {"memory": memory}
        size = c.eval_size or c.sizes[0]
        resize = size if c.stem == "small" else round(size * 8 / 7)
        self.info = dict(arch=c.arch, width=c.width, stem=c.stem, channels=3, mean=MEAN, std=STD,
                         method=method, recipe=c.recipe, resize=resize, size=size, range=images.range,
                         exif=images.exif) | about
        self.out = Path(c.out or f"runs/{method}_{c.recipe}")
        self.steps_per_epoch = len(images) // c.batch_size
        self.step, self.total = 0, self.steps_per_epoch * c.epochs
        self.unreadable = Unreadable(images, c.max_bad, self.out / "bad_images.txt", self._write)
        self.loader = None
        self.said, self.trouble = set(), False
        self.saved_at = self.started = time.monotonic()
        self.queries = None
        if c.eval_every:
            from .held_out import held_out

            self.queries = distributed.from_first(held_out, c, images)
        self.fresh, self.trunk = distributed.from_main(self._beginning)
        self.log_file = Log(self.out, self.total, c.tensorboard)
        distributed.from_main(self._claim)  # last, since --fresh deletes files
        self.stops = Stops()
        self._restart_clock()

    def _beginning(self):
        """Returns whether to start over, and the state dict of the trunk to start from, or None."""
        c, several = self.config, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < distributed.world_size()
        # A restart by torchrun goes on despite --fresh. Rank 0 may now be on another node.
        restarted = distributed.restarts() > 0 and (same_parent(self.out) or several)
        fresh = c.fresh and not restarted
        if not c.init_from or (not fresh and (self.out / "checkpoint.pt").exists()):
            return fresh, None
        from ..weights import load_trunk

        return fresh, load_trunk(c.init_from, self.info)

    def _claim(self):
        self.lock = claim(self.out, self.fresh)

    # ---- the loop

    def epochs(self):
        """Yields the epochs still to run. Resumes before the first one, and saves after the last one.

        A resumed run enters the epoch in which it stopped again. So memory must record what was done at its
        start, as in `if memory.epoch < epoch: assign(...)`, and draw from a generator seeded by the epoch.
        """
        evaluated = self._resume()
        first, begun = divmod(self.step, self.steps_per_epoch)
        if not begun and not evaluated:
            self.evaluate(first)
        self._restart_clock()
        for epoch in range(first, self.config.epochs):
            self._stop_at_max_steps()
            yield epoch
        self.save(final=True)
        seconds = round(time.monotonic() - self.started)
        done = {"steps": self.step, "epochs": self.config.epochs, "seconds_since_last_start": seconds}
        self._write(write_json, self.out / "done.json", done)
        clusters = f", clusters in {self.out / 'assignments.csv'}" * self.kept
        say(f"done: {self.step} steps; trunk in {self.out / 'backbone.pt'}{clusters}")

    def steps(self, loader, batches, epoch, extra=False):
        """Yields (step, batch) for the rest of the epoch. step counts from 0 at the start of training.

        Before each step all ranks may save, or save and stop. extra: a pass that does not train. It has an
        epoch number of its own, at least config.epochs, and its steps do not count. It may change running
        statistics, so the run is saved before it, and a stop during it saves nothing.
        """
        first, number = self.step - epoch * self.steps_per_epoch, self.step
        if extra:
            first, number = 0, self.total + epoch * len(batches)
            if self.step:
                self.save()
        else:
            self.loader = loader
        source = loader.epoch(epoch, batches, first)
        for _ in range(first, len(batches)):
            self._stop_at_max_steps()
            asked = time.perf_counter()
            batch = self._fetch(source, loader, extra)
            self.waited += 0 if extra else time.perf_counter() - asked
            torch.manual_seed(self.config.seed << 32 | number)  # so dropout depends on the step only
            yield number, batch
            number += 1
            self.step += not extra
        if extra:
            self.unreadable.add(loader.bad)

    def autocast(self):
        """Returns a context in which the network computes with --precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @contextlib.contextmanager
    def timed(self, name):
        """Prints how long the block took."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        say(f"{name} in {time.perf_counter() - began:.1f} s")

    def features(self, model):
        """Returns model(centre crop), in eval mode, of this rank's rows of the data set: (n, D).

        The row of an image that cannot be read is NaN. Too many of them, or weights or other rows that are
        not finite, end the run. The run may be saved meanwhile: change memory and model only afterwards.
        """
        self._stop_unless_finite(list(model.parameters()))
        found = set()
        with self.timed(f"features of {len(self.images)} images"):
            rows, _ = self._extract(model, self.images, bad=found)
        self.unreadable.add(found)
        return rows

    def _extract(self, model, images, **how):
        return features.extract(model, images, self.info["resize"], self.info["size"], self.device,
                                workers=self.config.workers, precision=self.dtype, fetch=self._fetch, **how)

    def _fetch(self, source, loader=None, extra=False):
        """Returns the next batch, after all ranks have saved, if it is time, or saved and stopped. A stop
        signal interrupts the wait for the batch. No step has begun by then, so nothing is lost."""
        batch = self.stops.wait(next, source)
        minutes = (time.monotonic() - self.saved_at) / 60
        due = distributed.rank() == 0 and self.step > 0 and minutes >= self.config.save_every
        stop, lost, due = distributed.any_rank(self.stops.count > 0, loader is not None and loader.lost, due)
        if lost:
            self.unreadable.add(loader.bad if loader is not None else set())
            raise DataError(f"{TRIES} images in a row cannot be read: {self.unreadable.examples()}")
        if stop and extra:
            raise Stopped("stopped by a signal in a pass over the data: the same command goes on from what "
                          f"{self.out} holds")
        if stop:
            self._stop(f"by a signal, after step {self.step}", "the same command")
        if due and not extra:
            self.save()
        return batch

    def _stop_at_max_steps(self):
        if 0 < self.config.max_steps <= self.step:
            self._stop(f"at --max-steps {self.config.max_steps}", "the same command with more")

    def _stop(self, why, how):
        self.save(final=True)
        raise Stopped(f"stopped {why}: saved in {self.out}, {how} goes on from there")

    def log(self, loss, lr, z, index, assignments, **figures):
        """Counts a step, and writes a record every --log-every steps. Call it in every step, on every rank.

        loss: scalar on the device, a mean cross-entropy over the K clusters. It is compared with ln K.
        z (B, D): unit embeddings of one crop of each image. Their spread reveals a collapse. index (B,): the
        images. assignments (B,) or (H, B): their clusters, below 0 for none. assignments.csv gets the last
        one of each image. figures: more numbers to record; tensors may stay on the device.
        """
        self.meter.count(loss, index, assignments)
        self.timed_steps += 1
        self.log_file.tick()
        if (self.step + 1) % self.config.log_every and self.step + 1 != self.total:
            return
        self._stop_unless_finite()
        self.unreadable.add(self.loader.bad)
        seconds = time.perf_counter() - self.clock
        health = self.meter.read(z)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory /= 1e9 if sys.platform == "darwin" else 1e6  # bytes on macOS, KiB elsewhere
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 1e9
        figures = {name: float(x) if isinstance(x, torch.Tensor) else x for name, x in figures.items()}
        record = {"step": self.step + 1, "epoch": (self.step + 1) / self.steps_per_epoch, "lr": lr, **health,
                  **figures, "images_per_s": self.timed_steps * self.config.batch_size / seconds,
                  "data_wait": self.waited / seconds, "memory_gb": memory}
        left = (self.total - self.step - 1) * seconds / self.timed_steps
        self._record(record, step_line(record, self.config.epochs, self.total, self.meter.clusters, left))
        warning = self.meter.warning(health, self.config.log_every)
        if warning:
            say(f"warning: {warning}\n{self.remedy}")
        self._restart_clock()

    def _restart_clock(self):
        self.waited, self.timed_steps, self.clock = 0.0, 0, time.perf_counter()

    def _stop_unless_finite(self, weights=()):
        """Raises Diverged if a loss since the last log step, or one of the weights, is not finite."""
        spoilt = torch.stack([~w.isfinite().all() for w in weights]).any() if weights else torch.tensor(False)
        if self.meter.mean_loss() is None or distributed.all_max(spoilt.float()):
            last = self.out / "checkpoint.pt"
            there = distributed.from_main(last.exists)
            kept = f"the last good checkpoint is {last}" if there else "no checkpoint was written yet"
            raise Diverged(f"loss or weights are not finite at step {self.step + 1} or shortly before; "
                           f"{kept}; a lower --lr may help")

    def end_epoch(self, epoch, assignments=None):
        """Writes the assignments and logs how they changed. Then obeys --keep-every and --eval-every.

        assignments (H, N): clusters of the whole data set, below 0 for none (default: those given to `log`).
        """
        self.unreadable.add(self.loader.bad)
        figures = self.meter.end_epoch(assignments)
        used, change = figures["epoch_clusters_used"], figures["nmi_to_previous"]
        line = f"epoch {epoch + 1} done"
        line += f": {used} of {self.meter.clusters} clusters in use" if used is not None else ""
        line += f", NMI to the epoch before {change:.3f}" if change is not None else ""
        self._record({"step": self.step, "epoch": epoch + 1, **figures}, line)
        if self.kept:
            self._write(write_assignments, self.out, self.meter.assignments, self.images)
        c = self.config
        if c.keep_every and (epoch + 1) % c.keep_every == 0:
            self._write(self._export, self.out / f"backbone_{epoch + 1}.pt")
        self.evaluate(epoch + 1)
        self._restart_clock()

    def evaluate(self, epoch):
        """Logs the 20-NN accuracy of the held-out images among the training images, as --eval-every says.

        The run is saved first. If it is stopped or killed meanwhile, it resumes with this evaluation.
        """
        c = self.config
        if self.queries is None or (epoch % c.eval_every and epoch < c.epochs):
            return
        if self.step:
            self.save()
        bank, queries = (self._extract(self.model.backbone, images) for images in (self.images, self.queries))
        accuracy = features.knn_accuracy(*bank, *queries, k=min(20, len(self.images)))
        for k, (top1, _) in accuracy.items():
            self._record({"step": self.step, "epoch": epoch, "knn_k": k, "knn_top1": top1},
                         f"epoch {epoch}: {k}-NN top-1 {top1:.2f} %")

    def _record(self, record, line):
        if distributed.rank() == 0:
            self._survive(self.log_file.write, record, line)

    # ---- files

    def save(self, final=False):
        """Writes checkpoint.pt and backbone.pt. A full disk is a warning; if final, a CheckpointError."""
        self._stop_unless_finite(list(self.model.parameters()))
        state = {"format": 1, "method": self.method, "config": asdict(self.config), "step": self.step,
                 "data": self.images.fingerprint, "torch": str(torch.__version__),
                 "bad": sorted(self.unreadable.found),
                 **{name: thing.state_dict() for name, thing in self.objects.items()}}
        problem = self._write(self._save, state)
        self.saved_at = time.monotonic()
        if not self.trouble:
            self.said.clear()  # nothing failed since the last save, so the next problem is printed again
        self.trouble = False
        if problem and final:
            raise CheckpointError(f"{problem}: the end of the run is not saved")

    def _write(self, write, *arguments):
        """Calls write, which writes to the run directory, on rank 0. Returns the problem, or None."""
        return distributed.from_main(self._survive, write, *arguments)

    def _survive(self, write, *arguments):
        """Calls write. An OSError, as of a full disk, becomes a warning, printed once: training goes on."""
        try:
            write(*arguments)
        except OSError as error:
            self.trouble, problem = True, f"cannot write to {self.out}: {error.strerror or error}"
            if problem not in self.said:
                say(f"warning: {problem}; the training goes on, the next save tries again")
            self.said.add(problem)
            return problem

    def _save(self, state):
        checkpoint.save(self.out / "checkpoint.pt", state)
        self._export(self.out / "backbone.pt")

    def _export(self, path):
        info = {**self.info, "epoch": self.step / self.steps_per_epoch}
        checkpoint.export_backbone(path, self.model.backbone, info)

    def _resume(self):
        """Loads the newest intact checkpoint, else the trunk of --init-from. Returns whether the evaluation
        at the checkpoint's step has been made."""
        state, evaluated = distributed.from_main(self._read)
        if state is None:
            if self.trunk:
                self.model.backbone.load_state_dict(self.trunk)
            return False
        with border(CheckpointError, f"{self.out / 'checkpoint.pt'} {NOT_OURS}"):
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            self.step = state["step"]
            self.unreadable.found = {range(len(self.images)).index(i) for i in state["bad"]}
        say(f"resumed at step {self.step} of {self.total}")
        return evaluated

    def _read(self):
        path, step = self.out / "checkpoint.pt", -1
        try:
            expect = {"format": 1, "method": self.method, "data": self.images.fingerprint}
            state = checkpoint.newest(path, expect)
            if state:
                with border(CheckpointError, f"{path} {NOT_OURS}"):
                    if changed := options.differences(self.config, state["config"]):
                        raise CheckpointError(
                            f"{path} was made with other options: {', '.join(changed)}; --fresh starts over, "
                            f"--init-from {self.out} with a new --out goes on from its trunk")
                    step = state["step"] = range(self.total + 1).index(state["step"])
            records = self.log_file.rewind(step)
            if step < self.total:
                (self.out / "done.json").unlink(missing_ok=True)
            write_json(self.out / "config.json", {"method": self.method, **asdict(self.config)})
        except OSError as error:
            reason = error.strerror or error
            raise ArgumentError(f"--out {self.out} cannot be read or written: {reason}") from None
        return state, any("knn_k" in record and record["step"] == step for record in records)
