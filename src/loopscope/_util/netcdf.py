"""Data sets as NetCDF files: whole in memory, as HDF5 survives no full disk and no damaged file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import netCDF4
import xarray as xr

from loopscope._util.reading import foreign, open_file
from loopscope._util.signals import uninterrupted

_ENGINE: Literal["netcdf4"] = "netcdf4"
_CACHE = 2**20
"""Bytes, of each variable."""
_MOST_ARRAYS = 1100
"""Bytes of the arrays to one of their file: what compresses best does so a thousandfold."""


def netcdf(dataset: xr.Dataset) -> memoryview:
    """The dataset as the bytes of one NetCDF file; made in memory, since HDF5 does not survive a full disk."""
    encoding = {
        str(name): {"zlib": True, "complevel": 1, "shuffle": True}
        for name, variable in dataset.variables.items()
        if name not in dataset.coords and variable.dtype.kind in "fu" and variable.size > 1000
    }
    with _small_caches(), uninterrupted():
        return memoryview(dataset.to_netcdf(None, engine=_ENGINE, encoding=encoding))


def read_arrays(path: Path) -> xr.Dataset:
    """What `netcdf` made, read whole: a file that stays open would break when it is written again."""
    with open_file(path), foreign(), _small_caches(), uninterrupted(), xr.open_dataset(path, engine=_ENGINE) as opened:
        if opened.nbytes > _MOST_ARRAYS * path.stat().st_size + 2**20:
            raise ValueError(f"{path.name} says that it holds {opened.nbytes:,} bytes")
        return opened.load()


@contextmanager
def _small_caches() -> Iterator[None]:
    """Without the 64 MB that the library keeps of each variable until its file is closed: every chunk is read once."""
    before = netCDF4.get_chunk_cache()
    netCDF4.set_chunk_cache(_CACHE)
    try:
        yield
    finally:
        netCDF4.set_chunk_cache(*before)
