"""Object detection (6, 20 or 80 classes): fine-tunes a detector together with its pre-trained trunk.

"c4" is MoCo's Faster R-CNN: the trunk up to layer3 makes the feature map; layer4 and one more batch norm form
the head that classifies regions of it. "fpn" is MMSelfSup's Mask R-CNN: a pyramid of the four stages, with
batch norm in all parts. Batch norm is in train mode and synchronised; nothing is frozen. The learning rate
warms up linearly and drops twice to a tenth. The last iteration is evaluated, by average precision at an IoU
of 0.5 (AP50), at 0.75 (AP75), and averaged over 0.50, 0.55 .. 0.95 (AP): VOC's by 11 points, COCO's by
pycocotools.

The state is saved at a stop signal and every --save-every minutes. The same command resumes.

    python eval_detection.py runs/swav_shapes                # drawn scenes, minutes on a CPU
    python eval_detection.py runs/swav_shapes --random-init  # the same from random weights: the floor
    python eval_detection.py --list-presets                  # the published protocols and their figures
    torchrun --nproc_per_node=8 eval_detection.py resnet50.pth --preset voc0712_24k_swav --data VOCdevkit
    torchrun --nproc_per_node=8 eval_detection.py resnet50.pth --preset coco_fpn_1x --data coco
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from common import data, distributed
from common.batchnorm import parallel
from common.engine.errors import DataError, say
from common.engine.launch import launch, repeatable
from common.evaluation import boxes, dense, detector, examples, found
from common.evaluation import protocol as evaluation
from common.evaluation.progress import Progress
from common.optim import drops
from common.sources.objects import open_coco, open_voc
from common.sources.scenes import open_scenes


@dataclass(frozen=True)
class Preset:
    """A protocol. sizes: of an image's short side. Training draws one per image, the test uses the last."""

    published: str
    open: Callable  # spec -> (training, held-out) images
    rule: boxes.Rule | None  # for average precision; None: COCO's, by pycocotools
    network: Callable
    sizes: tuple
    iterations: int  # training steps, or passes over the images if `epochs` is True
    drops: tuple  # fractions of the training after which lr is multiplied by 0.1
    lr: float = 0.02
    warmup: int = 100  # iterations in which the rate rises linearly from warmup_start * lr to lr
    warmup_start: float = 0.001
    batch_size: int = 16
    weight_decay: float = 1e-4
    norm_decay: float = 0.0  # weight decay of batch norm's parameters
    reestimate: int = 0  # batches to average batch norm's statistics over, before the test; 0: keep them
    longest: int = 1333  # most pixels of an image's long side
    sides: tuple = (32, 64, 128, 256, 512)  # of the anchors, in pixels
    region: int = 14  # side of a pooled region, in cells
    before: tuple = (12_000, 6_000)  # (training, test): proposals per map before non-maximum suppression
    after: tuple = (2_000, 1_000)  # and per image after it
    rois: int = 512  # regions per image to train on
    over_all: bool = True  # divide the proposals' losses by all that could be sampled, not by all that were
    epochs: bool = False


MOCO = Preset("none for these methods; MoCo v2 of 200 epochs 82.4 / 57.0 / 63.6 (its authors), supervised "
              "81.58 / 54.19 / 59.80, random 59.02 / 32.83 / 31.60 (OpenSelfSup)", open_voc, boxes.VOC07,
              detector.c4, tuple(range(480, 801, 32)), 24_000, (18 / 24, 22 / 24), reestimate=200)
