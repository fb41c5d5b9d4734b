"""ODC, online deep clustering (Zhan et al., CVPR 2020, arXiv 2006.10645).

DeepCluster without the pause between epochs: a memory holds an embedding and a cluster of every image, and
each step updates those of its batch.

    f_i <- normalise((1 - m) f_i + m z_i)                    memory of image i; z_i its new embedding, D = 256; m = 0.5
    y_i <- argmax_k  C_k . f_i                               C_k: mean of the embeddings of cluster k, every 10 steps
    L   =  sum_i w(y_i) cross-entropy(classifier(z_i), y_i) / sum_i w(y_i),      w(k) ~ (images in cluster k)^-1/2

After every step, clusters with fewer than 20 images are dissolved into the nearest others, and each of them
gets half of the then largest one. That and the weights are what keeps it from collapsing; clusters keep their
numbers, so the classifier is never reset. One k-means at the start, one crop an image, no whitening.

Published recipe, 53.4 % ImageNet linear top-1 reported by the authors (no full ImageNet run was made here),
in OpenSelfSup; the best layer 57.7, 20-NN 39.1:

    torchrun --nproc_per_node=8 odc.py --data /imagenet

On a CPU, in minutes:                  python odc.py --eval-every 5    (embedded images, needs no data)
Your photos, no labels:                python odc.py --data ~/photos --recipe small
Another method's trunk, tuned:         python odc.py --data ~/photos --recipe small --init-from runs/swav_small
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed
from common.batchnorm import parallel
from common.distributed import rows_of
from common.engine.errors import ArgumentError, DataError, say
from common.engine.launch import autocast_dtype, launch, start
from common.engine.log import Meter
from common.engine.options import option, parse, recipe
from common.engine.run import Run
from common.kmeans import fit_whitening, kmeans
from common.multicrop import MEAN, STD, Augmentation, MultiCrop, to_device
from common.optim import drops
from common.resnet import ARCHITECTURES

# Letters in shapes: B images of this rank, W ranks, V crops, F features, D embedding, K prototypes (one a
# cluster), N data set (n here).

# ---------------------------------------------------------------------------------------------------- recipes

TINY = dict(arch="resnet10", width=0.5, stem="small", crops=(1,), sizes=(32,), eval_size=48)
TINY.update(scales=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, rotate=0.0, prototypes=50,
            memory_momentum=0.3)
TINY.update(batch_size=32, lr=0.05, drop_epochs=())
SHAPES = dict(TINY, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 1.0, 0.5), jitter_p=1.0,
              epochs=10)
RECIPES = {  # name: (ImageNet linear top-1 reported by the authors, what differs from the defaults of Config)
    "odc_440ep": ("53.4, F1 to F5 14.8 31.8 42.4 55.8 57.7, VOC07 SVM 78.4, 20-NN 39.1 (OpenSelfSup); the "
                  "default with --data", {}),
    "shapes": ("20-NN 47.1 on held-out images, untrained 30.3: measured here", SHAPES),
    "cifar": ("20-NN 39.7 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, a tenth of the images at most);
  a lower --lr; milder --jitter and --scales. README.md says more: "When the loss sits at ln K\""""


