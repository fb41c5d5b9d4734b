"""Reads images in tar files in place: an index says where each lies."""

import functools
import hashlib
import io
import json
import os
import platform
import re
import tarfile
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from ..engine.errors import DataError, border, reason, say
from ..engine.files import writing
from .files import EXTENSIONS, FOREIGN, Files
from .lists import number_labels

SECONDS = 10  # between progress lines while an index is made
LARGEST_RANGE = 1_000_000
LARGEST_LABEL = 2**20  # bytes of a .json or .cls member


class Tars(Files):
    """A set of images in tar files. Names, labels and places are packed into arrays, as in Files."""

    def source(self, i):
        shard, offset, size = (int(self._arrays[name][i]) for name in ("shard", "offset", "size"))
        return functools.partial(_member, self.shards[shard][0], offset, size)


def _member(path, offset, size):
    file = _opened(path)  # a reference: another thread may evict, and so close, it
    try:
        return io.BytesIO(os.pread(file.fileno(), size, offset))
    except OSError:
        _opened.cache_clear()  # on a network file system, opening it again may help
        raise


@functools.lru_cache(256)
def _opened(path):
    return open(path, "rb", buffering=0)


def shards_of(spec):
    """Returns the tars that "a.tar" or "shards-{000000..000146}.tar" names, or that lie in a folder. Returns
    none for a folder that holds images or folders, too."""
    if Path(spec).is_dir():
        entries = [entry for entry in os.scandir(spec)
                   if not entry.name.startswith(".") and entry.name not in FOREIGN]
        mixed = any(entry.is_dir() or entry.name.lower().endswith(tuple(EXTENSIONS)) for entry in entries)
        tars = [entry.path for entry in entries if entry.name.endswith(".tar")]
        return [] if mixed else sorted(tars, key=os.fsencode)
    shards = [str(spec)]
    while found := re.search(r"\{(\d+)\.\.(\d+)\}", shards[0]):
        first, last = found.groups()
        if int(last) - int(first) not in range(LARGEST_RANGE):
            raise DataError(f"{spec}: {found[0]} is no range of shards")
        numbers = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        shards = [shard.replace(found[0], number, 1) for shard in shards for number in numbers]
    return shards


def open_tars(shards, index=""):
    """Opens the images in tar files as a set, in the order in which they lie there.

    In WebDataset's format, a .cls member, or a "label" in a .json member, labels the images of the same stem.
    Otherwise an image's class is the first folder of its name that is not shared by all images. If tars lie
    inside a tar, it is the name of the inner tar. There are no labels if some image has no such folder.
    index: folder that keeps the index, in a file named by the shards' paths, sizes and times.
    Raises DataError if a file is not a complete, uncompressed tar, or if there are no images.
    """
    state = []
    for shard in shards:
        with border(DataError, f"{shard} cannot be read"):
            found = os.stat(shard)
        state.append([os.path.abspath(shard), found.st_size, found.st_mtime_ns])
    if not index:
        return _Scan(state).images()
    path = Path(index, f"index-{zlib.crc32(json.dumps(state).encode()):08x}")
    if path.exists():
        with border(DataError, f"{path} is not an index of images, or damaged: delete it"):
            images = Tars.mapped(path)
            if images.shards == state:
                return images
    images = _Scan(state).images()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other nodes may write the same file, so each uses a name of its own until its file is complete.
        partial = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")
        with writing(partial) as file:
            images.save(file)
        os.replace(partial, path)
        return Tars.mapped(path)
    except OSError as error:
        say(f"warning: {path} cannot be written, so the next start makes the index again: {reason(error)}")
        return images


