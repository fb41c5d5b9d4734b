"""SeLa-v2 (the improved SeLa of Caron et al., NeurIPS 2020, arXiv 2006.09882; SeLa: ICLR 2020, 1911.05371).

Once per epoch, every image gets a label, computed from the embeddings that the last epoch stored in a memory
such that all labels are used about equally often. During the epoch, every crop of an image predicts the label
of that image. Each of several heads has its own labels.

    z_v = normalise(projection(trunk(crop_v)))              unit embedding of crop v, D = 128
    Q_h = diag(c) exp(lambda z C_h^T / temperature) diag(r)     such that rows sum to 1 / N, columns to 1 / K
    y_h = argmax_k Q_h                                      once per epoch, for each head h; no gradient
    L   = mean over h, v of  cross-entropy(z_v C_h^T / temperature, y_h)

This is DeepCluster-v2 with SeLa's labels: the prototypes C_h are learnt, not made by k-means. Equal use of
the labels prevents collapse. The authors released no code; settings that their paper leaves open are ours.

Published result: the authors report 71.8 % ImageNet linear top-1 (settings ours, no full run was made here):

    torchrun --nproc_per_node=8 --nnodes=8 selav2.py --data /imagenet --recipe selav2_400ep

One node of 8 GPUs:            torchrun --nproc_per_node=8 selav2.py --data /imagenet
On a CPU, in minutes:          python selav2.py --eval-every 5    (on drawn images, needs no data)
Your photos, no labels:        python selav2.py --data ~/photos --recipe small
"""

from dataclasses import dataclass

import torch
from torch import nn

from common import data, distributed
from common.engine.errors import ArgumentError, DataError, Diverged
from common.engine.launch import launch, own_trunk, prepare, report, setup
from common.engine.options import RunOptions, option, parse, recipe
from common.engine.run import Run
from common.multicrop import Augmentation, MultiCrop, to_device
from common.optim import LARC, warmup_cosine
from common.resnet import ARCHITECTURES
from common.sinkhorn import balanced_assignments

# Letters in shapes: B images of this rank's batch, W ranks, V crops per image (V_r of size r; the first U are
# large), s pixels wide, F trunk features, D embedding size, H heads of K prototypes, L queue length, N images
# in all, n per rank. V B rows: crop 0 of all B images, then crop 1. params (V, B, 8): crops' colour changes.

# ---------------------------------------------------------------------------------------------------- recipes

BATCH_4096 = dict(batch_size=4096, lr=4.8, final_lr=0.0048, start_lr=0.3, freeze_prototypes_iters=313)
TWO_CROPS = dict(crops=(2,), sizes=(224,), scales=(0.08, 1.0))
TINY = dict(arch="resnet10", width=0.5, stem="small", hidden=256, dim=64, crops=(4,), sizes=(32,),
            scales=(0.2, 1.0), eval_size=48, jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0, prototypes=100,
            freeze_prototypes_iters=100, batch_size=32, lr=0.8, final_lr=0.0008, warmup_epochs=0)
SHAPES = dict(TINY, width=0.25, crops=(2, 2), sizes=(24, 16), eval_size=32, scales=(0.4, 1.0, 0.2, 0.5),
              jitter=(0.4, 0.4, 0.4, 0.2), dim=32, batch_size=64, lr=3.6, final_lr=0.0036, epochs=20)
