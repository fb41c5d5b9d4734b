"""The run directory: log, health figures, checkpoints, polite stops. All plumbing that a training script has.

    run = Run(config, "swav", images, steps_per_epoch, clusters, {"model": model, "optimizer": optimizer}, device)
    run.resume()
    for epoch in run.epochs():
        for step, (index, crops, params) in run.steps(loader, batches, epoch):
            ...
            run.log(loss, lr, z, index, assignments)
        run.end_epoch(epoch)
    run.finish()

Every decision (stop, save, give up) is taken by all ranks at the same step.
"""

import csv
import fcntl
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from . import checkpoint, data, distributed, features
from . import config as options

STUCK_STEPS = 1000  # this long at ln K, and the remedies are printed
COLLAPSED_STEPS = 100  # this long without spread in the features, and a warning is
COLLAPSED = 0.05  # feature std x sqrt(D): 1 when spread over the sphere, 0 when all are equal


class Diverged(ValueError):
    """The loss is not finite any more."""

    exit_code = 5


class Stopped(Exception):
    """Not an error: the run ends early, with everything saved."""


def launch(main, config):
    """Runs main(config) and turns what a user can cause into one line and an exit code: 2 arguments, 3 data,
    4 checkpoint, 5 diverged; 0 for a finished or politely stopped run."""
    try:
        main(config)
    except Stopped as reason:
        say(reason)
    except ValueError as error:
        if not hasattr(error, "exit_code"):
            raise
        distributed.fail(error, error.exit_code)
    distributed.stop()


def start(config):
    """Joins the other processes, checks the options that all methods share and seeds the weights; returns the device."""
    try:
        device = distributed.start(config.device)
    except ValueError as error:
        raise options.ArgumentError(str(error)) from None
    options.check(config, distributed.world_size())
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.manual_seed(config.seed)
    return device


def say(text):
    if distributed.rank() == 0:
        print(text, flush=True)


