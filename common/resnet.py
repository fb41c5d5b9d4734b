"""ResNet trunks with torchvision's parameter names. Needs torch only: copy this one file.

`width` multiplies the channels of every layer, the stem included (RN50w2 of the SwAV paper is
resnet50(width=2)). `stem="small"` is for images of 32 to 64 pixels: a 3x3 convolution without stride and no
max-pool. `sobel=True` first computes the image's gradients by two fixed filters, as in DeepCluster. He's rule
initialises the weights: with fan-out as in torchvision, or with `fan_in=True` as in OpenSelfSup. At width 1
with the "imagenet" stem, the state dict is torchvision's without `fc`.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, channels, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, channels, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 1), nn.BatchNorm2d(channels)
        # v1.5: stride on the 3x3
        self.conv2, self.bn2 = conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = conv(channels, channels * 4, 1), nn.BatchNorm2d(channels * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class Sobel(nn.Module):
    """Computes x and y gradients of the channels' mean: (B, 3, H, W) -> (B, 2, H, W), zero-padded."""

    def __init__(self):
        super().__init__()
        kernels = torch.tensor([[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]])
        self.register_buffer("kernels", kernels[:, None], persistent=False)

    def forward(self, x):
        # rounding to bfloat16 would swamp the differences between neighbouring pixels
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.mean(1, keepdim=True), self.kernels, padding=1)


@contextlib.contextmanager
def _statistics_kept(stage):
    """Keeps the stage's batch norms from updating their running statistics and counting the batch."""
    norms = [module for module in stage.modules() if hasattr(module, "num_batches_tracked")]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class ResNet(nn.Module):
    """Maps images (B, in_channels, H, W) to features (B, feature_dim), globally average-pooled.

    With checkpointing = True, feature maps inside the four stages are not stored for the backward pass but
    recomputed, to the same bits: this needs less memory and a third more computation.
    """

    checkpointing = False

    def __init__(self, block, depths, width, stem, in_channels, sobel, fan_in):
        super().__init__()
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem is "imagenet" or "small", got {stem!r}')
        if width <= 0 or int(64 * width) != 64 * width:
            raise ValueError(f"width must give whole channels (64 x width), got {width}")
        channels = int(64 * width)
        self.sobel = Sobel() if sobel else nn.Identity()
        in_channels = 2 if sobel else in_channels
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, channels, size, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        inputs = channels
        for i, depth in enumerate(depths):
            outputs = channels * 2**i
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                downsample = None
                if stride != 1 or inputs != outputs * block.expansion:
                    downsample = nn.Sequential(conv(inputs, outputs * block.expansion, 1, stride),
                                               nn.BatchNorm2d(outputs * block.expansion))
                blocks.append(block(inputs, outputs, stride, downsample))
                inputs = outputs * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.feature_dim = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = "fan_in" if fan_in else "fan_out"
                nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")

    def stages(self, x):
        """Returns maps: "conv1" (after batch norm and ReLU, before max-pooling), "layer1" .. "layer4"."""
        maps = {"conv1": self.relu(self.bn1(self.conv1(self.sobel(x))))}
        x = self.maxpool(maps["conv1"])
        for name in ("layer1", "layer2", "layer3", "layer4"):
            stage = getattr(self, name)
            x = maps[name] = self._again_in_backward(stage, x) if self.checkpointing else stage(x)
        return maps

    def _again_in_backward(self, stage, x):
        return checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False,
                          context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(stage)))

    def forward(self, x):
        return F.adaptive_avg_pool2d(self.stages(x)["layer4"], 1).flatten(1)  # (B, feature_dim)


def resnet10(width=1, stem="imagenet", in_channels=3, sobel=False, fan_in=False):
    return ResNet(BasicBlock, (1, 1, 1, 1), width, stem, in_channels, sobel, fan_in)


def resnet18(width=1, stem="imagenet", in_channels=3, sobel=False, fan_in=False):
    return ResNet(BasicBlock, (2, 2, 2, 2), width, stem, in_channels, sobel, fan_in)


def resnet34(width=1, stem="imagenet", in_channels=3, sobel=False, fan_in=False):
    return ResNet(BasicBlock, (3, 4, 6, 3), width, stem, in_channels, sobel, fan_in)


def resnet50(width=1, stem="imagenet", in_channels=3, sobel=False, fan_in=False):
    return ResNet(Bottleneck, (3, 4, 6, 3), width, stem, in_channels, sobel, fan_in)


ARCHITECTURES = {"resnet10": resnet10, "resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
