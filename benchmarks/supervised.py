"""Trains the ceiling: the trunk of the small recipes with labels, on the same crops and for as many epochs as
swav.py.

    python -m benchmarks.supervised --recipe cifar --data cifar10 --eval-every 5

Trains a linear classifier and the trunk by cross-entropy over all crops. The options are swav.py's.
"""

import torch
import torch.nn.functional as F
from torch import nn

import swav
from common import data
from common.engine.launch import launch, report, setup
from common.engine.options import parse, recipe
from common.engine.run import Run
from common.multicrop import Augmentation, MultiCrop, to_device
from common.optim import warmup_cosine
from common.resnet import ARCHITECTURES
from swav import Config

USUAL = dict(lr=0.05, final_lr=0.0, weight_decay=5e-4)  # SGD with momentum on CIFAR-10; not tuned
RECIPES = {"cifar": ("with labels: the ceiling", dict(swav.RECIPES["cifar"][1], **USUAL))}


class Model(nn.Module):
    def __init__(self, config, classes):
        super().__init__()
        self.backbone = ARCHITECTURES[config.arch](config.width, config.stem)
        self.classifier = nn.Linear(self.backbone.feature_dim, classes)


def train_one_epoch(model, optimizer, loader, run, config, epoch):
    batches = data.batches(len(run.images), config.batch_size, epoch, config.seed)
    for step, (index, crops, params) in run.steps(loader, batches, epoch):
        lr = warmup_cosine(step, len(batches), config.epochs, config.lr, config.final_lr,
                           config.warmup_epochs, config.start_lr)
        optimizer.param_groups[0]["lr"] = lr
        (crops,) = to_device(crops, params, run.device)  # (V B, 3, s, s)
        with run.autocast():
            features = model.backbone(crops)  # (V B, F)
        scores = model.classifier(features.float())  # (V B, C)
        loss = F.cross_entropy(scores, run.images.labels[index].repeat(config.crops[0]).to(run.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss.detach(), lr, F.normalize(features[: len(index)].detach().float()), index,
                scores[: len(index)].argmax(dim=1))


def main(config):
    device, images = setup(config)
    model = Model(config, len(images.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum,
                                weight_decay=config.weight_decay, nesterov=True)
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, (config.scales,), augmentation, config.seed)
    loader = data.Loader(crops, config.workers, device.type == "cuda")
    run = Run(config, "supervised", images, model, optimizer, clusters=len(images.classes))
    report(run, recipe(Config, RECIPES, config.recipe), len(images))
    for epoch in run.epochs():
        train_one_epoch(model, optimizer, loader, run, config, epoch)
        run.end_epoch(epoch)


if __name__ == "__main__":
    launch(main, parse(Config, RECIPES, __doc__))