def autocast_dtype(precision, device):
    """The dtype that --precision means: "auto" is bfloat16 where the hardware multiplies it fast, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capability = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else ""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "AVX512" in capability and ("avx512_bf16" in flags or "amx_bf16" in flags) else torch.float32


class Run:
    """One run directory and the state of the run that is not the method's.

    clusters: K, or None; heads: H. objects: {name: object with state_dict() and load_state_dict()}, saved together; their
    state_dict() is called on every rank and may gather. backbone, info: the trunk to export and what describes it.
    """

    def __init__(self, config, method, images, steps_per_epoch, clusters, objects, backbone, info, device, heads=1, remedy=""):
        self.config, self.method, self.images, self.device = config, method, images, device
        self.steps_per_epoch, self.clusters, self.objects = steps_per_epoch, clusters, objects
        self.backbone, self.info, self.remedy = backbone, info, remedy
        self.out = Path(config.out or f"runs/{method}_{config.recipe}")
        self.step, self.total = 0, steps_per_epoch * config.epochs
        self.assignments = torch.full((heads, len(images)), -1, dtype=torch.int32)  # last seen, all ranks
        self.current = torch.full((heads, len(images)), -1, dtype=torch.int32, device=device)  # this epoch, this rank
        self.histogram = torch.zeros(heads, clusters, device=device)  # since the last log step
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, steps, steps with a loss not finite
        self.bad = set()
        self.stuck, self.collapsed, self.remedied = 0, 0, False
        self.waited, self.timed_steps, self.clock = 0.0, 0, time.perf_counter()
        self.saved_at, self.started = time.monotonic(), time.monotonic()
        self.pending, self.signals = None, 0
        self.writer = self.bar = None
        distributed.from_main(self._open)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    # ---- the directory

    def _open(self):
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / "lock", "a+")
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.seek(0)
                raise options.ArgumentError(f"--out {self.out} is in use by another run ({self._lock.read().strip()})") from None
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {platform.node()}")
            self._lock.flush()
            stale = list(self.out.glob("*.partial"))
            if self.config.fresh:
                names = ("*checkpoint.pt", "backbone*.pt", "metrics.jsonl", "assignments.*", "done.json", "bad_images.txt")
                stale += [path for name in names for path in self.out.glob(name)]
            for path in stale:
                path.unlink()
            text = json.dumps({"method": self.method, **asdict(self.config)}, indent=1)
            (self.out / "config.json").write_text(text + "\n")
        except OSError as error:
            raise options.ArgumentError(f"--out {self.out} cannot be written: {error.strerror}") from None
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise options.ArgumentError("--tensorboard needs: pip install tensorboard") from None
            self.writer_class = SummaryWriter

    def report(self, recipe, parameters, balanced, held):
        """What is about to happen, and what will not work. recipe: its own Config; balanced: rows that an assignment
        spreads over the clusters (batch + queue, or the data set); held: bytes kept beside the model."""
        c, n, k = self.config, len(self.images), self.clusters
        labels = f"{len(self.images.classes)} classes (labels only evaluate)" if self.images.labels is not None else "no labels"
        crops = " + ".join(f"{v}x{s} px" for v, s in zip(c.crops, c.sizes))
        dtype = str(autocast_dtype(c.precision, self.device))[6:]
        lr = f"{c.lr:g}" + (
            f" ({recipe.lr:g} at the recipe's batch {recipe.batch_size})" if (c.lr, c.batch_size) != (recipe.lr, recipe.batch_size) else ""
        )
        say(f"{self.method}, recipe {c.recipe}, in {self.out}")
        say(f"  data     {n} images of {c.data or 'shapes'}, {labels}; crops {crops}")
        say(
            f"  model    {c.arch} x{c.width:g}, {c.stem} stem, {parameters / 1e6:.2f} M parameters; {dtype} on {distributed.world_size()} x {self.device.type}"
        )
        say(f"  steps    {self.steps_per_epoch} an epoch, {c.epochs} epochs, {self.total} in all; batch {c.batch_size}, lr {lr}")
        say(f"  balance  K {k}: {n / k:.3g} images and {balanced / k:.3g} assigned rows a cluster")
        say(f"  memory   {held / n:.3g} bytes an image, {held / 2**20:.3g} MiB in all, beside the model")
        if k > balanced:
            say(f"warning: --prototypes {k} are more than the {balanced} rows (batch + queue) that share them: take at most {balanced}")
        if n / k < 10:
            say(f"warning: --prototypes {k} leaves {n / k:.1f} images a cluster: take {max(2, n // 10)} or fewer")
        if not recipe.batch_size / 4 <= c.batch_size <= recipe.batch_size * 4:
            say(f"warning: --batch-size {c.batch_size} is far from the recipe's {recipe.batch_size}: --lr and --prototypes may need tuning")

    # ---- the loop

    def epochs(self):
        """Epochs still to do, from the one that the run stands in."""
        if self.step == 0:
            self.evaluate(0)
        self.clock = time.perf_counter()
        yield from range(self.step // self.steps_per_epoch, self.config.epochs)

    def steps(self, loader, batches, epoch):
        """(step, batch) of the epoch's remaining steps. Between two steps all ranks agree on whether to save or to stop."""
        self.loader = loader
        source = loader.epoch(epoch, batches, self.step - epoch * self.steps_per_epoch)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(source, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise data.DataError(
                    f"a loader worker died, probably out of memory: lower --workers, or enlarge /dev/shm ({str(error).splitlines()[0]})"
                ) from None
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self._agree()
            yield self.step, batch
            self.step += 1

    def _agree(self):
        due = distributed.rank() == 0 and time.monotonic() - self.saved_at >= 60 * self.config.save_every
        flags = torch.tensor([self.signals > 0, self.loader.lost, due and self.step > 0], dtype=torch.int32)
        if distributed.world_size() > 1:
            # Sent now, read before the next step: nobody waits for it.
            work, posted = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True), flags
            (work, posted), self.pending = self.pending or (None, torch.zeros_like(flags)), (work, posted)
            if work is not None:
                work.wait()
            flags = posted
        stop, lost, due = flags.tolist()
        if lost:
            self._collect_bad()
            raise data.DataError(f"{data.TRIES} images in a row cannot be read ({self._examples()})")
        if self.config.max_steps and self.step >= self.config.max_steps:
            self.save(final=True)
            raise Stopped(f"stopped at --max-steps {self.config.max_steps}: saved in {self.out}, the same command with more continues")
        if stop:
            self.save(final=True)
            raise Stopped(f"stopped by a signal after step {self.step}: saved in {self.out}, the same command resumes")
        if due:
            self.save()

    def _on_signal(self, number, frame):
        self.signals += 1
        if self.signals > 1:
            os._exit(130)
        os.write(2, b"signal received: saving after this step (again to quit at once)\n")

    @torch.no_grad()
    def log(self, loss, lr, z, index, assignments, **figures):
        """Counts one step; on a log step, the line and the record.

        loss: scalar on the device; z (B, D) embeddings; index (B,); assignments (B,) or (H, B); figures: plain numbers.
        """
        assignments = assignments.view(-1, len(index))  # (H, B)
        index = index.to(self.device, non_blocking=True)
        self.current[:, index] = assignments.int()
        self.histogram.scatter_add_(1, assignments, torch.ones_like(assignments, dtype=self.histogram.dtype))
        finite = loss.isfinite()
        self.sums += torch.stack([torch.where(finite, loss, 0), finite, ~finite]).double()
        self.timed_steps += 1
        if self.bar is not None:
            self.bar.update()
        if (self.step + 1) % self.config.log_every and self.step + 1 != self.total:
            return
        seconds = time.perf_counter() - self.clock
        mean_loss = self._finite_loss()
        self._collect_bad()
        counts = distributed.all_sum(self.histogram)  # (H, K)
        share = counts / counts.sum(dim=1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(1).mean().item() / math.log(max(2, self.clusters))
        moments = distributed.all_sum(torch.stack([torch.ones_like(z[0]) * len(z), z.sum(0), (z**2).sum(0)]).double())
        variance = moments[2] / moments[0] - (moments[1] / moments[0]) ** 2
        record = {
            "step": self.step + 1,
            "epoch": (self.step + 1) / self.steps_per_epoch,
            "loss": mean_loss,
            "loss_per_ln_k": mean_loss / math.log(max(2, self.clusters)),
            "lr": lr,
            "clusters_used": (counts > 0).sum(1).double().mean().item(),
            "assignment_entropy": entropy,
            "feature_std": variance.clamp(min=0).mean().sqrt().item() * math.sqrt(z.shape[1]),
            **figures,
            "images_per_s": self.timed_steps * self.config.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else _resident_gb(),
        }
        self._record(record)
        self._check_health(record)
        self.histogram.zero_()
        self.sums.zero_()
        self.waited, self.timed_steps, self.clock = 0.0, 0, time.perf_counter()

    def _finite_loss(self):
        """Mean loss of all ranks since the last log step. Raises Diverged on every rank if one of them was not finite."""
        total, steps, broken = distributed.all_sum(self.sums).tolist()
        if broken:
            last = self.out / "checkpoint.pt"
            kept = f"the last good checkpoint is {last}" if distributed.from_main(last.exists) else "no checkpoint was written yet"
            raise Diverged(f"the loss is not finite at step {self.step + 1} or shortly before: {kept}; lower --lr, or see its data")
        return total / max(1, steps)

    def _check_health(self, record):
        self.stuck = self.stuck + self.config.log_every if record["loss_per_ln_k"] >= 0.999 else 0
        self.collapsed = self.collapsed + self.config.log_every if record["feature_std"] < COLLAPSED else 0
        if self.remedied:
            return
        if self.collapsed >= COLLAPSED_STEPS:
            say(f"warning: collapsed: for {self.collapsed} steps all images have had nearly the same embedding\n{self.remedy}")
        elif self.stuck >= STUCK_STEPS:
            say(f"warning: stuck: the loss has been ln K for {self.stuck} steps, so nothing is learnt\n{self.remedy}")
        self.remedied = self.collapsed >= COLLAPSED_STEPS or self.stuck >= STUCK_STEPS

    def _collect_bad(self):
        """Brings the unreadable images that any rank met to all ranks, names the new ones, and stops above --max-bad."""
        found = distributed.gather_rows(torch.tensor(sorted(self.loader.bad - self.bad), dtype=torch.int64))
        new = sorted(set(found.tolist()) - self.bad)
        if not new:
            return
        self.bad.update(new)
        if distributed.rank() == 0:
            with open(self.out / "bad_images.txt", "a", errors="surrogateescape") as file:
                file.writelines(f"{self.images.paths[i]}\n" for i in new)
        say(f"warning: {len(self.bad)} images cannot be read and are replaced by their neighbours: see {self.out / 'bad_images.txt'}")
        limit = self.config.max_bad if self.config.max_bad >= 0 else max(10, len(self.images) // 1000)
        if len(self.bad) > limit:
            raise data.DataError(f"{len(self.bad)} images cannot be read ({self._examples()}), more than --max-bad {limit}")

    def _examples(self):
        return ", ".join(repr(self.images.paths[i]) for i in sorted(self.bad)[:3])

    def end_epoch(self, epoch):
        """Assignments to disk, their change, and what --eval-every and --keep-every ask for."""
        self._collect_bad()
        seen = distributed.all_max(self.current).cpu()
        self.current.fill_(-1)
        before, self.assignments = self.assignments, torch.where(seen >= 0, seen, self.assignments)
        both = (before[0] >= 0) & (self.assignments[0] >= 0)
        figures = {
            "step": self.step,
            "epoch": epoch + 1,
            "epoch_clusters_used": len(self.assignments[0].unique()) - int((self.assignments[0] < 0).any()),
            "nmi_to_previous": nmi(before[0][both], self.assignments[0][both]) if both.any() else None,
        }
        self._record(
            figures,
            line=f"epoch {epoch + 1} done: {figures['epoch_clusters_used']} of {self.clusters} clusters in use"
            + (f", NMI to the epoch before {figures['nmi_to_previous']:.3f}" if figures["nmi_to_previous"] is not None else ""),
        )
        self._write_assignments()
        if self.config.keep_every and (epoch + 1) % self.config.keep_every == 0:
            self._export(self.out / f"backbone_{epoch + 1}.pt")
        if self.config.eval_every and ((epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs):
            self.evaluate(epoch + 1)
        self.waited, self.timed_steps, self.clock = 0.0, 0, time.perf_counter()

    def evaluate(self, epoch):
        """20-NN accuracy of the trunk on the held-out images, from the training images as the bank, if both have labels."""
        c = self.config
        if not c.eval_every:
            return
        spec = c.val or c.data or "shapes"
        queries = data.open_images(spec, "train" if c.val else "val", c.root) if c.val or data.has_split(spec, "val") else None
        if queries is None or queries.labels is None or self.images.labels is None:
            raise options.ArgumentError("--eval-every needs labels and held-out images: name some with --val")
        dtype = autocast_dtype(c.precision, self.device)
        rows = [
            features.extract(self.backbone, images, self.info["resize"], self.info["size"], self.device, workers=c.workers, precision=dtype)
            for images in (self.images, queries)
        ]
        ((top1, _),) = features.knn_accuracy(*rows[0], *rows[1], k=20).values()
        self._record({"step": self.step, "epoch": epoch, "knn_top1": top1}, line=f"epoch {epoch}: 20-NN top-1 {top1:.2f} %")

    def _record(self, record, line=None):
        if distributed.rank() != 0:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.config.tensorboard:
            self.writer = self.writer or self.writer_class(self.out)
            for name, value in record.items():
                if value is not None and name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, record["step"])
        if line is None:
            left = (self.total - self.step - 1) * self.config.batch_size / record["images_per_s"]
            line = (
                f"epoch {record['epoch']:.2f}/{self.config.epochs} step {record['step']}/{self.total} loss {record['loss']:.4f} ({record['loss_per_ln_k']:.3f} ln K) "
                f"lr {record['lr']:.3g} used {record['clusters_used']:.0f}/{self.clusters} entropy {record['assignment_entropy']:.2f} std {record['feature_std']:.2f} "
                f"{record['images_per_s']:.0f} img/s wait {record['data_wait']:.0%} left {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}"
            )
        self._show(line)

    def _show(self, line):
        """A progress bar on a terminal where tqdm is installed, plain lines elsewhere."""
        if self.bar is None and sys.stdout.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self.bar = tqdm(total=self.total, initial=self.step, unit="step", smoothing=0.05)
        self.bar.write(line) if self.bar is not None else print(line, flush=True)

    # ---- checkpoints

    def save(self, final=False):
        """Writes checkpoint.pt and backbone.pt. A full disk is reported and tried again later; at the end it is an error."""
        self._finite_loss()
        window = torch.cat([distributed.all_sum(self.sums), distributed.all_sum(self.histogram.double()).flatten()])
        state = {
            "format": 1,
            "method": self.method,
            "config": asdict(self.config),
            "data": self.images.fingerprint,
            "step": self.step,
            "torch": str(torch.__version__),
            "run": {
                "assignments": self.assignments,
                "current": distributed.all_max(self.current).cpu(),
                "window": window.cpu(),
                "bad": sorted(self.bad),
                "health": [self.stuck, self.collapsed, int(self.remedied)],
            },
            **{name: thing.state_dict() for name, thing in self.objects.items()},
        }
        problem = distributed.from_main(self._write, state)
        self.saved_at = time.monotonic()
        if problem and final:
            raise checkpoint.CheckpointError(problem)
        if problem:
            say(f"warning: {problem}; training goes on, next try in {self.config.save_every:g} minutes")

    def _write(self, state):
        try:
            checkpoint.save(self.out / "checkpoint.pt", state)
            self._export(self.out / "backbone.pt")
        except OSError as error:
            return f"cannot save to {self.out}: {error.strerror or error}"
        return None

    def _export(self, path):
        if distributed.rank() == 0:
            checkpoint.export_backbone(path, self.backbone, {**self.info, "epoch": self.step / self.steps_per_epoch})

    def resume(self):
        """Loads the newest valid checkpoint of the run directory, if there is one."""
        state = distributed.from_main(self._read)
        if state is None:
            return
        for name, thing in self.objects.items():
            thing.load_state_dict(state[name])
        self.step = state["step"]
        self.assignments = state["run"]["assignments"]
        self.current.copy_(state["run"]["current"])  # on every rank: the maximum over ranks is taken in the end
        if distributed.rank() == 0:  # sums over ranks: one rank holds what all had
            self.sums.copy_(state["run"]["window"][:3])
            self.histogram.copy_(state["run"]["window"][3:].view_as(self.histogram))
        self.bad = set(state["run"]["bad"])
        self.stuck, self.collapsed, self.remedied = state["run"]["health"]
        say(f"resumed at step {self.step} of {self.total}")

    def _read(self):
        newest = self.out / "checkpoint.pt"
        damage = []
        for path in (newest, checkpoint.previous_path(newest)):
            try:
                state = checkpoint.load(path)
            except FileNotFoundError:
                continue
            except checkpoint.CheckpointError as error:
                damage.append(str(error))
                continue
            for error in damage:
                print(f"warning: {error}; going on from {path}", flush=True)
            self._compare(path, state)
            self._rewind(state["step"])
            return state
        if damage:
            raise checkpoint.CheckpointError(f"{'; '.join(damage)}; --fresh starts over")
        return None

    def _compare(self, path, state):
        if state.get("method") != self.method:
            raise checkpoint.CheckpointError(f"{path} is of {state.get('method')}, this is {self.method}")
        changed = options.differences(self.config, state["config"])
        if changed:
            raise checkpoint.CheckpointError(f"{path} was made with other options: {', '.join(changed)}; --fresh starts over")
        if state["data"] != self.images.fingerprint:
            raise checkpoint.CheckpointError(
                f"{path} was made with other data: {state['data']}, now {self.images.fingerprint}; --fresh starts over"
            )

    def _rewind(self, step):
        """Drops what metrics.jsonl has after the step that the run resumes at, so that each step is there once."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the line that a kill cut short
                continue
        partial = path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)

    def finish(self):
        """The last save, and done.json."""
        if self.pending is not None:
            self.pending[0].wait()
        self.save(final=True)
        if distributed.rank() == 0:
            seconds = round(time.monotonic() - self.started)
            (self.out / "done.json").write_text(
                json.dumps({"steps": self.step, "epochs": self.config.epochs, "seconds_of_last_start": seconds}) + "\n"
            )
        say(f"done: {self.step} steps; trunk in {self.out / 'backbone.pt'}, clusters in {self.out / 'assignments.csv'}")

    def _write_assignments(self):
        """Cluster of every image, each head, -1 if not seen yet: assignments.npz and, with the paths, assignments.csv."""
        if distributed.rank() != 0:
            return
        table = self.assignments.numpy()
        np.savez_compressed(self.out / "assignments.npz", assignments=table)
        with open(self.out / "assignments.csv", "w", newline="", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", *(f"head{h}" for h in range(len(table)))])
            writer.writerows([path, *column] for path, column in zip(self.images.paths, table.T.tolist()))


def nmi(a, b):
    """Normalised mutual information of two assignments (N,), arithmetic mean of the entropies: 0 independent .. 1 equal."""

    def entropy(values):
        share = values.unique(return_counts=True)[1].double() / len(values)
        return -(share * share.log()).sum().item()

    h_a, h_b = entropy(a), entropy(b)
    mutual = h_a + h_b - entropy(a.long() * (int(b.max()) + 1) + b.long())
    return mutual / ((h_a + h_b) / 2) if h_a + h_b > 0 else 1.0


def _resident_gb():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
