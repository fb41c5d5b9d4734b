"""SwAV: Swapping Assignments between Views (Caron et al., NeurIPS 2020, arXiv 2006.09882).

Two crops of an image should fall into the same cluster. In every step, Sinkhorn assigns the large crops (two,
as published) to K learnt prototypes, so that the batch spreads evenly over them. Each crop must then predict
the assignments of the other large crops of its image.

    z_v = normalise(projection(trunk(crop_v)))              unit embedding of crop v, D = 128
    q_u = Sinkhorn(z_u C^T / epsilon)                       codes of large crop u: K shares that sum to 1
    L   = mean over u, v != u of  - sum_k q_uk log softmax_k(z_v C^T / temperature)

C holds the K prototypes, one unit row each; no gradient flows through q. Equal mass per prototype prevents
collapse: there are no negatives, no momentum encoder, no memory of the data set and no k-means. If a batch
has fewer images than prototypes, a queue of past embeddings is balanced together with the batch.

Published recipe: the authors report 75.3 % ImageNet linear top-1 (no full ImageNet run was made here):

    torchrun --nproc_per_node=8 --nnodes=8 swav.py --data /imagenet --recipe swav_800ep

One node of 8 GPUs (74.3 %):   torchrun --nproc_per_node=8 swav.py --data /imagenet
On a CPU, in minutes:          python swav.py --eval-every 5    (on drawn images, needs no data)
Your photos, no labels:        python swav.py --data ~/photos --recipe small
"""

from dataclasses import dataclass

import torch
from torch import nn

from common import data, distributed
from common.engine.errors import ArgumentError, say
from common.engine.launch import launch, own_trunk, prepare, report, setup
from common.engine.options import RunOptions, option, parse, recipe
from common.engine.run import Run
from common.multicrop import Augmentation, MultiCrop, to_device
from common.optim import LARC, warmup_cosine
from common.resnet import ARCHITECTURES
from common.sinkhorn import sinkhorn

# Letters in shapes: B images of this rank's batch, W ranks, V crops per image (V_r of size r; the first U are
# large), s pixels wide, F trunk features, D embedding size, H heads of K prototypes, L queue length, N images
# in all, n per rank. V B rows: crop 0 of all B images, then crop 1. params (V, B, 8): crops' colour changes.

# ---------------------------------------------------------------------------------------------------- recipes

BATCH_4096 = dict(batch_size=4096, lr=4.8, final_lr=0.0048, warmup_epochs=10, start_lr=0.3,
                  freeze_prototypes_iters=313, queue_length=0)
WIDE = dict(BATCH_4096, epochs=400, crops=(2, 4), hidden=8192)
W4 = dict(WIDE, width=4.0, scales=(0.08, 1.0, 0.08, 0.14), batch_size=2560, queue_length=2560,
          queue_start_epoch=0)
W5 = dict(WIDE, width=5.0, hidden=10240, head_norm=False, batch_size=1536, start_lr=0.1875, final_lr=0.0,
          queue_length=1536, queue_start_epoch=0)
TWO_CROPS = dict(crops=(2,), sizes=(224,), scales=(0.08, 1.0))
TINY = dict(arch="resnet10", width=0.5, stem="small", hidden=256, dim=64, crops=(4,), sizes=(32,),
            scales=(0.2, 1.0), eval_size=48, jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0, prototypes=32,
            queue_length=0, freeze_prototypes_iters=100, batch_size=32, lr=0.8, final_lr=0.0008)
SHAPES = dict(TINY, width=0.25, crops=(2, 2), sizes=(24, 16), eval_size=32, scales=(0.4, 1.0, 0.2, 0.5),
              jitter=(0.4, 0.4, 0.4, 0.2), dim=32, prototypes=40, epsilon=0.03, freeze_prototypes_iters=50,
              batch_size=64, lr=2.4, final_lr=0.0024, epochs=10)
