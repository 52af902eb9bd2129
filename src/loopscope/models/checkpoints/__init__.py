"""Checkpoints: a folder with config.json and safetensors in, a model out; no code from the folder is ever run."""

from loopscope.models.checkpoints.config_reader import ConfigReader
from loopscope.models.checkpoints.families import FAMILIES
from loopscope.models.checkpoints.family import Family, TensorSlice

__all__ = ["FAMILIES", "ConfigReader", "Family", "TensorSlice"]
