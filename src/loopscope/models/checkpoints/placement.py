"""Where the layers of a model lie: on one device or several, in memory, or on disk."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from loopscope._util.sites import STAGES
from loopscope.errors import CheckpointError, ConfigError
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.family import parameter_shapes, parse_name
from loopscope.models.checkpoints.free_memory import available_memory, size_text
from loopscope.models.subject import find_device

DeviceMap = str | Mapping[str, str | torch.device]
"""`auto`, or places by names of layers, as a mapping or as text: `prelude=cuda:0,recurrent.0-3=cuda:1,coda=disk`."""

DISK = "disk"
_MEMORY = "cpu"
_REST = "embedding, head and norms"

_SHARE = 0.75
"""Of what is free on a device, that `auto` fills with weights: the states of a batch want room too."""

_ENTRY = re.compile(r"(prelude|recurrent|coda)(?:\.([0-9]{1,4})(?:-([0-9]{1,4}))?)?")


@dataclass(frozen=True)
class Placement:
    """Which layers lie where. What belongs to no layer, and the states between layers, are at home."""

    home: torch.device
    layers: Mapping[str, str]
    """By name, such as `recurrent.3`: a device, `cpu` for what is kept in memory, or `disk`."""
    sizes: Mapping[str, int]
    """Bytes of each layer, and under the empty name of what belongs to none."""

    def runs_on(self, layer: str) -> torch.device:
        """What lies on disk, or in memory while home is elsewhere, is brought home when it runs."""
        return self.home if self.is_brought(layer) else torch.device(self.layers[layer])

    def is_brought(self, layer: str) -> bool:
        """It is no part of a device all the time."""
        place = self.layers[layer]
        return place == DISK or (place == _MEMORY and self.home.type != "cpu")

    @property
    def is_spread(self) -> bool:
        """Not all of it lies at home."""
        return any(place != str(self.home) for place in self.layers.values())

    @property
    def elsewhere(self) -> set[torch.device]:
        """Devices other than home on which layers run."""
        return {self.runs_on(layer) for layer in self.layers} - {self.home}

    @property
    def largest_brought(self) -> int:
        """Bytes that home needs for one layer at a time."""
        return max((self.sizes[layer] for layer in self.layers if self.is_brought(layer)), default=0)

    def read(self, *stages: str) -> int:
        """Bytes of the layers of these stages that are read from the disk whenever they run."""
        return sum(
            self.sizes[layer]
            for layer, place in self.layers.items()
            if place == DISK and layer.partition(".")[0] in stages
        )

    def __str__(self) -> str:
        """`cuda:0: embedding, head and norms, prelude.0-1 (1.2 GB); disk: recurrent.0-3 (2.4 GB)`."""
        places = {str(self.home): [""]}
        for layer, place in self.layers.items():
            places.setdefault(place, []).append(layer)
        return "; ".join(
            f"{place}: {', '.join(_shortened(names))} ({size_text(sum(self.sizes[name] for name in names))})"
            for place, names in places.items()
        )


def parse_device_map(given: DeviceMap) -> str | dict[str, str]:
    """`auto`, or places by name, in the order given. Raises `ConfigError` for what is neither."""
    if isinstance(given, Mapping):
        return {str(name): str(place) for name, place in given.items()}
    if given == "auto":
        return given
    pairs = [entry.strip().partition("=") for entry in str(given).split(",")]
    if not all(name and equals and place for name, equals, place in pairs):
        raise ConfigError(
            "A device map is auto, or places by layers such as prelude=cuda:0,recurrent.0-3=cuda:1,coda=disk, got "
            f"{given!r}."
        )
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"The device map says twice where {twice} goes; say it once.")
    return {name: place for name, _, place in pairs}


def place_layers(
    architecture: Architecture, dtype: torch.dtype, home: torch.device, device_map: DeviceMap
) -> Placement:
    """Where each layer goes, from its size and the memory that is free now.

    `auto` fills home, then the other GPUs, with layers in their order. Where these are too small, the layers of the
    loop come first, since those on disk are read at every recurrence, and what is left is kept in memory, or on disk.

    Raises `ConfigError` for a map that leaves layers out or names others, or a device that is not there, and
    `CheckpointError` where a device is too small for what goes there.
    """
    sizes: Counter[str] = Counter({"": 0})
    for name, shape in parameter_shapes(architecture).items():
        parsed = parse_name(name)
        sizes[f"{parsed.stage}.{parsed.layer}" if parsed.stage else ""] += math.prod(shape) * dtype.itemsize
    names = [f"{stage}.{layer}" for stage in STAGES for layer in range(getattr(architecture, stage))]
    given, home = parse_device_map(device_map), _exact(home)
    if isinstance(given, str):
        return Placement(home, _automatic(names, sizes, home), sizes)
    placement = Placement(home, _as_given(names, given, architecture), sizes)
    _check_room(placement)
    return placement


def _automatic(names: Sequence[str], sizes: Mapping[str, int], home: torch.device) -> dict[str, str]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if home.type == "cuda" else []
    devices = list(dict.fromkeys([home, *gpus]))
    room = {str(device): int(_SHARE * available_memory(device)) for device in devices}
    _take(room, str(home), sizes[""], f"The {_REST} of the model need")
    in_order = _in_order(names, sizes, room)
    if in_order is not None:
        return in_order
    _take(
        room, str(home), max(sizes[name] for name in names), "One layer at a time, beside what is there always, needs"
    )
    if home.type != "cpu":
        room[_MEMORY] = int(_SHARE * available_memory(torch.device("cpu")))
    room[DISK] = sum(sizes.values())
    places = {}
    for name in sorted(names, key=lambda name: not name.startswith("recurrent")):
        places[name] = next(place for place, left in room.items() if sizes[name] <= left)
        room[places[name]] -= sizes[name]
    return {name: places[name] for name in names}


def _take(room: dict[str, int], place: str, needed: int, what: str) -> None:
    if needed > room[place]:
        raise CheckpointError(
            f"{what} {size_text(needed)} on {place}, and {size_text(max(0, room[place]))} may be taken there; take a "
            "narrower --dtype, or another --device."
        )
    room[place] -= needed


def _in_order(names: Sequence[str], sizes: Mapping[str, int], room: Mapping[str, int]) -> dict[str, str] | None:
    """One device after the other, with as few borders as there can be; None where that is not enough."""
    places, left = {}, dict(room)
    devices = iter(left)
    device = next(devices)
    for name in names:
        while sizes[name] > left[device]:
            following = next(devices, None)
            if following is None:
                return None
            device = following
        places[name] = device
        left[device] -= sizes[name]
    return places


def _as_given(names: Sequence[str], given: Mapping[str, str], architecture: Architecture) -> dict[str, str]:
    of_stages: dict[str, str] = {}
    of_layers: dict[str, str] = {}
    for entry, place in given.items():
        match = _ENTRY.fullmatch(entry)
        stage, first, last = match.groups() if match else ("", None, None)
        found = [name for name in names if name.startswith(f"{stage}.")]
        if first is not None:
            found = [f"{stage}.{layer}" for layer in range(int(first), int(last or first) + 1)]
        if not found or not set(found) <= set(names):
            raise ConfigError(
                f"The device map names {entry!r}, and the layers of this model, of layout {architecture.layout}, are "
                f"{', '.join(_shortened(names))}."
            )
        places = of_stages if first is None else of_layers
        twice = [name for name in found if name in places]
        if twice:
            raise ConfigError(f"The device map says twice where {twice[0]} goes; say it once.")
        places |= dict.fromkeys(found, place if place == DISK else _device(place, entry))
    # What is said of some layers of a stage goes before what is said of all.
    places = of_stages | of_layers
    missing = [name for name in names if name not in places]
    if missing:
        raise ConfigError(f"The device map leaves out {', '.join(_shortened(missing))}; say where these layers go too.")
    return {name: places[name] for name in names}


def _device(place: str, entry: str) -> str:
    try:
        return str(_exact(find_device(place)))
    except ConfigError as error:
        raise ConfigError(f"The device map puts {entry} on {place!r}: {error}") from None


def _exact(device: torch.device) -> torch.device:
    """As its tensors name it: `cuda:0` for `cuda`."""
    return torch.empty(0, device=device).device


def _check_room(placement: Placement) -> None:
    needed: Counter[str] = Counter()
    for name, size in placement.sizes.items():
        needed[placement.layers[name] if name else str(placement.home)] += size
    needed[str(placement.home)] += placement.largest_brought
    for place, total in needed.items():
        available = total if place == DISK else available_memory(torch.device(place))
        if total > available:
            raise CheckpointError(
                f"The device map puts {size_text(total)} of weights on {place}, and {size_text(available)} of memory "
                "are available there; put fewer layers there, or on disk."
            )


def _shortened(names: Sequence[str]) -> Iterator[str]:
    """`prelude.0-1` for two neighbours."""
    if "" in names:
        yield _REST
    layers = [(stage, int(layer)) for stage, _, layer in (name.partition(".") for name in names if name)]
    for _, run in groupby(enumerate(layers), key=lambda pair: (pair[1][0], pair[1][1] - pair[0])):
        (_, (stage, first)), *_, (_, (_, last)) = *(both := list(run)), both[-1]
        yield f"{stage}.{first}" + (f"-{last}" if last > first else "")