RECIPES = {  # name: (result, by default ImageNet linear top-1; options that differ from the first row)
    "swav_400ep_8x32": ("74.3, one node of 8 GPUs; the default with --data", dict(
        crops=(2, 6), sizes=(224, 96), scales=(0.14, 1.0, 0.05, 0.14), jitter=(0.8, 0.8, 0.8, 0.2),
        blur_p=0.5, prototypes=3000, temperature=0.1, epochs=400, batch_size=256, lr=0.6,
        final_lr=0.0006, warmup_epochs=0, start_lr=0.0, weight_decay=1e-6)),
    "swav_800ep": ("75.3, 64 GPUs", dict(BATCH_4096, epochs=800)),
    "swav_400ep": ("74.6, 64 GPUs", dict(BATCH_4096, epochs=400)),
    "swav_200ep": ("73.9, 64 GPUs", dict(BATCH_4096, epochs=200)),
    "swav_100ep": ("72.1, 64 GPUs", dict(BATCH_4096, epochs=100)),
    "swav_400ep_2x224": ("70.1, 64 GPUs", dict(BATCH_4096, epochs=400, **TWO_CROPS)),
    "swav_400ep_bs256": ("74.3, 4 GPUs", dict(epochs=400)),
    "swav_200ep_bs256": ("72.7, 4 GPUs", dict(epochs=200)),
    "swav_rn50w2": ("77.3, 128 GPUs", dict(WIDE, width=2.0)),
    "swav_rn50w4": ("77.9, 64 GPUs", W4),
    "swav_rn50w5": ("78.5, 128 GPUs; learning rates ours", W5),
    "shapes": ("20-NN 95.7 on held-out images, untrained 27.5: measured here", SHAPES),
    "cifar": ("20-NN 55.4 from 10,000 images of CIFAR-10, untrained 35.0: measured here",
              dict(TINY, epochs=20)),
    "small": ("20-NN 54.0 from 5,000 images of CIFAR-10, untrained 33.7: measured here",
              dict(TINY, epochs=50, exif=True)),
}
REMEDY = """  try in this order: fewer --prototypes (ten per class you expect, at most a tenth of the
  images and batch + queue); --epsilon 0.03; more --freeze-prototypes-iters; no queue (--queue-length 0) or a
  later one (--queue-start-epoch); a lower --lr; milder --jitter and --scales. See docs/log.md."""


@dataclass
class Config(RunOptions):
    hidden: int = option(2048, "width of the projection head's hidden layer", group="model", least=1)
    head_norm: bool = option(True, "batch norm in the projection head", group="model")
    dim: int = option(128, "size D of the embedding", group="model", least=1)

    epsilon: float = option(0.05, "epsilon of Sinkhorn: smaller makes sharper codes", above=0)
    sinkhorn_iterations: int = option(3, "iterations of Sinkhorn", least=0)
    queue_length: int = option(3840, "past embeddings balanced with the batch; 0: no queue", least=0)
    queue_start_epoch: int = option(15, "epoch in which the queue begins to fill; used once full", least=0)
    freeze_prototypes_iters: int = option(5005, "steps before prototypes are trained: one epoch of ImageNet")
    assignments: str = option("auto", "keep each image's cluster (8 bytes); auto: up to 20 million images",
                              choices=("auto", "on", "off"))

    final_lr: float = option(0.0, "learning rate at the end of the cosine", group="optimisation", least=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", group="optimisation", least=0)
    start_lr: float = option(0.0, "learning rate when the warm-up starts", group="optimisation", least=0)


# ------------------------------------------------------------------------------------------------------ model


class Model(nn.Module):
    """Maps crops to unit embeddings and their cosines with the prototypes: trunk, head, prototypes."""

    def __init__(self, config, backbone=None):
        super().__init__()
        self.backbone = backbone or ARCHITECTURES[config.arch](width=config.width, stem=config.stem)
        self.projection_head = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, config.hidden),
            *([nn.BatchNorm1d(config.hidden)] if config.head_norm else []),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)  # weight (K, D), unit rows

    def forward(self, crops):
        """Maps a list of crops, (V_r B, 3, s, s) per resolution, to z (V B, D) and scores (V B, K)."""
        # One pass per resolution: batch-norm statistics of large and small crops stay apart.
        features = torch.cat([self.backbone(group) for group in crops])  # (V B, F)
        z = self.projection_head(features)  # (V B, D)
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = nn.functional.normalize(z.to(self.prototypes.weight.dtype))
            return z, self.prototypes(z)

    @torch.no_grad()
    def normalize_prototypes(self):
        self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight))


# -------------------------------------------------------------------------------------------------- algorithm


