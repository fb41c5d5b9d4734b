"""ODC, online deep clustering (Zhan et al., CVPR 2020, arXiv 2006.10645).

DeepCluster without the pause to cluster between epochs: a memory holds the embedding and cluster of every
image, and each step updates those of the images in its batch.

    f_i <- normalise((1 - m) f_i + m z_i)                   memory of image i; z_i: new embedding, D = 256
    y_i <- argmax_k  C_k . f_i                              C_k: mean f_i of cluster k, updated every 10 steps
    L   =  sum_i w(y_i) cross-entropy(classifier(z_i), y_i) / sum_i w(y_i),   w(k) ~ (images in k)^-1/2

After every step, clusters with fewer than 20 images are dissolved: their images move to the nearest other
cluster, and each emptied cluster takes half of the largest one. This and the weights w prevent collapse.
Clusters keep their numbers, so the classifier (`prototypes`, here a linear layer) is never reset.

Published recipe: in OpenSelfSup the authors report 53.4 % ImageNet linear top-1, 57.7 for the best layer and
39.1 for 20-NN (no full ImageNet run was made here):

    torchrun --nproc_per_node=8 odc.py --data /imagenet

On a CPU, in minutes:          python odc.py --eval-every 5    (on drawn images, needs no data)
Your photos, no labels:        python odc.py --data ~/photos --recipe small
Fine-tune a SwAV run's trunk:  python odc.py --data ~/photos --recipe small --init-from runs/swav_small
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common import data, distributed
from common.engine.errors import ArgumentError, DataError, say
from common.engine.launch import autocast_dtype, launch, own_trunk, prepare, report, setup
from common.engine.options import RunOptions, option, parse, recipe
from common.engine.run import Run
from common.kmeans import fit_whitening, kmeans
from common.multicrop import Augmentation, MultiCrop, to_device
from common.optim import drops
from common.resnet import ARCHITECTURES

# Letters in shapes: B images of this rank's batch, W ranks, V crops per image (V_r of size r; the first U are
# large), s pixels wide, F trunk features, D embedding size, H heads of K prototypes, L queue length, N images
# in all, n per rank. V B rows: crop 0 of all B images, then crop 1. params (V, B, 8): crops' colour changes.

# ---------------------------------------------------------------------------------------------------- recipes

TINY = dict(arch="resnet10", width=0.5, stem="small", crops=(1,), sizes=(32,), scales=(0.2, 1.0),
            eval_size=48, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, rotate=0.0, prototypes=50,
            memory_momentum=0.3, batch_size=32, lr=0.05, drop_epochs=())
SHAPES = dict(TINY, width=0.25, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 1.0, 0.5),
              jitter_p=1.0, memory_momentum=0.5, epochs=36, drop_epochs=(31,), drop_factor=0.1)
RECIPES = {  # name: (result, by default ImageNet linear top-1; options that differ from the first row)
    "odc_440ep": (
        "53.4, F1 to F5 14.8 31.8 42.4 55.8 57.7, VOC07 SVM 78.4, 20-NN 39.1 (OpenSelfSup); "
        "the default with --data",
        dict(crops=(1,), sizes=(224,), scales=(0.08, 1.0), jitter=(0.4, 0.4, 1.0, 0.5), blur_p=0.0,
             prototypes=10000, temperature=1.0, epochs=440, batch_size=512, lr=0.06, weight_decay=1e-5)),
    "shapes": ("20-NN 98.4 on held-out images, untrained 27.9: measured here", SHAPES),
    "cifar": ("20-NN 42.1 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50, exif=True)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, at most a tenth of the images);
  a lower --lr; milder --jitter and --scales. See docs/log.md."""


@dataclass
class Config(RunOptions):
    hidden: int = option(512, "width of the projection head's hidden layer", group="model", least=1)
    dim: int = option(256, "size D of the embedding", group="model", least=1)

    # Unlike the shared option, a resumed run may not change it: images are clustered at this size.
    eval_size: int = option(0, "side of clustered and evaluated images; 0: that of the large crops", least=0)
    jitter_p: float = option(1.0, "probability of colour jitter", group="multi-crop", least=0, most=1)
    grey_p: float = option(0.2, "probability of turning grey", group="multi-crop", least=0, most=1)
    rotate: float = option(2.0, "largest rotation in degrees", group="multi-crop", least=0)

    memory_momentum: float = option(0.5, "weight of a new embedding in the memory", least=0, most=1)
    centroid_iters: int = option(10, "steps between updates of the centroids", least=1)
    min_cluster: int = option(20, "dissolve clusters with fewer images; at most a sixth of N / K", least=0)
    reweight: float = option(0.5, "exponent p of the loss weight (cluster size)^-p; 0: no weights", least=0)
    kmeans_iterations: int = option(20, "iterations of the k-means before the first epoch", least=1)

    momentum: float = option(0.9, "momentum of SGD; the classifier has none", least=0, below=1)
    drop_epochs: tuple[int, ...] = option((400,), "epochs after which lr drops", group="optimisation")
    drop_factor: float = option(0.4, "factor of lr at each drop", group="optimisation", above=0)


