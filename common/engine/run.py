"""The run directory: log, checkpoints, polite stops. All plumbing that a training script has.

    run = Run(config, "swav", images, steps_per_epoch, meter, objects, backbone, info, device)
    run.resume()
    for epoch in run.epochs():
        for step, (index, crops, params) in run.steps(loader, batches, epoch):
            ...
            run.log(loss, lr, z, index, assignments)
        run.end_epoch(epoch)
    run.finish()

Every decision (save, stop, give up) is taken by all ranks at the same step.
"""

import contextlib
import csv
import fcntl
import json
import os
import platform
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from .. import data, distributed, features
from ..multicrop import TRIES
from . import checkpoint, options
from .errors import ArgumentError, CheckpointError, Damaged, DataError, Diverged, Stopped, say
from .files import writing
from .launch import autocast_dtype


class Run:
    """One run directory, and what of the run's state is not the method's.

    objects: {name: object with state_dict() and load_state_dict()}, saved together; state_dict() is called on
    every rank and may gather. backbone, info: the trunk to export, and what describes it. remedy: what to try
    when the meter warns.
    """

    def __init__(self, config, method, images, steps_per_epoch, meter, objects, backbone, info, device,
                 remedy=""):
        self.config, self.method, self.images, self.device = config, method, images, device
        self.steps_per_epoch, self.meter, self.objects = steps_per_epoch, meter, {"meter": meter, **objects}
        self.backbone, self.info, self.remedy = backbone, info, remedy
        self.out = Path(config.out or f"runs/{method}_{config.recipe}")
        self.step, self.total = 0, steps_per_epoch * config.epochs
        self.bad = set()  # unreadable images that any rank has met
        self.signals, self.posted = 0, None
        self.saved_at = self.started = time.monotonic()
        self.bar = self.board = self.problem = self.loader = None
        self.resumed = False
        self.unwritten = ""  # what metrics.jsonl could not take yet
        self.queries = distributed.from_main(self._held_out) if config.eval_every else None
        starts = config.fresh or not (self.out / "checkpoint.pt").exists()
        self.trunk = None
        if config.init_from and starts:
            from ..weights import load_trunk

            self.trunk = load_trunk(config.init_from, info)
        distributed.from_main(self._open)  # last: with --fresh it deletes
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        self._restart_clock()

    def _open(self):
        """Makes the run directory this process's own, and shows that it can be written before the first
        step."""
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ArgumentError("--tensorboard needs: pip install tensorboard") from None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / "lock", "a+")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.lock.seek(0)
                raise ArgumentError(
                    f"--out {self.out} is in use by another run ({self.lock.read()})") from None
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {platform.node()}")
            self.lock.flush()
            stale = ["*.partial"]
            if self.config.fresh:
                stale += ["checkpoint.pt", "previous_checkpoint.pt", "damaged_checkpoint.pt", "backbone.pt",
                          "backbone_*.pt", "metrics.jsonl"]
                stale += ["assignments.npz", "assignments.csv", "done.json", "bad_images.txt",
                          "events.out.tfevents.*"]
            for path in [path for pattern in stale for path in self.out.glob(pattern)]:
                path.unlink()
        except OSError as error:
            raise ArgumentError(f"--out {self.out} cannot be written: {error.strerror}") from None
        if self.config.tensorboard:
            self.board = SummaryWriter(self.out)

    def _held_out(self):
        c = self.config
        spec = c.val or c.data or "shapes"
        if not c.val and not data.has_split(spec, "val"):
            raise ArgumentError(f"--eval-every needs held-out images, and {spec} has no val split: name some "
                                f"with --val")
        queries = data.open_queries(c.data or "shapes", c.val, c.root)
        if queries.labels is None or self.images.labels is None:
            raise ArgumentError("--eval-every needs labels: class folders, or lists with labels")
        data.match_classes(queries, self.images)
        return queries

    def report(self, recipe, parameters, balanced, held):
        """Says what is about to happen, and what will not work. recipe: its own Config; balanced: rows that
        an assignment spreads over the clusters (batch + queue, or the data set); held: the most bytes that
        there are beside the model, over all ranks."""
        c, n, k = self.config, len(self.images), self.meter.clusters
        labels = f"{len(self.images.classes)} classes (used to evaluate only)" if self.images.labels is not None else "no labels"
        crops = " + ".join(f"{v}x{s} px" for v, s in zip(c.crops, c.sizes))
        dtype = str(autocast_dtype(c.precision, self.device)).removeprefix("torch.")
        ranks = f"{distributed.world_size()} x {self.device.type}"
        changed = (c.lr, c.batch_size) != (recipe.lr, recipe.batch_size)
        base = f" ({recipe.lr:g} at the recipe's batch {recipe.batch_size})" if changed else ""
        say(f"{self.method}, recipe {c.recipe}, in {self.out}")
        say(f"  data     {n} images of {c.data or 'shapes'}, {labels}; crops {crops}")
        say(f"  model    {c.arch} x{c.width:g}, {c.stem} stem, {parameters / 1e6:.2f} M parameters; {dtype} "
            f"on {ranks}")
        say(f"  steps    {self.steps_per_epoch} an epoch, {c.epochs} epochs, {self.total} in all; batch "
            f"{c.batch_size}, lr {c.lr:g}{base}")
        say(f"  balance  K {k}: {n / k:.3g} images and {balanced / k:.3g} assigned rows a cluster")
        say(f"  memory   {held / n:.0f} bytes an image, {held / 2**20:.3g} MiB in all, beside the model")
        if k > balanced:
            say(f"warning: --prototypes {k} are more than the {balanced} rows (batch + queue) that share "
                f"them: take at most {balanced}")
        if n / k < 10:
            say(f"warning: --prototypes {k} leaves {n / k:.1f} images a cluster: take {max(2, n // 10)} or "
                f"fewer")
        if not recipe.batch_size / 4 <= c.batch_size <= recipe.batch_size * 4:
            say(f"warning: --batch-size {c.batch_size} is far from the recipe's {recipe.batch_size}: --lr "
                f"and --prototypes may need tuning")

    # ---- the loop

    def epochs(self):
        """Epochs still to do, from the one that the run stands in."""
        if not self.resumed:
            self.evaluate(0)
            self._restart_clock()
        yield from range(self.step // self.steps_per_epoch, self.config.epochs)

    def steps(self, loader, batches, epoch):
        """(step, batch) of the epoch's remaining steps. Between two steps all ranks agree on whether to save
        or to stop."""
        self.loader = loader
        source = loader.epoch(epoch, batches, self.step - epoch * self.steps_per_epoch)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.agree()
            # what a step draws (dropout) depends on its number alone
            torch.manual_seed(self.config.seed << 32 | self.step)
            yield self.step, batch
            self.step += 1

    @contextlib.contextmanager
    def phase(self, name):
        """Says how long the block took."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        say(f"{name} in {time.perf_counter() - began:.1f} s")

    def look(self, model, loader):
        """What model, in eval mode, makes of the centre crops of this rank's rows of the data set: (n, D), as
        it gives them.

        A row of NaN is an image that cannot be read; too many of them, or weights that are not finite, end
        the run.
        """
        self._stop_unless_finite(list(model.parameters()))
        self.loader = loader
        how = dict(workers=self.config.workers, precision=autocast_dtype(self.config.precision, self.device))
        with self.phase(f"features of {len(self.images)} images"):
            rows, _ = features.extract(model, self.images, self.info["resize"], self.info["size"],
                                       self.device, bad=loader.bad, agree=self.agree, **how)
        return self.accept(rows)

    def accept(self, rows):
        """rows as they are: features (n, D) of this rank's rows from a pass over the data, in which what
        cannot be read is a row of NaN.

        Too many of these end the run, and so do more rows that are not finite than images that cannot be
        read.
        """
        self.collect_bad()
        finite = torch.cat([block.isfinite().all(1) for block in rows.split(4096)])
        if distributed.all_sum((~finite).sum()) > len(self.bad):
            raise Diverged("features of images that can be read are not finite: the weights have run away; a "
                           "lower --lr may help")
        return rows

    def agree(self, keep=True):
        """Between two steps, or two batches of a pass over the data: whether it is time to save, or to save
        and stop.

        keep: False where the objects are not what they were after the last step, so that a stop saves
        nothing.
        """
        due = distributed.rank() == 0 and self.step > 0 and time.monotonic() - self.saved_at >= 60 * self.config.save_every
        flags = torch.tensor([self.signals > 0, self.loader is not None and self.loader.lost, due],
                             dtype=torch.int32)
        if distributed.world_size() > 1:
            # Posted now, read before the next step: nobody waits for it.
            posted, self.posted = self.posted, (dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True),
                                                flags)
            if due:
                self.saved_at = time.monotonic()  # asked for: not once more in the next step
            flags = torch.zeros_like(flags)
            if posted is not None:
                posted[0].wait()
                flags = posted[1]
        stop, lost, due = flags.tolist()
        if lost:
            self.collect_bad()
            raise DataError(f"{TRIES} images in a row cannot be read: {self._examples()}")
        ended = 0 < self.config.max_steps <= self.step
        if stop or ended:
            if not keep:
                raise Stopped(f"stopped by a signal in a pass over the data: the same command goes on from "
                              f"what {self.out} holds")
            self.save(final=True)
            why = f"at --max-steps {self.config.max_steps}" if ended else f"by a signal, after step {self.step}"
            raise Stopped(f"stopped {why}: saved in {self.out}, the same command "
                          f"{'with more ' if ended else ''}goes on from there")
        if due and keep:
            self.save()

    def _on_signal(self, number, frame):
        if not self.signals:  # often it comes twice: to every process, and once more from torchrun
            os.write(2,
                     b"signal received: saving and stopping before the next step (Ctrl-\\ quits at once)\n")
        self.signals += 1

    def log(self, loss, lr, z, index, assignments, **figures):
        """Counts one step; on a log step, the line and the record.

        loss: scalar on the device; z (B, D) embeddings; index (B,); assignments (B,) or (H, B); figures:
        numbers, also on the device.
        """
        self.meter.count(loss, index, assignments)
        self.timed_steps += 1
        if self.bar is not None:
            self.bar.update()
        if (self.step + 1) % self.config.log_every and self.step + 1 != self.total:
            return
        self._stop_unless_finite()
        self.collect_bad()
        seconds = time.perf_counter() - self.clock
        health = self.meter.read(z)
        gpu = self.device.type == "cuda"
        record = {"step": self.step + 1, "epoch": (self.step + 1) / self.steps_per_epoch, "lr": lr, **health,
                  **{name: float(value) if isinstance(value, torch.Tensor) else value
                     for name, value in figures.items()},
                  "images_per_s": self.timed_steps * self.config.batch_size / seconds,
                  "data_wait": self.waited / seconds, "memory_gb": torch.cuda.max_memory_allocated() / 1e9
                  if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
        left = (self.total - self.step - 1) * seconds / self.timed_steps
        self._record(
            record,
            f"epoch {record['epoch']:.2f}/{self.config.epochs} step {self.step + 1}/{self.total}"
            f" loss {record['loss']:.4f} ({record['loss_per_ln_k']:.3f} ln K) lr {lr:.3g}"
            f" used {record['clusters_used']:.0f}/{self.meter.clusters} entropy "
            f"{record['assignment_entropy']:.2f}"
            f" std {record['feature_std']:.2f} {record['images_per_s']:.0f} img/s wait "
            f"{record['data_wait']:.0%}"
            f" left {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}",
        )
        warning = self.meter.warning(health, self.config.log_every)
        if warning:
            say(f"warning: {warning}\n{self.remedy}")
        self._restart_clock()

    def _restart_clock(self):
        self.waited, self.timed_steps, self.clock = 0.0, 0, time.perf_counter()

    def _stop_unless_finite(self, weights=()):
        """Ends the run if a loss was not finite; before a save if a weight is not: a gradient may have been
        the first."""
        spoilt = torch.stack([~w.isfinite().all() for w in weights]).any() if weights else torch.zeros(
            (), device=self.device)
        if self.meter.mean_loss() is None or distributed.all_max(spoilt.float()):
            last = self.out / "checkpoint.pt"
            kept = f"the last good checkpoint is {last}" if distributed.from_main(
                last.exists) else "no checkpoint was written yet"
            raise Diverged(f"loss or weights are not finite at step {self.step + 1} or shortly before; "
                           f"{kept}; a lower --lr may help")

    def collect_bad(self):
        """Brings the unreadable images that any rank met to all ranks, names the new ones, and stops above
        --max-bad."""
        found = distributed.gather_rows(torch.tensor(sorted(self.loader.bad - self.bad), dtype=torch.int64))
        new = sorted(set(found.tolist()) - self.bad)
        if not new:
            return
        self.bad.update(new)
        distributed.from_main(self._survive, self._write_bad)
        say(f"warning: {len(self.bad)} images cannot be read and are replaced by their neighbours: see "
            f"{self.out / 'bad_images.txt'}")
        limit = self.config.max_bad if self.config.max_bad >= 0 else max(10, len(self.images) // 1000)
        if len(self.bad) > limit:
            raise DataError(f"{len(self.bad)} images cannot be read, more than --max-bad {limit}: "
                            f"{self._examples()}")

    def _write_bad(self):
        with writing(self.out / "bad_images.txt", text=True) as file:
            file.writelines(f"{self.images.paths[i]}\n" for i in sorted(self.bad))

    def _examples(self):
        return ", ".join(repr(self.images.paths[i]) for i in sorted(self.bad)[:3])

    def end_epoch(self, epoch):
        """Assignments to disk and their change to the log; then what --keep-every and --eval-every ask
        for."""
        self.collect_bad()
        figures = self.meter.end_epoch()
        change = figures["nmi_to_previous"]
        line = f"epoch {epoch + 1} done: {figures['epoch_clusters_used']} of {self.meter.clusters} clusters in use"
        line += f", NMI to the epoch before {change:.3f}" if change is not None else ""
        self._record({"step": self.step, "epoch": epoch + 1, **figures}, line)
        distributed.from_main(self._survive, self._write_assignments)
        c = self.config
        if c.keep_every and (epoch + 1) % c.keep_every == 0:
            distributed.from_main(self._survive, self._export, self.out / f"backbone_{epoch + 1}.pt")
        if c.eval_every and ((epoch + 1) % c.eval_every == 0 or epoch + 1 == c.epochs):
            self.save()  # a run that is stopped during a long evaluation may not live to its end
            self.evaluate(epoch + 1)
        self._restart_clock()

    def evaluate(self, epoch):
        """With --eval-every: 20-NN accuracy on the held-out images, the training images being the bank."""
        if self.queries is None:
            return
        c = self.config
        how = {"workers": c.workers, "precision": autocast_dtype(c.precision, self.device)}
        bank, queries = (features.extract(self.backbone, images, self.info["resize"], self.info["size"],
                                          self.device, **how) for images in (self.images, self.queries))
        for k, (top1, _) in features.knn_accuracy(*bank, *queries, k=min(20, len(self.images))).items():
            self._record({"step": self.step, "epoch": epoch, "knn_k": k, "knn_top1": top1},
                         f"epoch {epoch}: {k}-NN top-1 {top1:.2f} %")

    def _record(self, record, line):
        if distributed.rank() != 0:
            return
        self._survive(self._append, json.dumps(record) + "\n")
        if self.board is not None:
            for name in record.keys() - {"step", "epoch"}:
                if record[name] is not None:
                    self.board.add_scalar(name, record[name], record["step"])
        # A progress bar on a terminal where tqdm is installed, plain lines elsewhere.
        if self.bar is None and sys.stdout.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=self.total, initial=self.step, unit="step", smoothing=0.05)
            except ImportError:
                pass
        self.bar.write(line) if self.bar is not None else say(line)

    def finish(self):
        """The last save, and done.json."""
        self.save(final=True)
        done = {"steps": self.step, "epochs": self.config.epochs,
                "seconds_since_last_start": round(time.monotonic() - self.started)}
        distributed.from_main(self._survive, self._write_json, "done.json", done)
        say(f"done: {self.step} steps; trunk in {self.out / 'backbone.pt'}, clusters in "
            f"{self.out / 'assignments.csv'}")

    # ---- files

    def save(self, final=False):
        """Writes checkpoint.pt and backbone.pt. A full disk is reported and tried again later; at the end it
        is an error."""
        self._stop_unless_finite(list(self.objects["model"].parameters()))
        state = {"format": 1, "method": self.method, "config": asdict(self.config),
                 "data": self.images.fingerprint, "step": self.step, "torch": str(torch.__version__),
                 "bad": sorted(self.bad),
                 **{name: thing.state_dict() for name, thing in self.objects.items()}}
        problem = distributed.from_main(self._survive, self._write, state)
        self.saved_at = time.monotonic()
        if problem and final:
            raise CheckpointError(f"{problem}: the end of the run is not saved")

    def _survive(self, write, *arguments):
        """Runs what writes to the run directory. A full disk is a warning, said once until a write succeeds
        again, and ends no training. Returns the warning, or None."""
        try:
            write(*arguments)
            self.problem = None
        except OSError as error:
            problem, before = f"cannot write to {self.out}: {error.strerror or error}", self.problem
            self.problem = problem
            if problem != before:
                say(f"warning: {problem}; the training goes on, the next save tries again")
        return self.problem

    def _write(self, state):
        if self.unwritten:
            self._append("")
        checkpoint.save(self.out / "checkpoint.pt", state)
        self._export(self.out / "backbone.pt")

    def _write_json(self, name, content):
        with writing(self.out / name, text=True) as file:
            file.write(json.dumps(content, indent=1) + "\n")

    def _append(self, line):
        """Adds to metrics.jsonl whole lines or, on a full disk, nothing: then they come with the next
        ones."""
        path = self.out / "metrics.jsonl"
        self.unwritten += line
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError:
            os.truncate(path, size)
            raise

    def _export(self, path):
        checkpoint.export_backbone(path, self.backbone,
                                   {**self.info, "epoch": self.step / self.steps_per_epoch})

    def _write_assignments(self):
        """Cluster of every image in each head, -1 if not seen yet: assignments.npz and assignments.csv, both
        with the paths."""
        table = self.meter.assignments.numpy()
        paths = np.frombuffer("\0".join(self.images.paths).encode(errors="surrogateescape"), np.uint8)
        with writing(self.out / "assignments.npz") as file:
            np.savez_compressed(file, assignments=table, paths=paths)
        with writing(self.out / "assignments.csv", text=True) as file:
            writer = csv.writer(file)
            writer.writerow(["path", *(f"head{h}" for h in range(len(table)))])
            writer.writerows([path, *column] for path, column in zip(self.images.paths, table.T.tolist()))

    def resume(self):
        """Loads the newest valid checkpoint of the run directory if there is one, else the trunk that
        --init-from names."""
        state = distributed.from_main(self._read)
        self.resumed = state is not None
        if not self.resumed:
            if self.trunk:
                self.backbone.load_state_dict(self.trunk)
            return
        for name, thing in self.objects.items():
            thing.load_state_dict(state[name])
        self.step, self.bad = state["step"], set(state["bad"])
        say(f"resumed at step {self.step} of {self.total}")

    def _read(self):
        try:
            return self._read_newest()
        except OSError as error:
            raise ArgumentError(
                f"--out {self.out} cannot be read or written: {error.strerror or error}") from None

    def _read_newest(self):
        newest = self.out / "checkpoint.pt"
        state, damage = None, []
        for path in (newest, checkpoint.previous_path(newest)):
            try:
                state = checkpoint.load(path, {"method": self.method, "data": self.images.fingerprint})
                break
            except FileNotFoundError:
                continue
            except Damaged as error:
                damage.append(str(error))
            except CheckpointError as error:
                raise CheckpointError(f"{error}; --fresh starts over") from None
        if state is None and damage:
            raise CheckpointError(f"{'; '.join(damage)}; --fresh starts over")
        if state is not None:
            for error in damage:
                say(f"warning: {error}; going on from {path}")
                # or the next save would keep it as the previous one
                os.replace(newest, newest.with_name("damaged_checkpoint.pt"))
            changed = options.differences(self.config, state["config"])
            if changed:
                raise CheckpointError(f"{path} was made with other options: {', '.join(changed)}; --fresh "
                                      f"starts over")
        self._rewind(state["step"] if state else -1)
        self._write_json("config.json", {"method": self.method, **asdict(self.config)})
        return state

    def _rewind(self, step):
        """Drops what metrics.jsonl has after the step that the run resumes at, so that each step is there
        once."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept, lines = [], path.read_text().splitlines(keepends=True)
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the line that a kill cut short
                continue
        if len(kept) < len(lines):
            with writing(path, text=True) as file:
                file.write("".join(kept))
