"""Other projects' checkpoints in, ours out; `python -m common.weights FILE` says what a file is. No training
run imports it."""

from ..engine.checkpoint import export_backbone as export_backbone
from .export import export_detectron2 as export_detectron2
from .export import export_model as export_model
from .load import build_backbone as build_backbone
from .load import load_backbone as load_backbone
from .load import load_model as load_model
from .load import load_trunk as load_trunk