class Queue:
    """Holds past embeddings of the U large crops, newest first: balanced with the batch, not trained on.

    length: L rows over all ranks, a multiple of the global batch. Checkpoints hold one (U, L, D): the newest
    global batch first, each batch in the order of its images, so that any world size can load it.
    """

    def __init__(self, length, U, D, device=None, dtype=torch.float32):
        self.length, self.filled = length, 0
        self.queue = torch.zeros(U, length // distributed.world_size(), D, device=device, dtype=dtype)

    @property
    def full(self):
        return self.length > 0 and self.filled >= self.length

    @torch.no_grad()
    def push(self, z):
        """Puts this rank's embeddings z (U, B, D) in front; the oldest fall off the end."""
        self.queue = torch.cat([z, self.queue], dim=1)[:, : self.queue.shape[1]]
        self.filled = min(self.length, self.filled + z.shape[1] * distributed.world_size())
        self.batch = z.shape[1]

    def rows(self, u):
        """Returns this rank's part of the queue for large crop u: (L / W, D)."""
        return self.queue[u]

    def state_dict(self):
        if not self.filled:
            return {"queue": None, "filled": 0}
        U, rows, D = self.queue.shape
        ranks = distributed.gather_rows(self.queue[None])  # (W, U, L / W, D)
        ranks = ranks.view(-1, U, rows // self.batch, self.batch, D)  # (W, U, pushes, B, D)
        queue = ranks.permute(1, 2, 0, 3, 4).reshape(U, -1, D).cpu()  # (U, L, D)
        return {"queue": queue, "filled": self.filled, "batch": self.batch * len(ranks)}

    def load_state_dict(self, state):
        self.filled = state["filled"]
        if self.filled:
            U, L, D = state["queue"].shape
            self.batch = state["batch"] // distributed.world_size()
            pushes = state["queue"].view(U, L // state["batch"], distributed.world_size(), self.batch, D)
            self.queue.copy_(pushes[:, :, distributed.rank()].reshape(U, -1, D))


@torch.no_grad()
def assign(scores, memory, prototypes, epsilon, iterations):
    """Returns codes (U, B, K) of the large crops' scores (U, B, K), balanced over all ranks and the queue."""
    rows = scores  # (U, L / W + B, K)
    if memory.full:
        queued = torch.stack([memory.rows(u) @ prototypes.T for u in range(len(scores))])  # (U, L / W, K)
        rows = torch.cat([queued, scores], dim=1)
    return sinkhorn(rows, epsilon, iterations)[:, -scores.shape[1] :]  # the batch's codes


def prediction_loss(scores, codes, temperature):
    """Predicts each code from every other crop of its image: mean cross-entropy over the U (V - 1) pairs.

    scores: (V, B, K) cosines; codes: (U, B, K) of the first U crops, without gradient. Equation 2 of the
    paper, averaged over crops as in main_swav.py of facebookresearch/swav, so the learning rate does not
    depend on the number of crops.
    """
    (V, B, _), U = scores.shape, len(codes)
    log_p = nn.functional.log_softmax(scores / temperature, dim=2)  # (V, B, K)
    pairs = -torch.einsum("ubk,vbk->uv", codes, log_p) / B  # (U, V): code of crop u predicted from crop v
    return (pairs.sum() - pairs.diagonal().sum()) / (U * (V - 1))


# --------------------------------------------------------------------------------------------------- training


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
        scores = scores.view(-1, len(index), scores.shape[1])  # (V, B, K)

        # assign
        prototypes = model.prototypes.weight  # (K, D)
        codes = assign(scores[:U].detach(), memory, prototypes, config.epsilon, config.sinkhorn_iterations)

        # loss
        loss = prediction_loss(scores, codes, config.temperature)

        # memory: push after assign, or each image would be balanced with a copy of itself
        if memory.length and epoch >= config.queue_start_epoch:
            was_full = memory.full
            memory.push(z[:U].detach())
            if memory.full and not was_full:
                say(f"queue of {memory.length} is full: used from step {step + 2} on")

        # update
        optimizer.zero_grad()
        loss.backward()
        if step < config.freeze_prototypes_iters:
            model.prototypes.weight.grad = None  # the optimizer skips parameters without a gradient
        optimizer.step()

        # log
        run.log(loss.detach(), lr, z[0].detach(), index, scores[0].argmax(dim=1), queue_filled=memory.filled)


def main(config):
    device, images = setup(config)
    if sum(config.crops) < 2:
        raise ArgumentError(f"--crops {sum(config.crops)}: 2 crops are needed, to predict one from another")
    length = config.queue_length // config.batch_size * config.batch_size
    if length != config.queue_length:
        say(f"warning: --queue-length {config.queue_length} is not a multiple of --batch-size "
            f"{config.batch_size}: {length} is used")

    model = Model(config, own_trunk(config, device))
    net = prepare(model, config, device)
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    memory = Queue(length, config.crops[0], config.dim, device, next(model.parameters()).dtype)

    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")

    run = Run(config, "swav", images, model, optimizer, memory, REMEDY, assignments=config.assignments)
    report(run, recipe(Config, RECIPES, config.recipe), assigned=config.batch_size + length)
    for epoch in run.epochs():
        train_one_epoch(net, optimizer, memory, loader, run, config, epoch)
        run.end_epoch(epoch)


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
