"""DeepCluster (Caron et al., ECCV 2018, arXiv 1807.05520).

Before each epoch, k-means clusters the features of all images; during the epoch a new linear classifier, and
the trunk below it, predict the clusters.

    x_i  = trunk(centre crop of image i), in eval mode, of all N images     D = 4096 (AlexNet) or 2048 (ResNet-50)
    u_i  = (x_i - mean) projected on 256 principal axes, each divided by its standard deviation, and / |.|
    y    = k-means of u, K = 10,000, 20 iterations                          once an epoch
    L    = cross-entropy(classifier(relu(trunk(crop_i))), y_i)              images drawn evenly over the clusters

Clusters have new numbers every epoch, so the classifier starts anew with them. No projection head, no memory
of embeddings, one crop an image. Against collapse: whitening, k-means without empty clusters, and as many
draws from small clusters as from large ones.

Published recipe, 46.9 % ImageNet linear top-1 reported by OpenSelfSup (no full ImageNet run was made here),
of ResNet-50 on Sobel-filtered images; the best layer 57.7:

    torchrun --nproc_per_node=8 deepcluster.py --data /imagenet

The paper's AlexNet:                   torchrun --nproc_per_node=8 deepcluster.py --data /imagenet --recipe alexnet_sobel_500ep
On a CPU, in minutes:                  python deepcluster.py --eval-every 5    (embedded images, needs no data)
Your photos, no labels:                python deepcluster.py --data ~/photos --recipe small
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed
from common.alexnet import alexnet
from common.batchnorm import parallel
from common.engine.errors import ArgumentError, DataError, say
from common.engine.launch import autocast_dtype, launch, start
from common.engine.log import Meter, nmi
from common.engine.options import option, parse, recipe
from common.engine.run import Run
from common.kmeans import fit_whitening, held_scores, kmeans
from common.multicrop import MEAN, STD, Augmentation, MultiCrop, to_device
from common.optim import warmup_cosine
from common.resnet import ARCHITECTURES

# Letters in shapes: B images of this rank, V crops, F features, K prototypes (one a cluster), N data set (n
# here).

# ---------------------------------------------------------------------------------------------------- recipes

PLAIN = dict(jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, grey_p=0.0, rotate=0.0)
TINY = dict(arch="resnet10", width=0.5, stem="small", crops=(1,), sizes=(32,), eval_size=48)
TINY.update(scales=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, rotate=0.0, prototypes=100,
            pca_dim=128)
TINY.update(batch_size=32, lr=0.05, final_lr=0.05)
SHAPES = dict(TINY, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), epochs=5)
RECIPES = {  # name: (ImageNet linear top-1 reported by others, what differs from the defaults of Config)
    "resnet50_sobel_200ep": ("46.9, best layer 57.7 (OpenSelfSup); the default with --data",
                             dict(sobel=True)),
    "resnet50_200ep": ("50.4 (mmselfsup)", dict(lr=0.3, final_lr=0.3)),
    "alexnet_sobel_500ep": (
        "37.9 for the best layer (VISSL, of the authors' weights)",
        dict(PLAIN, arch="alexnet", sobel=True, epochs=500, batch_size=256, lr=0.05, final_lr=0.05),
    ),
    "shapes": ("20-NN 46.9 on held-out images, untrained 30.3: measured here", SHAPES),
    "cifar": ("20-NN 45.6 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, a tenth of the images at most); a smaller --pca-dim;
  a lower --lr; milder --jitter and --scales. A new classifier every epoch keeps the loss high: judge by --eval-every"""


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

    arch: str = option("resnet50", "trunk", group="model", choices=(*ARCHITECTURES, "alexnet"))
    width: float = option(1.0, "multiplies the trunk's channels")
    stem: str = option("imagenet", "first layers: imagenet, or small for images of 32 to 64 pixels",
                       choices=("imagenet", "small"))
    sobel: bool = option(False, "the trunk sees the image's gradients in place of its colours")

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
    pca_dim: int = option(256, "principal axes of the features that are clustered")
    kmeans_iterations: int = option(20, "of k-means, each epoch")

    epochs: int = option(200, "passes over the data", group="optimisation")
    max_steps: int = option(0, "stop, saved, after this many steps; 0: never", free=True)
    batch_size: int = option(512,
                             "images a step over all ranks; the recipe's learning rates follow it linearly")
    lr: float = option(0.1, "peak learning rate at this batch size")
    final_lr: float = option(0.1, "learning rate that the cosine ends at")
    warmup_epochs: int = option(0, "epochs of linear warm-up")
    start_lr: float = option(0.0, "learning rate that the warm-up starts from")
    momentum: float = option(0.9, "of SGD; the classifier has none")
    weight_decay: float = option(1e-5, "of every parameter")

    recipe: str = option("resnet50_sobel_200ep", "named settings; options given on the command line win",
                         group="run", free=True)
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
    """Trunk and linear classifier: a list of crop groups to features and scores of the clusters."""

    def __init__(self, config):
        super().__init__()
        if "alexnet" in config.arch:
            self.backbone = alexnet("deepcluster", sobel=config.sobel)
        else:
            self.backbone = ARCHITECTURES[config.arch](width=config.width, stem=config.stem,
                                                       sobel=config.sobel)
        self.prototypes = nn.Linear(self.backbone.feature_dim, config.prototypes)  # weight (K, F)

    def forward(self, crops, autocast=torch.float32):
        """crops: one (V_r B, 3, s, s) a resolution, crop-major. Returns features (V B, F) and scores (V B,
        K)."""
        with torch.autocast(crops[0].device.type, dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
            # One pass per resolution: batch-norm statistics of large and small crops stay apart. The head
            # sees all.
            features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        features = features.to(self.prototypes.weight.dtype)  # (V B, F): full precision from here on
        # clustered without, classified with the last ReLU of AlexNet
        return features, self.prototypes(F.relu(features))


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """The cluster of every image, and nothing else: targets (N,), -100 (ignored) for an image that cannot be
    read."""

    def __init__(self, n, device=None):
        self.targets = torch.full((n,), -100, device=device)
        self.epoch = -1  # whose clusters the targets are
        self.figures = {}  # of the last assignment

    def state_dict(self):
        return {"targets": self.targets.cpu(), "epoch": self.epoch, "figures": self.figures}

    def load_state_dict(self, state):
        self.targets.copy_(state["targets"])
        self.epoch, self.figures = state["epoch"], state["figures"]


@torch.no_grad()
def whiten(features, dim):
    """Features (n, F) of this rank's rows to unit rows (n, dim) along the whitened principal axes of all
    ranks' rows.

    A row of NaN, an image that cannot be read, stays one. Features may be bfloat16: they are taken a chunk at
    a time, and only the result is held in full precision.
    """
    chunks = features.split(max(1, held_scores(features.device) // features.shape[1]))
    whitening = fit_whitening((chunk[~chunk[:, 0].isnan()] for chunk in chunks), dim)
    x = whitening.mean.new_empty(len(features), dim)
    for rows, chunk in zip(x.split(len(chunks[0]) or 1), chunks):
        rows.copy_(whitening(chunk))
    return x


@torch.no_grad()
def assign(memory, prototypes, x, iterations, generator):
    """Clusters all images into targets; the classifier starts anew, since clusters have new numbers.

    x: (n, pca_dim) this rank's rows of the data set, whitened. Raises DataError if fewer images than
    prototypes can be read.
    """
    K, seen = len(prototypes.weight), ~x[:, 0].isnan()
    readable = int(distributed.all_sum(seen.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    mine = torch.full((len(x),), -100, device=x.device)
    _, mine[seen], counts, _ = kmeans(x if seen.all() else x[seen], K, iterations, generator=generator)
    previous, memory.targets = memory.targets, distributed.gather_rows(mine)  # (N,)
    both = (previous >= 0) & (memory.targets >= 0)
    share = counts[counts > 0] / readable
    memory.figures = {"nmi_to_previous": nmi(previous[both], memory.targets[both]) if both.any() else None,
                      "empty_clusters": int((counts == 0).sum()), "largest_cluster": int(counts.max()),
                      "cluster_entropy": -float((share * share.log()).sum()) / math.log(max(2, K))}
    prototypes.weight.copy_(0.01 * torch.randn(prototypes.weight.shape, generator=generator))
    prototypes.bias.zero_()


def uniform_order(assignments, length, generator):
    """Images of an epoch in which all clusters come equally often: (length,) indices of assignments (N,),
    below 0 for none.

    Of each of the E clusters in use length // E + 1 images are drawn, without replacement if it has more than
    that. They are shuffled, and the first `length` taken. The intention of util.py of
    facebookresearch/deepcluster, where these indices meet a data set in another order, so that large clusters
    stay large.
    """
    assignments = assignments.cpu()
    shuffled = torch.randperm(len(assignments), generator=generator)
    by_cluster = assignments[shuffled].sort(stable=True)
    # cluster after cluster, each in random order
    members = shuffled[by_cluster.indices[by_cluster.values >= 0]]
    sizes = torch.bincount(assignments[members])
    sizes = sizes[sizes > 0]  # (E,)
    per = length // len(sizes) + 1
    again = (torch.rand(len(sizes), per, generator=generator, dtype=torch.float64) * sizes[:, None]).long()
    place = torch.where(sizes[:, None] > per, torch.arange(per), again)  # (E, per) within the cluster
    drawn = members[(place + (sizes.cumsum(0) - sizes)[:, None]).flatten()]
    return drawn[torch.randperm(len(drawn), generator=generator)[:length]]


def prediction_loss(scores, targets, temperature):
    """Every crop predicts the cluster of its image: mean cross-entropy over the crops of all ranks' images.

    scores: (V, B, K); targets: (B,), where -100 is ignored.
    """
    total = F.cross_entropy(scores.flatten(0, 1) / temperature, targets.repeat(len(scores)), reduction="sum")
    count = distributed.all_sum((targets >= 0).sum() * len(scores))
    # Averaged over ranks, as DistributedDataParallel does, this is the mean over the crops of all ranks.
    return total * distributed.world_size() / count.clamp(min=1)


# --------------------------------------------------------------------------------------------------- training


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)
    dtype = autocast_dtype(config.precision, run.device)
    full_precision = model.prototypes.weight.dtype
    n = len(run.images)
    # another one than k-means drew from
    generator = torch.Generator().manual_seed(config.seed << 32 | config.epochs + epoch)
    order = uniform_order(memory.targets, n, generator)
    batches = data.batches(n, config.batch_size, epoch, config.seed, distributed.rank(),
                           distributed.world_size(), order=order)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # schedule
        lr = warmup_cosine(step, len(batches), config.epochs, config.lr, config.final_lr,
                           config.warmup_epochs, config.start_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        crops = to_device(crops, params, run.device, full_precision)  # one (V_r B, 3, s, s) a resolution

        # forward
        features, scores = net(crops, dtype)
        scores = scores.view(-1, len(index), scores.shape[1])  # (V, B, K)

        # loss
        targets = memory.targets[index.to(run.device, non_blocking=True)]  # (B,)
        loss = prediction_loss(scores, targets, config.temperature)

        # update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log
        run.log(loss.detach(), lr, F.normalize(features[: len(index)].detach()), index, targets,
                **memory.figures)
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
    if "alexnet" in config.arch and ({*config.sizes, config.eval_size or 224}, config.width,
                                     config.stem) != ({224}, 1, "imagenet"):
        raise ArgumentError(f"--arch {config.arch} takes images of 224 pixels and has no other width or "
                            f"stem: --sizes 224 --eval-size 0")

    model = Model(config)
    if config.pca_dim > model.backbone.feature_dim:
        raise ArgumentError(f"--pca-dim {config.pca_dim}: the trunk has only {model.backbone.feature_dim} "
                            f"features")
    model.to(device, torch.float64 if config.precision == "float64" else torch.float32,
             memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()
    net = parallel(model)
    # The classifier starts anew each epoch, so it has no momentum that would come from another one.
    groups = [{"params": list(model.backbone.parameters())},
              {"params": list(model.prototypes.parameters()), "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    memory = Memory(len(images), device)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, jitter_p=config.jitter_p, grey_p=config.grey_p,
                                blur_p=config.blur_p, rotate=config.rotate)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    size = config.eval_size or config.sizes[0]
    info = dict(arch=config.arch, width=config.width, stem=config.stem, channels=3, mean=MEAN, std=STD,
                method="deepcluster")
    info.update(sobel=config.sobel, recipe=config.recipe,
                resize=size if config.stem == "small" else round(size * 8 / 7), size=size)
    objects = {"model": model, "optimizer": optimizer, "memory": memory}
    meter = Meter(config.prototypes, len(images), device=device)
    run = Run(config, info["method"], images, steps_per_epoch, meter, objects, model.backbone, info, device,
              REMEDY)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = autocast_dtype(config.precision, device)
    exact = torch.promote_types(dtype, torch.float32)  # of what is clustered
    # features, principal components; targets and assignments
    held = len(images) * (dtype.itemsize * model.backbone.feature_dim + exact.itemsize * config.pca_dim + 16)
    run.report(recipe(Config, RECIPES, config.recipe), parameters, len(images), held)
    run.resume()
    for epoch in run.epochs():
        if memory.epoch < epoch:  # not when a run resumes in mid-epoch
            x = whiten(run.look(model.backbone, loader), config.pca_dim)
            with run.phase("clusters"):
                assign(memory, model.prototypes, x, config.kmeans_iterations,
                       torch.Generator().manual_seed(config.seed << 32 | epoch))
            del x
            memory.epoch = epoch
            say(", ".join(f"{name} {value:.3g}" for name, value in memory.figures.items()
                          if value is not None))
            if memory.figures["largest_cluster"] > 20 * len(images) / config.prototypes:
                say(f"warning: one cluster has more than 20 times the mean's images\n{REMEDY}")
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
