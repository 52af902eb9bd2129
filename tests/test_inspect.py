"""What is said of a model before it is loaded: that it is true of the loaded one, and that no weight is read for it."""

from __future__ import annotations

import json
import re
import runpy
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loopscope
from hub_server import Hub, believed_hub
from loopscope import Architecture
from loopscope.cli import main
from loopscope.errors import CheckpointError, ConfigError, LoopscopeError, MissingDependencyError
from loopscope.models.checkpoints.families import FAMILIES
from loopscope.models.checkpoints.family import Family, TensorSlice, parameter_shapes
from loopscope.models.checkpoints.find import demo_names
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.inspection.facts import RunSize, Sizes, estimate_memory
from loopscope.models.native.subject import NativeSubject
from small_models import ARCHITECTURES, architecture, checkpoint, subject

CHECKOUT = Path(__file__).resolve().parent.parent
REFERENCE = CHECKOUT / "tests" / "reference"
NAME = "organisation/tiny"


def reference_folders() -> list[Path]:
    return sorted(path.parent for path in REFERENCE.glob("*/config.json"))


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_what_is_said_of_a_published_format_is_true_of_the_loaded_model(folder: Path) -> None:
    said = loopscope.inspect_model(folder)
    if said.runs == "through hooks":
        pytest.importorskip("transformers")
    agrees(said, loopscope.load(folder, device="cpu"))


@pytest.mark.parametrize("name", demo_names())
def test_what_is_said_of_a_shipped_model_is_true_of_the_loaded_one(name: str) -> None:
    said = loopscope.inspect_model(name)
    agrees(said, loopscope.load(name, device="cpu"))
    assert said.tokenizer is not None
    assert said.tokenizer.before == ("<|begin|>",)
    assert not said.tokenizer.chat_template


def agrees(said: loopscope.Inspection, model: loopscope.Subject) -> None:
    info = model.info
    assert (said.prelude, said.recurrent, said.coda) == (info.prelude, info.recurrent, info.coda)
    assert said.trained_recurrences == info.trained_recurrences
    assert said.parameters.total == info.parameters
    assert said.parameters.rest >= 0
    assert (said.width, said.heads, said.vocab_size) == (info.width, info.heads, info.vocab_size)
    assert said.max_positions == info.max_positions
    assert info.family.startswith(said.family)
    assert said.memory is not None
    assert said.memory.weights == 4 * info.parameters
    if isinstance(model, NativeSubject):
        assert said.layout == model.model.architecture.layout
        assert said.unobservable == ()
    else:
        assert said.unobservable


def test_counts_of_the_parts_add_up(tmp_path: Path) -> None:
    given = subject(ARCHITECTURES["injected"])
    save_checkpoint(tmp_path, given.model)
    counts = loopscope.inspect_model(tmp_path).parameters
    model = given.model
    assert model.injection is not None
    assert model.head is not None
    assert counts.recurrent == sum(p.numel() for part in (model.recurrent, model.injection) for p in part.parameters())
    assert counts.prelude == sum(p.numel() for p in model.prelude.parameters())
    assert counts.embedding == counts.unembedding == 48 * 16
    assert counts.rest == 16  # the final norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bytes_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, subject(ARCHITECTURES["added"]).model.to(dtype))
    said = loopscope.inspect_model(tmp_path)
    assert said.stored == {str(dtype).removeprefix("torch."): said.parameters.total * dtype.itemsize}
    assert said.files == ("model.safetensors",)


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"injection": "linear"}, "injection", "linear map of .* in every recurrence"),
        ({"injection": "none", "state_init": "embeddings"}, "injection", "initial state alone"),
        ({}, "initial state", "normal noise, standard deviation 0.5"),
        ({"state_init": "embeddings"}, "initial state", "the prelude's output"),
        ({"state_init": "embeddings", "prelude": 0}, "initial state", "the token embeddings"),
        ({"norm_placement": "branch-out", "qk_norm": "full"}, "norms", "branch's output .* over all heads together"),
        ({"loop_norm": "recurrence"}, "loop norm", "at the end of each recurrence; its output is carried"),
        ({"sliding_window": 4, "full_attention_layers": (0,)}, "attention", "the last 4 tokens in 3 of 4 layers"),
        ({"max_positions": 4096}, "positions", "up to 4,096 tokens"),
        ({"tied_embeddings": True}, "unembedding", "tied"),
        (
            {"loop_norm": "recurrence", "coda": 0, "exit_gate": True, "exit_threshold": 0.7},
            "exit gate",
            "cumulated probability of 0.7",
        ),
    ],
)
def test_settings_are_said_in_words(changes: dict[str, Any], name: str, words: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, subject(architecture(**changes)).model)
    assert re.search(words, loopscope.inspect_model(tmp_path).settings[name])


