"""Trains the peer: SwAV of lightly 1.6, with the settings of lightly's own CIFAR-10 benchmark, on a trunk of
ours.

    python -m benchmarks.lightly_swav --recipe cifar --data cifar10 --eval-every 5

From lightly come the transform, head, prototypes, loss and training step: one forward pass per crop, float32,
Adam. From here come the trunk, the reading of images and their order, the run directory and the k-NN
evaluation. The options are swav.py's. Those that lightly's SwAV lacks (queue, warm-up, momentum, LARC's
rates, --compile) have no effect.
"""

import math

import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from lightly.transforms import SwaVTransform
from torch import nn

from common import data
from common.engine.launch import launch, report, setup
from common.engine.options import parse, recipe
from common.engine.run import Run
from common.multicrop import generator, read_or_next
from common.resnet import ARCHITECTURES
from swav import Config

# lightly's CIFAR-10 benchmark (docs/source/getting_started/benchmarks/cifar10_benchmark.py in its repository,
# not in the package; compared with it in August 2026): two crops of 32 px of 14 to 100 % of the area, colour
# jitter of strength 0.5, no blur; head 512-512-128 behind a ResNet-18 of 512 features with a 3x3 stem, 512
# prototypes, never frozen, no queue; Adam with learning rate 1e-3 for a batch of 128 and weight decay 1e-6,
# cosine over the epochs, one rate per epoch; float32. It reports 81.2 % 200-NN at temperature 0.1 after 200
# epochs of 50,000 images.
# The rest are defaults of the package: SwaVLoss (temperature 0.1, epsilon 0.05, 3 iterations) and
# SwaVTransform (jitter 0.8 0.8 0.8 0.2 times its strength, with probability 0.8; grey 0.2; ImageNet's mean
# and standard deviation).
# Another trunk changes only the head's input. Evaluations use images of the same size as for our recipe.
PUBLISHED = dict(arch="resnet10", width=0.5, stem="small", hidden=512, dim=128, crops=(2,), sizes=(32,),
                 eval_size=48)
PUBLISHED.update(scales=(0.14, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0, prototypes=512, queue_length=0,
                 freeze_prototypes_iters=0)
PUBLISHED.update(batch_size=128, lr=1e-3, final_lr=0.0, weight_decay=1e-6, precision="float32")
RECIPES = {"cifar": ("lightly's CIFAR-10 benchmark on our trunk", dict(PUBLISHED, epochs=20))}


class Views:
    """Map-style set like common.multicrop.MultiCrop: lightly's crops of an image, jittered and normalised in
    the worker."""

    def __init__(self, images, config):
        self.images, self.seed = images, config.seed
        low, high = config.scales
        self.transform = SwaVTransform(crop_sizes=config.sizes, crop_counts=config.crops, crop_min_scales=(
            low,), crop_max_scales=(high,), cj_strength=config.jitter[0] / 0.8, gaussian_blur=config.blur_p,)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, position, index = key
        index, image = read_or_next(self.images, index)
        # lightly's transforms draw from torch's global generator
        torch.manual_seed(generator(self.seed, epoch, position).getrandbits(63))
        views = self.transform(image)
        return index, [torch.stack(views)], torch.zeros(len(views), 8)  # (V, 3, s, s)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.backbone = ARCHITECTURES[config.arch](config.width, config.stem)
        self.projection_head = SwaVProjectionHead(self.backbone.feature_dim, config.hidden, config.dim)
        self.prototypes = SwaVPrototypes(config.dim, config.prototypes, config.freeze_prototypes_iters)


def train_one_epoch(model, criterion, optimizer, loader, run, config, epoch):
    batches = data.batches(len(run.images), config.batch_size, epoch, config.seed)
    lr = config.lr / 2 * (1 + math.cos(math.pi * epoch / config.epochs))
    optimizer.param_groups[0]["lr"] = lr
    for step, (index, (views,), _) in run.steps(loader, batches, epoch):
        model.prototypes.normalize()
        with run.autocast():
            z = [model.projection_head(model.backbone(view)) for view in views.to(run.device)]
        z = [F.normalize(x.float()) for x in z]  # V (B, D)
        scores = [model.prototypes(x, step) for x in z]  # V (B, K)
        loss = criterion(scores, []).squeeze()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss.detach(), lr, z[0].detach(), index, scores[0].argmax(dim=1))


def main(config):
    device, images = setup(config)
    model = Model(config).to(device)
    criterion = SwaVLoss(config.temperature, config.sinkhorn_iterations, config.epsilon)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    loader = data.Loader(Views(images, config), config.workers, device.type == "cuda")
    run = Run(config, "lightly_swav", images, model, optimizer)
    report(run, recipe(Config, RECIPES, config.recipe), config.batch_size)
    for epoch in run.epochs():
        train_one_epoch(model, criterion, optimizer, loader, run, config, epoch)
        run.end_epoch(epoch)


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
