"""SeLa, self-labelling (Asano et al., ICLR 2020, arXiv 1911.05371).

The network and the labels are optimised in turn, both to minimise one loss. A label here is a cluster: no
ground truth is used. Every label must be used equally often; this alone prevents collapse.

    L  =  mean over h, i of  cross-entropy(classifier_h(trunk(crop_i)), y_hi)   10 classifiers of 3,000 labels
    Q  =  diag(c) P^25 diag(r),  P (N, K) = softmax of the scores of all images; c, r such that rows
          sum to 1 / N and columns to 1 / K (Sinkhorn-Knopp on the whole data set)
    y_hi  =  argmax_k Q_ik

Labels are computed 100 times, at growing intervals: after (E + 1.01) (j / 99)^2 of the E epochs, j = 0 .. 99.
A label keeps its number, since it comes from the classifier (`prototypes`, here linear layers) that learns
it. There is no k-means, no projection head, and one crop per image.

Published recipe: the authors report 61.5 % ImageNet linear top-1 for a pre-activation ResNet-50, and 68.8 for
a standard one with stronger augmentation (no full ImageNet run was made here):

    torchrun --nproc_per_node=8 sela.py --data /imagenet

On a CPU, in minutes:          python sela.py --eval-every 5    (on drawn images, needs no data)
Your photos, no labels:        python sela.py --data ~/photos --recipe small
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common import data, distributed
from common.alexnet import alexnet
from common.engine.errors import ArgumentError, DataError, Diverged, say
from common.engine.launch import autocast_dtype, launch, own_trunk, prepare, report, setup
from common.engine.options import RunOptions, option, parse, recipe
from common.engine.run import Run
from common.multicrop import Augmentation, CenterCrop, MultiCrop, to_device
from common.optim import drops
from common.resnet import ARCHITECTURES
from common.sinkhorn import balanced_assignments

# Letters in shapes: B images of this rank's batch, W ranks, V crops per image (V_r of size r; the first U are
# large), s pixels wide, F trunk features, D embedding size, H heads of K prototypes, L queue length, N images
# in all, n per rank. V B rows: crop 0 of all B images, then crop 1. params (V, B, 8): crops' colour changes.

# ---------------------------------------------------------------------------------------------------- recipes

ALEXNETS = ("alexnet", "alexnet_small")
ALEXNET = dict(arch="alexnet", heads=1)
STRONG = dict(arch="resnet50", scales=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_first=False,
              blur_p=0.5, epochs=280, drop_epochs=(160, 220, 260))
CIFAR = dict(arch="alexnet", scales=(0.2, 1.0), prototypes=128, lam=10.0, relabellings=400, relabel_power=1,
             one_head=True, grey_first=False, batch_size=128, lr=0.03, weight_decay=5e-4, epochs=400,
             drop_epochs=(240, 320))
TINY = dict(arch="resnet10", width=0.5, stem="small", crops=(1,), sizes=(32,), scales=(0.2, 1.0),
            eval_size=48, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_first=False, prototypes=64, heads=4,
            relabellings=10, relabel_power=1, labelling="clean", batch_size=32, lr=0.05, drop_epochs=())
SHAPES = dict(TINY, width=0.25, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 0.4, 0.2),
              heads=10, lr=0.1, epochs=18, relabellings=36, drop_epochs=(15,))
RECIPES = {  # name: (result, by default ImageNet linear top-1; options that differ from the first row)
    "resnet50_10x3k": ("61.5; NMI 54.2, AMI 34.4, ARI 7.2; the default with --data", dict(
        arch="preact50", crops=(1,), sizes=(224,), scales=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.4),
        blur_p=0.0, prototypes=3000, temperature=1.0, epochs=400, batch_size=256, lr=0.08,
        weight_decay=1e-5)),
    "alexnet_1x1k": ("42.1; NMI 50.5, AMI 12.2, ARI 2.7", dict(ALEXNET, prototypes=1000)),
    "alexnet_1x10k": ("43.8; NMI 66.4, AMI 4.7, ARI 4.7", dict(ALEXNET, prototypes=10000)),
    "alexnet_10x3k": ("47.1, best layer, ten crops (the paper, with rotations)", dict(ALEXNET, heads=10)),
    "resnet18_1k_strong": ("53.3; NMI 62.7, AMI 36.4, ARI 12.5; drops ours",
                           dict(STRONG, arch="resnet18", prototypes=1000, heads=1)),
    "resnet50_1k_strong": ("63.5; NMI 65.7, AMI 42.0, ARI 16.2; drops ours",
                           dict(STRONG, prototypes=1000, heads=1)),
    "resnet50_10x3k_strong": ("68.8; NMI 75.7, AMI 52.8, ARI 27.6; drops ours", STRONG),
    "cifar10_10x128": ("CIFAR-10 linear 83.4, k-NN 77.6; 75.5 by a user's run of the script "
                       "(issue 24 of its code)", CIFAR),
    "cifar100_10x128": ("CIFAR-100 linear 57.4, k-NN 44.2", CIFAR),
    "svhn_10x128": ("SVHN linear 94.5, k-NN 92.8; settings ours, number by the authors, not comparable",
                    CIFAR),
    "shapes": ("20-NN 95.7 on held-out images, untrained 27.5: measured here", SHAPES),
    "cifar": ("20-NN 49.8 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured",
              dict(TINY, epochs=50, relabellings=25, exif=True)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, at most a tenth of the images);
  fewer --heads; more --relabellings; a lower --lr; milder --jitter and --scales. See docs/log.md."""


