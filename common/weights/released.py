"""Finds and downloads released checkpoints of other projects, named as "released:swav_800ep".

Addresses and figures are from the projects' own pages. Whether the addresses still work was not tried here.
"""

import contextlib
import os
import shutil
import socket
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote
from urllib.request import Request, urlopen

import torch

from ..engine.errors import CheckpointError, border, say

SWAV = "https://dl.fbaipublicfiles.com/deepcluster"
MMSELFSUP = "https://download.openmmlab.com/mmselfsup"
LIGHTLY = "https://lightly-ssl-checkpoints.s3.amazonaws.com"
SELA = "http://www.robots.ox.ac.uk/~vgg/research/self-label/asset"
PROJECTS = {  # {start of an address: (repository, its licence, families that its files are recognised as)}
    f"{SWAV}/alexnet": ("facebookresearch/deepcluster", "CC BY-NC 4.0", ["DeepCluster"]),
    f"{SWAV}/swav": ("facebookresearch/swav", "CC BY-NC 4.0", ["SwAV"]),
    SWAV: ("facebookresearch/swav", "CC BY-NC 4.0", ["DeepCluster-v2 or SeLa-v2"]),
    MMSELFSUP: ("open-mmlab/mmselfsup", "Apache 2.0", ["MMSelfSup", "OpenSelfSup"]),
    LIGHTLY: ("lightly-ai/lightly", "MIT", ["Lightning", "SwAV"]),
    SELA: ("yukimasano/self-label", "see its page", ["SeLa", "DeepCluster"]),  # one head: like DeepCluster's
}


class Released(NamedTuple):
    """published: ImageNet linear top-1 unless it says otherwise. sha256: the first digits of the hash, if the
    file's name has them. member: the file in a zip."""

    url: str
    published: str
    sha256: str | None = None
    member: str = ""

    @property
    def project(self):
        return next(about for begins, about in PROJECTS.items() if self.url.startswith(begins))


def _swav(name, published):
    return Released(f"{SWAV}/{name}_pretrain.pth.tar", published)


def _first_sela(name, published):
    return Released(f"{SELA}/pretrained.zip", published, member=f"self-label_models/{name}.pth")


RELEASED = {
    "swav_800ep": _swav("swav_800ep", "75.3"),
    "swav_400ep": _swav("swav_400ep", "74.6"),
    "swav_200ep": _swav("swav_200ep", "73.9"),
    "swav_100ep": _swav("swav_100ep", "72.1"),
    "swav_400ep_bs256": _swav("swav_400ep_bs256", "74.3"),
    "swav_200ep_bs256": _swav("swav_200ep_bs256", "72.7"),
    "swav_400ep_2x224": _swav("swav_400ep_2x224", "70.1"),
    "swav_rn50w2": _swav("swav_RN50w2_400ep", "77.3"),
    "swav_rn50w4": _swav("swav_RN50w4_400ep", "77.9"),
    "swav_rn50w5": _swav("swav_RN50w5_400ep", "78.5"),
    "swav_800ep_linear": Released(f"{SWAV}/swav_800ep_eval_linear.pth.tar",
                                  "75.3 as --head of swav_800ep: a classifier, no trunk"),
    "deepclusterv2_800ep": _swav("deepclusterv2_800ep", "75.2"),
    "deepclusterv2_400ep": _swav("deepclusterv2_400ep", "74.3"),
    "deepclusterv2_400ep_2x224": _swav("deepclusterv2_400ep_2x224", "70.2"),
    "selav2_400ep": _swav("selav2_400ep", "71.8"),
    "selav2_400ep_2x224": _swav("selav2_400ep_2x224", "67.2"),
    "deepcluster_alexnet": Released(f"{SWAV}/alexnet/checkpoint.pth.tar", "37.9, best layer (VISSL)"),
    "deepcluster_resnet50_sobel": Released(
        f"{MMSELFSUP}/deepcluster/deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k-bb8681e2.pth", "46.92",
        "bb8681e2"),
    "odc_440ep": Released(f"{MMSELFSUP}/odc/odc_resnet50_8xb64-steplr-440e_in1k_20220225-a755d9c0.pth",
                          "53.42; 20-NN 39.1; VOC 2007 SVM 78.42", "a755d9c0"),
    "swav_200ep_bs256_mmselfsup": Released(
        f"{MMSELFSUP}/1.x/swav/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96/"
        "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96_20220825-5b3fc7fc.pth", "70.47", "5b3fc7fc"),
    "swav_200ep_bs256_mmselfsup_linear": Released(
        f"{MMSELFSUP}/1.x/swav/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96/"
        "resnet50_linear-8xb32-coslr-100e_in1k/resnet50_linear-8xb32-coslr-100e_in1k_20220825-80341e08.pth",
        "70.47 as --head of swav_200ep_bs256_mmselfsup: a classifier", "80341e08"),
    "swav_100ep_bs256_lightly": Released(
        f"{LIGHTLY}/imagenet_resnet50_swav_2023-05-25_08-29-14/pretrain/version_0/checkpoints/"
        "epoch%3D99-step%3D500400.ckpt", "67.2; 20-NN 49.5; holds more than tensors: see --trust-pickle"),
    "sela_resnet18_1k": Released(f"{SELA}/new_models/resnet18-1k_pp.pth", "53.3"),
    "sela_resnet50_1k": Released(f"{SELA}/new_models/resnet50-1k_pp.pth", "63.5"),
    "sela_resnet50_10x3k": Released(f"{SELA}/new_models/resnet50-10x3k_pp.pth", "68.8"),
    "sela_resnet50_10x3k_first": _first_sela("resnet-10x3k", "61.5, pre-activation ResNet-50"),
    "sela_alexnet_1k": _first_sela("alexnet-1k", "42.1, best layer"),
    "sela_alexnet_10x3k": _first_sela("alexnet-10x3k", "43.8, best layer"),
    "sela_alexnet_10x3k_wrot": _first_sela("alexnet-10x3k-wRot", "47.1, best layer, trained with rotations"),
}


