"""Writes 10,000 images of CIFAR-10 as files, 1,000 per class, and 5,000 held-out ones: the sizes behind the
figures of docs/results.md.

    python -m benchmarks.subset cifar       # downloads CIFAR-10 into cifar/download; PNG files, a few MB
    make results DATA=cifar/list.txt ROOT=cifar/train VAL=cifar/val

Takes the first images of each class. The figures of docs/results.md are of another choice of as many, saved
as JPEG, so expect other decimals.
"""

import argparse
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000,
                        help="training images per class; half as many are held out (default: 1000)")
    return parser.parse_args()


def save(images, folder, count):
    """Saves the first `count` images of each class as folder/CLASS/NNNN.png. Returns lines of path and class,
    relative to folder."""
    taken, lines = Counter(), []
    for image, label in images:
        name, number = images.classes[label], taken[label]
        if number < count:
            path = folder / name / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            lines.append(f"{name}/{path.name},{name}\n")
        taken[label] += 1
    return lines


def main():
    args = arguments()
    train, val = (CIFAR10(args.folder / "download", train=part, download=True) for part in (True, False))
    lines = save(train, args.folder / "train", args.images)
    held_out = save(val, args.folder / "val", args.images // 2)
    (args.folder / "list.txt").write_text("".join(lines))
    print(f"{len(lines)} images in {args.folder / 'list.txt'}, {len(held_out)} held-out ones in "
          f"{args.folder / 'val'}")


if __name__ == "__main__":
    main()
