"""The AlexNet of DeepCluster and SeLa, with batch norm. Needs torch only: copy this one file.

Parameters are named as in the released models (features.N, classifier.N); their top layers are left out.
Images must have 224x224 pixels. Channels and layers, but not the code, are those of models/alexnet.py of
facebookresearch/deepcluster and of yukimasano/self-label.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # size, stride, padding
POOLED = (0, 1, 4)  # convolutions followed by a max-pool


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


class AlexNet(nn.Module):
    """Maps (B, 3, 224, 224) to (B, 4096): the second fully connected layer, before or after its ReLU."""

    feature_dim = 4096

    def __init__(self, channels, sobel, last_relu):
        super().__init__()
        self.sobel = Sobel() if sobel else nn.Identity()
        layers, inputs = [], 2 if sobel else 3
        for i, (outputs, (size, stride, padding)) in enumerate(zip(channels, CONVOLUTIONS)):
            layers += [nn.Conv2d(inputs, outputs, size, stride, padding), nn.BatchNorm2d(outputs),
                       nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(3, 2)] if i in POOLED else []
            inputs = outputs
        self.features = nn.Sequential(*layers)
        layers = [nn.Dropout(0.5), nn.Linear(inputs * 6 * 6, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5),
                  nn.Linear(4096, 4096)]
        self.classifier = nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if last_relu else []))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def stages(self, x):
        """Returns the feature maps after each ReLU, before max-pooling: "conv1" (55x55), "conv2" (27x27),
        "conv3" .. "conv5" (13x13)."""
        maps, x = {}, self.sobel(x)
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps[f"conv{len(maps) + 1}"] = x
        return maps

    def forward(self, x):
        maps = self.features(self.sobel(x))  # (B, C, 6, 6)
        if maps.shape[2:] != (6, 6):
            raise ValueError(f"AlexNet takes images of 224x224 pixels, got {x.shape[2]}x{x.shape[3]}")
        return self.classifier(maps.flatten(1))  # (B, 4096)


def alexnet(kind="deepcluster", sobel=False):
    """Builds an AlexNet. kind: "deepcluster" (returns features before the last ReLU, to be clustered), "sela"
    (after it) or "sela_small" (after it, with fewer channels).

    sobel: use the two image gradients as input instead of the three colours.
    """
    if kind not in ("deepcluster", "sela", "sela_small"):
        raise ValueError(f'kind is "deepcluster", "sela" or "sela_small", got {kind!r}')
    channels = (64, 192, 384, 256, 256) if kind == "sela_small" else (96, 256, 384, 384, 256)
    return AlexNet(channels, sobel, last_relu=kind != "deepcluster")


# name of the trunk: kind
ARCHITECTURES = {"alexnet": "deepcluster", "alexnet_sela": "sela", "alexnet_sela_small": "sela_small"}
