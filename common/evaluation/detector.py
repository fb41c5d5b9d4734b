"""Faster and Mask R-CNN on a trunk, as benchmarks of self-supervised trunks define them.

Uses torchvision's parts, and replaces what differs from detectron2 and mmdet: RoIAlign gets the half-pixel
offset; box losses are L1; losses are divided by the same counts; anchors are not rounded; strides are given;
initial values and mask targets are the same. Two differences stay: the best anchors of an object are positive
however little they overlap it, and class 0 is the background, whose boxes are never trained.

Losses and batch norm cover the images of all ranks, and each image's seed decides what is drawn for it. So on
images of one size two ranks train as one does. Images of other sizes are padded to the largest on a rank.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .. import distributed

# B images, C classes and background, F channels, R regions of all B images


def mean_over_ranks(total, count):
    """Scales this rank's total so that its mean over ranks is total / count, both summed over ranks.
    DistributedDataParallel takes this mean of the gradients."""
    count = distributed.all_sum(torch.as_tensor(count, dtype=total.dtype, device=total.device))
    return total * distributed.world_size() / count.clamp(min=1)


class Anchors(AnchorGenerator):
    """Anchors around the corners of the maps' cells, not rounded, with the given strides. torchvision divides
    sides instead: its stride is 61 pixels where a map of 25 rows was pooled to 13. sides: a tuple per map."""

    def __init__(self, sides, strides, ratios=(0.5, 1.0, 2.0)):
        super().__init__(sides, (ratios,) * len(sides))
        self.strides = strides

    def generate_anchors(self, scales, ratios, dtype=torch.float32, device="cpu"):
        root = torch.tensor(ratios, dtype=dtype, device=device).sqrt()[:, None]  # height / width
        scales = torch.tensor(scales, dtype=dtype, device=device)
        width, height = (scales / root).flatten(), (scales * root).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def forward(self, images, maps):
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        grids = [x.shape[-2:] for x in maps]
        return [torch.cat(self.grid_anchors(grids, [(s, s) for s in self.strides]))] * len(images.image_sizes)


class AlignedPool(nn.Module):
    """RoIAlign with the half-pixel offset: maps {name: (B, F, h, w)}, boxes [(n, 4)] -> (R, F, size, size).

    strides: {name: pixels}. With several maps, a box is pooled from level floor(4 + log2(sqrt(area) / 224)),
    where the map of stride 4 is level 2.
    """

    def __init__(self, strides, size):
        super().__init__()
        self.strides, self.size = strides, size

    def forward(self, maps, boxes, sizes=None):
        regions = torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])  # (R, 5)
        if len(self.strides) == 1:
            (name, stride), = self.strides.items()
            return roi_align(maps[name], regions, self.size, 1 / stride, aligned=True)
        sides = (regions[:, 3:] - regions[:, 1:3]).prod(dim=1).sqrt()
        level = (4 + torch.log2(sides / 224) + 1e-6).floor().clamp(2, 1 + len(self.strides))  # (R,)
        channels = maps[next(iter(self.strides))].shape[1]
        pooled = regions.new_zeros(len(regions), channels, self.size, self.size)
        for number, (name, stride) in enumerate(self.strides.items(), 2):
            rows = (level == number).nonzero()[:, 0]
            pooled[rows] = roi_align(maps[name], regions[rows], self.size, 1 / stride, aligned=True)
        return pooled


class Sampler:
    """Draws up to `count` anchors or regions of each image, at most `share` of them positive. Returns masks
    of the positive and of the negative ones. Only `seeds`, one per image, decide the draws."""

    def __init__(self, count, share):
        self.count, self.share, self.seeds = count, share, ()

    def __call__(self, labels):
        picked = [], []
        for label, seed in zip(labels, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            positive, negative = (label >= 1).nonzero()[:, 0], (label == 0).nonzero()[:, 0]
            number = min(len(positive), int(self.count * self.share))
            for masks, rows, most in zip(picked, (positive, negative), (number, self.count - number)):
                chosen = torch.randperm(len(rows), generator=generator)[:most].to(rows.device)
                masks.append(torch.zeros_like(label, dtype=torch.bool).index_fill_(0, rows[chosen], True))
        return picked


class Proposer(RegionProposalNetwork):
    """RPN. over_all: divides the losses by all that could be sampled (detectron2), not by all that were."""

    over_all = False

    def compute_loss(self, scores, deltas, labels, targets):
        masks = self.fg_bg_sampler(labels)
        positive, negative = (torch.cat(mask).nonzero()[:, 0] for mask in masks)
        sampled = torch.cat([positive, negative])
        count = self.fg_bg_sampler.count * len(labels) if self.over_all else len(sampled)
        scores, labels = scores.flatten()[sampled], torch.cat(labels)[sampled]
        wrong = F.binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="sum")
        off = F.l1_loss(deltas[positive], torch.cat(targets)[positive].to(deltas), reduction="sum")
        return mean_over_ranks(wrong, count), mean_over_ranks(off, count)


class Heads(RoIHeads):
    """Predicts classes, boxes and, if there is a mask head, masks of proposals."""

    def forward(self, maps, proposals, sizes, targets=None):
        if self.training:
            proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals)))
        if self.training:
            losses = self.box_losses(scores, deltas, torch.cat(labels), torch.cat(wanted))
            if self.has_mask():
                losses["mask"] = self.mask_loss(maps, proposals, matched, labels, targets)
            return None, losses
        parts = self.postprocess_detections(scores, deltas, proposals, sizes)
        found = [dict(zip(("boxes", "scores", "labels"), image)) for image in zip(*parts)]
        if self.has_mask():
            logits = self.masks(maps, [image["boxes"] for image in found])
            for image, masks in zip(found, maskrcnn_inference(logits, [image["labels"] for image in found])):
                image["masks"] = masks  # (n, 1, 28, 28) between 0 and 1
        return found, {}

    def box_losses(self, scores, deltas, labels, wanted):
        """Averages over R: scores (R, C), deltas (R, 4C), labels (R,) 0 for background, wanted (R, 4)."""
        positive = labels.nonzero()[:, 0]
        of_class = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]  # (positive, 4)
        return {"class": mean_over_ranks(F.cross_entropy(scores, labels, reduction="sum"), len(labels)),
                "box": mean_over_ranks(F.l1_loss(of_class, wanted[positive], reduction="sum"), len(labels))}

    def masks(self, maps, boxes):
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes)))

    def mask_loss(self, maps, proposals, matched, labels, targets):
        """Returns the cross-entropy of each positive region's true-class mask, averaged over all pixels."""
        rows = [label.nonzero()[:, 0] for label in labels]
        boxes = [box[row] for box, row in zip(proposals, rows)]
        logits, wanted = self.masks(maps, boxes), []
        for target, box, match, row in zip(targets, boxes, matched, rows):
            regions = torch.cat([match[row, None].to(box), box], dim=1)  # (n, 5)
            masks = target["masks"][:, None].to(box)
            # as in mmdet: pool the mask like the features, then threshold it at one half
            wanted.append(roi_align(masks, regions, logits.shape[-1], aligned=True)[:, 0] >= 0.5)
        classes = torch.cat([label[row] for label, row in zip(labels, rows)])
        logits = logits[torch.arange(len(classes), device=classes.device), classes]  # (positive, 28, 28)
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).to(logits), reduction="sum")
        return mean_over_ranks(loss, logits.numel())


