"""One page of clusters, in itself: rows of thumbnails, typical and random ones. No network, no framework."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..engine.files import writing

SIDES = {3_000: 96, 24_000: 48}  # up to so many thumbnails, a side of so many pixels; more are not read
LIMIT = 26_000_000  # bytes of thumbnails, as base64, and their names in a page


def write(path, images, clusters, scores, k, about, samples=12, seed=0):
    """Writes the page; returns (its size in bytes, thumbnails of each kind a cluster has at most).

    images: a set of common/data.py; clusters (N,): the cluster of each image, below 0 for none; scores (N,):
    higher is more typical of its cluster, NaN where not known; k: number of clusters, also the empty ones.
    about: {"title": str, "notes": [str], "figures": [[name, value, chance level]]}, shown as they are.
    samples: thumbnails of each kind a cluster, fewer if the page would become too large for a browser; of
    more than 12,000 clusters it shows the largest.
    """
    rng = np.random.default_rng(seed)
    labels = np.full(len(clusters), -1) if images.labels is None else np.asarray(images.labels)
    order = np.argsort(clusters, kind="stable")
    numbers, starts = np.unique(clusters[order], return_index=True)
    members = [(c, rows) for c, rows in zip(numbers.tolist(), np.split(order, starts[1:])) if c >= 0]
    used = len(members)
    members = sorted(sorted(members, key=lambda m: -len(m[1]))[: max(SIDES) // 2], key=lambda m: m[0])
    samples = max(1, min(samples, max(SIDES) // (2 * max(1, len(members)))))
    fitting = [side for most, side in SIDES.items() if 2 * samples * len(members) <= most]
    side = fitting[0] if fitting else min(SIDES.values())
    picked = [choose(rows, scores, samples, rng) for _, rows in members]  # (typical, random) of each cluster
    wanted = dict.fromkeys(i for kinds in picked for kind in kinds for i in kind)
    with ThreadPoolExecutor() as pool:
        jpegs = pool.map(lambda i: thumbnail(images, i, side), wanted)
        thumbnails = {i: jpeg for i, jpeg in zip(wanted, jpegs) if jpeg}
    length, head = header(next(iter(thumbnails.values()), b""))

    def named(i):
        name = images.paths[i]
        return name if len(name) <= 150 else "…" + name[-149:]

    def size(samples):
        shown = (i for kinds in picked for kind in kinds for i in kind[:samples] if i in thumbnails)
        return sum((len(thumbnails[i]) - length) * 4 / 3 + len(json.dumps(named(i))) for i in shown)

    def entries(kind):
        return [[base64.b64encode(thumbnails[i][length:]).decode(), named(i), int(labels[i]),
                 None if np.isnan(scores[i]) else round(float(scores[i]), 4)]
                for i in kind[:samples] if i in thumbnails]

    while samples > 1 and size(samples) > LIMIT:
        samples -= 1
    if used > len(members):
        about = {**about, "notes": [*about["notes"], f"the largest {len(members):,} of {used:,} clusters"]}
    page = {**about, "classes": [] if images.labels is None else list(images.classes), "k": k,
            "images": int((clusters >= 0).sum()), "side": side, "head": base64.b64encode(head).decode(),
            "clusters": [{"id": c, "size": len(rows), "labelled": int((labels[rows] >= 0).sum()),
                          "labels": most_frequent(labels[rows]), "typical": entries(typical),
                          "random": entries(random)}
                         for (c, rows), (typical, random) in zip(members, picked)]}
    # "<" would let a file name end the script, and is legal in JSON as an escape; all else is ASCII.
    text = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    with writing(path, text=True) as file:
        file.write(template.replace("__DATA__", text))
    return Path(path).stat().st_size, samples


def choose(rows, scores, samples, rng):
    """Of the images of a cluster those with the highest scores, best first, and random ones of the others."""
    known = rows[~np.isnan(scores[rows])]
    typical = known[np.argsort(-scores[known], kind="stable")[:samples]]
    others = np.setdiff1d(rows, typical)
    return typical.tolist(), rng.permutation(others)[:samples].tolist()


def thumbnail(images, i, side):
    """The central square of an image as a JPEG file, or b"" if it cannot be read."""
    try:
        image = ImageOps.fit(images.read(i), (side, side), Image.Resampling.LANCZOS)
    except Exception:  # Pillow's plug-ins raise a dozen kinds for damaged files
        return b""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def header(jpeg):
    """What thumbnails of one size and quality share: its length in bytes, and it with a comment that makes
    the length a multiple of 3, so that base64 of it and of the rest, side by side, is that of the file."""
    length = max(0, jpeg.find(b"\xff\xda"))
    fill = (-length - 4) % 3
    comment = b"\xff\xfe" + (2 + fill).to_bytes(2, "big") + bytes(fill)
    return length, jpeg[:2] + comment + jpeg[2:length]


def most_frequent(labels, most=8):
    """[class, images] of the labels in a cluster, the most frequent first, without those that are -1."""
    values, times = np.unique(labels[labels >= 0], return_counts=True)
    order = np.argsort(-times, kind="stable")[:most]
    return np.stack([values, times], axis=1)[order].tolist()
