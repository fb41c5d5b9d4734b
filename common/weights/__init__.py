"""Other projects' checkpoints in, ours out; `python -m common.weights FILE` says what a file is.

No training run imports it at its start.
"""

from ..engine.checkpoint import export_backbone
from .export import export_detectron2, export_model
from .load import build_backbone, checksum, load_backbone, load_model, load_trunk
from .released import local

__all__ = ["build_backbone", "checksum", "export_backbone", "export_detectron2", "export_model",
           "load_backbone", "load_model", "load_trunk", "local"]