PRESETS = {
    "voc0712_24k": MOCO,
    "voc0712_24k_swav": replace(MOCO, published="none that we could check; the rates that VISSL has for SwAV",
                                lr=0.1, warmup=1_000, warmup_start=0.3333),
    "coco_fpn_1x": Preset("SwAV of 200 epochs, batch 256: 60.5 / 40.2 / 43.9, masks 57.5 / 36.3 / 38.8 "
                          "(MMSelfSup)", open_coco, None, detector.fpn, tuple(range(640, 801, 32)), 12,
                          (8 / 12, 11 / 12), warmup=1_000, norm_decay=1e-4, region=7, before=(2_000, 1_000),
                          after=(1_000, 1_000), over_all=False, epochs=True),
    "small": Preset("none: ours, for the drawn scenes on a CPU", open_scenes, boxes.COCO, detector.c4, (64,),
                    600, (18 / 24, 22 / 24), warmup=50, batch_size=8, longest=64, sides=(12, 20, 32),
                    region=8, before=(300, 300), after=(100, 100), rois=32),
}


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "what the preset needs: scenes, or scenes:N for N of them (default: "
                                        "scenes), VOCdevkit, or COCO's folder",
                               "", precisions=(*evaluation.PRECISIONS, "float64"), crops=False)
    evaluation.add_presets(parser, PRESETS, table(), ("--iterations", "training steps; warm-up and drops of "
                                                                      "the learning rate scale along"))
    add = parser.add_argument
    add("--lr", type=float, help="learning rate (default: the preset's, scaled linearly with --batch-size)")
    add("--reestimate", type=int, metavar="BATCHES",
        help="training batches to average batch norm's statistics over, before the test; 0: keep them")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False,
        help="repeatable bits on a GPU too; much slower: plain operations pool the regions (default: off)")
    return parser.parse_args(argv)


def table():
    """The presets as text: name, published figures, settings."""
    lines = ["preset           published AP50 / AP / AP75"]
    for name, p in PRESETS.items():
        length = f"{p.iterations} {'epochs' if p.epochs else 'iterations'}"
        after = " and ".join(f"{round(drop * p.iterations)}" for drop in p.drops)
        sizes = f"{p.sizes[0]} to {p.sizes[-1]}" if len(p.sizes) > 1 else f"{p.sizes[0]}"
        lines += [f"{name:16} {p.published}",
                  f"    {p.network.__name__}, {length} of {p.batch_size} images of {sizes} px, lr {p.lr:g}, "
                  f"from {p.warmup_start:g} of it in {p.warmup} iterations, x0.1 after {after}, weight decay "
                  f"{p.weight_decay:g}, of batch norm {p.norm_decay:g}"
                  + f", statistics of {p.reestimate} batches" * (p.reestimate > 0)]
    return "\n".join(lines)


def resolve(args):
    """Returns the preset with the given options. Without --lr, the learning rate scales with --batch-size."""
    preset = PRESETS[args.preset]
    p = replace(preset, **evaluation.given(args, ("batch_size", "lr", "reestimate")))
    if args.lr is None:
        p = replace(p, lr=preset.lr * p.batch_size / preset.batch_size)
    dense.check(args, p, p.open is open_scenes)
    evaluation.need(p.reestimate >= 0, p, "reestimate", "0 or more is needed")
    return p


