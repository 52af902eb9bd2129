"""Checkpoints: a folder with config.json and safetensors in, a model out; no code from the folder is ever run."""

from loopscope.checkpoints.families import FAMILIES
from loopscope.checkpoints.family import Family
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.find import FoundCheckpoint, demo_names, find_checkpoint
from loopscope.checkpoints.headers import Headers, TensorHeader
from loopscope.checkpoints.layout import Layout, find_layout, read_layout
from loopscope.checkpoints.load import Checkpoint, load_checkpoint
from loopscope.checkpoints.memory import available_memory
from loopscope.checkpoints.native import save_checkpoint
from loopscope.checkpoints.parts import Part
from loopscope.checkpoints.peek import Peek, peek_checkpoint
from loopscope.checkpoints.store import TensorStore, read_json

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "Fields",
    "FoundCheckpoint",
    "Headers",
    "Layout",
    "Part",
    "Peek",
    "TensorHeader",
    "TensorStore",
    "available_memory",
    "demo_names",
    "find_checkpoint",
    "find_layout",
    "load_checkpoint",
    "peek_checkpoint",
    "read_json",
    "read_layout",
    "save_checkpoint",
]
