"""DeepCluster-v2 (Caron et al., NeurIPS 2020, arXiv 2006.09882, appendix; DeepCluster: ECCV 2018).

Once per epoch, spherical k-means clusters the embeddings that the last epoch stored in a memory. During the
epoch, every crop of an image predicts the cluster of that image. Each of several heads has its own clusters.

    z_v = normalise(projection(trunk(crop_v)))              unit embedding of crop v, D = 128
    C_h, y_h = k-means of the memory, cosine similarity     once per epoch, for each head h; no gradient
    L   = mean over h, v of  cross-entropy(z_v C_h^T / temperature, y_h)

The centroids are the prototypes: they are copied into the heads and never trained. There is no Sinkhorn, no
queue and no second network. k-means prevents collapse: it spreads its centroids over all embeddings.

Published recipe: the authors report 75.2 % ImageNet linear top-1 (no full ImageNet run was made here):

    torchrun --nproc_per_node=8 --nnodes=8 deepclusterv2.py --data /imagenet --recipe deepclusterv2_800ep

One node of 8 GPUs:            torchrun --nproc_per_node=8 deepclusterv2.py --data /imagenet
On a CPU, in minutes:          python deepclusterv2.py --eval-every 5    (on drawn images, needs no data)
Your photos, no labels:        python deepclusterv2.py --data ~/photos --recipe small
"""

from dataclasses import dataclass

import torch
from torch import nn

from common import data, distributed
from common.engine.errors import ArgumentError, DataError, Diverged
from common.engine.launch import launch, own_trunk, prepare, report, setup
from common.engine.options import RunOptions, option, parse, recipe
from common.engine.run import Run
from common.kmeans import kmeans
from common.multicrop import Augmentation, MultiCrop, to_device
from common.optim import LARC, warmup_cosine
from common.resnet import ARCHITECTURES

# Letters in shapes: B images of this rank's batch, W ranks, V crops per image (V_r of size r; the first U are
# large), s pixels wide, F trunk features, D embedding size, H heads of K prototypes, L queue length, N images
# in all, n per rank. V B rows: crop 0 of all B images, then crop 1. params (V, B, 8): crops' colour changes.

# ---------------------------------------------------------------------------------------------------- recipes

BATCH_4096 = dict(batch_size=4096, lr=4.8, final_lr=0.0048, start_lr=0.3)
TWO_CROPS = dict(crops=(2,), sizes=(224,), scales=(0.08, 1.0))
SIX_SMALL = dict(crops=(2, 6), sizes=(224, 96), scales=(0.14, 1.0, 0.05, 0.14))
TINY = dict(arch="resnet10", width=0.5, stem="small", hidden=256, dim=64, crops=(4,), sizes=(32,),
            scales=(0.2, 1.0), eval_size=48, jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0, prototypes=100,
            batch_size=32, lr=0.8, final_lr=0.0008, warmup_epochs=0)
SHAPES = dict(TINY, width=0.25, crops=(2, 2), sizes=(24, 16), eval_size=32, scales=(0.4, 1.0, 0.2, 0.5),
              jitter=(0.4, 0.4, 0.4, 0.2), dim=32, batch_size=64, lr=3.6, final_lr=0.0036, epochs=12)
