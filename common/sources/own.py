"""Runs the user's own code: images of `--data package.module:function`, a trunk of `--arch` likewise.

Imports only what was typed on the command line, never what a file names.
"""

import contextlib
import hashlib
import importlib
import inspect
import os
import sys
import traceback

import numpy as np
import torch
from PIL import Image

from ..engine.errors import ArgumentError, DataError, UserError
from .files import _Paths, _to_rgb, deep_pixels

LABELS = 1_000_000  # most classes there can be, as in a list


def call(spec, kind, **arguments):
    """Calls the function of `spec` with those arguments that it takes, and returns its result. Raises an
    error of class `kind`. An exception in the user's code adds its traceback below the first line."""
    module, _, name = spec.partition(":")
    with _users(spec, kind):
        if os.getcwd() not in sys.path:
            sys.path.insert(1, os.getcwd())  # behind the folder of the script
        function = getattr(importlib.import_module(module), name, None)
        if callable(function):
            taken = inspect.signature(function).parameters if arguments else ()
            return function(**{key: value for key, value in arguments.items() if key in taken})
    raise kind(f"{spec}: {module} has no function {name}")


@contextlib.contextmanager
def _users(spec, kind):
    """Wraps the user's code. An exception in it becomes an error of class `kind`, with its traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        module = spec.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            found = "is installed or in the working directory, and no file has this name"
            raise kind(f"{spec}: no module {error.name} {found}") from None
        raise kind(f"{spec}: {_words(error)}") from None


def _words(error):
    """Returns an error in one line, and below it the traceback of the user's code."""
    told = traceback.TracebackException.from_exception(error)
    ours = (__file__, importlib.__file__)
    told.stack = traceback.StackSummary.from_list(
        [frame for frame in told.stack if not frame.filename.startswith(("<frozen", *ours))])
    first = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    return f"{first}\n{''.join(told.format())}".rstrip()


class Own:
    """The images of a user's function. What it returns has len(), and read(i) -> PIL image, or [i] -> PIL
    image or a tuple that begins with one; optionally labels or targets, classes, paths.

    What it returns is never sent to another process. Each process, a forked one too, calls the function
    itself, so that it has open files of its own.
    """

    range, exif = (), False  # see open_images

    def __init__(self, spec):
        self.spec = where = str(spec)
        self._made, self._said = {}, None  # {process: function's result}; process that showed an error
        with _users(where, DataError):
            self._describe(call(where, DataError), where)

    def _describe(self, images, where):
        if not hasattr(images, "__len__") or not (hasattr(images, "read") or hasattr(images, "__getitem__")):
            needed = "len() and read(i), or a map-style Dataset, are needed"
            raise DataError(f"{where} returns {type(images).__name__}: {needed}")
        self._made[os.getpid()], self.n = images, len(images)
        if not self.n:
            raise DataError(f"{where} holds no images")
        labels = getattr(images, "labels", getattr(images, "targets", None))
        names, paths = getattr(images, "classes", None), getattr(images, "paths", None)
        self.labels, self.classes, self.numbered = None, [], names is None
        if labels is not None:
            self.labels = torch.from_numpy(_checked(labels, self.n, where))
            most = int(self.labels.max())
            self.classes = list(map(str, range(most + 1) if names is None else names))
            if most >= len(self.classes):
                raise DataError(f"{where} has label {most}, but {len(self.classes)} classes")
            self.labels = self.labels if most >= 0 else None
        self.fingerprint, self.paths = f"{where} {self.n}", _Paths(self)
        if paths is not None:
            if len(paths) != self.n:
                raise DataError(f"{where} has {len(paths)} paths for {self.n} images")
            digest = hashlib.sha256()
            for path in self.paths:
                digest.update(path.encode(errors="surrogateescape") + b"\0")
            self.fingerprint += f" {digest.hexdigest()[:16]}"

    def __len__(self):
        return self.n

    def __getstate__(self):
        return {**self.__dict__, "_made": {}}

    @property
    def images(self):
        """What the function returned in this process. A parent's is kept: deleting it could close files."""
        if os.getpid() not in self._made:
            images = call(self.spec, DataError)
            if len(images) != self.n:
                raise DataError(f"{self.spec} has {len(images)} images now, at first {self.n}")
            self._made[os.getpid()] = images
        return self._made[os.getpid()]

    def path(self, i):
        paths = getattr(self.images, "paths", None)
        return f"{self.spec}/{i:06d}" if paths is None else str(paths[i])

    def read(self, i):
        """Returns image i as RGB."""
        return _to_rgb(self._image(i), self.range, self.exif)

    def sample(self, i):
        """Returns some pixels of image i if it is grey with more than 8 bits, else None."""
        return deep_pixels(self._image(i))

    def _image(self, i):
        """Returns image i as the user's code gives it. Prints the first error of each process on stderr."""
        try:
            images = self.images
            image = images.read(i) if hasattr(images, "read") else images[i]
            image = image[0] if isinstance(image, (tuple, list)) else image
            if not isinstance(image, Image.Image):
                needed = "a PIL image is needed"
                raise DataError(f"{self.spec}: image {i} is {type(image).__name__}, {needed}")
            return image
        except Exception as error:
            if self._said != os.getpid():
                self._said = os.getpid()
                words = f"{self.spec}: image {i}: {_words(error)}"
                words = str(error) if isinstance(error, UserError) else words
                with contextlib.suppress(OSError):
                    print(f"warning: {words}", file=sys.stderr, flush=True)
            raise


def _checked(labels, n, where):
    """Returns labels as (N,) int64. Raises DataError."""
    try:
        found = np.asarray(labels)
    except ValueError:  # lists of several lengths
        found = np.empty(0)
    if found.shape != (n,) or found.dtype.kind not in "iu" or not -1 <= found.min() <= found.max() < LABELS:
        has = f"labels of type {found.dtype} and shape {found.shape}"
        needed = f"{n} whole numbers from 0 to {LABELS - 1}, or -1 for none, are needed"
        raise DataError(f"{where} has {has}: {needed}")
    return found.astype(np.int64)


def trunk(spec, width, stem):
    """Returns the trunk that a user's function makes: an nn.Module, (B, 3, s, s) -> (B, feature_dim). The
    function gets width and stem if it takes them. Raises ArgumentError."""
    made = call(spec, ArgumentError, width=width, stem=stem)
    if not isinstance(made, torch.nn.Module) or not isinstance(getattr(made, "feature_dim", None), int):
        needed = "an nn.Module with feature_dim, a whole number, is needed"
        raise ArgumentError(f"{spec} returns {type(made).__name__}: {needed}")
    return made


@torch.no_grad()
def check(made, spec, sizes, device):
    """Raises ArgumentError unless a trunk on the device maps images of these sizes to (B, feature_dim).
    Leaves the trunk in eval mode."""
    made.eval()
    wanted = 2, made.feature_dim
    for size in sizes:
        try:
            features = made(torch.zeros(2, 3, size, size, device=device))
        except Exception as error:
            raise ArgumentError(f"{spec} with images of {size} pixels: {_words(error)}") from None
        if getattr(features, "shape", None) != wanted:
            got = f"{tuple(getattr(features, 'shape', ())) or type(features).__name__}"
            raise ArgumentError(f"{spec} gives {got} for two images of {size} pixels, not {wanted}")