# ------------------------------------------------------------------------------------------------------ model


class Model(nn.Module):
    """Maps crops to embeddings and scores of the clusters: trunk, MLP head, linear classifier."""

    def __init__(self, config, backbone=None):
        super().__init__()
        trunk = ARCHITECTURES.get(config.arch)
        self.backbone = backbone or trunk(width=config.width, stem=config.stem, fan_in=True)
        self.projection_head = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, config.hidden),
            nn.BatchNorm1d(config.hidden, momentum=0.001, affine=False),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(config.hidden, config.dim),
            nn.ReLU(inplace=True),
        )
        for module in self.projection_head:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Linear(config.dim, config.prototypes)  # weight (K, D)
        nn.init.normal_(self.prototypes.weight, std=0.01)
        nn.init.zeros_(self.prototypes.bias)

    def forward(self, crops):
        """Maps a list of crops, (V_r B, 3, s, s) per resolution, to z (V B, D) and scores (V B, K)."""
        # One pass per resolution: batch-norm statistics of large and small crops stay apart.
        features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        z = self.projection_head(features)  # (V B, D), not normalised
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = z.to(self.prototypes.weight.dtype)
            return z, self.prototypes(z)


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Holds the embedding and cluster of every image, and the centroid and number of images of every cluster.

    The embeddings are sharded over ranks; all else is equal on all ranks. targets (N,): cluster of an image,
    -100 (ignored by the loss) if it was never read. Saved in data-set order, so any world size can load it.
    """

    def __init__(self, N, D, K, momentum=0.5, reweight=0.5, min_cluster=20, device=None, dtype=torch.float32):
        self.momentum, self.reweight, self.min_cluster = momentum, reweight, min_cluster
        # Unit rows; zeros for an image that was never read.
        self.bank = distributed.ShardedRows(N, D, device=device, dtype=dtype)
        self.targets = torch.full((N,), -100, device=device)
        self.centroids = torch.zeros(K, D, device=device, dtype=dtype)
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)
        self.ready = False

    @torch.no_grad()
    def fill(self, features):
        """Stores the features (n, D) of this rank's images as unit rows; NaN marks an unreadable image."""
        for rows, block in zip(self.bank.local.split(4096), features.split(4096)):
            rows.copy_(nn.functional.normalize(block.to(rows.dtype)))

    @torch.no_grad()
    def begin(self, targets):
        """Stores the targets (N,), clusters of the embeddings in the memory, and computes the centroids."""
        self.bank.local[targets[self.bank.first : self.bank.last] < 0] = 0
        self.targets.copy_(targets)
        self.count()
        self.refresh()
        self.ready = True

    @torch.no_grad()
    def update(self, index, features):
        """Blends the features (B, D) of this rank's images index (B,), and those of all other ranks, into the
        memory and assigns these images again. Returns the share of them whose cluster changed."""
        index = distributed.gather_rows(index.to(features.device, non_blocking=True), equal=True)  # (W B,)
        features = nn.functional.normalize(distributed.gather_rows(features, equal=True))  # (W B, D)
        place, before = self.bank.place(index), self.targets[index]  # (W B,) each
        old = self.bank.table[place]  # (W B, D); the dummy row for other ranks' images
        new = nn.functional.normalize((1 - self.momentum) * old + self.momentum * features)  # (W B, D)
        # Only the rank that holds an image knows its new cluster.
        here = place < len(self.bank.local)
        after = distributed.all_sum(torch.where(here, assign(new, self.centroids), 0))  # (W B,)
        # An image drawn twice in a batch keeps its last embedding; write alone could keep either.
        order = torch.arange(len(index), device=index.device, dtype=torch.int32)
        last = torch.where(index[:, None] == index, order, -1).amax(1)  # (W B,)
        self.bank.write(index, new[last])
        self.targets[index] = after[last]
        self.count()
        return (after != before).float().mean()

    def count(self):
        """Counts the images of each cluster; unlike bincount, without waiting for a GPU."""
        self.counts.zero_().index_add_(0, self.targets.clamp(min=0), (self.targets >= 0).long())

    @torch.no_grad()
    def refresh(self):
        """Sets each centroid to its cluster's mean, summed in float64; an empty cluster's centroid stays."""
        sums = torch.zeros_like(self.centroids, dtype=torch.float64)
        own = self.targets[self.bank.first : self.bank.last].clamp(min=0)  # rows never read are 0
        for rows, clusters in zip(self.bank.local.split(4096), own.split(4096)):
            sums.index_add_(0, clusters, rows.double())
        means = (distributed.all_sum(sums) / self.counts.clamp(min=1)[:, None]).to(self.centroids.dtype)
        self.centroids.copy_(torch.where(self.counts[:, None] > 0, means, self.centroids))

    @torch.no_grad()
    def repair(self):
        """Empties clusters with fewer than min_cluster images; each then gets half of the largest one."""
        small = self.counts < self.min_cluster  # (K,)
        if not small.any() or small.all():
            return
        images, here, rows = self.members(small)
        self.move(images, here, assign(rows, self.centroids, without=small))
        for empty in small.nonzero().flatten().tolist():
            largest = int(self.counts.argmax())
            images, here, rows = self.members(torch.arange(len(small), device=small.device) == largest)
            half = second_half(rows, here)
            self.move(images, here, torch.where(half, empty, largest))
            pair, sums = [largest, empty], rows.new_zeros(2, rows.shape[1], dtype=torch.float64)
            sums = distributed.all_sum(sums.index_add_(0, half.long(), rows.double()))  # (2, D)
            self.centroids[pair] = (sums / self.counts[pair, None].clamp(min=1)).to(self.centroids.dtype)

    def members(self, clusters):
        """Returns the images (M,) of the clusters in a mask (K,), a mask (M,) of those that this rank holds,
        and the rows (m, D) of these."""
        images = (clusters[self.targets.clamp(min=0)] & (self.targets >= 0)).nonzero().flatten()
        here = (images >= self.bank.first) & (images < self.bank.last)
        return images, here, self.bank.local[images[here] - self.bank.first]

    def move(self, images, here, clusters):
        """Moves images (M,). clusters (m,): the new cluster of each image that this rank holds."""
        after = torch.zeros_like(images)
        after[here] = clusters
        self.targets[images] = distributed.all_sum(after)
        self.count()

    def loss_weight(self):
        """Returns weights (K,) that sum to 1, proportional to (images in the cluster)^-reweight."""
        weight = (self.counts + 1e-5) ** -self.reweight
        return (weight / weight.sum()).to(self.centroids.dtype)

    def state_dict(self):
        tables = {"bank": self.bank.state(), "targets": self.targets.cpu(), "centroids": self.centroids.cpu()}
        return {**tables, "ready": self.ready}

    def load_state_dict(self, state):
        self.bank.load(state["bank"])
        self.targets.copy_(state["targets"])
        self.centroids.copy_(state["centroids"])
        self.ready = state["ready"]
        self.count()