RECIPES = {  # name: (result, by default ImageNet linear top-1; options that differ from the first row)
    "selav2_400ep_bs1024": ("published at 4096, lr by the linear rule; the default with --data", dict(
        crops=(2, 4), sizes=(160, 96), scales=(0.08, 1.0, 0.05, 0.14), jitter=(0.8, 0.8, 0.8, 0.2),
        blur_p=0.5, prototypes=3000, temperature=0.1, epochs=400, batch_size=1024, lr=1.2,
        final_lr=0.0012, warmup_epochs=10, start_lr=0.075, weight_decay=1e-6)),
    "selav2_400ep": ("71.8, 64 GPUs; settings ours", dict(BATCH_4096, epochs=400)),
    "selav2_400ep_2x224": ("67.2, 64 GPUs; settings ours", dict(BATCH_4096, epochs=400, **TWO_CROPS)),
    "shapes": ("20-NN 93.5 on held-out images, untrained 27.5: measured here", SHAPES),
    "cifar": ("20-NN 49.2 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("settings of cifar for longer: not measured", dict(TINY, epochs=50, exif=True)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, at most a tenth of the images);
  fewer --heads; a lower --lr or a longer --warmup-epochs; milder --jitter and --scales. See docs/log.md."""


@dataclass
class Config(RunOptions):
    hidden: int = option(2048, "width of the projection head's hidden layer", group="model", least=1)
    dim: int = option(128, "size D of the embedding", group="model", least=1)

    heads: int = option(3, "number H of heads, each with clusters of its own", least=1)
    lam: float = option(25.0, "lambda: exponent of the probabilities in Q; larger makes Q sharper", above=0)
    tolerance: float = option(0.01, "balancing ends at this largest relative error of label mass", above=0)
    freeze_prototypes_iters: int = option(1252, "steps before prototypes are trained: one epoch of ImageNet")

    final_lr: float = option(0.0, "learning rate at the end of the cosine", group="optimisation", least=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", group="optimisation", least=0)
    start_lr: float = option(0.0, "learning rate when the warm-up starts", group="optimisation", least=0)


# ------------------------------------------------------------------------------------------------------ model


class Model(nn.Module):
    """Maps crops to unit embeddings and their cosines with H sets of prototypes: trunk, head, prototypes."""

    def __init__(self, config, backbone=None):
        super().__init__()
        self.backbone = backbone or ARCHITECTURES[config.arch](width=config.width, stem=config.stem)
        self.projection_head = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        heads = (nn.Linear(config.dim, config.prototypes, bias=False) for _ in range(config.heads))
        self.prototypes = nn.ModuleList(heads)  # (K, D) each

    def forward(self, crops):
        """Maps a list of crops, (V_r B, 3, s, s) per resolution, to z (V B, D) and H scores (V B, K)."""
        # One pass per resolution: batch-norm statistics of large and small crops stay apart.
        features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        z = self.projection_head(features)  # (V B, D)
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = nn.functional.normalize(z.to(self.prototypes[0].weight.dtype))
            return z, [head(z) for head in self.prototypes]

    @torch.no_grad()
    def normalize_prototypes(self):
        for head in self.prototypes:
            head.weight.copy_(nn.functional.normalize(head.weight))


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Holds the embeddings of every image's U large crops, stored by one epoch's steps, and their clusters.

    targets (H, N): cluster of each image, -100 (ignored by the loss) if the memory had no embedding of it.
    Saved in data-set order, so that any world size can load it.
    """

    def __init__(self, N, U, D, heads, K, device=None, dtype=torch.float32):
        self.banks = distributed.ShardedRows(N, U, D, device=device, dtype=dtype)
        self.filled = distributed.ShardedRows(N, device=device, dtype=torch.bool)
        self.targets = torch.full((heads, N), -100, device=device)
        # log r, from which the next balancing starts
        self.scalings = torch.zeros(heads, K, device=device, dtype=dtype)
        self.epoch = -1  # epoch that the targets were computed for

    @torch.no_grad()
    def update(self, index, z):
        """Stores z (U, B, D) of this rank's images index (B,), each on the rank that holds its row."""
        index = distributed.gather_rows(index.to(z.device, non_blocking=True), equal=True)  # (W B,)
        self.banks.write(index, distributed.gather_rows(z.transpose(0, 1), equal=True))  # (W B, U, D)
        self.filled.write(index, True)

    def rows(self, u):
        """Returns the embeddings of large crop u that the last epoch stored on this rank: (rows, D)."""
        return self.banks.local[self.filled.local, u]

    def state_dict(self):
        tables = {"banks": self.banks.state(), "filled": self.filled.state(), "targets": self.targets.cpu()}
        return {**tables, "scalings": self.scalings.cpu(), "epoch": self.epoch}

    def load_state_dict(self, state):
        self.banks.load(state["banks"])
        self.filled.load(state["filled"])
        self.targets.copy_(state["targets"])
        self.scalings.copy_(state["scalings"])
        self.epoch = state["epoch"]


@torch.no_grad()
def assign(memory, prototypes, temperature, lam, tolerance):
    """Labels the memory once per head, head h by large crop h mod U. All labels are used about equally often.

    Raises DataError if fewer images than prototypes can be read, Diverged if a head's scores are not finite
    or are the same for all images.
    """
    K, U, filled = len(prototypes[0].weight), memory.banks.local.shape[1], memory.filled.local
    readable = int(distributed.all_sum(filled.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    for h, head in enumerate(prototypes):
        try:
            # (rows, K): the largest tensor held.
            scores = memory.rows(h % U) @ (nn.functional.normalize(head.weight) / temperature).T
            assignments, memory.scalings[h], *_ = balanced_assignments(
                scores, lam, tolerance, in_place=True, init=memory.scalings[h])
        except ValueError as error:  # raised on every rank
            raise Diverged(f"head {h} cannot be labelled: {error}; a lower --lr may help") from None
        del scores  # makes room for the next head's
        mine = torch.full_like(filled, -100, dtype=torch.int64)
        mine[filled] = assignments
        mine = distributed.gather_rows(mine)  # (N,)
        if torch.bincount(mine[mine >= 0]).max() == readable and K > 1:
            raise Diverged(f"head {h} has collapsed: it scores all images alike, so all get one label; "
                           "are all images alike, or is --lr too high?")
        memory.targets[h] = mine
    memory.filled.local.fill_(False)  # the coming epoch fills it again


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
def fill(model, memory, loader, run, config):
    """Fills the memory before the first epoch: one pass, each large crop by itself, in train mode (batch
    statistics), as the authors do."""
    number = config.epochs  # an epoch number that training does not use: other crops
    batches = data.batches(len(run.images), config.batch_size, number, config.seed)
    for _, (index, crops, params) in run.steps(loader, batches, number, extra=True):
        dtype = model.prototypes[0].weight.dtype
        large = to_device(crops[:1], params[: config.crops[0]], run.device, dtype)[0]  # (U B, 3, s, s)
        with run.autocast():
            memory.update(index, torch.stack([model([crop])[0] for crop in large.split(len(index))]))


def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):
    model = getattr(net, "module", net)  # the Model inside DistributedDataParallel
    batches = data.batches(len(run.images), config.batch_size, epoch, config.seed)
    U = config.crops[0]
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
        model.normalize_prototypes()
        with run.autocast():
            z, scores = net(crops)
        z = z.view(-1, len(index), z.shape[1])  # (V, B, D)
        scores = [s.view(-1, len(index), s.shape[1]) for s in scores]  # H (V, B, K)

        # loss
        targets = memory.targets[:, index.to(run.device, non_blocking=True)]  # (H, B)
        loss = prediction_loss(scores, targets, config.temperature)

        # memory: store the embeddings, to be clustered before the next epoch
        memory.update(index, z[:U].detach())

        # update
        optimizer.zero_grad()
        loss.backward()
        if step < config.freeze_prototypes_iters:
            for head in model.prototypes:
                head.weight.grad = None  # the optimizer skips parameters without a gradient
        optimizer.step()

        # log
        run.log(loss.detach(), lr, z[0].detach(), index, targets)


def main(config):
    device, images = setup(config)
    if sum(config.crops) < 2:
        raise ArgumentError(f"--crops {sum(config.crops)}: 2 crops are needed, to predict one from another")
    clustered = len(images) // config.batch_size * config.batch_size
    if clustered < config.prototypes:
        raise ArgumentError(f"--prototypes {config.prototypes}: more than the {clustered} images that an "
                            "epoch clusters")

    model = Model(config, own_trunk(config, device))
    net = prepare(model, config, device)
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    dtype = model.prototypes[0].weight.dtype
    memory = Memory(len(images), config.crops[0], config.dim, config.heads, config.prototypes, device, dtype)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    run = Run(config, "selav2", images, model, optimizer, memory, remedy=REMEDY, heads=config.heads)
    temporary = 4 * config.dim + 4 * config.prototypes  # bytes per image: one crop's embedding, its scores
    report(run, recipe(Config, RECIPES, config.recipe), assigned=clustered, temporary=temporary)
    for epoch in run.epochs():
        if memory.epoch < 0:
            fill(model, memory, loader, run, config)
        if memory.epoch < epoch:  # false if a run resumes in mid-epoch
            with run.timed("clusters"):
                assign(memory, model.prototypes, config.temperature, config.lam, config.tolerance)
            memory.epoch = epoch
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
