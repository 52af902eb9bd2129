"""Data sets as NetCDF files: whole in memory, as HDF5 survives no full disk and no damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import xarray as xr

from loopscope._util.reading import foreign, open_file
from loopscope._util.signals import uninterrupted

_ENGINE: Literal["netcdf4"] = "netcdf4"
_MOST_ARRAYS = 1100
"""Bytes of the arrays to one of their file: what compresses best does so a thousandfold."""


def netcdf(dataset: xr.Dataset) -> memoryview:
    """The dataset as the bytes of one NetCDF file; made in memory, since HDF5 does not survive a full disk."""
    encoding = {
        str(name): {"zlib": True, "complevel": 1, "shuffle": True}
        for name, variable in dataset.data_vars.items()
        if variable.dtype.kind in "fu" and variable.size > 1000
    }
    with uninterrupted():
        return memoryview(dataset.to_netcdf(None, engine=_ENGINE, encoding=encoding))


def read_arrays(path: Path) -> xr.Dataset:
    """What `netcdf` made, read whole: a file that stays open would break when it is written again."""
    with open_file(path), foreign(), uninterrupted(), xr.open_dataset(path, engine=_ENGINE) as opened:
        if opened.nbytes > _MOST_ARRAYS * path.stat().st_size + 2**20:
            raise ValueError(f"{path.name} says that it holds {opened.nbytes:,} bytes")
        return opened.load()