def assign(z, centroids, without=None):
    """Returns the cluster (B,) of each row of z (B, D): the centroid with the largest inner product.

    without: mask (K,) of clusters to leave out.
    """
    scores = z @ centroids.T  # (B, K)
    return (scores if without is None else scores.masked_fill_(without, -torch.inf)).argmax(1)


def second_half(rows, here):
    """Splits a cluster by 2-means, started along its first principal axis; returns a mask (m,) of one half.
    rows (m, D): the cluster's images on this rank. here (M,): mask of them among its images on all ranks."""
    whitening = fit_whitening([rows], 1)
    axis = nn.functional.normalize(whitening.matrix[:, 0], dim=0)
    axis = axis * (whitening.eigenvalues[0] / len(here)).sqrt()  # one standard deviation long
    ends = torch.stack([whitening.mean - axis, whitening.mean + axis])  # (2, D)
    _, halves, counts, _ = kmeans(rows, 2, 20, init=ends)
    if (counts == 0).any():  # all rows are equal
        return torch.arange(len(here), device=here.device)[here] % 2 == 1
    return halves == 1


@torch.no_grad()
def first_clusters(memory, z, iterations, generator):
    """Fills the memory and clusters it by k-means. z (n, D): the embeddings of this rank's images.

    A row of NaN is an image that cannot be read. Raises DataError if fewer images than prototypes can be
    read.
    """
    K, seen = len(memory.centroids), ~z[:, 0].isnan()
    readable = int(distributed.all_sum(seen.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    memory.fill(z)
    x, mine = memory.bank.local, torch.full((len(z),), -100, device=z.device)
    _, mine[seen], _, _ = kmeans(x if seen.all() else x[seen], K, iterations, generator=generator)
    memory.begin(distributed.gather_rows(mine))


def prediction_loss(scores, targets, weight, temperature):
    """Predicts an image's cluster from each crop: weighted mean of the cross-entropy over all ranks' crops.

    scores: (V, B, K); targets: (B,), where -100 is ignored; weight: (K,).
    """
    targets = targets.repeat(len(scores))  # (V B,)
    logits = scores.flatten(0, 1) / temperature  # (V B, K)
    total = nn.functional.cross_entropy(logits, targets, weight, reduction="sum")
    count = distributed.all_sum(torch.where(targets >= 0, weight[targets.clamp(min=0)], 0).sum())
    # Averaged over ranks, as DistributedDataParallel does, this is the mean over the crops of all ranks.
    return total * distributed.world_size() / count.clamp(min=torch.finfo(count.dtype).tiny)


# --------------------------------------------------------------------------------------------------- training


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)  # the Model inside DistributedDataParallel
    N = len(run.images)
    # Images are drawn with replacement, as the authors do.
    order = np.random.default_rng((config.seed, epoch)).integers(N, size=N)
    batches = data.batches(N, config.batch_size, epoch, config.seed, order=order)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # schedule
        lr = drops(step, len(batches), config.lr, config.drop_epochs, config.drop_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        dtype = next(model.parameters()).dtype
        crops = to_device(crops, params, run.device, dtype)  # per resolution (V_r B, 3, s, s)

        # forward
        with run.autocast():
            z, scores = net(crops)
        scores = scores.view(-1, len(index), scores.shape[1])  # (V, B, K)

        # loss
        targets = memory.targets[index.to(run.device, non_blocking=True)]  # (B,)
        loss = prediction_loss(scores, targets, memory.loss_weight(), config.temperature)

        # memory: update the batch's embeddings and clusters, sometimes the centroids; repair small clusters
        z = z[: len(index)].detach()  # (B, D) of the first crop
        changed = memory.update(index, z)
        if (step + 1) % config.centroid_iters == 0:
            memory.refresh()
        memory.repair()

        # update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log
        run.log(loss.detach(), lr, nn.functional.normalize(z), index, targets, changed=changed)


def main(config):
    device, images = setup(config)
    if len(images) < config.prototypes:
        raise ArgumentError(f"--prototypes {config.prototypes}: more than the {len(images)} images")
    # With a larger minimum, a cluster just split off would be too small at once.
    smallest = min(config.min_cluster, max(1, len(images) // (6 * config.prototypes)))
    if smallest < config.min_cluster:
        say(f"warning: --min-cluster {config.min_cluster} is more than a sixth of the images per cluster: "
            f"{smallest} is used")

    model = Model(config, own_trunk(config, device))
    net = prepare(model, config, device)
    # The classifier has no momentum, as in the authors' code.
    groups = [{"params": [*model.backbone.parameters(), *model.projection_head.parameters()]},
              {"params": list(model.prototypes.parameters()), "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    memory = Memory(len(images), config.dim, config.prototypes, config.memory_momentum, config.reweight,
                    smallest, device, model.prototypes.weight.dtype)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, jitter_p=config.jitter_p, grey_p=config.grey_p,
                                blur_p=config.blur_p, rotate=config.rotate)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    run = Run(config, "odc", images, model, optimizer, memory, remedy=REMEDY)
    temporary = autocast_dtype(config.precision, device).itemsize * config.dim  # bytes per image: embedding
    report(run, recipe(Config, RECIPES, config.recipe), assigned=len(images), temporary=temporary)
    for epoch in run.epochs():
        if not memory.ready:
            z = run.features(nn.Sequential(model.backbone, model.projection_head))  # (n, D)
            generator = torch.Generator().manual_seed(config.seed << 32)
            with run.timed("clusters"):
                first_clusters(memory, z, config.kmeans_iterations, generator)
            del z
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch, memory.targets[None])


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