def table():
    """Returns the files as text: name, published figure, project and licence, address."""
    lines = []
    for name, file in RELEASED.items():
        project, licence, _ = file.project
        inside = f", in it {file.member}" if file.member else ""
        lines += [f"released:{name}", f"    {file.published} ({project}, {licence})",
                  f"    {file.url}{inside}"]
    lines += ["SeLa's labels of ImageNet's training images, 10 x 3,000", f"    {SELA}/alexnet-labels.csv",
              f"    {SELA}/resnet-labels.csv"]
    return "\n".join(lines)


def local(path):
    """Returns the file or folder: a path as it is, or the copy of released:NAME in torch.hub's cache, which
    is downloaded the first time.

    Raises CheckpointError if there is no such name, or if the download fails or is incomplete.
    """
    if not str(path).startswith("released:"):
        return Path(path)
    name = str(path).removeprefix("released:")
    if name not in RELEASED:
        raise CheckpointError(f"released:{name} is not known: see python -m common.weights --list")
    file = RELEASED[name]
    folder = Path(torch.hub.get_dir(), "checkpoints", "deepclustering")
    suffix = Path(unquote(file.url)).suffix if not file.member else ".pth"
    kept = folder / f"{name}{suffix}"  # not the address's: many files are a checkpoint.pth.tar
    if not kept.exists():
        project, licence, _ = file.project
        say(f"released:{name} is {project}'s, licence {licence}: {file.url}")
        with border(CheckpointError, f"released:{name} cannot be had from {file.url} (or put it at {kept})"):
            folder.mkdir(parents=True, exist_ok=True)
            _download(file, kept)
    return kept


def check(name, path, method):
    """Raises CheckpointError if name is released:NAME but method, as recognised, is another project's."""
    if str(name).startswith("released:"):
        expected = RELEASED[str(name).removeprefix("released:")].project[2]
        if method not in expected:
            found = f"{path} is a file of {method}, where {name} is one of {expected[0]}"
            raise CheckpointError(f"{found}: delete it, or name the file itself")


def _download(file, kept):
    """Downloads a released file, or the member of a zip. It gets the name kept only once it is complete."""
    before, partial = socket.getdefaulttimeout(), kept.with_name(f"{kept.name}.{os.getpid()}")
    length = None
    socket.setdefaulttimeout(60)  # seconds without data
    try:
        with contextlib.suppress(OSError):  # some servers do not answer HEAD
            with urlopen(Request(file.url, method="HEAD", headers={"User-Agent": "torch.hub"})) as answer:
                length = answer.headers["Content-Length"]
        torch.hub.download_url_to_file(file.url, str(partial), file.sha256)
        if length and partial.stat().st_size != int(length):  # torch.hub does not check
            raise OSError(f"{partial.stat().st_size} of {length} bytes came")
        if file.member:
            with zipfile.ZipFile(partial) as archive, archive.open(file.member) as inside:
                with open(f"{partial}.member", "wb") as out:
                    shutil.copyfileobj(inside, out)
            Path(f"{partial}.member").replace(partial)
        partial.replace(kept)
    finally:
        socket.setdefaulttimeout(before)
        for left in (partial, Path(f"{partial}.member")):
            left.unlink(missing_ok=True)
