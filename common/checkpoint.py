"""One atomic, checksummed file a run; trunks and models in and out, whoever wrote them (python -m common.checkpoint --help).

A checkpoint is what torch.save writes, plus 40 bytes: a mark and the SHA-256 of all before it. torch.load reads the file
as it is; `load` reads it with weights_only=True after the checksum agreed, and nothing else.
"""

import contextlib
import hashlib
import os
import pickle
import re
import warnings
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import alexnet, families, preact, resnet
from .config import ArgumentError, Parser
from .multicrop import MEAN, STD

MARK = b"SHA-256:"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says which file and why."""

    exit_code = 4


class HeadsDoNotFit(CheckpointError):
    """A file whose trunk can be used, but not its heads."""


class Damaged(CheckpointError):
    """A file that is not whole, or not what was written."""


class _HashingWriter:
    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, block):
        self.digest.update(block)
        try:
            return self.file.write(block)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


@contextlib.contextmanager
def writing(path, text=False, sync=False, keep=None):
    """A file to write. It takes the name `path` once it is whole; until then, and if anything goes wrong, the file that was
    there stays as it is. text: a text file, in which undecodable paths may be written. sync: wait until it is on the disk.
    keep: the name that the file that was there gets."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", newline="", errors="surrogateescape") if text else open(partial, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the new names themselves reach the disk
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def _torch_save(state, file):
    """Returns the SHA-256 of what it has written. Raises the file's own OSError, in whose place torch reports a position."""
    writer = _HashingWriter(file)
    try:
        torch.save(state, writer)
    except RuntimeError:
        if writer.error is None:
            raise
        raise writer.error from None
    return writer.digest.digest()


def save(path, state):
    """Writes state (tensors, numbers, strings, lists, tuples and dicts) to path, keeping the file that was there as
    previous_path(path). The name never points at half a file. Raises OSError, with the old files intact."""
    with writing(path, sync=True, keep=previous_path(path)) as file:
        file.write(MARK + _torch_save(state, file))


def previous_path(path):
    return Path(path).with_name("previous_" + Path(path).name)


def load(path, expect=None):
    """The state that `save` wrote. expect: {key: value} that the state must hold, else CheckpointError says what differs.

    Raises Damaged if the file is not what was written, FileNotFoundError if there is none.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - len(MARK) - 32
        digest, left = hashlib.sha256(), max(0, size)
        while left and (block := file.read(min(left, 1 << 24))):
            digest.update(block)
            left -= len(block)
        if size <= 0 or file.read() != MARK + digest.digest():
            raise Damaged(f"{path} is damaged: its checksum does not agree")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several kinds for what it refuses
            raise Damaged(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
    for key, value in (expect or {}).items():
        if state.get(key) != value:
            raise CheckpointError(f"{path} has {key} {state.get(key)!r}, here it is {value!r}")
    return state


def export_backbone(path, backbone, info, clusters=None, labels=None):
    """Writes a trunk as {"state_dict", "info"}: torchvision's parameter names, and what is needed to rebuild it.

    info: dict with arch, width, stem, channels, sobel, mean, std, resize, size, method, recipe, epoch.
    clusters: the Model that the trunk is of; its projection and heads are written too, for `load_model`. labels: see `export_model`.
    """
    content = {"state_dict": _weights(backbone), "info": info}
    if clusters is not None:
        projection, several = clusters.projection_head, clusters.heads
        content["clusters"] = _weights(nn.ModuleDict({"prototypes": several, **({"projection_head": projection} if projection else {})}))
    if labels is not None:
        content["L"] = labels
    _write(path, content)


def export_model(path, model, info, head=0, labels=None):
    """Writes a Model whose clusters are linear in its trunk's features for torchvision alone: {"state_dict", "L"}, the head as `fc`.

        saved = torch.load(path, weights_only=True)
        network = torchvision.models.resnet50(num_classes=K)
        network.load_state_dict(saved["state_dict"])  # network(images).argmax(1) is the cluster

    labels (H, N): the clusters of the training images, which `L` becomes. Raises CheckpointError where torchvision has no such network.
    """
    if not torchvision_has(info):
        raise CheckpointError(f"torchvision has no {_architecture(info)}")
    if not model.heads:
        raise CheckpointError("it has no heads: there are no clusters to be `fc`")
    if model.projection_head is not None:
        raise CheckpointError(f"its clusters are those of a projection ({info['method']}): only SeLa's and DeepCluster's can be `fc`")
    if not 0 <= head < len(model.heads):
        raise ArgumentError(f"--head {head}: 0 to {len(model.heads) - 1} are there")
    fc = _weights(model.heads[head])
    fc.setdefault("bias", torch.zeros(len(fc["weight"])))
    state = {**_weights(model.backbone), **{f"fc.{name}": tensor for name, tensor in fc.items()}}
    _write(path, {"state_dict": state, "info": info, **({} if labels is None else {"L": labels})})


def export_detectron2(path, backbone, info):
    """Writes a ResNet's trunk as the .pkl that detectron2 takes as MODEL.WEIGHTS. `detectron2_options` is what it must be told."""
    if info["arch"] not in ("resnet18", "resnet34", "resnet50") or info["stem"] != "imagenet" or info.get("sobel"):
        raise CheckpointError(f"detectron2 has no {_architecture(info)}")
    state = {}
    for name, tensor in _weights(backbone).items():
        if name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^(conv1|bn1)", r"stem.\1", name)
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        state[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = tensor.numpy()
    with writing(path, sync=True) as file:
        pickle.dump({"model": state, "__author__": info["method"], "matching_heuristics": True}, file)


def detectron2_options(info):
    """The options of detectron2 that belong to an exported trunk."""
    stem, basic = int(64 * info["width"]), info["arch"] != "resnet50"
    mean, std = ([round(255 * x, 3) for x in info[key]] for key in ("mean", "std"))
    options = f"INPUT.FORMAT RGB MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std} MODEL.RESNETS.DEPTH {info['arch'][6:]}".replace(", ", ",")
    options += f" MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.STEM_OUT_CHANNELS {stem}"
    return options + f" MODEL.RESNETS.WIDTH_PER_GROUP {stem} MODEL.RESNETS.RES2_OUT_CHANNELS {stem if basic else 4 * stem}"


def torchvision_has(info):
    return (
        info["arch"] in ("resnet18", "resnet34", "resnet50") and info["stem"] == "imagenet" and info["width"] == 1 and not info.get("sobel")
    )


def _architecture(info):
    width, sobel = info.get("width") or 1, " with Sobel" if info.get("sobel") else ""
    return f"{info['arch']} x{width:g}{sobel}, {info.get('stem')} stem"


def _weights(module):
    """State dict on the CPU, in float32."""
    state = module.state_dict().items()
    return {name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu() for name, tensor in state}


def _write(path, content):
    with writing(path, sync=True) as file:
        _torch_save(content, file)


def load_backbone(path, trust_pickle=False):
    """(trunk, info) of a run directory, a backbone.pt, or the checkpoint of another project: families.py lists them.

    Every weight of the trunk must be in the file, of its shape, and the other way round; else CheckpointError names some. Counters of batch
    norm may be missing. trust_pickle: run the code that an old file may hold; without it none ever is.
    """
    return _open(path, trust_pickle)[:2]


def _open(path, trust_pickle):
    """(trunk, info, families.Contents) of a file."""
    path = Path(path)
    path = path / "backbone.pt" if path.is_dir() else path
    saved = _read(path, trust_pickle)
    try:
        contents = families.recognise(saved)
        info = {"method": "unknown", "resize": 256, "size": 224, "mean": MEAN, "std": STD, **contents.info}
        trunk = build_backbone(info)
        _fill(trunk, contents.trunk, path, info)
    except families.Refused as error:
        raise CheckpointError(f"{path} {error}") from None
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # anything may be in a file
        raise CheckpointError(f"{path} is no checkpoint that is known ({type(error).__name__}: {_first_line(error)})") from None
    return trunk, info, contents


def _read(path, trust_pickle):
    """What a file holds. The one place that may run code which is in a file: with trust_pickle alone."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        if trust_pickle and path.suffix == ".pkl":
            return pickle.loads(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the protocol of a pickle that is refused
            encoding = {"encoding": "latin1"} if trust_pickle else {}  # Python 2 wrote some
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, **encoding)
    except Exception as error:  # torch raises several kinds for what it refuses
        code = "a pickle" if path.suffix == ".pkl" else re.search(r"GLOBAL (\S+)|$", str(error))[1]
        if code and not trust_pickle:
            convert = f"python -m common.checkpoint {path} --trust-pickle --to torchvision --out new.pt"
            reason = f"without running code that is in it ({code}): if you trust its origin, convert it: {convert}"
            raise CheckpointError(f"{path} cannot be loaded {reason}") from None
        reason = "it is not what torch.save writes" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise CheckpointError(f"{path} cannot be loaded: {reason}") from None


def _first_line(error):
    return str(error).splitlines()[0] if str(error) else "it is empty"


def _fill(module, state, path, info):
    """Loads a state dict that has every tensor of the module, counters of batch norm apart, and no other."""
    own = module.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = sorted(set(needed) - state.keys())
    unknown = sorted(state.keys() - own.keys())
    wrong = [f"{name} {tuple(state[name].shape)}" for name in own if name in state and state[name].shape != own[name].shape]
    if missing or unknown or wrong:
        fit = len(needed) - len(missing) - sum(name.partition(" ")[0] in needed for name in wrong)
        words = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        reasons = ", ".join(f"{word} {names[:3]}{f' and {len(names) - 3} more' * (len(names) > 3)}" for word, names in words if names)
        raise CheckpointError(f"{path} is no {_architecture(info)}: {fit} of {len(needed)} tensors fit; {reasons}")
    module.load_state_dict({**own, **state})


class Model(nn.Module):
    """A trunk with what clusters its features: images (B, 3, S, S), normalised, to H scores (B, K), whose arg-max is the cluster.

    projection_head: a module or None. heads: H linear layers; those without bias are prototypes, whose scores are cosines.
    relu: of the features, for a trunk that ends before its last one.
    """

    def __init__(self, backbone, projection_head, heads, relu=False):
        super().__init__()
        self.backbone, self.projection_head, self.relu = backbone, projection_head, relu
        self.heads = nn.ModuleList(heads)

    def forward(self, images):
        return self.scores(self.backbone(images))

    def scores(self, features):
        """Those of the trunk's features (B, F)."""
        z = features if self.projection_head is None else self.projection_head(features)  # (B, D)
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = F.relu(z.float()) if self.relu else z.float()
            unit = F.normalize(z)
            return [head(z) if head.bias is not None else F.linear(unit, F.normalize(head.weight)) for head in self.heads]


def load_model(path, trust_pickle=False):
    """(Model, info) of a run directory, whose weights are those of its checkpoint.pt, or of any file that `load_backbone` reads.

    Where the method or the file has none, projection_head is None and heads are empty.
    """
    return _open_model(path, trust_pickle)[:2]


def _open_model(path, trust_pickle):
    """(Model, info, families.Contents) of a run directory or a file."""
    path = Path(path)
    backbone, info, contents = _open(path, trust_pickle)
    if path.is_dir():
        path = path / "checkpoint.pt"
        try:
            saved = load(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        _fill(backbone, {name[9:]: tensor for name, tensor in saved["model"].items() if name.startswith("backbone.")}, path, info)
        projection, heads, _ = families.heads(saved["model"])
        contents = contents._replace(projection=projection, heads=heads, labels=saved["meter"]["assignments"].long())
    try:
        projection, heads = families.build(contents.projection, contents.heads)
        model = Model(backbone, projection, heads, relu=info["arch"] == "alexnet")
        model.eval().scores(torch.zeros(1, backbone.feature_dim))  # raises if they do not fit
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise HeadsDoNotFit(f"{path}: its heads do not fit its {info['arch']} ({_first_line(error)})") from None
    return model.train(), info, contents


def load_trunk(path, run):
    """State dict of the trunk at path (see load_backbone), which must be of the arch, width, stem and input in a run's info."""
    trunk, info = load_backbone(path)
    for name in ("arch", "width", "stem", "sobel"):
        there, here = info.get(name, False), run.get(name, False)
        if there != here:
            raise CheckpointError(f"--init-from {path} has {name} {there}, this run has --{name} {here}")
    return trunk.state_dict()


def build_backbone(info):
    """A trunk with random weights, of the architecture that info names."""
    arch, sobel = info["arch"], info.get("sobel", False)
    if arch == "preact50":
        return preact.PreactResNet50()
    if arch not in alexnet.ARCHITECTURES:
        return resnet.ARCHITECTURES[arch](info["width"], info["stem"], info.get("channels", 3), sobel)
    trunk = alexnet.alexnet(alexnet.ARCHITECTURES[arch], sobel)
    if info.get("convolutions_only"):  # VISSL's file: features are the last maps
        trunk.classifier, trunk.feature_dim = nn.Identity(), 256 * 6 * 6
    return trunk


def arguments(argv=None):
    description = """Says what a checkpoint is, and writes it as others read it: runs of this code and checkpoints of other projects.

    python -m common.checkpoint swav_800ep_pretrain.pth.tar
    python -m common.checkpoint runs/swav --to detectron2 --out swav.pkl"""
    parser = Parser("-m common.checkpoint", description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("file", help="a run directory, a backbone.pt or another project's checkpoint")
    parser.add_argument(
        "--to",
        choices=("torchvision", "detectron2", "model"),
        help="write a backbone.pt (torchvision's names, and heads where there are some), a .pkl for detectron2, or a torchvision"
        " network with a cluster head as its fc and the training images' clusters as L",
    )
    parser.add_argument("--out", default="", metavar="FILE", help="where to")
    parser.add_argument("--head", type=int, default=0, help="the head that --to model takes (default: 0)")
    parser.add_argument("--trust-pickle", action="store_true", help="run the code that an old file may hold: only if you trust its origin")
    return parser.parse_args(argv)


def main(args):
    if bool(args.to) != bool(args.out):
        raise ArgumentError("--to and --out go together: what to write, and where")
    path, out = Path(args.file), Path(args.out)
    try:
        model, info, contents = _open_model(path, args.trust_pickle)
    except HeadsDoNotFit as error:
        if args.to == "model":
            raise
        print(f"warning: {error}: they are left out")
        backbone, info, contents = _open(path, args.trust_pickle)
        model, contents = Model(backbone, None, nn.ModuleList()), contents._replace(labels=None)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    counters = sum(name.endswith("num_batches_tracked") for name in contents.trunk)
    print(f"{path}: {info['method']}, {_architecture(info)}")
    if path.is_file():
        print(f"  sha256      {_sha256(path)}")
    found, dim = len(contents.trunk) - counters, model.backbone.feature_dim
    print(f"  trunk       {found} of {found} tensors, {parameters / 1e6:.1f} M parameters, {dim} features")
    if model.projection_head is not None:
        print("  projection  " + " -> ".join(str(layer.out_features) for layer in model.projection_head if isinstance(layer, nn.Linear)))
    print("  heads       " + (", ".join(f"{head.out_features} clusters" for head in model.heads) or "none: there are no clusters in it"))
    if contents.labels is not None:
        print(f"  labels      {' x '.join(map(str, contents.labels.shape))}")
    if contents.unused:
        groups = Counter(key.partition(".")[0] for key in contents.unused)
        print(f"  not used    {', '.join(f'{name} ({count})' for name, count in groups.items())}")
    if not args.to:
        return
    if out.exists() and out.samefile(path):
        raise ArgumentError(f"--out {out} is the file itself")
    try:
        if args.to == "torchvision":
            export_backbone(out, model.backbone, info, model, contents.labels)
        elif args.to == "detectron2":
            export_detectron2(out, model.backbone, info)
        else:
            export_model(out, model, info, args.head, contents.labels)
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(f"written: {out}")
    if args.to == "detectron2":
        print(f"  options     MODEL.WEIGHTS {out} {detectron2_options(info)}")
    elif not torchvision_has(info):
        print("  torchvision has no such network: common.checkpoint.load_backbone rebuilds it")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    from common import checkpoint, run  # this file once more, under the name that the others know

    run.launch(checkpoint.main, checkpoint.arguments())