def test_a_feed_forward_model_has_no_words_about_a_loop(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, subject(ARCHITECTURES["feed-forward"]).model)
    said = loopscope.inspect_model(tmp_path)
    assert said.trained_recurrences is None
    assert said.trained_depth == said.unique_layers == 2
    assert not {"injection", "loop norm", "initial state", "exit gate"} & set(said.settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_states_and_maps_take_what_is_said(name: str) -> None:
    given = subject(ARCHITECTURES[name])
    looped = given.info.is_looped
    trace = loopscope.capture(given, [[1, 2, 3, 4], [5, 6, 7, 8]], recurrences=3 if looped else None, attention=True)
    said = estimate_memory(Sizes.of(ARCHITECTURES[name]), RunSize(tokens=4, batch_size=2, recurrences=3))
    states = [trace.residual(*visit) for visit in trace.visits] + [
        trace.loop_state(r) for r in range(1, trace.recurrences + 1)
    ]
    if given.info.injection != "none":
        states += [trace.injected(recurrence) for recurrence in range(1, trace.recurrences + 1)]
    assert said.kept_states == sum({state.data_ptr(): state.nbytes for state in states}.values())
    assert said.attention_map == trace.attention(*trace.visits[0]).nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_the_estimate_of_a_forward_pass_is_near_the_peak_of_a_real_process() -> None:
    benchmark = runpy.run_path(str(CHECKOUT / "benchmarks" / "memory.py"))
    run = RunSize(tokens=256, batch_size=2, recurrences=2)
    said = estimate_memory(Sizes.of(benchmark["WIDE"]), run).activations
    measured = benchmark["measured_activations"](benchmark["WIDE"], run)
    assert 0.6 < said / measured < 1.8


def sparse_checkpoint(folder: Path, shape: Architecture) -> int:
    """A checkpoint whose weights are a hole in the disk; returns its size in bytes."""
    folder.mkdir()
    config = {"model_type": "loopscope", "format_version": 1, "architecture": shape.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, sizes in parameter_shapes(shape).items():
        nbytes = 4 * int(torch.Size(sizes).numel())
        header[name] = {"dtype": "F32", "shape": list(sizes), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError as error:
            pytest.skip(f"no sparse file of this size can be made here: {error}")
    return end


_INSPECT = """
import resource, sys
import loopscope
print(loopscope.inspect_model(sys.argv[1]).parameters.total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_checkpoint_far_larger_than_memory_is_inspected_at_once(tmp_path: Path) -> None:
    shape = architecture(
        width=8192, heads=64, kv_heads=8, head_dim=128, mlp_width=28672, recurrent=56, vocab_size=128256
    )
    size = sparse_checkpoint(tmp_path / "huge", shape)
    assert size > 200e9
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", _INSPECT, str(tmp_path / "huge")], capture_output=True, text=True, check=True, timeout=60
    )
    total, peak = (int(number) for number in process.stdout.split())
    assert total == shape.parameters == size // 4
    assert peak < 2e9
    assert time.monotonic() - start < 60


def test_json_is_everything_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "demo:injected", "--json", "--tokens", "100", "--batch-size", "2", "--dtype", "bfloat16"])
    said = json.loads(capsys.readouterr().out)
    assert said.pop("analysis")["needed"] > 0
    assert said == json.loads(
        json.dumps(
            loopscope.inspect_model("demo:injected", run=RunSize(tokens=100, batch_size=2, dtype="bfloat16")).to_dict()
        )
    )
    assert said["memory"]["weights"] == 2 * said["parameters"]["total"]
    assert said["trained_depth"] == 36


@pytest.mark.parametrize("name", ["demo:injected", "demo:feedforward"])
def test_a_terminal_of_80_columns_is_wide_enough(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["inspect", name])
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert loopscope.inspect_model(name).layout in shown
    assert "<|begin|> text" in shown
    assert "What loopscope cannot see in this model" in shown


def test_several_models_stand_side_by_side(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    models = ["demo:injected", "demo:feedforward", str(REFERENCE / "ouro-tiny")]
    main(["inspect", *models])
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    rows = {line.split("  ")[0]: line for line in shown.splitlines()}
    assert rows["recurrences"].split() == ["recurrences", "8", "–", "4"]
    for words in ("ouro-tiny", "(2, 4 ⊗ 8, 2)_I", "(0, 3 ⊗ 4, 0)", "<|begin|>", "linear map of"):
        assert words in shown
    main(["inspect", *models, "--json"])
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == models
    for wrong in ([*models, "--revision", "main"], []):
        with pytest.raises(SystemExit):
            main(["inspect", *wrong])


def test_a_run_longer_than_the_models_positions_is_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["inspect", str(REFERENCE / "huginn-tiny"), "--tokens", "65"])
    assert "the model has 64 positions" in capsys.readouterr().out
    main(["inspect", str(REFERENCE / "huginn-tiny"), "--tokens", "64"])
    assert "the model has 64 positions" not in capsys.readouterr().out


def test_of_a_hooked_model_nothing_is_said_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    main(["inspect", str(REFERENCE / "gpt2-tiny")])
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "run through hooks" in shown.out


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(family.name in shown for family in FAMILIES)


def test_the_package_can_be_run_as_a_module() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "loopscope", "models"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "demo:injected" in process.stdout


def recognises(names: Any) -> bool:
    return "mine" in names


OWN = Family(
    name="mine",
    model_types=("mine",),
    recognises=recognises,
    architecture=lambda config: architecture(**config["shape"]),
    parts=lambda shape, names: {
        name: TensorSlice("mine" if name == "norm.weight" else name, sizes)
        for name, sizes in parameter_shapes(shape).items()
    },
)


def test_a_family_of_ones_own_is_inspected_and_loaded(tmp_path: Path) -> None:
    given = subject(architecture(recurrent=3))
    weights = {name: parameter.detach() for name, parameter in given.model.named_parameters()}
    weights["mine"] = weights.pop("norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "shape": {"recurrent": 3}}))
    assert loopscope.inspect_model(tmp_path, families=[OWN]).family == "mine"
    loaded = loopscope.load(tmp_path, families=[OWN], device="cpu")
    assert torch.equal(loopscope.capture(loaded, [1, 2]).logits, loopscope.capture(given, [1, 2]).logits)
    with pytest.raises(LoopscopeError, match="mine"):  # nothing is remembered
        loopscope.load(tmp_path, device="cpu")


def one_sentence(error: LoopscopeError) -> str:
    sentence = str(error)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def misshapen(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"norm.weight": torch.ones(3)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("model.safetensors"), "has no model.safetensors"),
        (only_pickled, "pickle files can run code and are not read"),
        (overwrite("model.safetensors", b"\xff" * 99), "model.safetensors is truncated or damaged"),
        (overwrite("model.safetensors", b""), "model.safetensors is truncated or damaged"),
        (overwrite("config.json", b"{"), "config.json is not valid JSON"),
        (overwrite("config.json", b"[]"), "must hold a JSON object"),
        (overwrite("tokenizer.json", b"{}"), "tokenizer.json is not a readable tokenizer"),
        (misshapen, r"'norm.weight' .* has shape \(3,\); config.json asks for \(16,\)"),
    ],
)
def test_folders_that_are_no_checkpoint(model: Path, damage: Any, message: str) -> None:
    damage(model)
    with pytest.raises(LoopscopeError, match=message) as caught:
        loopscope.inspect_model(model)
    if damage is not only_pickled:
        one_sentence(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at/all", "demo:none"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor a shipped model|no shipped model"):
        loopscope.inspect_model(name)


def test_a_family_that_nobody_knows(model: Path) -> None:
    pytest.importorskip("transformers")
    (model / "config.json").write_text('{"model_type": "nobodys"}')
    weights = load_file(model / "model.safetensors")
    save_file({f"theirs.{name}": tensor for name, tensor in weights.items()}, model / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'nobodys'.*transformers .* cannot load it either.*adding-a-family"
    ) as caught:
        loopscope.inspect_model(model)
    one_sentence(caught.value)


def test_without_transformers_the_command_that_installs_it_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (model / "config.json").write_text('{"model_type": "nobodys"}')
    weights = load_file(model / "model.safetensors")
    save_file({f"theirs.{name}": tensor for name, tensor in weights.items()}, model / "model.safetensors")
    with pytest.raises(MissingDependencyError, match=r"'nobodys'.*pip install 'loopscope\[transformers\]'"):
        loopscope.inspect_model(model)


@pytest.mark.parametrize("name", ["tokens", "batch_size", "recurrences"])
def test_a_run_of_no_size(name: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{option} must be at least 1, got 0"):
        RunSize(**{name: 0})  # type: ignore[arg-type]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client believes in, and an empty cache."""
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    with believed_hub(tmp_path, monkeypatch) as hub:
        yield hub


def test_of_a_model_on_the_hub_only_headers_are_read(hub: Hub, model: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit = hub.publish(NAME, files)
    said = loopscope.inspect_model(NAME)
    assert said.revision == commit
    assert said.to_dict() | {"name": "", "revision": None} == loopscope.inspect_model(model).to_dict() | {"name": ""}
    asked = [request for request in hub.requests if "model.safetensors" in request and request.startswith("GET")]
    assert asked
    assert all(re.search(r"bytes=\d+-\d+$", request) for request in asked)


def test_a_model_in_the_cache_is_inspected_without_a_network(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(NAME, {path.name: path.read_bytes() for path in model.iterdir()})
    loopscope.load(NAME, device="cpu")
    hub.status = 503
    assert loopscope.inspect_model(NAME).layout == loopscope.inspect_model(model).layout


def test_a_repository_of_pickles_is_refused_on_the_hub(hub: Hub, model: Path) -> None:
    hub.publish(NAME, {"config.json": (model / "config.json").read_bytes(), "pytorch_model.bin": b"a pickle"})
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin and no safetensors"):
        loopscope.inspect_model(NAME)


def test_a_repository_that_is_not_there_is_named(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="the hub has no organisation/tiny"):
        loopscope.inspect_model(NAME)
