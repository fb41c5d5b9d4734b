"""Reads checkpoints of any known project, exports ours. `python -m common.weights FILE` describes a file.

Training scripts import it only when needed: for --init-from, or SeLa's pre-activation ResNet.
"""

from ..engine.checkpoint import export_backbone
from .export import export_detectron2, export_model
from .load import build_backbone, checksum, load_backbone, load_model, load_trunk
from .released import local

__all__ = ["build_backbone", "checksum", "export_backbone", "export_detectron2", "export_model",
           "load_backbone", "load_model", "load_trunk", "local"]
