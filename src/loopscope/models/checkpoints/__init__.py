"""Checkpoints: a folder with config.json and safetensors in, a model out; no code from the folder is ever run."""

from loopscope.models.checkpoints.families import FAMILIES
from loopscope.models.checkpoints.family import Family, Part
from loopscope.models.checkpoints.fields import Fields

__all__ = ["FAMILIES", "Family", "Fields", "Part"]
