"""Writes one self-contained page of clusters: rows of typical and random thumbnails. Needs no network."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..engine.files import writing

SIDES = {3_000: 96, 24_000: 48}  # most thumbnails on the page: their side in pixels
LIMIT = 26_000_000  # most bytes of thumbnails (as base64) and their names on a page


def write(path, images, clusters, scores, k, about, samples=12, seed=0):
    """Writes the page. Returns (its size in bytes, most thumbnails of each kind per cluster).

    images: a set of common/data.py; clusters (N,): the cluster of each image, below 0 for none; scores (N,):
    higher is more typical of its cluster, NaN if unknown; k: number of clusters, empty ones included. about:
    {"title": str, "notes": [str], "figures": [[name, value, chance level]]}, shown unchanged. samples:
    thumbnails of each kind per cluster, fewer if the page would be too large for a browser. Of more than
    12,000 clusters only the largest are shown.
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
    # Escapes "<", as a file name could end the script with it. JSON allows the escape; all else is ASCII.
    text = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    with writing(path, text=True) as file:
        file.write(template.replace("__DATA__", text))
    return Path(path).stat().st_size, samples


def choose(rows, scores, samples, rng):
    """Picks the images of a cluster with the highest scores, best first, and random ones of the others."""
    known = rows[~np.isnan(scores[rows])]
    typical = known[np.argsort(-scores[known], kind="stable")[:samples]]
    others = np.setdiff1d(rows, typical)
    return typical.tolist(), rng.permutation(others)[:samples].tolist()


def thumbnail(images, i, side):
    """The central square of an image as a JPEG file, or b"" if it cannot be read."""
    try:
        image = ImageOps.fit(images.read(i), (side, side), Image.Resampling.LANCZOS)
    except Exception:  # Pillow raises many kinds of errors for damaged files
        return b""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def header(jpeg):
    """Returns the length of the header that all thumbnails share, and that header with a comment that pads it
    to a multiple of 3 bytes. So base64 of header and rest, joined, is base64 of the file."""
    length = max(0, jpeg.find(b"\xff\xda"))
    fill = (-length - 4) % 3
    comment = b"\xff\xfe" + (2 + fill).to_bytes(2, "big") + bytes(fill)
    return length, jpeg[:2] + comment + jpeg[2:length]


def most_frequent(labels, most=8):
    """Returns [class, images] of the labels in a cluster, the most frequent first, without labels of -1."""
    values, times = np.unique(labels[labels >= 0], return_counts=True)
    order = np.argsort(-times, kind="stable")[:most]
    return np.stack([values, times], axis=1)[order].tolist()
