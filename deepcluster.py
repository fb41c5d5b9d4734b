"""DeepCluster (Caron et al., ECCV 2018, arXiv 1807.05520).

Before each epoch, k-means clusters the features of all images. During the epoch, the trunk and a new linear
classifier are trained to predict the clusters.

    x_i  = trunk(centre crop of image i), eval mode         all images; F = 4096 (AlexNet) or 2048 (ResNet-50)
    u_i  = x_i - mean on 256 principal axes, each divided by its standard deviation, then scaled to length 1
    y    = k-means of u, K = 10,000, 20 iterations          once per epoch
    L    = cross-entropy(classifier(relu(trunk(crop_i))), y_i)      images drawn evenly over the clusters

Cluster numbers change every epoch, so the classifier (`prototypes`, here a linear layer) is reset each time.
There is no projection head, no memory of embeddings, and one crop per image. Whitening, k-means without empty
clusters, and drawing as many images from small clusters as from large ones prevent collapse.

Published recipe: OpenSelfSup reports 46.9 % ImageNet linear top-1, and 57.7 % for the best layer, for a
ResNet-50 on Sobel-filtered images (no full ImageNet run was made here):

    torchrun --nproc_per_node=8 deepcluster.py --data /imagenet

The paper's AlexNet: torchrun --nproc_per_node=8 deepcluster.py --data /imagenet --recipe alexnet_sobel_500ep
On a CPU, in minutes:          python deepcluster.py --eval-every 5    (on drawn images, needs no data)
Your photos, no labels:        python deepcluster.py --data ~/photos --recipe small
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from common import data, distributed
from common.alexnet import alexnet
from common.engine.errors import ArgumentError, DataError, say
from common.engine.launch import autocast_dtype, launch, own_trunk, prepare, report, setup
from common.engine.log import nmi
from common.engine.options import RunOptions, option, parse, recipe
from common.engine.run import Run
from common.kmeans import fit_whitening, held_scores, kmeans
from common.multicrop import Augmentation, MultiCrop, to_device
from common.optim import warmup_cosine
from common.resnet import ARCHITECTURES

# Letters in shapes: B images of this rank's batch, W ranks, V crops per image (V_r of size r; the first U are
# large), s pixels wide, F trunk features, D embedding size, H heads of K prototypes, L queue length, N images
# in all, n per rank. V B rows: crop 0 of all B images, then crop 1. params (V, B, 8): crops' colour changes.

# ---------------------------------------------------------------------------------------------------- recipes

PLAIN = dict(jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, grey_p=0.0, rotate=0.0)
TINY = dict(arch="resnet10", width=0.5, stem="small", sobel=False, crops=(1,), sizes=(32,), scales=(0.2, 1.0),
            eval_size=48, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, rotate=0.0, prototypes=100, pca_dim=128,
            batch_size=32, lr=0.05, final_lr=0.05)
SHAPES = dict(TINY, width=0.25, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 0.4, 0.2),
              epochs=10)
RECIPES = {  # name: (result, by default ImageNet linear top-1; options that differ from the first row)
    "resnet50_sobel_200ep": ("46.9, best layer 57.7 (OpenSelfSup); the default with --data", dict(
        sobel=True, crops=(1,), sizes=(224,), scales=(0.08, 1.0), jitter=(0.4, 0.4, 1.0, 0.5), blur_p=0.0,
        prototypes=10000, temperature=1.0, epochs=200, batch_size=512, lr=0.1, final_lr=0.1, warmup_epochs=0,
        start_lr=0.0, weight_decay=1e-5)),
    "resnet50_200ep": ("50.4 (a contributor of mmselfsup)", dict(sobel=False, lr=0.3, final_lr=0.3)),
    "alexnet_sobel_500ep": ("37.9 for the best layer (VISSL, of the authors' weights)", dict(
        PLAIN, arch="alexnet", sobel=True, epochs=500, batch_size=256, lr=0.05, final_lr=0.05)),
    "shapes": ("20-NN 82.2 on held-out images, untrained 27.9: measured here", SHAPES),
    "cifar": ("20-NN 48.2 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50, exif=True)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, at most a tenth of the images);
  a smaller --pca-dim; a lower --lr; milder --jitter and --scales. The classifier is new every epoch, which
  keeps the loss high: judge by --eval-every."""


