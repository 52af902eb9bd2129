"""Models that one device has no room for: layers on several devices, in memory, and on disk."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import loopscope
from logical_devices import LogicalDevices, capacities
from loopscope.analysis.job import SilentProgress
from loopscope.cli import main
from loopscope.errors import CheckpointError, ConfigError, LoopscopeError, MissingDependencyError
from loopscope.models.checkpoints.family import parameter_shapes
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.checkpoints.placement import place_layers
from loopscope.models.checkpoints.store import TensorStore
from loopscope.models.native.subject import NativeSubject
from random_model import random_architecture, random_model

IDS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]]
EVERYWHERE = "prelude=lazy:1,recurrent.0=lazy:1,recurrent.1=lazy:2,coda=cpu"
ON_DISK = {"prelude": "disk", "recurrent.0": "cpu", "recurrent.1": "disk", "coda": "disk"}
PARTS = ("path-independence", "cycle-similarity", "trajectories", "twin", "heads", "maps", "behaviour", "stages")
SETTINGS: dict[str, Any] = {
    "recurrences": 2,
    "horizon": 4,
    "eigenvalue_products": 4,
    "eigenvalue_search": 30,  # there is no fixed point
    "skip": PARTS,
}


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


def test_an_analysis_of_several_devices_is_that_of_one(folder: Path) -> None:
    # One that is not the CPU: what torch takes apart for a device without kernels rounds otherwise in a derivative.
    with LogicalDevices():
        one, several = (
            loopscope.analyze(loopscope.load(folder, device="cpu", device_map=device_map), IDS[1:], **SETTINGS)
            for device_map in ("prelude=lazy:1,recurrent=lazy:1,coda=lazy:1", EVERYWHERE)
        )
    assert {"eigenvalue_real", "noise_floor", "prediction_neurons"} <= one.dataset.data_vars.keys()
    assert several.dataset.identical(one.dataset)
    assert several.manifest["model"]["placement"].startswith("cpu: embedding, head and norms, coda.0 (")
    assert several.manifest["identity"] == one.manifest["identity"]


def test_eigenvalues_do_not_mind_where_other_layers_are(folder: Path) -> None:
    one, beside = study(folder), study(folder, {"prelude": "disk", "recurrent": "cpu", "coda": "disk"})
    assert {"eigenvalue_real", "prediction_neurons"} <= one.dataset.data_vars.keys()
    assert beside.dataset.identical(one.dataset)


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
    assert isinstance(subject, NativeSubject)
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
    assert all(weight.is_meta for layer in subject.model.layers("coda") for weight in layer.parameters())


def test_auto_fills_devices_in_order_and_then_keeps_the_loop_off_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, cpu = random_architecture(prelude=2, recurrent=3, coda=2), torch.device("cpu")
    shapes = parameter_shapes(architecture)
    layer = sum(4 * math.prod(shape) for name, shape in shapes.items() if name.startswith("recurrent.0."))
    rest = 4 * sum(math.prod(shape) for shape in shapes.values()) - 7 * layer

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
        ("prelude=cpu,recurrent.1-0=cpu,coda=cpu", r"names 'recurrent\.1-0', and the layers of this model"),
        ("prelude.0-99999999999=cpu,recurrent=cpu,coda=cpu", r"names 'prelude\.0-99999999999', and the layers"),
        ("prelude=cpu,recurrent=cpu,coda=cpu,prelude=disk", "says twice where prelude goes; say it once"),
        ("prelude=cpu,recurrent.0-1=cpu,recurrent.1=disk,coda=cpu", r"says twice where recurrent\.1 goes"),
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
        "(0.0 MB). For each batch, the disk is read for 0.0 MB of its loop 10 times or more, once in every recurrence "
        "(0.1 MB) and for 0.0 MB before and behind the loop once in every run and readout."
    )
    assert any("Eigenvalues are left out" in sentence and "one at a time" in sentence for sentence in said)
    main(["inspect", str(folder), "--device-map", "coda=disk,prelude=cpu,recurrent=cpu"])
    assert "layers lie on    cpu: embedding, head and norms, prelude.0, recurrent.0-1" in capsys.readouterr().out
    main(["inspect", str(folder), "demo:injected", "--device-map", "auto"])
    assert "layers lie on" in capsys.readouterr().out
    study = loopscope.analyze(folder, IDS, device_map=ON_DISK, **SETTINGS)
    assert study.manifest["settings"]["device_map"] == "prelude=disk,recurrent.0=cpu,recurrent.1=disk,coda=disk"
    with pytest.raises(ConfigError, match="device_map comes too late"):
        loopscope.analyze(loopscope.load(folder), IDS, device_map="auto")


def test_a_damaged_layer_on_disk_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model.layers("coda")[0].weight("mlp.down.weight")[0, 0] = math.nan
    save_checkpoint(tmp_path, model)
    with pytest.raises(LoopscopeError, match=r"The weight 'coda\.0\.mlp\.down\.weight' .* holds NaN"):
        loopscope.load(tmp_path, device="cpu", device_map=ON_DISK)


class Layer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.qkv, self.out, self.device = nn.Linear(8, 24), nn.Linear(8, 8), device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.device)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        put_out: torch.Tensor = x + self.out(mixed.transpose(1, 2).flatten(-2)).tanh() / 2
        return put_out


class Looped(nn.Module):
    """Moves states to where its layers are, as models do that accelerate spreads."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.embedding, self.head, self.loops = nn.Embedding(20, 8), nn.Linear(8, 20), 3
        self.body = nn.ModuleList([Layer(device) for device in devices])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with LogicalDevices():
            state = self.embedding(tokens)
            for _ in range(self.loops):
                state = 0.9 * state
                for layer in self.body:
                    state = layer(state)
            logits: torch.Tensor = self.head(state.to("cpu"))
            return logits


