"""Pools the feature maps of a trunk for probes, several layers per forward pass. Needs torch alone: copy it.

    maps = pooled(trunk, x, ["feature1", "avgpool"])  # (B, 64, 12, 12) and (B, 2048, 1, 1) of a ResNet-50

feature1 .. feature5 are the maps of Goyal et al. 2019 (arXiv 1905.01235), average-pooled to about 9,000
numbers. Their windows are for inputs of 224 pixels and a stem of stride 4. conv1 .. conv5 are AlexNet's maps,
average-pooled as in DeepCluster's evaluation; conv1_max .. conv5_max are max-pooled as in SeLa's.
"""

import torch
import torch.nn.functional as F
from torch import nn

# layer: (map in stages(x), its side for 224 pixels, pooling kernel, stride and padding; padded zeros count)
LAYERS = {
    "feature1": ("conv1", 112, (10, 10, 4)),  # before the max-pool
    "feature2": ("layer1", 56, (16, 8, 0)),
    "feature3": ("layer2", 28, (13, 5, 0)),
    "feature4": ("layer3", 14, (8, 3, 0)),
    "feature5": ("layer4", 7, (6, 1, 0)),
    "avgpool": ("layer4", None, None),  # the mean of a map of any size
    "conv1": ("conv1", 55, (6, 6, 3)),
    "conv2": ("conv2", 27, (4, 4, 0)),
    "conv3": ("conv3", 13, (3, 3, 1)),
    "conv4": ("conv4", 13, (3, 3, 1)),
    "conv5": ("conv5", 13, (2, 2, 0)),
}
LAYERS |= {f"conv{i}_max": LAYERS[f"conv{i}"] for i in range(1, 6)}
FEATURES = ("feature1", "feature2", "feature3", "feature4", "feature5")


def pooled(trunk, x, layers):
    """Returns {layer: (B, C, h, w)} of the named layers (see LAYERS): float32, or float64 for float64 maps.

    Raises ValueError if the trunk lacks a layer, or if its map does not have the side that the pooling needs.
    """
    if not hasattr(trunk, "stages"):  # a trunk of the user's own
        if set(layers) != {"avgpool"}:
            raise ValueError(f"{layers[0]} needs a trunk with stages(x), this one has avgpool alone")
        y = trunk(x)[:, :, None, None]
        return {"avgpool": y.to(torch.promote_types(y.dtype, torch.float32))}
    maps, result = trunk.stages(x), {}
    for layer in layers:
        if layer not in LAYERS:
            raise ValueError(f"{layer!r} is no layer: choose from {', '.join(LAYERS)}")
        if (stage := LAYERS[layer][0]) not in maps:
            raise ValueError(f"{layer} needs a trunk with a map {stage!r}, this one has {', '.join(maps)}")
    for layer in layers:
        stage, side, window = LAYERS[layer]
        y = maps[stage]
        if side is not None and tuple(y.shape[2:]) != (side, side):
            needed = f"a map of {side}x{side} ({stage}, 224 pixels)"
            got = f"{y.shape[2]}x{y.shape[3]}, from {x.shape[2]}x{x.shape[3]} pixels"
            raise ValueError(f"{layer} is defined on {needed}, this one is {got}")
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if window is None:
            result[layer] = F.adaptive_avg_pool2d(y, 1)
        else:
            result[layer] = (F.max_pool2d if layer.endswith("_max") else F.avg_pool2d)(y, *window)
    return result


def side_by_side(maps):
    """Joins pooled maps to rows (B, sum of F), each layer flattened as by nn.Flatten (channels first)."""
    return torch.cat([y.flatten(1) for y in maps.values()], dim=1)


class Reading(nn.Module):
    """A frozen trunk, then `read`: a function of its pooled maps {layer: (B, C, h, w)}, outside autocast."""

    def __init__(self, trunk, layers, read=side_by_side):
        super().__init__()
        self.trunk, self.layers, self.read = trunk, layers, read
        self.eval().requires_grad_(False)

    def forward(self, x):
        maps = pooled(self.trunk, x, self.layers)
        with torch.autocast(x.device.type, enabled=False):
            return self.read(maps)


@torch.inference_mode()
def shapes(trunk, size, layers):
    """Returns {layer: (C, h, w)} as `pooled` does for images of `size` pixels: tries it on a black one."""
    parameter, training = next(trunk.parameters()), trunk.training
    try:
        x = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
        return {layer: tuple(y.shape[1:]) for layer, y in pooled(trunk.eval(), x, layers).items()}
    finally:
        trunk.train(training)
