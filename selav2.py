"""SeLa-v2 (the improved SeLa of Caron et al., NeurIPS 2020, arXiv 2006.09882; SeLa: ICLR 2020, arXiv
1911.05371).

Once an epoch, every image gets a label from the embeddings that the last epoch left in a memory, such that
all labels are used about equally often; during the epoch every crop of an image predicts its label. Several
heads have labels of their own.

    z_v = head(trunk(crop_v)) / |.|                                   unit embedding of crop v, D = 128
    Q_h = diag(c) exp(lambda z C_h^T / temperature) diag(r)           r, c such that rows sum to 1 / N, columns to 1 / K
    y_h = argmax_k Q_h                                                once an epoch, for each head h; no gradient
    L   = mean over h, v of  cross-entropy(z_v C_h^T / temperature, y_h)

DeepCluster-v2 with SeLa's labels: the prototypes C_h are learnt, not made by k-means, and it is the balance
over the whole data set that keeps it from collapsing. The authors never released code; what their paper
leaves open is ours.

Published figure, 71.8 % ImageNet linear top-1 reported by the authors (settings ours, no full ImageNet run
was made here):

    torchrun --nproc_per_node=8 --nnodes=8 selav2.py --data /imagenet --recipe selav2_400ep

One node of 8 GPUs:                    torchrun --nproc_per_node=8 selav2.py --data /imagenet
On a CPU, in minutes:                  python selav2.py --eval-every 5    (embedded images, needs no data)
Your photos, no labels:                python selav2.py --data ~/photos --recipe small
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed
from common.batchnorm import parallel
from common.distributed import rows_of
from common.engine.errors import ArgumentError, DataError, Diverged
from common.engine.launch import autocast_dtype, launch, start
from common.engine.log import Meter
from common.engine.options import option, parse, recipe
from common.engine.run import Run
from common.multicrop import MEAN, STD, Augmentation, MultiCrop, to_device
from common.optim import LARC, warmup_cosine
from common.resnet import ARCHITECTURES
from common.sinkhorn import balanced_assignments

# Letters in shapes: B images of this rank, W ranks, V crops (first U large), F features, D embedding, H heads
# of K prototypes, N data set.

# ---------------------------------------------------------------------------------------------------- recipes

BATCH_4096 = dict(batch_size=4096, lr=4.8, final_lr=0.0048, start_lr=0.3, freeze_prototypes_iters=313)
TWO_CROPS = dict(crops=(2,), sizes=(224,), scales=(0.08, 1.0))
TINY = dict(arch="resnet10", width=0.5, stem="small", hidden=256, dim=64, crops=(4,), sizes=(32,),
            eval_size=48)
TINY.update(scales=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0, prototypes=100,
            freeze_prototypes_iters=100)
TINY.update(batch_size=32, lr=0.8, final_lr=0.0008, warmup_epochs=0)
SHAPES = dict(TINY, sizes=(24,), eval_size=32, scales=(0.4, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), epochs=5)
RECIPES = {  # name: (ImageNet linear top-1 reported by the authors, what differs from the defaults of Config)
    "selav2_400ep": ("71.8, 64 GPUs; settings ours", dict(BATCH_4096, epochs=400)),
    "selav2_400ep_2x224": ("67.2, 64 GPUs; settings ours", dict(BATCH_4096, epochs=400, **TWO_CROPS)),
    "selav2_400ep_bs1024": ("one node of 8 GPUs: published at 4096, lr by the linear rule; the default with "
                            "--data", {}),
    "shapes": ("20-NN 42.3 on held-out images, untrained 30.3: measured here", SHAPES),
    "cifar": ("20-NN 50.4 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, a tenth of the images at most); fewer --heads;
  a lower --lr or a longer --warmup-epochs; milder --jitter and --scales. README.md says more: "When the loss sits at ln K\""""


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
    hidden: int = option(2048, "width of the projection head's hidden layer")
    dim: int = option(128, "size D of the embedding")

    crops: tuple[int, ...] = option((2, 4), "crops of each size; those of the first, largest size are "
                                            "assigned", group="multi-crop")
    sizes: tuple[int, ...] = option((160, 96), "sides of the crops in pixels")
    scales: tuple[float, ...] = option((0.08, 1.0, 0.05, 0.14),
                                       "smallest and largest share of the image's area, for each size")
    eval_size: int = option(0, "side of the images that evaluations see; 0: that of the large crops",
                            free=True)
    jitter: tuple[float, ...] = option((0.8, 0.8, 0.8, 0.2), "brightness, contrast, saturation, hue")
    blur_p: float = option(0.5, "probability of blur")

    prototypes: int = option(3000, "number K of prototypes of each head, one a cluster", group="method")
    heads: int = option(3, "number H of heads, each with clusters of its own")
    temperature: float = option(0.1, "of the predictions")
    lam: float = option(25.0, "lambda: the power of the probabilities that is balanced")
    tolerance: float = option(0.01, "balancing ends once no label's mass differs by more than this share "
                                    "from 1 / K")
    freeze_prototypes_iters: int = option(1252, "steps before the prototypes begin to learn")

    epochs: int = option(400, "passes over the data", group="optimisation")
    max_steps: int = option(0, "stop, saved, after this many steps; 0: never", free=True)
    batch_size: int = option(1024,
                             "images a step over all ranks; the recipe's learning rates follow it linearly")
    lr: float = option(1.2, "peak learning rate at this batch size (LARC)")
    final_lr: float = option(0.0012, "learning rate that the cosine ends at")
    warmup_epochs: int = option(10, "epochs of linear warm-up")
    start_lr: float = option(0.075, "learning rate that the warm-up starts from")
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(1e-6, "of every parameter")

    recipe: str = option("selav2_400ep_bs1024", "named settings; options given on the command line win",
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
    """Trunk, two-layer head, H sets of prototypes: a list of crop groups to unit embeddings and their cosines
    to each set."""

    def __init__(self, config):
        super().__init__()
        self.backbone = ARCHITECTURES[config.arch](width=config.width, stem=config.stem)
        self.projection_head = nn.Sequential(nn.Linear(self.backbone.feature_dim, config.hidden),
                                             nn.BatchNorm1d(config.hidden), nn.ReLU(inplace=True),
                                             nn.Linear(config.hidden, config.dim))
        # (K, D) each
        self.prototypes = nn.ModuleList(nn.Linear(config.dim, config.prototypes,
                                                  bias=False) for _ in range(config.heads))

    def forward(self, crops, autocast=torch.float32):
        """crops: one (V_r B, 3, s, s) a resolution, crop-major. Returns z (V B, D) and H scores (V B, K)."""
        with torch.autocast(crops[0].device.type, dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
            # One pass per resolution: batch-norm statistics of large and small crops stay apart. The head
            # sees all.
            features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
            z = self.projection_head(features)
        z = F.normalize(z.to(self.prototypes[0].weight.dtype))  # (V B, D): full precision from here on
        return z, [head(z) for head in self.prototypes]

    @torch.no_grad()
    def normalize_prototypes(self):
        for head in self.prototypes:
            head.weight.copy_(F.normalize(head.weight))


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Embeddings of the U assigning crops of every image, as one epoch's steps left them, and the clusters
    they were put in.

    This rank holds the data-set rows [rN/W, (r+1)N/W) of all U banks. Saved in data-set order, so that
    another world size can load it. targets (H, N): cluster of each image, -100 (ignored) for an image that
    was not in the memory.
    """

    def __init__(self, n, U, D, heads, K, device=None, dtype=torch.float32):
        self.first, self.last = rows_of(n, distributed.rank(), distributed.world_size())
        self.own = self.last - self.first
        # One row more than this rank holds takes what other ranks hold: sorting it out would wait for the
        # device.
        self.banks = torch.zeros(U, self.own + 1, D, device=device, dtype=dtype)
        self.filled = torch.zeros(self.own + 1, dtype=torch.bool, device=device)
        self.targets = torch.full((heads, n), -100, device=device)
        # log r, where the next balancing begins
        self.scalings = torch.zeros(heads, K, device=device, dtype=dtype)
        self.epoch = -1  # whose clusters the targets are

    @torch.no_grad()
    def update(self, index, z):
        """Stores the embeddings z (U, B, D) of this rank's images index (B,); every rank keeps its rows of
        all of them."""
        index = distributed.gather_rows(index.to(z.device, non_blocking=True), equal=True)  # (W B,)
        z = distributed.gather_rows(z.transpose(0, 1), equal=True).transpose(0, 1)  # (U, W B, D)
        row = torch.where((index >= self.first) & (index < self.last), index - self.first, self.own)  # (W B,)
        self.banks[:, row] = z
        self.filled[row] = True

    def rows(self, u):
        """Embeddings of assigning crop u that the last epoch left on this rank: (rows, D)."""
        return self.banks[u, :-1][self.filled[:-1]]

    def state_dict(self):
        banks = distributed.gather_rows(self.banks[:, :-1].transpose(0, 1)).cpu()  # (N, U, D)
        filled = distributed.gather_rows(self.filled[:-1]).cpu()  # (N,)
        return {"banks": banks, "filled": filled, "targets": self.targets.cpu(),
                "scalings": self.scalings.cpu(), "epoch": self.epoch}

    def load_state_dict(self, state):
        mine = slice(self.first, self.last)
        self.banks[:, :-1] = state["banks"][mine].transpose(0, 1).to(self.banks.device)
        self.filled[:-1] = state["filled"][mine].to(self.filled.device)
        self.targets.copy_(state["targets"])
        self.scalings.copy_(state["scalings"])
        self.epoch = state["epoch"]


@torch.no_grad()
def assign(memory, prototypes, temperature, lam, tolerance):
    """Labels the memory once for each head, head h from bank h mod U, such that all labels are used about
    equally often.

    Raises DataError if fewer images than prototypes can be read, Diverged if a head's scores are not finite
    or all alike.
    """
    K, readable = len(prototypes[0].weight), int(distributed.all_sum(memory.filled[:-1].sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    for h, head in enumerate(prototypes):
        # (rows, K): the largest thing held
        scores = memory.rows(h % len(memory.banks)) @ (F.normalize(head.weight) / temperature).T
        try:
            assignments, memory.scalings[h], _, _ = balanced_assignments(
                scores, lam, tolerance, in_place=True, init=memory.scalings[h])
        except ValueError as error:  # on every rank
            raise Diverged(f"head {h} cannot be labelled: {error}; a lower --lr may help") from None
        del scores  # room for those of the next head
        mine = torch.full((memory.own,), -100, device=assignments.device)
        mine[memory.filled[:-1]] = assignments
        mine = distributed.gather_rows(mine)  # (N,)
        if torch.bincount(mine[mine >= 0]).max() == readable and K > 1:
            raise Diverged(f"head {h} has collapsed: it scores all images alike, so all get one label; a "
                           f"lower --lr may help")
        memory.targets[h] = mine
    memory.filled.fill_(False)  # from here on it is filled anew


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
def fill(model, memory, loader, run, config):
    """One pass before the first epoch: each assigning crop by itself, in train mode (batch statistics), as
    the authors do."""
    dtype = autocast_dtype(config.precision, run.device)
    own_number = config.epochs  # crops that no training epoch draws
    batches = data.batches(len(run.images), config.batch_size, own_number, config.seed, distributed.rank(),
                           distributed.world_size())
    for index, crops, params in loader.epoch(own_number, batches):
        run.agree(keep=False)  # this pass moves the running statistics
        # (U B, 3, s, s)
        crops = to_device(crops[:1], params[: config.crops[0]], run.device,
                          model.prototypes[0].weight.dtype)[0]
        memory.update(index, torch.stack([model([crop], dtype)[0] for crop in crops.split(len(index))]))


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)
    dtype = autocast_dtype(config.precision, run.device)
    full_precision = model.prototypes[0].weight.dtype
    batches = data.batches(len(run.images), config.batch_size, epoch, config.seed, distributed.rank(),
                           distributed.world_size())
    U = config.crops[0]
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        # schedule
        lr = warmup_cosine(step, len(batches), config.epochs, config.lr, config.final_lr,
                           config.warmup_epochs, config.start_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # move: uint8 crops to the device, where the whole batch is jittered, blurred and normalised
        crops = to_device(crops, params, run.device, full_precision)  # one (V_r B, 3, s, s) a resolution

        # forward
        model.normalize_prototypes()
        z, scores = net(crops, dtype)
        # (V, B, D), H (V, B, K)
        z, scores = z.view(-1, len(index), z.shape[1]), [s.view(-1, len(index), s.shape[1]) for s in scores]

        # loss
        targets = memory.targets[:, index.to(run.device, non_blocking=True)]  # (H, B)
        loss = prediction_loss(scores, targets, config.temperature)

        # memory: the embeddings that the next epoch's clusters are made of
        memory.update(index, z[:U].detach())

        # update
        optimizer.zero_grad()
        loss.backward()
        if step < config.freeze_prototypes_iters:
            for head in model.prototypes:
                head.weight.grad = None
        optimizer.step()

        # log
        run.log(loss.detach(), lr, z[0].detach(), index, targets)


def main(config):
    device = start(config)
    images = distributed.from_main(data.open_images, config.data or "shapes", "train", config.root)
    steps_per_epoch = len(images) // config.batch_size
    if not steps_per_epoch:
        raise DataError(f"--data has {len(images)} images, fewer than one batch: --batch-size "
                        f"{config.batch_size}")
    if sum(config.crops) < 2:
        raise ArgumentError(f"--crops {sum(config.crops)}: at least 2 crops are needed, to predict one from "
                            f"another")
    clustered = steps_per_epoch * config.batch_size
    if clustered < config.prototypes:
        raise ArgumentError(f"--prototypes {config.prototypes}: more than the {clustered} images of an "
                            f"epoch, which are clustered")

    model = Model(config)
    model.to(device, torch.float64 if config.precision == "float64" else torch.float32,
             memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()
    net = parallel(model)
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    memory = Memory(len(images), config.crops[0], config.dim, config.heads, config.prototypes, device,
                    model.prototypes[0].weight.dtype)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    size = config.eval_size or config.sizes[0]
    info = dict(arch=config.arch, width=config.width, stem=config.stem, channels=3, mean=MEAN, std=STD,
                method="selav2")
    info.update(recipe=config.recipe, resize=size if config.stem == "small" else round(size * 8 / 7),
                size=size)
    objects = {"model": model, "optimizer": optimizer, "memory": memory}
    meter = Meter(config.prototypes, len(images), config.heads, device)
    run = Run(config, info["method"], images, steps_per_epoch, meter, objects, model.backbone, info, device,
              REMEDY)
    parameters = sum(p.numel() for p in model.parameters())
    # memory, and the bank that is being labelled; scores; targets and assignments
    held = len(images) * (4 * (config.crops[0] + 1) * config.dim + 4 * config.prototypes + 16 * config.heads)
    run.report(recipe(Config, RECIPES, config.recipe), parameters, clustered, held)
    run.resume()
    for epoch in run.epochs():
        if memory.epoch < 0:
            fill(model, memory, loader, run, config)
        if memory.epoch < epoch:  # not when a run resumes in mid-epoch
            with run.phase("clusters"):
                assign(memory, model.prototypes, config.temperature, config.lam, config.tolerance)
            memory.epoch = epoch
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