class _Scan:
    """Reads the headers of tars, one after another. A sample is a run of members with the same folder and
    stem."""

    def __init__(self, shards):
        self.shards, self.names, self.left = shards, bytearray(), Counter()
        self.rows = {"ends": array("q"), "shard": array("i"), "offset": array("q"), "size": array("q")}
        self.folder, self.folders = array("i"), {}  # folder number of each image; {folder: number}
        self.kind, self.kinds = array("i"), {}  # label number of each image; {label: number}
        self.nested, self.said = False, time.monotonic()
        for number, (path, size, _) in enumerate(shards):
            self.sample, self.found, self.labels = None, [], []
            with border(DataError, f"{path} cannot be read"), open(path, "rb") as file:
                self.walk(file, number, path, 0, size)

    def walk(self, file, number, where, start, end, inner=()):
        """Reads the tar between bytes start and end of a file. inner: its name, if it lies in another tar."""
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members = []  # else it would keep a million
                    if member.size < 0:
                        raise DataError(f"{where} is damaged: {member.name!r:.200} has {member.size} bytes")
                    if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                        raise DataError(f"{where} is cut off: {member.name!r:.200} goes on behind its end")
                    self.member(file, number, where, member, inner)
                self.end_sample(file, number, where)
                file.seek(tar.offset)
                if tar.offset + 512 > end or file.read(512).strip(b"\0"):
                    raise DataError(f"{where} is cut off or damaged at byte {tar.offset}")
        except tarfile.TarError as error:
            raise DataError(f"{where} is no tar, or a compressed or damaged one; only an uncompressed tar "
                            f"can be read in place: {reason(error)}") from None

    def member(self, file, number, where, member, inner):
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if member.name.startswith("/") or ".." in parts:
            self.left["of names that lead elsewhere"] += 1
            return
        if member.isdir() or not parts or any(part.startswith(".") or part in FOREIGN for part in parts):
            return
        if not member.isreg() or member.issparse():
            self.left["links, devices and files with holes"] += 1
            return
        ending = os.path.splitext(parts[-1])[1].lower()
        if ending == ".tar" and not inner:
            self.nested = True
            start = member.offset_data
            return self.walk(file, number, f"{where}: {member.name!r:.200}", start, start + member.size,
                             (parts[-1][:-4],))
        folder, (stem, _, endings) = (*inner, *parts[:-1]), parts[-1].partition(".")
        if (folder, stem) != self.sample:
            self.end_sample(file, number, where)
            self.sample = folder, stem
        if endings in ("cls", "json"):
            self.labels.append(member)
        elif ending not in EXTENSIONS:
            self.left[ending if ending[1:].isalnum() and ending.isascii() else "of other names"] += 1
        elif not member.size:
            self.left["empty"] += 1
        else:
            self.found.append(("." not in endings, "/".join((*inner, *parts)), member))
        if time.monotonic() > self.said + SECONDS:
            self.said = time.monotonic()
            say(f"index of {where}: {len(self.kind):,} images so far")

    def end_sample(self, file, number, where):
        """Stores the images of a sample, once all its members have been read."""
        labels = [self.read_label(file, where, member) for member in self.labels if self.found]
        label = next((label for label in labels if label is not None), None)
        kind = -1 if label is None else self.kinds.setdefault(label, len(self.kinds))
        # In a labelled sample with STEM.jpg, STEM.mask.png is not an image of the set.
        apart = label is not None and any(whole for whole, *_ in self.found)
        for whole, name, member in self.found:
            if whole or not apart:
                self.names += os.fsencode(name)
                self.folder.append(self.folders.setdefault(self.sample[0], len(self.folders)))
                self.kind.append(kind)
                for row, value in zip(self.rows.values(),
                                      (len(self.names), number, member.offset_data, member.size)):
                    row.append(value)
        self.found, self.labels = [], []

    def read_label(self, file, where, member):
        """Returns the label in a .cls or .json member, or None: a .json may hold other things."""
        with border(DataError, f"{where}: the label in {member.name!r:.200} cannot be read"):
            if member.size > LARGEST_LABEL:
                raise ValueError(f"it has {member.size} bytes")
            text = os.pread(file.fileno(), member.size, member.offset_data).decode()
            if member.name.endswith(".json"):
                content = json.loads(text)
                text = content.get("label") if isinstance(content, dict) else None
                if text is not None and (not isinstance(text, (int, str)) or isinstance(text, bool)):
                    raise ValueError(f'"label" is {text!r:.60}, neither a whole number nor text')
        return None if text is None else str(text).strip()

    def images(self):
        """Returns the images found as a set."""
        first, many = self.shards[0][0], len(self.shards) - 1
        what = first + f" and {many} more" * (many > 0)
        left = ", ".join(f"{count} {kind}" for kind, count in self.left.most_common(5))
        if not self.kind:
            others = f": {left}" * bool(left)
            raise DataError(f"{what} holds no images ({' '.join(sorted(EXTENSIONS))}){others}")
        if left:
            say(f"warning: {what}: {self.left.total()} members are left out: {left}")
        arrays = {name: np.frombuffer(row, row.typecode) for name, row in self.rows.items()}
        arrays["names"] = np.frombuffer(self.names, np.uint8)
        classes, numbered, folders = [], False, list(self.folders)  # each a tuple of names
        shared = 0 if self.nested else len(os.path.commonprefix(folders))  # noqa: RUF071
        if self.kinds:
            row, kinds = np.frombuffer(self.kind, np.int32), list(self.kinds)
            if (bare := int((row < 0).sum())):
                raise DataError(f"{what}: {bare} images have no label, but others have one")
            table, classes, numbered = number_labels(kinds, lambda label: what)
        elif all(len(folder) > shared for folder in folders):
            row, kinds = np.frombuffer(self.folder, np.int32), [folder[shared] for folder in folders]
            classes = sorted(set(kinds), key=os.fsencode)
            table = {name: i for i, name in enumerate(classes)}
        if classes:
            arrays["labels"] = np.array([table[kind] for kind in kinds], np.int64)[row]
        digest = hashlib.sha256(arrays["names"])
        digest.update(arrays["size"])
        return Tars.of(arrays, dict(shards=self.shards, classes=classes, numbered=numbered,
                                    fingerprint=f"{len(self.kind)} members {digest.hexdigest()[:16]}"))
