"""Checkpoints: a folder with config.json and safetensors in, a model out; no code from the folder is ever run."""

from loopscope.checkpoints.family import FAMILIES, Family, Part
from loopscope.checkpoints.find import FoundCheckpoint, demo_names, find_checkpoint
from loopscope.checkpoints.load import Checkpoint, load_checkpoint
from loopscope.checkpoints.native import save_checkpoint
from loopscope.checkpoints.store import TensorStore, read_json

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "FoundCheckpoint",
    "Part",
    "TensorStore",
    "demo_names",
    "find_checkpoint",
    "load_checkpoint",
    "read_json",
    "save_checkpoint",
]
