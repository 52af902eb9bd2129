"""Models that one device has no room for: layers on several devices, in memory, and on disk."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import loopscope
from logical_devices import LogicalDevices, capacities
from loopscope.analysis.job import SilentProgress
from loopscope.cli import main
from loopscope.errors import CheckpointError, ConfigError, LoopscopeError
from loopscope.models.checkpoints.family import parameter_shapes, parse_name
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.checkpoints.placement import place_layers
from loopscope.models.checkpoints.store import TensorStore
from random_model import random_architecture, random_model

IDS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]]
EVERYWHERE = "prelude=lazy:1,recurrent.0=lazy:1,recurrent.1=lazy:2,coda=cpu"
ON_DISK = {"prelude": "disk", "recurrent.0": "cpu", "recurrent.1": "disk", "coda": "disk"}
SETTINGS: dict[str, Any] = {"recurrences": 4, "horizon": 6, "other_starts": 1, "eigenvalue_products": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, random_model(dtype=torch.float32, sliding_window=3, full_attention_layers=(1,)))
    return tmp_path


def study(folder: Path, device_map: Any = None) -> loopscope.Study:
    return loopscope.analyze(loopscope.load(folder, device="cpu", device_map=device_map), IDS, **SETTINGS)


@pytest.mark.parametrize("device_map", [EVERYWHERE, ON_DISK])
def test_states_maps_and_logits_are_those_of_one_device(folder: Path, device_map: Any) -> None:
    one = loopscope.capture(loopscope.load(folder, device="cpu"), IDS, recurrences=5, attention=True)
    with LogicalDevices() as devices:
        spread = loopscope.load(folder, device="cpu", device_map=device_map)
        moves = devices.moves
        trace = loopscope.capture(spread, IDS, recurrences=5, attention=True)
        assert (devices.moves > moves) == (device_map is EVERYWHERE)
    assert trace.visits == one.visits
    for stage, layer, recurrence in one.visits:
        assert torch.equal(trace.residual(stage, layer, recurrence), one.residual(stage, layer, recurrence))
        assert torch.equal(trace.attention(stage, layer, recurrence), one.attention(stage, layer, recurrence))
    assert torch.equal(trace.logits, one.logits)


def test_an_analysis_has_the_same_arrays_eigenvalues_and_neurons_too(folder: Path) -> None:
    one = study(folder)
    with LogicalDevices():
        spread = study(folder, EVERYWHERE)
    on_disk = study(folder, {"prelude": "disk", "recurrent": "cpu", "coda": "disk"})
    assert "eigenvalue_real" in one.dataset and "prediction_neurons" in one.dataset
    for other in (spread, on_disk):
        assert other.dataset.identical(one.dataset)
    assert spread.manifest["model"]["placement"].startswith("cpu: embedding, head and norms, coda.0 (")


def test_a_loop_on_disk_has_no_eigenvalues_and_everything_else(folder: Path) -> None:
    one, on_disk = study(folder), study(folder, ON_DISK)
    for name in one.dataset.data_vars.keys() & on_disk.dataset.data_vars.keys():
        assert on_disk.dataset[name].identical(one.dataset[name])
    assert "noise_floor" in on_disk.dataset
    assert {"eigenvalue_real", "predicted_rate"} <= one.dataset.data_vars.keys() - on_disk.dataset.data_vars.keys()
    with pytest.raises(ConfigError, match="layers of its loop are brought to cpu one at a time"):
        loopscope.leading_eigenvalues(loopscope.load(folder, device="cpu", device_map=ON_DISK), IDS)


def test_layers_on_disk_are_read_as_often_as_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = loopscope.load(folder, device="cpu", device_map=ON_DISK)
    reads: Counter[str] = Counter()
    rows = TensorStore.rows

    def counted(store: TensorStore, name: str, start: int, stop: int) -> torch.Tensor:
        reads[name] += 1
        return rows(store, name, start, stop)

    monkeypatch.setattr(TensorStore, "rows", counted)
    loopscope.capture(subject, IDS, recurrences=5)
    assert {name.partition(".attention")[0]: count for name, count in reads.items() if "query.weight" in name} == {
        "prelude.0": 1,
        "recurrent.1": 5,
        "coda.0": 1,
    }
    assert all(weight.is_meta for weight in subject.model.coda.parameters())


def sizes_of(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, shape in parameter_shapes(random_architecture(**changes)).items():
        parsed = parse_name(name)
        sizes[f"{parsed.stage}.{parsed.layer}" if parsed.stage else ""] += math.prod(shape) * dtype.itemsize
    return sizes


def test_auto_fills_devices_in_order_and_then_keeps_the_loop_off_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"prelude": 2, "recurrent": 3, "coda": 2}
    sizes, architecture, cpu = sizes_of(**layout), random_architecture(**layout), torch.device("cpu")
    layer, rest = sizes["recurrent.0"], sizes[""]

    def placed(layers: float) -> str:
        free = math.ceil((rest + layers * layer) / 0.75) + 4
        monkeypatch.setattr("loopscope.models.checkpoints.placement.available_memory", capacities(cpu=free))
        return str(place_layers(architecture, torch.float32, cpu, "auto"))

    assert placed(7).startswith("cpu: embedding, head and norms, prelude.0-1, recurrent.0-2, coda.0-1 (")
    # One layer's room is for what is brought from the disk.
    assert "prelude.0-1, recurrent.0-2 (" in placed(6)
    assert "disk: coda.0-1 (" in placed(6)
    assert "norms, recurrent.0-1 (" in placed(3)
    assert "disk: prelude.0-1, recurrent.2, coda.0-1 (" in placed(3)
    with pytest.raises(CheckpointError, match=r"One layer at a time, .* may be taken there; take a narrower --dtype"):
        placed(0.5)
    with pytest.raises(CheckpointError, match="embedding, head and norms of the model need"):
        placed(-0.5)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("prelude=cpu,recurrent=cpu", r"leaves out coda\.0; say where"),
        ("prelude=cpu,recurrent.0=cpu", r"leaves out recurrent\.1, coda\.0; say"),
        ("prelude=cpu,recurrent=cpu,coda=cuda:93", r"puts coda on 'cuda:93': The device 'cuda:93' cannot be used"),
        ("prelude=cpu,recurrent=meta,coda=cpu", "puts recurrent on 'meta': The device 'meta' cannot be used"),
        ("prelude.0-4=cpu,recurrent=cpu,coda=cpu", r"names 'prelude\.0-4', and the layers of this model, of layout"),
        ({"model.layers.0": "cpu"}, r"names 'model\.layers\.0', .* are prelude\.0, recurrent\.0-1, coda\.0\."),
        ("somewhere", "A device map is auto, or places by layers such as prelude=cuda:0,"),
    ],
)
def test_maps_that_do_not_fit_are_refused_in_a_sentence(folder: Path, device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loopscope.load(folder, device="cpu", device_map=device_map)


def test_a_device_that_is_too_small_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopscope.models.checkpoints.placement.available_memory", capacities(cpu=10**6, lazy_1=1000))
    with LogicalDevices(), pytest.raises(CheckpointError, match=r"of weights on lazy:1, and 0\.0 MB .* or on disk"):
        loopscope.load(folder, device="cpu", device_map=EVERYWHERE)


def test_what_goes_where_and_what_it_costs_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Notes(SilentProgress):
        def note(self, message: str) -> None:
            said.append(message)

    said: list[str] = []
    loopscope.analyze(loopscope.load(folder, device_map=ON_DISK), IDS, progress=Notes(), **SETTINGS)
    assert said[0] == (
        f"{folder} lies on cpu: embedding, head and norms, recurrent.0 (0.0 MB); disk: prelude.0, recurrent.1, coda.0 "
        "(0.0 MB). For each batch, the disk is read for 0.0 MB of its loop 16 times or more, once in every recurrence "
        "(0.1 MB) and for 0.0 MB before and behind the loop once in every run and readout."
    )
    assert any("Eigenvalues are left out" in sentence and "one at a time" in sentence for sentence in said)
    main(["inspect", str(folder), "--device-map", "coda=disk,prelude=cpu,recurrent=cpu"])
    assert "layers lie on    cpu: embedding, head and norms, prelude.0, recurrent.0-1" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="device_map comes too late"):
        loopscope.analyze(loopscope.load(folder), IDS, device_map="auto")


def test_a_damaged_layer_on_disk_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model.coda[0].mlp.down.weight[0, 0] = math.nan
    save_checkpoint(tmp_path, model)
    with pytest.raises(LoopscopeError, match=r"The weight 'coda\.0\.mlp\.down\.weight' .* holds NaN"):
        loopscope.load(tmp_path, device="cpu", device_map=ON_DISK)