class LowPrecision(nn.Module):
    """Runs a part in bfloat16 if `low`, and returns the input's dtype. Boxes and losses stay outside: in
    bfloat16 they would err by pixels."""

    def __init__(self, part, low):
        super().__init__()
        self.part, self.low = part, low

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low):
            y = self.part(x)
        return {name: z.to(x.dtype) for name, z in y.items()} if isinstance(y, dict) else y.to(x.dtype)


class Stages(nn.Module):
    """Returns the named maps of a trunk, or the feature pyramid of these maps."""

    def __init__(self, trunk, names, pyramid=None):
        super().__init__()
        self.trunk, self.names, self.pyramid = trunk, names, pyramid

    def forward(self, x):
        maps = self.trunk.stages(x)
        maps = {name: maps[name] for name in self.names}
        return maps if self.pyramid is None else self.pyramid(maps)


class Detector(nn.Module):
    """Takes x (B, 3, H, W), padded to the right and below, and sizes [(h, w)] of its images. In training,
    with targets [{"boxes", "labels", "seed", maybe "masks"}], returns {name: loss}, to be summed; else a dict
    per image: boxes, scores, labels, maybe masks."""

    def __init__(self, backbone, rpn, roi_heads):
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, x, sizes, targets=None):
        if self.training:
            for stream, part in enumerate((self.rpn, self.roi_heads)):
                part.fg_bg_sampler.seeds = [2 * target["seed"] + stream for target in targets]
        maps = self.backbone(x)
        proposals, losses = self.rpn(ImageList(x, sizes), maps, targets)
        found, others = self.roi_heads(maps, proposals, sizes, targets)
        return {**losses, **others} if self.training else found


