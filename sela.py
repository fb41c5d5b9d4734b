"""SeLa, self-labelling (Asano et al., ICLR 2020, arXiv 1911.05371).

Labels and network minimise one loss in turn; every label must be used equally often, which alone keeps it
from collapsing.

    L  =  mean over h, i of  cross-entropy(classifier_h(trunk(crop_i)), y_hi)        H = 10 classifiers of K = 3,000 labels
    Q  =  diag(r) P^25 diag(c),  P = softmax of the scores of all N images: r, c such that Q has
          row sums 1 / K and column sums 1 / N (Sinkhorn-Knopp on the whole data set)
    y_hi  =  argmax_k Q_ki

Labels are found anew 100 times, ever more rarely: after (E + 1.01) (j / 99)^2 epochs, the first time before
the first step. A label keeps its number, since it comes from the classifier that learns it. No k-means, no
projection head, one crop.

Published recipe, 61.5 % ImageNet linear top-1 reported by the authors (no full ImageNet run was made here),
of a pre-activation ResNet-50; with stronger augmentation 68.8:

    torchrun --nproc_per_node=8 sela.py --data /imagenet

On a CPU, in minutes:                  python sela.py --eval-every 5    (embedded images, needs no data)
Your photos, no labels:                python sela.py --data ~/photos --recipe small
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed
from common.alexnet import alexnet
from common.batchnorm import parallel
from common.distributed import rows_of
from common.engine.errors import ArgumentError, DataError, Diverged, say
from common.engine.launch import autocast_dtype, launch, start
from common.engine.log import Meter
from common.engine.options import option, parse, recipe
from common.engine.run import Run
from common.multicrop import MEAN, STD, Augmentation, CenterCrop, MultiCrop, to_device
from common.optim import drops
from common.resnet import ARCHITECTURES
from common.sinkhorn import balanced_assignments

# Letters in shapes: B images of this rank, W ranks, V crops, F features, H heads of K prototypes (one a
# cluster), N data set (n here).

# ---------------------------------------------------------------------------------------------------- recipes

ALEXNET = dict(arch="alexnet", heads=1)
STRONG = dict(scales=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_first=False, blur_p=0.5)
STRONG.update(epochs=280, drop_epochs=(160, 220, 260))
CIFAR = dict(arch="alexnet", scales=(0.2, 1.0), prototypes=128, lam=10.0, relabellings=400, relabel_power=1,
             one_head=True)
CIFAR.update(grey_first=False, batch_size=128, lr=0.03, weight_decay=5e-4, epochs=400, drop_epochs=(240, 320))
TINY = dict(arch="resnet10", width=0.5, stem="small", crops=(1,), sizes=(32,), eval_size=48)
TINY.update(scales=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_first=False, prototypes=64,
            heads=4)
TINY.update(relabellings=10, relabel_power=1, labelling="clean")
TINY.update(batch_size=32, lr=0.05, drop_epochs=())
SHAPES = dict(TINY, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), epochs=5,
              relabellings=5)
RECIPES = {  # name: (ImageNet linear top-1 reported by the authors, what differs from the defaults of Config)
    "resnet50_10x3k": ("61.5; NMI 54.2, AMI 34.4, ARI 7.2; the default with --data", {}),
    "alexnet_1x1k": ("42.1; NMI 50.5, AMI 12.2, ARI 2.7", dict(ALEXNET, prototypes=1000)),
    "alexnet_1x10k": ("43.8; NMI 66.4, AMI 4.7, ARI 4.7", dict(ALEXNET, prototypes=10000)),
    "alexnet_10x3k": ("47.1, best layer, ten crops (the paper, with rotations)", dict(ALEXNET, heads=10)),
    "resnet18_1k_strong": (
        "53.3; NMI 62.7, AMI 36.4, ARI 12.5; epochs and drops ours",
        dict(STRONG, arch="resnet18", prototypes=1000, heads=1),
    ),
    "resnet50_1k_strong": ("63.5; NMI 65.7, AMI 42.0, ARI 16.2; epochs and drops ours",
                           dict(STRONG, prototypes=1000, heads=1)),
    "resnet50_10x3k_strong": ("68.8; NMI 75.7, AMI 52.8, ARI 27.6; epochs and drops ours", STRONG),
    "cifar10_10x128": ("CIFAR-10 linear 83.4, k-NN 77.6; 75.5 by a user's run of the script (issue 24 of its "
                       "code)", CIFAR),
    "cifar100_10x128": ("CIFAR-100 linear 57.4, k-NN 44.2", CIFAR),
    "svhn_10x128": ("SVHN linear 94.5, k-NN 92.8; settings ours, number by the authors, not comparable",
                    CIFAR),
    "shapes": ("20-NN 41.7 on held-out images, untrained 30.3: measured here", SHAPES),
    "cifar": ("20-NN 49.9 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50, relabellings=25)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, a tenth of the images at most); fewer --heads;
  more --relabellings;
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

    arch: str = option("resnet50", "trunk", group="model",
                       choices=(*ARCHITECTURES, "alexnet", "alexnet_small"))
    width: float = option(1.0, "multiplies the trunk's channels")
    stem: str = option("imagenet", "first layers: imagenet, or small for images of 32 to 64 pixels",
                       choices=("imagenet", "small"))

    crops: tuple[int, ...] = option((1,), "crops of each size", group="multi-crop")
    sizes: tuple[int, ...] = option((224,), "sides of the crops in pixels")
    scales: tuple[float, ...] = option((0.08, 1.0),
                                       "smallest and largest share of the image's area, for each size")
    eval_size: int = option(0,
                            "side of the images that are clustered and evaluated; 0: that of the large crops")
    jitter: tuple[float, ...] = option((0.4, 0.4, 0.4, 0.4), "brightness, contrast, saturation, hue")
    jitter_p: float = option(1.0, "probability of jitter")
    grey_p: float = option(0.2, "probability of grey")
    grey_first: bool = option(True, "grey before the jitter")
    blur_p: float = option(0.0, "probability of blur")
    augs: int = option(3, "how much of that, as the authors count: 0 centre crops, 1 flipped, 2 random "
                          "crops, 3 colours too", choices=(0, 1, 2, 3))

    prototypes: int = option(3000, "number K of prototypes of each head, one a cluster", group="method")
    heads: int = option(10, "number H of heads, each with clusters of its own")
    temperature: float = option(1.0, "of the predictions")
    lam: float = option(25.0, "lambda: the power of the probabilities that is balanced")
    tolerance: float = option(0.01, "balancing ends once no label's mass differs by more than this share "
                                    "from 1 / K")
    relabellings: int = option(100, "times that labels are found")
    relabel_power: float = option(2.0,
                                  "of time in the course of the relabellings: 2 ever more rarely, 1 evenly")
    one_head: bool = option(False, "each relabelling is of one head, in turn, not of all")
    labelling: str = option("train", "what labels are found from: train (crops and mode of training) or "
                                     "clean (centre crops, eval mode)", choices=("train", "clean"))

    epochs: int = option(400, "passes over the data", group="optimisation")
    max_steps: int = option(0, "stop, saved, after this many steps; 0: never", free=True)
    batch_size: int = option(256,
                             "images a step over all ranks; the recipe's learning rates follow it linearly")
    lr: float = option(0.08, "learning rate at this batch size")
    drop_epochs: tuple[int, ...] = option((150, 300, 350), "epochs after which the learning rate drops")
    drop_factor: float = option(0.1, "by which it drops")
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(1e-5, "of every parameter")

    recipe: str = option("resnet50_10x3k", "named settings; options given on the command line win",
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
    """Trunk and H linear classifiers: a list of crop groups to features and H scores of the clusters."""

    def __init__(self, config):
        super().__init__()
        if "alexnet" in config.arch:
            self.backbone = alexnet("sela_small" if config.arch == "alexnet_small" else "sela")
        else:
            self.backbone = ARCHITECTURES[config.arch](width=config.width, stem=config.stem)
        # (K, F) each
        self.prototypes = nn.ModuleList(nn.Linear(self.backbone.feature_dim,
                                                  config.prototypes) for _ in range(config.heads))

    def forward(self, crops, autocast=torch.float32):
        """crops: one (V_r B, 3, s, s) a resolution, crop-major. Returns features (V B, F) and H scores (V B,
        K)."""
        with torch.autocast(crops[0].device.type, dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
            # One pass per resolution: batch-norm statistics of large and small crops stay apart. The head
            # sees all.
            features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        features = features.to(self.prototypes[0].weight.dtype)  # (V B, F): full precision from here on
        return features, [head(features) for head in self.prototypes]


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """The labels of every image: targets (H, N). Until a head is labelled for the first time its labels are
    random and even."""

    def __init__(self, n, heads, K, seed, device=None):
        generator = torch.Generator().manual_seed(seed)
        # (H, N)
        self.targets = torch.stack([torch.randperm(n,
                                                   generator=generator) % K for _ in range(heads)]).to(device)
        self.scalings = torch.zeros(heads, K, device=device)  # log r, where the next balancing begins
        self.done = 0  # relabellings so far
        self.figures = {}  # of the last assignment

    def state_dict(self):
        return {"targets": self.targets.cpu(), "scalings": self.scalings.cpu(), "done": self.done,
                "figures": self.figures}

    def load_state_dict(self, state):
        self.targets.copy_(state["targets"])
        self.scalings.copy_(state["scalings"])
        self.done, self.figures = state["done"], state["figures"]


def label_times(epochs, count, n, power):
    """When labels are found, in images seen: count times, ascending, the first at 0; those after the end of
    training are never.

    As in main.py (power 2) and cifar.py (power 1) of yukimasano/self-label.
    """
    end = (epochs + (1.0001 if power == 1 else 1.01)) * n
    return [end * (j / max(1, count - 1)) ** power for j in range(count)]


@torch.no_grad()
def assign(memory, prototypes, features, heads, lam, tolerance):
    """New labels for the heads named, each used about equally often over the data set.

    features: (n, F) this rank's rows of the data set; a row of NaN is an image that cannot be read: label
    -100, ignored.
    Raises DataError if fewer images than prototypes can be read, Diverged if a head's scores are not finite
    or all alike.
    """
    K, seen = len(prototypes[0].weight), ~features[:, 0].isnan()
    readable = int(distributed.all_sum(seen.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    features = features[seen] if not seen.all() else features
    rounds = []
    for h in heads:
        head = prototypes[h]
        scores = head.weight.new_empty(len(features), len(head.weight))  # (n, K): the largest thing held
        for rows, block in zip(scores.split(4096), features.split(4096)):
            rows.copy_(head(block.to(head.weight.dtype)))
        try:
            assignments, memory.scalings[h], _, iterations = balanced_assignments(
                scores, lam, tolerance, in_place=True, init=memory.scalings[h])
        except ValueError as error:  # on every rank
            raise Diverged(f"head {h} cannot be labelled: {error}; a lower --lr may help") from None
        del scores, rows  # room for those of the next head
        mine = torch.full((len(seen),), -100, device=assignments.device)
        mine[seen] = assignments
        mine = distributed.gather_rows(mine)  # (N,)
        largest = torch.bincount(mine[mine >= 0]).max()
        if largest == readable and K > 1:
            raise Diverged(f"head {h} has collapsed: it scores all images alike, so all get one label; a "
                           f"lower --lr may help")
        rounds.append([iterations, (mine != memory.targets[h]).double().mean(), largest])
        memory.targets[h] = mine
    iterations, changed, largest = (float(sum(values)) / len(heads) for values in zip(*rounds))
    memory.figures = {"relabellings": memory.done + 1, "sinkhorn_iterations": iterations, "changed": changed,
                      "largest_label": largest}


def prediction_loss(scores, targets, temperature):
    """Every crop predicts the clusters of its image: mean cross-entropy over heads, and over the crops of all
    ranks' images.

    scores: H tensors (V, B, K); targets: (H, B), where -100 is ignored.
    """
    loss = 0
    for head, target in zip(scores, targets):
        total = F.cross_entropy(head.flatten(0, 1) / temperature, target.repeat(len(head)), reduction="sum")
        count = distributed.all_sum((target >= 0).sum() * len(head))
        # Averaged over ranks, as DistributedDataParallel does, this is the mean over the crops of all ranks.
        loss = loss + total * distributed.world_size() / count.clamp(min=1)
    return loss / len(scores)


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def look(model, loader, run, config, number):
    """Features (n, F) of this rank's rows as training sees them: random crops, batch statistics, dropout. The
    authors' way.

    number: of the pass; each draws crops of its own.
    """
    n, dtype = len(run.images), autocast_dtype(config.precision, run.device)
    order = np.random.default_rng((config.seed, number)).permutation(n)
    # the last batch is filled up with images of the first
    order = np.resize(order, -(-n // config.batch_size) * config.batch_size)
    batches = data.batches(n, config.batch_size, number, config.seed, distributed.rank(),
                           distributed.world_size(), order=order)
    # whose losses stop the run
    own = run.loader = data.Loader(loader.dataset, config.workers, run.device.type == "cuda")
    first, last = rows_of(n, distributed.rank(), distributed.world_size())
    # One row more than this rank holds takes what other ranks hold: sorting it out would wait for the device.
    held = torch.full((last - first + 1, model.backbone.feature_dim), torch.nan, dtype=stored(dtype),
                      device=run.device)
    with run.phase(f"features of {n} images"):
        for step, (index, crops, params) in enumerate(own.epoch(number, batches)):
            run.agree(keep=False)  # this pass moves the running statistics
            torch.manual_seed(config.seed << 32 | run.total + number * len(batches) + step)  # of dropout
            crops = to_device(crops, params, run.device, model.prototypes[0].weight.dtype)
            with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                features = model.backbone(crops[0])[: len(index)]  # (B, F) of the first crop
            index = distributed.gather_rows(index.to(run.device, non_blocking=True), equal=True)  # (W B,)
            row = torch.where((index >= first) & (index < last), index - first, last - first)
            held[row] = distributed.gather_rows(features, equal=True).to(held.dtype)
    own.close()
    return run.accept(held[:-1])


def stored(dtype):
    """What features are held in between the pass and the labels: bfloat16 ones fit float16 without loss."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def relabel(model, memory, loader, run, config):
    """Labels of all heads, or of the one whose turn it is, from one pass over all images."""
    if config.labelling == "train":
        run.save()  # a stop in mid-pass would leave running statistics that no step has seen
        features = look(model, loader, run, config, config.epochs + memory.done)
    else:
        features = run.look(model.backbone, loader)
    run.loader = loader
    heads = [memory.done % config.heads] if config.one_head else range(config.heads)
    with run.phase("clusters"):
        assign(memory, model.prototypes, features, heads, config.lam, config.tolerance)
    memory.done += 1
    say(", ".join(f"{name} {value:.3g}" for name, value in memory.figures.items()))


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)
    dtype = autocast_dtype(config.precision, run.device)
    full_precision = model.prototypes[0].weight.dtype
    batches = data.batches(len(run.images), config.batch_size, epoch, config.seed, distributed.rank(),
                           distributed.world_size())
    times = label_times(config.epochs, config.relabellings, len(run.images), config.relabel_power)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # assign: all images, at the published times, at most once a step
        if memory.done < len(times) and step * config.batch_size >= times[memory.done]:
            relabel(model, memory, loader, run, config)

        # schedule
        lr = drops(step, len(batches), config.lr, config.drop_epochs, config.drop_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        crops = to_device(crops, params, run.device, full_precision)  # one (V_r B, 3, s, s) a resolution

        # forward
        features, scores = net(crops, dtype)
        scores = [s.view(-1, len(index), s.shape[1]) for s in scores]  # H (V, B, K)

        # loss
        targets = memory.targets[:, index.to(run.device, non_blocking=True)]  # (H, B)
        loss = prediction_loss(scores, targets, config.temperature)

        # update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log
        run.log(loss.detach(), lr, F.normalize(features[: len(index)].detach()), index, targets,
                **memory.figures)
    run.meter.take(memory.targets)


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
    if config.augs < 2 and config.crops != (1,):
        raise ArgumentError(f"--augs {config.augs} is one crop an image: --crops 1")

    model = Model(config)
    model.to(device, torch.float64 if config.precision == "float64" else torch.float32,
             memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()
    net = parallel(model)
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
        crops = CenterCrop(images, side if config.stem == "small" else round(side * 8 / 7), side, config.seed,
                           flip=config.augs == 1)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    size = config.eval_size or config.sizes[0]
    arch = config.arch.replace("alexnet", "alexnet_sela")
    info = dict(arch=arch, width=config.width, stem=config.stem, channels=3, mean=MEAN, std=STD,
                method="sela")
    info.update(recipe=config.recipe, resize=size if config.stem == "small" else round(size * 8 / 7),
                size=size)
    objects = {"model": model, "optimizer": optimizer, "memory": memory}
    meter = Meter(config.prototypes, len(images), config.heads, device)
    run = Run(config, info["method"], images, steps_per_epoch, meter, objects, model.backbone, info, device,
              REMEDY)
    parameters = sum(p.numel() for p in model.parameters())
    # features, scores; targets and assignments
    size_of = stored(autocast_dtype(config.precision, device)).itemsize
    held = len(images) * (size_of * model.backbone.feature_dim + 4 * config.prototypes + 16 * config.heads)
    run.report(recipe(Config, RECIPES, config.recipe), parameters, len(images), held)
    run.resume()
    for epoch in run.epochs():
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
