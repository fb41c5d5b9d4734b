"""The pre-activation ResNet-50 of SeLa's paper, to train it or to use its weights. Imports only torch, so
this file can be copied alone.

Batch norm and ReLU come before each convolution; none follows the first convolution or the last sum. Channels
and layers follow models/resnetv2.py of yukimasano/self-label; the code does not.
"""

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        outputs = channels * 4
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return self.conv3(F.relu(self.bn3(y))) + shortcut


class PreactResNet50(nn.Module):
    """Trunk: (B, 3, H, W) -> (B, 2048), the spatial mean of layer4, which may be negative."""

    feature_dim = 2048

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        inputs = 64
        for stage, (channels, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            blocks = [Block(inputs, channels, stride=1 if stage == 1 else 2)]
            blocks += [Block(channels * 4, channels, stride=1) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            inputs = channels * 4

    def stages(self, x):
        """Returns maps by name: "conv1" (before the max-pool), "layer1" .. "layer4"."""
        maps = {"conv1": self.conv1(x)}
        x = F.max_pool2d(maps["conv1"], 3, 2, 1)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = maps[name] = getattr(self, name)(x)
        return maps

    def forward(self, x):
        return F.adaptive_avg_pool2d(self.stages(x)["layer4"], 1).flatten(1)  # (B, 2048)