@dataclass
class Config:
    data: str = option("", "folder, list file, shapes, cifar10, cifar100, svhn or stl10 (default: shapes)",
                       group="data", free=True)
    val: str = option("", "held-out images for --eval-every; none: the val split of --data", free=True)
    root: str = option("", "folder that relative paths of a list file start from", free=True)
    workers: int = option(-1, "loader processes per rank; -1: its share of the CPU cores, at most 8",
                          free=True)
    max_bad: int = option(-1, "unreadable images to put up with; -1: one in a thousand, at least 10",
                          free=True)

    arch: str = option("resnet50", "trunk", group="model", choices=tuple(ARCHITECTURES))
    width: float = option(1.0, "multiplies the trunk's channels")
    stem: str = option("imagenet", "first layers: imagenet, or small for images of 32 to 64 pixels",
                       choices=("imagenet", "small"))
    hidden: int = option(512, "width of the projection head's hidden layer")
    dim: int = option(256, "size D of the embedding")

    crops: tuple[int, ...] = option((1,), "crops of each size", group="multi-crop")
    sizes: tuple[int, ...] = option((224,), "sides of the crops in pixels")
    scales: tuple[float, ...] = option((0.08, 1.0),
                                       "smallest and largest share of the image's area, for each size")
    eval_size: int = option(0,
                            "side of the images that are clustered and evaluated; 0: that of the large crops")
    jitter: tuple[float, ...] = option((0.4, 0.4, 1.0, 0.5), "brightness, contrast, saturation, hue")
    jitter_p: float = option(1.0, "probability of jitter")
    grey_p: float = option(0.2, "probability of grey")
    blur_p: float = option(0.0, "probability of blur")
    rotate: float = option(2.0, "largest rotation in degrees")

    prototypes: int = option(10000, "number K of prototypes, one a cluster", group="method")
    temperature: float = option(1.0, "of the predictions")
    memory_momentum: float = option(0.5, "weight of an image's new embedding in the memory")
    centroid_iters: int = option(10, "steps between two computations of the centroids")
    min_cluster: int = option(20, "smaller clusters are dissolved; at most a sixth of N / K")
    reweight: float = option(0.5, "power of a cluster's size by which its loss is divided; 0: none")
    kmeans_iterations: int = option(20, "of k-means, before the first epoch")

    epochs: int = option(440, "passes over the data", group="optimisation")
    max_steps: int = option(0, "stop, saved, after this many steps; 0: never", free=True)
    batch_size: int = option(512,
                             "images a step over all ranks; the recipe's learning rates follow it linearly")
    lr: float = option(0.06, "learning rate at this batch size")
    drop_epochs: tuple[int, ...] = option((400,), "epochs after which the learning rate drops")
    drop_factor: float = option(0.4, "by which it drops")
    momentum: float = option(0.9, "of SGD; the classifier has none")
    weight_decay: float = option(1e-5, "of every parameter")

    recipe: str = option("odc_440ep", "named settings; options given on the command line win", group="run",
                         free=True)
    out: str = option("", "run directory; the same command resumes (default: runs/METHOD_RECIPE)", free=True)
    fresh: bool = option(False, "start over, deleting what the run directory holds", free=True)
    init_from: str = option("", "trunk to start from: a run, a backbone.pt or another project's checkpoint",
                            free=True)
    precision: str = option("auto", "auto is bfloat16 where the hardware is made for it, else float32",
                            choices=("auto", "bfloat16", "float32", "float64"))
    compile: bool = option(False, "compile the trunk with torch.compile", free=True)
    deterministic: bool = option(False, "the same bits on a GPU too: slower, or stops at an operation that "
                                        "cannot", free=True)
    seed: int = option(0, "of weights, order and crops")
    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True)
    log_every: int = option(20, "steps between log lines", free=True)
    save_every: float = option(10.0, "minutes between checkpoints", free=True)
    keep_every: int = option(0, "epochs between backbone_EPOCH.pt files; 0: none", free=True)
    eval_every: int = option(0, "epochs between k-NN evaluations, where labels exist; 0: none", free=True)
    tensorboard: bool = option(False, "also write TensorBoard events", free=True)


# ------------------------------------------------------------------------------------------------------ model