@dataclass
class Config(RunOptions):
    arch: str = option("resnet50", "architecture of the trunk, or MODULE:FUNCTION of your own",
                       choices=(*ARCHITECTURES, "preact50", *ALEXNETS))

    # Unlike the shared option, a resumed run may not change it: images are clustered at this size.
    eval_size: int = option(0, "side of clustered and evaluated images; 0: that of the large crops", least=0)
    jitter_p: float = option(1.0, "probability of colour jitter", group="multi-crop", least=0, most=1)
    grey_p: float = option(0.2, "probability of turning grey", group="multi-crop", least=0, most=1)
    grey_first: bool = option(True, "turn grey before the colour jitter", group="multi-crop")
    augs: int = option(3, "augmentation: 0 centre crops, 1 flips too, 2 random crops, 3 colours too",
                       group="multi-crop", choices=(0, 1, 2, 3))

    heads: int = option(10, "number H of heads, each with clusters of its own", least=1)
    lam: float = option(25.0, "lambda: exponent of the probabilities in Q; larger makes Q sharper", above=0)
    tolerance: float = option(0.01, "balancing ends at this largest relative error of label mass", above=0)
    relabellings: int = option(100, "number of times that labels are computed", least=1)
    relabel_power: float = option(2.0, "spacing of relabellings; 1: even, above 1: growing", above=0)
    one_head: bool = option(False, "each relabelling updates one head, another one every epoch, not all")
    labelling: str = option("train", "crops that labels come from; clean: centre crops, eval mode",
                            choices=("train", "clean"))

    drop_epochs: tuple[int, ...] = option((150, 300, 350), "epochs after which lr drops",
                                          group="optimisation")
    drop_factor: float = option(0.1, "factor of lr at each drop", group="optimisation", above=0)


# ------------------------------------------------------------------------------------------------------ model