def scheduled(p, args, n):
    """Returns the preset with its length in iterations over n images, and its warm-up scaled to that."""
    published = p.iterations * (n // p.batch_size) if p.epochs else p.iterations
    iterations = published if args.iterations is None else args.iterations
    return replace(p, iterations=iterations, warmup=round(p.warmup * iterations / max(1, published)))


def rate(step, p):
    """Returns the learning rate of iteration `step`, counted from 0."""
    lr = drops(step, 1, p.lr, [round(drop * p.iterations) for drop in p.drops], 0.1)
    return lr if step >= p.warmup else lr * (p.warmup_start + (1 - p.warmup_start) * step / p.warmup)


def enlarged(p, times):
    return replace(p, sizes=tuple(times * size for size in p.sizes), longest=times * p.longest,
                   sides=tuple(times * side for side in p.sides))


# --------------------------------------------------------------------------------------------------- training


def batches(loader, images, p, args, how, dtype, first, last):
    """Yields (index, batch) of iterations first .. last - 1; a batch holds the arguments of a Detector."""
    wide = getattr(images, "wide", np.ones(len(images), bool))
    source = dense.iterations(loader, len(images), p.batch_size, args.seed, first, last,
                              lambda epoch: examples.in_pairs(wide, args.seed, epoch))
    for index, pixels, targets in source:
        yield index, examples.batch(pixels, targets, how, dtype)


def train(model, p, loader, images, args, how, progress):
    """Trains the model on its device. Returns the mean loss that the last line of the log shows."""
    net, dtype = parallel(model), next(model.parameters()).dtype
    optimizer = torch.optim.SGD(detector.groups(model, p.weight_decay, p.norm_decay), lr=p.lr, momentum=0.9)
    loss = dense.train(
        model, optimizer, lambda first: batches(loader, images, p, args, how, dtype, first, p.iterations),
        lambda step, batch: sum(net(*batch[1]).values()), lambda step: rate(step, p), p.iterations, loader,
        progress)
    if p.reestimate:
        # Takes the batches that would come next. A stop in between saves a fully trained model.
        source = batches(loader, images, p, args, how, dtype, p.iterations, p.iterations + p.reestimate)
        fetched = iter(lambda: progress.fetch(source, None), None)
        detector.reestimate(net, (batch for _, batch in fetched))
    return loss


# ------------------------------------------------------------------------------------------------------- main


def main(args):
    device = evaluation.start(args)
    p = resolve(args)
    repeatable(args.deterministic)
    trunk, info = evaluation.open_trunk(args, device)
    p = enlarged(p, dense.magnified(trunk, args))
    images, queries = distributed.from_first(p.open, args.data)
    p = scheduled(p, args, len(images))
    name = f"eval_detection_{args.preset}"
    how, decisive, folder, own = dense.setting(args, info, device, trunk, name, images, queries)
    model = p.network(trunk, len(images.classes), p.sides, p.region, how["precision"] == torch.bfloat16,
                      before=p.before, after=p.after, rois=p.rois, over_all=p.over_all)
    dtype = torch.float64 if args.precision == "float64" else torch.float32
    model.to(device, dtype, memory_format=torch.channels_last)

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    say(f"{args.trunk}: {evaluation.name(info)}, {millions:.2f} M parameters; preset {args.preset}")
    say(f"{len(images)} images of {len(images.classes)} classes, judged on {len(queries)}; {p.iterations} "
        f"iterations of {p.batch_size} images, lr {p.lr:g}")

    progress = Progress(folder, own, decisive, args.save_every, args.fresh)
    training = examples.Examples(images, p.sizes, p.longest, args.seed, model.roi_heads.has_mask())
    loader = data.Loader(training, args.workers, device.type == "cuda", collate=examples.collate)
    loss = train(model, p, loader, images, args, how, progress)
    loader.close()
    rows, masks, bad = found.detect(model, queries, p, how, progress.fetch)
    evaluation.warn_of_bad(loader.bad, bad)
    if len(bad) == len(queries):
        raise DataError("no held-out image can be read")

    result = distributed.from_main(found.figures, queries, p.rule, rows, masks, bad)
    say("\nclass              AP50")
    for class_name, ap in zip(images.classes, result["class_ap50"]):
        say(f"{class_name:16}{'-' if ap is None else f'{ap:.2f}':>7}")
    for prefix, what in (("", "boxes"), ("mask_", "masks")):
        if f"{prefix}ap" in result:
            values = " / ".join(f"{result[prefix + key]:.2f}" for key in ("ap50", "ap", "ap75"))
            say(f"AP50 / AP / AP75 of {what}: {values}")
    record = {"preset": args.preset, "images": len(images), "queries": len(queries),
              "classes": len(images.classes), "iterations": p.iterations, "batch_size": p.batch_size,
              "lr": p.lr, "reestimate": p.reestimate, "seed": args.seed, "loss": loss,
              **{key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}}
    if not progress.write(found.write_pictures, folder / f"{own}.png", queries, rows, bad):
        say(f"image, truth, prediction: {folder / f'{own}.png'}")
    evaluation.finish(args, info, name, record, folder)
    progress.finish()


if __name__ == "__main__":
    launch(main, arguments())