class Model(nn.Module):
    """Trunk, two-layer head, linear classifier: a list of crop groups to embeddings and scores of the
    clusters."""

    def __init__(self, config):
        super().__init__()
        self.backbone = ARCHITECTURES[config.arch](width=config.width, stem=config.stem)
        self.projection_head = nn.Sequential(nn.Linear(self.backbone.feature_dim, config.hidden),
                                             nn.BatchNorm1d(config.hidden, momentum=0.001, affine=False),
                                             nn.ReLU(inplace=True), nn.Dropout(0.5),
                                             nn.Linear(config.hidden, config.dim), nn.ReLU(inplace=True))
        for module in self.projection_head:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Linear(config.dim, config.prototypes)  # weight (K, D)
        nn.init.normal_(self.prototypes.weight, std=0.01)
        nn.init.zeros_(self.prototypes.bias)

    def forward(self, crops, autocast=torch.float32):
        """crops: one (V_r B, 3, s, s) a resolution, crop-major. Returns z (V B, D), not normalised, and
        scores (V B, K)."""
        with torch.autocast(crops[0].device.type, dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
            # One pass per resolution: batch-norm statistics of large and small crops stay apart. The head
            # sees all.
            features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
            z = self.projection_head(features)
        z = z.to(self.prototypes.weight.dtype)  # (V B, D): full precision from here on
        return z, self.prototypes(z)


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Embedding and cluster of every image, the centroids of the clusters, and how many images each has.

    This rank holds the embeddings of the data-set rows [rN/W, (r+1)N/W); the rest is the same on every rank.
    Saved in data-set order, so that another world size can load it. targets (N,): cluster of each image, -100
    (ignored) for one that was never read.
    """

    # Sums are of whole multiples of 1 / FIXED, so float64 holds them exactly: the same whatever the order,
    # the ranks and the past.
    FIXED = 2**28

    def __init__(self, n, D, K, momentum=0.5, reweight=0.5, min_cluster=20, device=None, dtype=torch.float32):
        self.first, self.last = rows_of(n, distributed.rank(), distributed.world_size())
        self.own = self.last - self.first
        self.momentum, self.reweight, self.min_cluster = momentum, reweight, min_cluster
        # One row more than this rank holds takes what other ranks hold: sorting it out would wait for the
        # device.
        self.bank = torch.zeros(self.own + 1, D, device=device, dtype=dtype)
        self.targets = torch.full((n,), -100, device=device)
        self.centroids = torch.zeros(K, D, device=device, dtype=dtype)
        # of this rank's rows of each cluster, times FIXED
        self.sums = torch.zeros(K, D, dtype=torch.float64, device=device)
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)  # of all ranks' images
        self.ready = False

    @torch.no_grad()
    def fill(self, features):
        """features (n, D): of this rank's rows, of any length; NaN for an image that cannot be read, of which
        start makes 0."""
        for rows, block in zip(self.bank[:-1].split(4096), features.split(4096)):
            rows.copy_(F.normalize(block.to(rows.dtype)))

    @torch.no_grad()
    def start(self, targets):
        """targets (N,): clusters of the embeddings that the memory was filled with."""
        self.bank[:-1][targets[self.first : self.last] < 0] = 0
        self.targets.copy_(targets)
        self.recount()
        self.refresh()
        self.ready = True

    def recount(self):
        """Sums and counts from embeddings and targets."""
        own = self.targets[self.first : self.last]
        self.sums.zero_()
        for rows, clusters in zip(self.bank[:-1].split(4096), own.split(4096)):
            self._add(rows[clusters >= 0], clusters[clusters >= 0])
        self.counts.copy_(torch.bincount(self.targets[self.targets >= 0], minlength=len(self.counts)))

    def _add(self, rows, clusters, sign=1):
        self.sums.index_add_(0, clusters, (rows * self.FIXED).round().double(), alpha=sign)

    @torch.no_grad()
    def update(self, index, features):
        """Blends the embeddings features (B, D) of this rank's images index (B,), then of all ranks' ones,
        into the memory and gives these images new clusters. Returns the share of them whose cluster changed,
        on the device."""
        index = distributed.gather_rows(index.to(features.device, non_blocking=True), equal=True)  # (W B,)
        features = F.normalize(distributed.gather_rows(features, equal=True))  # (W B, D)
        row = torch.where((index >= self.first) & (index < self.last), index - self.first, self.own)  # (W B,)
        old, before = self.bank[row], self.targets[index]
        new = F.normalize((1 - self.momentum) * old + self.momentum * features)
        # Only the rank that holds an image knows its new cluster.
        after = distributed.all_sum(torch.where(row < self.own, (new @ self.centroids.T).argmax(1), 0))
        changed = (after != before).float().mean()
        # of an image that comes twice the last embedding counts
        keep = ~(index[:, None] == index).triu(1).any(1)
        index, row, old, new, before, after = (t[keep] for t in (index, row, old, new, before, after))
        # an image may be read now that could not be at the start
        own, known = (row < self.own)[:, None], before >= 0
        self._add(torch.where(own & known[:, None], old, 0), before.clamp(min=0), -1)
        self._add(torch.where(own, new, 0), after)
        self.counts.index_add_(0, before.clamp(min=0), -known.long())
        self.counts.index_add_(0, after, torch.ones_like(after))
        self.bank[row] = new
        self.targets[index] = after
        return changed

    @torch.no_grad()
    def refresh(self):
        """Centroids from the sums; that of an empty cluster stays."""
        means = distributed.all_sum(self.sums).div_(self.FIXED * self.counts.clamp(min=1)[:, None])
        self.centroids.copy_(torch.where(self.counts[:, None] > 0, means.to(self.centroids.dtype),
                                         self.centroids))

    @torch.no_grad()
    def repair(self):
        """Dissolves clusters with fewer than min_cluster images into the others; each then gets half of the
        largest."""
        small = self.counts < self.min_cluster  # (K,)
        if not small.any() or small.all():
            return
        images, here = self._members(small)
        rows = self.bank[images[here] - self.first]
        self._move(images, here, (rows @ self.centroids.T).masked_fill(small, -torch.inf).argmax(1))
        for empty in small.nonzero().flatten().tolist():
            largest = int(self.counts.argmax())
            images, here = self._members(torch.arange(len(small), device=small.device) == largest)
            self._move(images, here, torch.where(self._second_half(images, here), empty, largest))
            pair = [largest, empty]
            total = distributed.all_sum(self.sums[pair])  # (2, D)
            self.centroids[pair] = (total / (self.FIXED * self.counts[pair, None].clamp(min=1))).to(
                self.centroids.dtype)

    def _members(self, clusters):
        """Indices of the images in the clusters that a mask (K,) names, of all ranks, and which of them this
        rank holds."""
        images = (clusters[self.targets.clamp(min=0)] & (self.targets >= 0)).nonzero().flatten()
        return images, (images >= self.first) & (images < self.last)

    def _move(self, images, here, clusters):
        """Gives images new clusters, of which each rank knows those of the images that it holds."""
        rows, before, after = self.bank[images[here] - self.first], self.targets[images], torch.zeros_like(
            images)
        after[here] = clusters
        after = distributed.all_sum(after)
        self._add(rows, before[here], -1)
        self._add(rows, clusters)
        self.counts += torch.bincount(after, minlength=len(self.counts)) - torch.bincount(
            before, minlength=len(self.counts))
        self.targets[images] = after

    def _second_half(self, images, here):
        """Which of this rank's members of a cluster form its second half: 2-means, begun along the first
        principal axis."""
        rows = self.bank[images[here] - self.first]
        whitening = fit_whitening([rows], 1)
        axis = F.normalize(whitening.matrix[:, 0], dim=0) * (whitening.eigenvalues[0] / len(images)).sqrt()
        _, halves, counts, _ = kmeans(rows, 2, 20,
                                      init=torch.stack([whitening.mean - axis, whitening.mean + axis]))
        if (counts == 0).any():  # all of them are equal
            return torch.arange(len(images), device=images.device)[here] % 2 == 1
        return halves == 1

    def loss_weight(self):
        """(K,) summing to 1: proportional to (images in the cluster)^-reweight."""
        weight = (self.counts + 1e-5) ** -self.reweight
        return (weight / weight.sum()).to(self.bank.dtype)

    def state_dict(self):
        bank = distributed.gather_rows(self.bank[:-1])  # (N, D)
        return {"bank": bank.cpu(), "targets": self.targets.cpu(), "centroids": self.centroids.cpu(),
                "ready": self.ready}

    def load_state_dict(self, state):
        self.bank[:-1] = state["bank"][self.first : self.last].to(self.bank.device)
        self.targets.copy_(state["targets"])
        self.centroids.copy_(state["centroids"])
        self.ready = state["ready"]
        self.recount()  # the very sums and counts that were there


@torch.no_grad()
def assign(memory, z, iterations, generator):
    """The memory's first embeddings and clusters: k-means of all images' embeddings z (n, D), of which these
    are this rank's.

    Raises DataError if fewer images than prototypes can be read.
    """
    K, seen = len(memory.centroids), ~z[:, 0].isnan()
    readable = int(distributed.all_sum(seen.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    memory.fill(z)
    x, mine = memory.bank[:-1], torch.full((len(z),), -100, device=z.device)
    _, mine[seen], _, _ = kmeans(x if seen.all() else x[seen], K, iterations, generator=generator)
    memory.start(distributed.gather_rows(mine))


def prediction_loss(scores, targets, weight, temperature):
    """Every crop predicts the cluster of its image: mean cross-entropy over the crops of all ranks' images,
    weighted by cluster.

    scores: (V, B, K); targets: (B,), where -100 is ignored; weight: (K,).
    """
    targets = targets.repeat(len(scores))
    total = F.cross_entropy(scores.flatten(0, 1) / temperature, targets, weight, reduction="sum")
    count = distributed.all_sum(torch.where(targets >= 0, weight[targets.clamp(min=0)], 0).sum())
    # Averaged over ranks, as DistributedDataParallel does, this is the mean over the crops of all ranks.
    return total * distributed.world_size() / count.clamp(min=torch.finfo(count.dtype).tiny)


# --------------------------------------------------------------------------------------------------- training


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)
    dtype = autocast_dtype(config.precision, run.device)
    full_precision = model.prototypes.weight.dtype
    n = len(run.images)
    # with replacement, as the authors do
    order = np.random.default_rng((config.seed, epoch)).integers(n, size=n)
    batches = data.batches(n, config.batch_size, epoch, config.seed, distributed.rank(),
                           distributed.world_size(), order=order)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # schedule
        lr = drops(step, len(batches), config.lr, config.drop_epochs, config.drop_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        crops = to_device(crops, params, run.device, full_precision)  # one (V_r B, 3, s, s) a resolution

        # forward
        z, scores = net(crops, dtype)
        scores = scores.view(-1, len(index), scores.shape[1])  # (V, B, K)

        # loss
        targets = memory.targets[index.to(run.device, non_blocking=True)]  # (B,)
        loss = prediction_loss(scores, targets, memory.loss_weight(), config.temperature)

        # memory: the batch's embeddings and clusters; now and then the centroids; no cluster stays small
        changed = memory.update(index, z[: len(index)].detach())
        if (step + 1) % config.centroid_iters == 0:
            memory.refresh()
        memory.repair()

        # update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log
        run.log(loss.detach(), lr, F.normalize(z[: len(index)].detach()), index, targets, changed=changed)
    run.meter.take(memory.targets[None])


def main(config):
    device = start(config)
    images = distributed.from_main(data.open_images, config.data or "shapes", "train", config.root)
    steps_per_epoch = len(images) // config.batch_size
    if not steps_per_epoch:
        raise DataError(f"--data has {len(images)} images, fewer than one batch: --batch-size "
                        f"{config.batch_size}")
    if len(images) < config.prototypes:
        raise ArgumentError(f"--prototypes {config.prototypes}: more than the {len(images)} images, which "
                            f"are clustered")

    model = Model(config)
    model.to(device, torch.float64 if config.precision == "float64" else torch.float32,
             memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()
    net = parallel(model)
    # The classifier has no momentum, as in the authors' code.
    below = [*model.backbone.parameters(), *model.projection_head.parameters()]
    groups = [{"params": below}, {"params": list(model.prototypes.parameters()), "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    # or merging and splitting would never rest
    smallest = min(config.min_cluster, max(1, len(images) // (6 * config.prototypes)))
    if smallest < config.min_cluster:
        say(f"warning: --min-cluster {config.min_cluster} is more than a sixth of the images a cluster: "
            f"{smallest} is used")
    state = (config.memory_momentum, config.reweight, smallest, device, model.prototypes.weight.dtype)
    memory = Memory(len(images), config.dim, config.prototypes, *state)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, jitter_p=config.jitter_p, grey_p=config.grey_p,
                                blur_p=config.blur_p, rotate=config.rotate)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    size = config.eval_size or config.sizes[0]
    info = dict(arch=config.arch, width=config.width, stem=config.stem, channels=3, mean=MEAN, std=STD,
                method="odc")
    info.update(recipe=config.recipe, resize=size if config.stem == "small" else round(size * 8 / 7),
                size=size)
    objects = {"model": model, "optimizer": optimizer, "memory": memory}
    meter = Meter(config.prototypes, len(images), device=device)
    run = Run(config, info["method"], images, steps_per_epoch, meter, objects, model.backbone, info, device,
              REMEDY)
    parameters = sum(p.numel() for p in model.parameters())
    # memory, and what it is filled from; targets and assignments
    held = len(images) * ((4 + autocast_dtype(config.precision, device).itemsize) * config.dim + 16)
    run.report(recipe(Config, RECIPES, config.recipe), parameters, len(images), held)
    run.resume()
    for epoch in run.epochs():
        if not memory.ready:
            z = run.look(nn.Sequential(model.backbone, model.projection_head), loader)
            with run.phase("clusters"):
                assign(memory, z, config.kmeans_iterations, torch.Generator().manual_seed(config.seed << 32))
            del z
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