RECIPES = {  # name: (result, by default ImageNet linear top-1; options that differ from the first row)
    "deepclusterv2_400ep_bs1024": ("published at 4096, lr by the linear rule; the default with --data", dict(
        crops=(2, 4), sizes=(160, 96), scales=(0.08, 1.0, 0.05, 0.14), jitter=(0.8, 0.8, 0.8, 0.2),
        blur_p=0.5, prototypes=3000, temperature=0.1, epochs=400, batch_size=1024, lr=1.2,
        final_lr=0.0012, warmup_epochs=10, start_lr=0.075, weight_decay=1e-6)),
    "deepclusterv2_800ep": ("75.2, 64 GPUs", dict(BATCH_4096, epochs=800, **SIX_SMALL)),
    "deepclusterv2_400ep": ("74.3, 64 GPUs", dict(BATCH_4096, epochs=400)),
    "deepclusterv2_400ep_2x224": ("70.2, 64 GPUs", dict(BATCH_4096, epochs=400, **TWO_CROPS)),
    "shapes": ("20-NN 88.9 on held-out images, untrained 27.5: measured here", SHAPES),
    "cifar": ("20-NN 50.8 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
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
    kmeans_iterations: int = option(10, "iterations of k-means, for each head and epoch", least=1)

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
        self.prototypes.requires_grad_(False)  # k-means computes them

    def forward(self, crops):
        """Maps a list of crops, (V_r B, 3, s, s) per resolution, to z (V B, D) and H scores (V B, K)."""
        # One pass per resolution: batch-norm statistics of large and small crops stay apart.
        features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        z = self.projection_head(features)  # (V B, D)
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = nn.functional.normalize(z.to(self.prototypes[0].weight.dtype))
            return z, [head(z) for head in self.prototypes]


# -------------------------------------------------------------------------------------------------- algorithm


class Memory:
    """Holds the embeddings of every image's U large crops, stored by one epoch's steps, and their clusters.

    targets (H, N): cluster of each image, -100 (ignored by the loss) if the memory had no embedding of it.
    Saved in data-set order, so that any world size can load it.
    """

    def __init__(self, N, U, D, heads, device=None, dtype=torch.float32):
        self.banks = distributed.ShardedRows(N, U, D, device=device, dtype=dtype)
        self.filled = distributed.ShardedRows(N, device=device, dtype=torch.bool)
        self.targets = torch.full((heads, N), -100, device=device)
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
        return {**tables, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.banks.load(state["banks"])
        self.filled.load(state["filled"])
        self.targets.copy_(state["targets"])
        self.epoch = state["epoch"]


@torch.no_grad()
def assign(memory, prototypes, iterations, generator):
    """Clusters the memory once per head, head h by large crop h mod U. The centroids become the prototypes.

    Raises DataError if fewer images than prototypes can be read, Diverged if embeddings are not finite.
    """
    K, U, filled = len(prototypes[0].weight), memory.banks.local.shape[1], memory.filled.local
    readable = int(distributed.all_sum(filled.sum()))
    if readable < K:
        raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")
    for h, head in enumerate(prototypes):
        try:
            rows, k = memory.rows(h % U), len(head.weight)
            centroids, assignments, *_ = kmeans(rows, k, iterations, spherical=True, generator=generator)
        except ValueError as error:  # raised on every rank
            raise Diverged(f"head {h} cannot be clustered: {error}; a lower --lr may help") from None
        head.weight.copy_(centroids)
        mine = torch.full_like(filled, -100, dtype=torch.int64)
        mine[filled] = assignments
        memory.targets[h] = distributed.gather_rows(mine)  # (N,)
    memory.filled.local.fill_(False)  # the coming epoch fills it again


def prediction_loss(scores, targets, temperature):
    """Predicts an image's clusters from each crop: mean cross-entropy over heads and all ranks' crops.

    scores: H tensors (V, B, K); targets: (H, B), where -100 is ignored. As in main_deepclusterv2.py of
    facebookresearch/swav.
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
    memory = Memory(len(images), config.crops[0], config.dim, config.heads, device, dtype)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    run = Run(config, "deepclusterv2", images, model, optimizer, memory, remedy=REMEDY, heads=config.heads)
    temporary = 4 * config.dim  # bytes per image: the embeddings of one crop
    report(run, recipe(Config, RECIPES, config.recipe), assigned=clustered, temporary=temporary)
    for epoch in run.epochs():
        if memory.epoch < 0:
            fill(model, memory, loader, run, config)
        if memory.epoch < epoch:  # false if a run resumes in mid-epoch
            with run.timed("clusters"):
                generator = torch.Generator().manual_seed(config.seed << 32 | epoch)
                assign(memory, model.prototypes, config.kmeans_iterations, generator)
            memory.epoch = epoch
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