class Model(nn.Module):
    """Maps crops to features and H scores of the clusters: trunk and H linear classifiers."""

    def __init__(self, config, backbone=None):
        super().__init__()
        if backbone:
            self.backbone = backbone
        elif config.arch in ALEXNETS:
            self.backbone = alexnet("sela_small" if config.arch == "alexnet_small" else "sela")
        elif config.arch == "preact50":
            from common.weights.preact import PreactResNet50

            self.backbone = PreactResNet50()
        else:
            self.backbone = ARCHITECTURES[config.arch](width=config.width, stem=config.stem)
        heads = (nn.Linear(self.backbone.feature_dim, config.prototypes) for _ in range(config.heads))
        self.prototypes = nn.ModuleList(heads)  # (K, F) each
        if config.arch in ALEXNETS:  # start like AlexNet's own layers; ResNet heads keep torch's default
            for head in self.prototypes:
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)

    def forward(self, crops):
        """Maps a list of crops, (V_r B, 3, s, s) per resolution, to features (V B, F), H scores (V B, K)."""
        # One pass per resolution: batch-norm statistics of large and small crops stay apart.
        features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        with torch.autocast(features.device.type, enabled=False):  # full precision from here on
            features = features.to(self.prototypes[0].weight.dtype)
            return features, [head(features) for head in self.prototypes]


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Holds labels (H, N): for each head, the cluster of every image. Until a head is first labelled, they
    are random and used equally often."""

    def __init__(self, N, heads, K, seed, device=None):
        generator = torch.Generator().manual_seed(seed)
        targets = [torch.randperm(N, generator=generator) % K for _ in range(heads)]
        self.targets = torch.stack(targets).to(device)  # (H, N)
        self.scalings = torch.zeros(heads, K, device=device)  # log r, from which the next balancing starts
        self.done = 0  # relabellings so far
        self.figures = {}  # statistics of the last assignment, for the log

    def state_dict(self):
        tensors = {"targets": self.targets.cpu(), "scalings": self.scalings.cpu()}
        return {**tensors, "done": self.done, "figures": self.figures}

    def load_state_dict(self, state):
        self.targets.copy_(state["targets"])
        self.scalings.copy_(state["scalings"])
        self.done, self.figures = state["done"], state["figures"]


def label_times(epochs, count, n, power):
    """Returns the `count` times, in images seen, at which labels are computed; 0 is the first.

    As in main.py (power 2) and cifar.py (power 1) of yukimasano/self-label.
    """
    end = (epochs + (1.0001 if power == 1 else 1.01)) * n
    return [end * (j / max(1, count - 1)) ** power for j in range(count)]


@torch.no_grad()
def assign(memory, prototypes, features, heads, lam, tolerance):
    """Computes new labels for the given heads; all labels are used about equally often over the data set.

    features: (n, F) of this rank's images; a row of NaN is an image that cannot be read: label -100, ignored.
    Raises DataError if fewer images than prototypes can be read, Diverged if a head's scores are not finite
    or are the same for all images.
    """
    K, seen = len(prototypes[0].weight), ~features[:, 0].isnan()
    readable = int(distributed.all_sum(seen.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    features = features[seen] if not seen.all() else features
    rounds = []
    for h in heads:
        head = prototypes[h]
        scores = head.weight.new_empty(len(features), K)  # (n, K): the largest tensor held
        for rows, block in zip(scores.split(4096), features.split(4096)):
            rows.copy_(head(block.to(head.weight.dtype)))
        try:
            assignments, memory.scalings[h], _, iterations = balanced_assignments(
                scores, lam, tolerance, in_place=True, init=memory.scalings[h])
        except ValueError as error:  # raised on every rank
            raise Diverged(f"head {h} cannot be labelled: {error}; a lower --lr may help") from None
        del scores, rows  # makes room for the next head's
        mine = torch.full((len(seen),), -100, device=assignments.device)
        mine[seen] = assignments
        mine = distributed.gather_rows(mine)  # (N,)
        largest = torch.bincount(mine[mine >= 0]).max()
        if largest == readable and K > 1:
            raise Diverged(f"head {h} has collapsed: it scores all images alike, so all get one label; "
                           "are all images alike, or is --lr too high?")
        rounds.append([iterations, (mine != memory.targets[h]).double().mean(), largest])
        memory.targets[h] = mine
    iterations, changed, largest = (float(sum(values)) / len(heads) for values in zip(*rounds))
    memory.figures = {"relabellings": memory.done + 1, "sinkhorn_iterations": iterations, "changed": changed,
                      "largest_label": largest}


def prediction_loss(scores, targets, temperature):
    """Predicts an image's clusters from each crop: mean cross-entropy over heads and all ranks' crops.

    scores: H tensors (V, B, K); targets: (H, B), where -100 is ignored.
    """
    loss, crops = 0, len(scores[0])  # V
    counts = distributed.all_sum((targets >= 0).sum(1) * crops)  # (H,)
    for logits, target, count in zip(scores, targets, counts.clamp(min=1)):
        logits = logits.flatten(0, 1) / temperature  # (V B, K)
        total = nn.functional.cross_entropy(logits, target.repeat(crops), reduction="sum")
        # Averaged over ranks, as DistributedDataParallel does, this is the mean over the crops of all ranks.
        loss = loss + total * distributed.world_size() / count
    return loss / len(scores)


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def features_in_training(model, loader, run, config, number):
    """Returns features (n, F) of this rank's images as in training, which is how the authors do it: random
    crops, batch statistics, dropout. number: of the pass; each pass draws other crops."""
    N = len(run.images)
    order = np.random.default_rng((config.seed, number)).permutation(N)
    # Images from the start of the order fill up the last batch.
    order = np.resize(order, -(-N // config.batch_size) * config.batch_size)
    batches = data.batches(N, config.batch_size, number, config.seed, order=order)
    own = data.Loader(loader.dataset, config.workers, run.device.type == "cuda")
    dtype, stored = model.prototypes[0].weight.dtype, stored_dtype(config, run.device)
    held = distributed.ShardedRows(N, model.backbone.feature_dim, device=run.device, dtype=stored,
                                   fill=torch.nan)
    with run.timed(f"features of {N} images"):
        for _, (index, crops, params) in run.steps(own, batches, number, extra=True):
            crops = to_device(crops, params, run.device, dtype)
            with run.autocast():
                features = model.backbone(crops[0])[: len(index)]  # (B, F) of the first crop
            # A NaN from the network must not be taken for an image that cannot be read.
            features = features.nan_to_num(torch.inf, torch.inf, -torch.inf).to(stored)
            index = distributed.gather_rows(index.to(run.device, non_blocking=True), equal=True)  # (W B,)
            held.write(index, distributed.gather_rows(features, equal=True))
    own.close()
    return held.local


def stored_dtype(config, device):
    """Returns the dtype of stored features: float16 for a bfloat16 trunk, exact at usual magnitudes."""
    dtype = autocast_dtype(config.precision, device)
    return torch.float16 if dtype == torch.bfloat16 else dtype


def relabel(model, memory, loader, run, config, epoch):
    """Computes new labels from one pass over all images, for all heads or for the one whose turn it is."""
    if config.labelling == "train":
        features = features_in_training(model, loader, run, config, config.epochs + memory.done)
    else:
        features = run.features(model.backbone)
    heads = [epoch % config.heads] if config.one_head else range(config.heads)
    with run.timed("clusters"):
        assign(memory, model.prototypes, features, heads, config.lam, config.tolerance)
    memory.done += 1
    say(", ".join(f"{name} {value:.3g}" for name, value in memory.figures.items()))


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)  # the Model inside DistributedDataParallel
    N = len(run.images)
    batches = data.batches(N, config.batch_size, epoch, config.seed)
    times = label_times(config.epochs, config.relabellings, N, config.relabel_power)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # assign: all images, at the published times, at most once per step
        if memory.done < len(times) and step * config.batch_size >= times[memory.done]:
            relabel(model, memory, loader, run, config, epoch)

        # schedule
        lr = drops(step, len(batches), config.lr, config.drop_epochs, config.drop_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        dtype = next(model.parameters()).dtype
        crops = to_device(crops, params, run.device, dtype)  # per resolution (V_r B, 3, s, s)

        # forward
        with run.autocast():
            features, scores = net(crops)
        scores = [s.view(-1, len(index), s.shape[1]) for s in scores]  # H (V, B, K)

        # loss
        targets = memory.targets[:, index.to(run.device, non_blocking=True)]  # (H, B)
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
    if config.arch in ALEXNETS and alexnet_input != ({224}, 1, "imagenet"):
        raise ArgumentError(f"--arch {config.arch} takes images of 224 pixels and has no other width or "
                            "stem: --sizes 224 --eval-size 0")
    if config.arch == "preact50" and (config.width, config.stem) != (1, "imagenet"):
        raise ArgumentError("--arch preact50 has no other width or stem: --width 1 --stem imagenet")
    if config.augs < 2 and config.crops != (1,):
        raise ArgumentError(f"--augs {config.augs} takes one crop per image: --crops 1")

    model = Model(config, own_trunk(config, device))
    net = prepare(model, config, device)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum,
                                weight_decay=config.weight_decay)
    memory = Memory(len(images), config.heads, config.prototypes, config.seed, device)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, jitter_p=config.jitter_p, grey_p=config.grey_p,
                                grey_first=config.grey_first, blur_p=config.blur_p)
    if config.augs < 3:
        augmentation = Augmentation(jitter_p=0, grey_p=0, blur_p=0)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    if config.augs < 2:
        side = config.sizes[0]
        resize = side if config.stem == "small" else round(side * 8 / 7)
        crops = CenterCrop(images, resize, side, config.seed, flip=config.augs == 1)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    arch = config.arch.replace("alexnet", "alexnet_sela") if config.arch in ALEXNETS else config.arch
    run = Run(config, "sela", images, model, optimizer, memory, remedy=REMEDY, heads=config.heads,
              arch=arch)
    temporary = stored_dtype(config, device).itemsize * model.backbone.feature_dim + 4 * config.prototypes
    report(run, recipe(Config, RECIPES, config.recipe), assigned=len(images), temporary=temporary)
    for epoch in run.epochs():
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch, memory.targets)


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
