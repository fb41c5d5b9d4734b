"""How quickly a network learns from the labels that a run of sela.py ended with: trained from scratch on
them.

    python sela.py --recipe cifar --data ... --eval-every 1 --out runs/sela
    python -m benchmarks.retrain runs/sela                  # 10 epochs: half as long as the run
    python -m benchmarks.retrain runs/sela --epochs 2       # a quick look

The same trunk, heads, crops, batch and learning rate as the run's, plain cross-entropy, no labels found on
the way. The 20-NN accuracy after every epoch stands beside the run's own at that epoch, and beside that of
the same network trained on the same labels shuffled among the images. Labels find their images by path.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

import sela
from benchmarks.record import curve_of, write
from common import data, distributed, features
from common.engine.held_out import match_classes, open_queries
from common.engine.launch import autocast_dtype
from common.evaluation.store import read_assignments
from common.multicrop import Augmentation, MultiCrop, to_device
from common.weights import load_backbone


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of sela.py")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1,
                        help="of weights, order and crops (default: 1, where the run's is 0)")
    parser.add_argument("--workers", type=int, default=-1)
    return parser.parse_args()


def train(config, images, targets, device, evaluate):
    """The accuracies that evaluate(trunk) finds before and after every epoch of training on targets (H, N),
    -100 for none."""
    torch.manual_seed(config.seed)
    model = sela.Model(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum,
                                weight_decay=config.weight_decay)
    scales = list(zip(config.scales[::2], config.scales[1::2]))
    augmentation = Augmentation(config.jitter, config.jitter_p, config.grey_p, config.grey_first,
                                config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)  # --augs 3
    loader = data.Loader(crops, config.workers, device.type == "cuda")
    dtype = autocast_dtype(config.precision, device)
    accuracies = [evaluate(model.backbone)]
    for epoch in range(config.epochs):
        for index, views, params in loader.epoch(epoch, data.batches(len(images), config.batch_size, epoch,
                                                                     config.seed, 0, 1)):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                _, scores = model(to_device(views, params, device))
            scores = [s.view(-1, len(index), s.shape[1]) for s in scores]  # H (V, B, K)
            loss = sela.prediction_loss(scores, targets[:, index].to(device), config.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracies.append(evaluate(model.backbone))
        print(f"epoch {epoch + 1} of {config.epochs}: loss {loss.item():.3f}, 20-NN {accuracies[-1]:.2f} %",
              flush=True)
    loader.close()
    return accuracies


def main():
    args = arguments()
    device = distributed.start()
    names = {field.name for field in dataclasses.fields(sela.Config)}
    try:
        saved = json.loads((args.run / "config.json").read_text())
        run = dict(curve_of(args.run))
        if saved.get("method") != "sela" or saved.get("augs", 3) != 3 or not run:
            raise ValueError("it is no run of sela.py with --eval-every and --augs 3")
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
                 if name in names}
        config = sela.Config(**{**saved, "epochs": args.epochs, "seed": args.seed, "workers": args.workers})
        images = data.open_images(config.data or "shapes", "train", config.root)
        queries = open_queries(config.data or "shapes", config.val, config.root)
        match_classes(queries, images)
        # (H, N)
        targets = torch.from_numpy(read_assignments(args.run / "assignments.npz", images)).long()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {args.run}: {error}")
    targets[targets < 0] = -100

    info = load_backbone(args.run)[1]
    how = dict(workers=config.workers, precision=autocast_dtype(config.precision, device))

    def evaluate(trunk):
        bank, held_out = (features.extract(trunk, part, info["resize"], info["size"], device,
                                           **how) for part in (images, queries))
        return features.knn_accuracy(*bank, *held_out, k=20)[20][0]

    shuffled = targets[:, torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))]
    curves = {"its labels": train(config, images, targets, device, evaluate)}
    curves["its labels, shuffled"] = train(config, images, shuffled, device, evaluate)
    figures = {f"the run itself, {epoch} epochs, 20-NN %": value for epoch, value in run.items()}
    for name, curve in curves.items():
        figures |= {f"{name}, {epoch} epochs, 20-NN %": value for epoch, value in enumerate(curve)}
    settings = dict(images=len(images), run_epochs=saved["epochs"], epochs=args.epochs,
                    batch_size=config.batch_size, seed=args.seed)
    write("retrain", device, settings, figures)


if __name__ == "__main__":
    main()