def test_a_module_on_several_devices_is_watched_as_on_one() -> None:
    torch.manual_seed(0)
    one, spread = Looped("cpu", "cpu"), Looped("lazy:1", "lazy:2")
    spread.load_state_dict(one.state_dict())
    with LogicalDevices():
        for layer, device in zip(spread.body, ("lazy:1", "lazy:2"), strict=True):
            layer.to(device)
    here, there = (loopscope.hook(model) for model in (one, spread))
    assert there.found == here.found
    assert there.info.weights_sha256 == here.info.weights_sha256
    traces = [loopscope.capture(subject, IDS, recurrences=5, attention=True) for subject in (here, there)]
    for visit in traces[0].visits:
        assert torch.equal(traces[1].residual(*visit), traces[0].residual(*visit))
        assert torch.equal(traces[1].attention(*visit), traces[0].attention(*visit))
    assert torch.equal(traces[1].logits, traces[0].logits)
    near = [
        loopscope.leading_eigenvalues(subject, IDS[1:], recurrences=4, products=3, search=0)
        for subject in (here, there)
    ]
    assert near[1].eigenvalues == pytest.approx(near[0].eigenvalues, rel=1e-4)


def test_transformers_places_what_it_loads_and_brings_it_from_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    one = loopscope.load(tmp_path, device="cpu")
    spread = loopscope.load(tmp_path, device="cpu", device_map=layers | rest)
    assert "disk: model.layers.1, model.layers.2" in str(spread.info.placement)
    assert any(weight.is_meta for weight in spread.model.parameters())
    traces = [loopscope.capture(subject, IDS, attention=True) for subject in (one, spread)]
    for visit in traces[0].visits:
        assert torch.equal(traces[1].residual(*visit), traces[0].residual(*visit))
        assert torch.equal(traces[1].attention(*visit), traces[0].attention(*visit))
    assert torch.equal(traces[1].logits, traces[0].logits)
    in_memory = loopscope.hook(spread.model)
    assert in_memory.info.weights_sha256 == loopscope.hook(one.model).info.weights_sha256
    with pytest.raises(ConfigError, match="The device map does not do for"):
        loopscope.load(tmp_path, device="cpu", device_map=layers)


def test_a_map_for_a_model_of_transformers_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package accelerate, .* 'loopscope\[devices\]'"):
        loopscope.load(tmp_path, device_map="auto")