@dataclass
class Config(RunOptions):
    arch: str = option("resnet50", "architecture of the trunk, or MODULE:FUNCTION of your own",
                       choices=(*ARCHITECTURES, "alexnet"))
    sobel: bool = option(False, "the trunk sees the image's gradients in place of its colours", group="model")

    # Unlike the shared option, a resumed run may not change it: images are clustered at this size.
    eval_size: int = option(0, "side of clustered and evaluated images; 0: that of the large crops", least=0)
    jitter_p: float = option(1.0, "probability of colour jitter", group="multi-crop", least=0, most=1)
    grey_p: float = option(0.2, "probability of turning grey", group="multi-crop", least=0, most=1)
    rotate: float = option(2.0, "largest rotation in degrees", group="multi-crop", least=0)

    pca_dim: int = option(256, "number of principal axes that features are projected on for k-means", least=1)
    kmeans_iterations: int = option(20, "iterations of k-means, per epoch", least=1)

    momentum: float = option(0.9, "momentum of SGD; the classifier has none", least=0, below=1)
    final_lr: float = option(0.0, "learning rate at the end of the cosine", group="optimisation", least=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", group="optimisation", least=0)
    start_lr: float = option(0.0, "learning rate when the warm-up starts", group="optimisation", least=0)


# ------------------------------------------------------------------------------------------------------ model


class Model(nn.Module):
    """Maps crops to features and scores of the clusters: trunk and linear classifier."""

    def __init__(self, config, backbone=None):
        super().__init__()
        if backbone:
            self.backbone = backbone
        elif config.arch == "alexnet":
            self.backbone = alexnet("deepcluster", sobel=config.sobel)
        else:
            trunk = ARCHITECTURES[config.arch]
            self.backbone = trunk(width=config.width, stem=config.stem, sobel=config.sobel, fan_in=True)
        self.prototypes = nn.Linear(self.backbone.feature_dim, config.prototypes)  # weight (K, F)

    def forward(self, crops):
        """Maps a list of crops, (V_r B, 3, s, s) per resolution, to features (V B, F), scores (V B, K)."""
        # One pass per resolution: batch-norm statistics of large and small crops stay apart.
        features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        with torch.autocast(features.device.type, enabled=False):  # full precision from here on
            features = features.to(self.prototypes.weight.dtype)
            # k-means clusters AlexNet's features before the last ReLU; the classifier takes them after it.
            return features, self.prototypes(nn.functional.relu(features))


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Holds the cluster of every image: targets (N,), -100 (ignored by the loss) if it cannot be read."""

    def __init__(self, N, device=None):
        self.targets = torch.full((N,), -100, device=device)
        self.epoch = -1  # epoch that the targets were computed for
        self.figures = {}  # statistics of the last assignment, for the log

    def state_dict(self):
        return {"targets": self.targets.cpu(), "epoch": self.epoch, "figures": self.figures}

    def load_state_dict(self, state):
        self.targets.copy_(state["targets"])
        self.epoch, self.figures = state["epoch"], state["figures"]


@torch.no_grad()
def whiten(features, dim):
    """Whitens this rank's features (n, F) along the principal axes of all ranks' rows: unit rows (n, dim).

    A row of NaN (an image that cannot be read) stays NaN. Features may be bfloat16: they are converted chunk
    by chunk, and only the result is stored in full precision.
    """
    chunks = features.split(max(1, held_scores(features.device) // features.shape[1]))
    whitening = fit_whitening((chunk[~chunk[:, 0].isnan()] for chunk in chunks), dim)
    x = whitening.mean.new_empty(len(features), dim)
    for rows, chunk in zip(x.split(len(chunks[0]) or 1), chunks):
        rows.copy_(whitening(chunk))
    return x


@torch.no_grad()
def assign(memory, x, K, iterations, generator):
    """Clusters all images and stores their targets. x: (n, pca_dim), whitened features of this rank's images.

    Raises DataError if fewer images than prototypes can be read.
    """
    seen = ~x[:, 0].isnan()
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


@torch.no_grad()
def reset_classifier(prototypes, generator):
    """Resets the classifier: weights of standard deviation 0.01, biases 0."""
    prototypes.weight.copy_(0.01 * torch.randn(prototypes.weight.shape, generator=generator))
    prototypes.bias.zero_()


def uniform_order(assignments, length, generator):
    """Draws the (length,) images of an epoch, equally often from every cluster.

    assignments: (N,) cluster of each image, below 0 for none. Each of the E clusters in use gives length // E
    + 1 images, without replacement if it has more than that. They are shuffled and cut to `length`. util.py
    of facebookresearch/deepcluster intends the same, but its indices count in another order than the data
    set's, so large clusters stay large there.
    """
    assignments = assignments.cpu()
    shuffled = torch.randperm(len(assignments), generator=generator)
    by_cluster = assignments[shuffled].sort(stable=True)
    members = shuffled[by_cluster.indices[by_cluster.values >= 0]]  # sorted by cluster, random within
    sizes = torch.bincount(assignments[members])
    sizes = sizes[sizes > 0]  # (E,)
    per = length // len(sizes) + 1
    again = (torch.rand(len(sizes), per, generator=generator, dtype=torch.float64) * sizes[:, None]).long()
    place = torch.where(sizes[:, None] > per, torch.arange(per), again)  # (E, per), place in the cluster
    drawn = members[(place + (sizes.cumsum(0) - sizes)[:, None]).flatten()]
    return drawn[torch.randperm(len(drawn), generator=generator)[:length]]


def prediction_loss(scores, targets, temperature):
    """Predicts an image's cluster from each crop: mean cross-entropy over all ranks' crops.

    scores: (V, B, K); targets: (B,), where -100 is ignored.
    """
    logits = scores.flatten(0, 1) / temperature  # (V B, K)
    total = nn.functional.cross_entropy(logits, targets.repeat(len(scores)), reduction="sum")
    count = distributed.all_sum((targets >= 0).sum() * len(scores))
    # Averaged over ranks, as DistributedDataParallel does, this is the mean over the crops of all ranks.
    return total * distributed.world_size() / count.clamp(min=1)


# --------------------------------------------------------------------------------------------------- training


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)  # the Model inside DistributedDataParallel
    N = len(run.images)
    # No epoch's k-means has this seed.
    generator = torch.Generator().manual_seed(config.seed << 32 | config.epochs + epoch)
    order = uniform_order(memory.targets, N, generator)
    batches = data.batches(N, config.batch_size, epoch, config.seed, order=order)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # schedule
        lr = warmup_cosine(step, len(batches), config.epochs, config.lr, config.final_lr,
                           config.warmup_epochs, config.start_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        dtype = next(model.parameters()).dtype
        crops = to_device(crops, params, run.device, dtype)  # per resolution (V_r B, 3, s, s)

        # forward
        with run.autocast():
            features, scores = net(crops)
        scores = scores.view(-1, len(index), scores.shape[1])  # (V, B, K)

        # loss
        targets = memory.targets[index.to(run.device, non_blocking=True)]  # (B,)
        loss = prediction_loss(scores, targets, config.temperature)

        # update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log
        z = nn.functional.normalize(features[: len(index)].detach())  # (B, F) of the first crop
        run.log(loss.detach(), lr, z, index, targets, **memory.figures)


def main(config):
    device, images = setup(config)
    if len(images) < config.prototypes:
        raise ArgumentError(f"--prototypes {config.prototypes}: more than the {len(images)} images")
    alexnet_input = {*config.sizes, config.eval_size or 224}, config.width, config.stem
    if config.arch == "alexnet" and alexnet_input != ({224}, 1, "imagenet"):
        raise ArgumentError(f"--arch {config.arch} takes images of 224 pixels and has no other width or "
                            "stem: --sizes 224 --eval-size 0")

    model = Model(config, own_trunk(config, device))
    if config.pca_dim > model.backbone.feature_dim:
        has = f"the trunk has only {model.backbone.feature_dim} features"
        raise ArgumentError(f"--pca-dim {config.pca_dim}: {has}")
    net = prepare(model, config, device)
    # The classifier is reset every epoch: momentum of its old gradients must not move it.
    groups = [{"params": list(model.backbone.parameters())},
              {"params": list(model.prototypes.parameters()), "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    memory = Memory(len(images), device)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, jitter_p=config.jitter_p, grey_p=config.grey_p,
                                blur_p=config.blur_p, rotate=config.rotate)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    run = Run(config, "deepcluster", images, model, optimizer, memory, remedy=REMEDY, sobel=config.sobel)
    dtype = autocast_dtype(config.precision, device)
    whitened = torch.promote_types(dtype, torch.float32).itemsize * config.pca_dim
    temporary = dtype.itemsize * model.backbone.feature_dim + whitened
    report(run, recipe(Config, RECIPES, config.recipe), assigned=len(images), temporary=temporary)
    for epoch in run.epochs():
        if memory.epoch < epoch:  # false if a run resumes in mid-epoch
            generator = torch.Generator().manual_seed(config.seed << 32 | epoch)
            x = whiten(run.features(model.backbone), config.pca_dim)  # (n, pca_dim)
            with run.timed("clusters"):
                assign(memory, x, config.prototypes, config.kmeans_iterations, generator)
            del x
            reset_classifier(model.prototypes, generator)  # cluster numbers have changed
            memory.epoch = epoch
            found = memory.figures
            say(", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None))
            if found["largest_cluster"] > 20 * len(images) / config.prototypes:
                say(f"warning: one cluster holds more than 20 times the mean number of images\n{REMEDY}")
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch, memory.targets[None])


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
