"""Runs a detector on held-out images, computes its average precision and draws what it finds."""

import contextlib
import io
import itertools
import json

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.models.detection.roi_heads import paste_masks_in_image

from .. import data, distributed
from . import boxes, dense, examples

TOGETHER = 4  # images per group
SHOWN = 6  # images in the sheet of predictions


@torch.inference_mode()
def detect(model, images, p, how, fetch=next):
    """Returns the detections of all ranks, on rank 0: rows (n, 7) of image, class from 1, score, box in
    pixels of the original image; masks in COCO's encoding, or []; and, on every rank, the unreadable images.

    Images form groups that do not depend on the number of ranks, so neither do the detections.
    """
    dtype, device, masks = next(model.parameters()).dtype, how["device"], model.roi_heads.has_mask()
    loader = data.Loader(examples.Examples(images, p.sizes, p.longest), how["workers"],
                         device.type == "cuda", collate=examples.collate)
    groups = [[(i, i) for i in range(first, min(first + TOGETHER, len(images)))]
              for first in range(0, len(images), TOGETHER)]
    mine = range(distributed.rank(), -(-len(groups) // distributed.world_size()) * distributed.world_size(),
                 distributed.world_size())
    # All ranks take equally many groups, as `fetch` is collective: past the end the last one is repeated.
    source = loader.epoch(0, [groups[min(number, len(groups) - 1)] for number in mine])
    rows, encoded, bad = [torch.zeros(0, 7, dtype=torch.float64)], [], set()
    model.eval()
    for number in mine:
        index, pixels, targets = fetch(source)
        if number >= len(groups):
            continue
        wanted = [i for i, _ in groups[number]]
        bad |= {i for i, got in zip(wanted, index.tolist()) if i != got}  # replaced by a neighbour
        trio = [part for part in zip(wanted, pixels, targets) if part[0] not in bad]
        for _, alike in itertools.groupby(trio, lambda part: part[1].shape):  # of one size: little padding
            numbers, some, of_some = zip(*alike)
            x, sizes, _ = examples.batch(some, of_some, how, dtype)
            for i, size, target, found in zip(numbers, sizes, of_some, model(x, sizes)):
                height, width = target["original"]
                box = found["boxes"].double() * torch.tensor(
                    [width / size[1], height / size[0]] * 2, dtype=torch.float64, device=device)
                label, score = found["labels"].double(), found["scores"].double()
                rows.append(torch.column_stack([torch.full_like(score, i), label, score, box]).cpu())
                if masks:
                    encoded += encode(paste_masks_in_image(found["masks"], box, (height, width))[:, 0] > 0.5)
    loader.close()
    rows = distributed.gather_on_main(torch.cat(rows))
    text = "".join(f"{line}\n" for line in encoded).encode()
    text = distributed.gather_on_main(torch.frombuffer(bytearray(text or b"\n"), dtype=torch.uint8)).tobytes()
    bad = distributed.gather_rows(torch.tensor(sorted(bad), dtype=torch.int64)).tolist()
    return rows, [line for line in text.decode().splitlines() if line], set(bad)


def encode(masks):
    """Encodes masks (n, H, W) bool with pycocotools, each as one line of ASCII text."""
    from pycocotools import mask

    columns = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
    return [json.dumps(code["counts"].decode()) for code in mask.encode(columns)]


def figures(images, rule, rows, masks, bad):
    """Returns {"ap", "ap50", "ap75", "class_ap50", maybe "mask_ap" ..} in percent over readable images."""
    order = np.argsort(rows[:, 0], kind="stable")
    rows, masks = rows[order], [masks[i] for i in order] if masks else []
    if rule is None:
        return by_pycocotools(images, rows, masks, bad)
    judge, ends = boxes.Judge(len(images.classes), rule), np.searchsorted(rows[:, 0], range(len(images) + 1))
    for i in range(len(images)):
        mine = rows[ends[i] : ends[i + 1]]
        if i not in bad:
            found = {"labels": mine[:, 1].astype(np.int64), "scores": mine[:, 2], "boxes": mine[:, 3:]}
            judge.add(found, images.objects(i))
    return judge.figures()


def by_pycocotools(images, rows, masks, bad):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = []
    for k, (i, label, score, x1, y1, x2, y2) in enumerate(rows.tolist()):
        entry = {"image_id": images.numbers[int(i)], "category_id": images.ids[int(label) - 1],
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        if masks:
            width, height = images.sizes[int(i)]
            entry["segmentation"] = {"size": [height, width], "counts": json.loads(masks[k])}
        found.append(entry)
    result = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(images.file)
        for kind, prefix in (("bbox", ""), ("segm", "mask_")):
            values, classes = [0.0] * 3, [0.0] * len(images.ids)
            if found:
                judge = COCOeval(truth, truth.loadRes(found), kind)
                judge.params.imgIds = [number for i, number in enumerate(images.numbers) if i not in bad]
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
                values = judge.stats[:3].tolist()
                classes = judge.eval["precision"][0, :, :, 0, -1].mean(axis=0).tolist()  # (C,), -1: no object
            result |= {f"{prefix}{name}": 100 * value for name, value in zip(("ap", "ap50", "ap75"), values)}
            result[f"{prefix}class_ap50"] = [None if v < 0 else round(100 * v, 4) for v in classes]
    return result


def write_pictures(path, images, rows, bad):
    """Writes a sheet of the first readable images: each alone, with its objects, and with its detections."""
    sheet = []
    for i in [i for i in range(min(len(images), 10 * SHOWN)) if i not in bad][:SHOWN]:
        image, truth = images.read(i), images.objects(i)
        mine = rows[(rows[:, 0] == i) & (rows[:, 2] >= 0.5)]
        scale = max(1, 192 // min(image.size))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        row = [image]
        for drawn, labels in ((truth["boxes"], truth["labels"]), (mine[:, 3:], mine[:, 1].astype(int))):
            row.append(image.copy())
            draw = ImageDraw.Draw(row[-1])
            for box, label in zip(drawn * scale, labels):
                colour = tuple(dense.colours(np.uint8([[label]]))[0, 0].tolist())
                x1, y1, x2, y2 = box.tolist()
                draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
                draw.text((x1 + 4, y1 + 2), images.classes[label - 1], "white", stroke_width=1,
                          stroke_fill=colour)
        sheet.append([np.asarray(picture) for picture in row])
    dense.write_sheet(path, sheet)