def assemble(backbone, channels, anchors, pool, head, features, classes, before, after, rois, over_all,
             masks=()):
    """Builds the Detector. before, after: proposals (in training, at test), per map before non-maximum
    suppression and per image after it. rois: regions per image to train on. masks: pool, head, predictor."""
    cut = [dict(zip(("training", "testing"), numbers)) for numbers in (before, after)]
    rpn_head = RPNHead(channels, anchors.num_anchors_per_location()[0])
    rpn = Proposer(anchors, rpn_head, 0.7, 0.3, 256, 0.5, *cut, nms_thresh=0.7)
    rpn.fg_bg_sampler, rpn.over_all = Sampler(256, 0.5), over_all
    predictor = FastRCNNPredictor(features, classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    roi_heads = Heads(pool, head, predictor, 0.5, 0.5, rois, 0.25, None, 0.05, 0.5, 100, *masks)
    roi_heads.fg_bg_sampler = Sampler(rois, 0.25)
    return Detector(backbone, rpn, roi_heads)


def c4(trunk, classes, sides, size, low=False, **counts):
    """Builds Faster R-CNN on a ResNet up to layer3. Moves layer4 into the head and adds a batch norm (MoCo's
    protocol). sides: of the anchors, in pixels; size: side of a pooled region, in cells."""
    layer4, stride = trunk.layer4, 16 if trunk.conv1.stride == (2, 2) else 4
    trunk.layer4 = nn.Identity()
    head = nn.Sequential(layer4, nn.BatchNorm2d(trunk.feature_dim), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return assemble(LowPrecision(Stages(trunk, ["layer3"]), low), trunk.feature_dim // 2,
                    Anchors((sides,), (stride,)), AlignedPool({"layer3": stride}, size),
                    LowPrecision(head, low), trunk.feature_dim, classes, **counts)


def fpn(trunk, classes, sides, size, low=False, **counts):
    """Builds Mask R-CNN on a pyramid of a ResNet's four stages, with batch norm in all parts (MMSelfSup's).
    The box head has four convolutions and a hidden layer, the mask head four convolutions."""
    strides = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
    inputs, norm = [trunk.feature_dim // 2**i for i in (3, 2, 1, 0)], nn.BatchNorm2d
    pyramid = FeaturePyramidNetwork(inputs, 256, LastLevelMaxPool(), norm_layer=norm)
    anchors = Anchors(tuple((side,) for side in sides), (*strides.values(), 64))
    head = FastRCNNConvFCHead((256, size, size), [256] * 4, [1024], norm_layer=norm)
    masks = (AlignedPool(strides, 14), LowPrecision(MaskRCNNHeads(256, [256] * 4, 1, norm_layer=norm), low),
             MaskRCNNPredictor(256, 256, classes + 1))
    return assemble(LowPrecision(Stages(trunk, list(strides), pyramid), low), 256, anchors,
                    AlignedPool(strides, size), LowPrecision(head, low), 1024, classes, masks=masks, **counts)


def norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def groups(model, decay, norm_decay):
    """Returns parameter groups: batch norm's parameters, found by type, have a weight decay of their own."""
    own = [p for module in norms(model) for p in module.parameters()]
    ids = set(map(id, own))
    others = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": others, "weight_decay": decay}, {"params": own, "weight_decay": norm_decay}]


@torch.no_grad()
def reestimate(net, batches):
    """Replaces running statistics by plain means over batches (x, sizes, targets), in train mode."""
    momenta = [(module, module.momentum) for module in norms(net)]
    for module, _ in momenta:
        module.reset_running_stats()
        module.momentum = None  # makes torch average plainly
    net.train()
    for batch in batches:
        net(*batch)
    for module, momentum in momenta:
        module.momentum = momentum
