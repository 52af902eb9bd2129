"""What loading costs: peak memory in a fresh process, and refusals before anything is allocated."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loopscope import LoopedTransformer
from loopscope.errors import CheckpointError
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints import free_memory as memory
from loopscope.models.checkpoints.family import parameter_shapes
from loopscope.models.checkpoints.free_memory import available_memory
from loopscope.models.checkpoints.layout import read_layout
from loopscope.models.checkpoints.load import load_checkpoint
from published import HUGINN, RETROFIT_LLAMA, publish
from test_model_settings import CASES

MEGABYTE = 2**20

# The kernel's own record of the most memory that this process had. It belongs to the program that runs, unlike
# ru_maxrss, which a process inherits from the one that started it.
MEASURE = """
import sys, torch
from pathlib import Path
from loopscope.models.checkpoints.load import load_checkpoint

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

load_checkpoint(Path(sys.argv[1]))  # a small one: what the first use of torch needs is no matter of size
before = status("VmRSS")
model = load_checkpoint(Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3])).model
weights = sum(parameter.nbytes for parameter in model.parameters())
print(weights, status("VmHWM") - before)
"""

# About 250 MB in float32. A third of it is the unembedding, which is read last, so that a copy of it would show.
LARGE = {
    "padded_vocab_size": 40000,
    "n_embd": 512,
    "n_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2048,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 3,
    "n_layers_in_coda": 1,
}


def convert(folder: Path, dtype: torch.dtype, files: int) -> None:
    """Store the weights in another dtype, and in several files with an index."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return
    (folder / "model.safetensors").unlink()
    place = {name: f"model-{number % files}.safetensors" for number, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: weights[name] for name in weights if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize(
    ("family", "stored", "files", "wanted"),
    [(HUGINN, torch.float32, 3, "bfloat16"), (RETROFIT_LLAMA, torch.bfloat16, 1, "float32")],
)
def test_peak_memory_is_little_more_than_the_weights(
    family: str, stored: torch.dtype, files: int, wanted: str, tmp_path: Path
) -> None:
    tensors = publish(tmp_path, family, **LARGE)
    if family == HUGINN:  # with the copy of its embedding that published files hold
        copy = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        save_file(tensors | copy, tmp_path / "model.safetensors")
    convert(tmp_path, stored, files)
    small = Path(__file__).resolve().parent / "reference" / "llama-tiny"
    command = [sys.executable, "-c", MEASURE, str(small), str(tmp_path), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for file in tmp_path.iterdir():
        file.unlink()
    weights, peak = map(int, done.stdout.split())
    assert weights > 60 * MEGABYTE
    assert peak < 1.15 * weights
    assert peak > 0.9 * weights, "the measurement misses the weights themselves"


def hollow(folder: Path, architecture: Architecture) -> None:
    """A checkpoint of any size whose file takes no room: its weights are a hole."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in parameter_shapes(architecture).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
    config = {"model_type": "loopscope", "format_version": 1, "architecture": architecture.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))


def test_more_weights_than_memory_are_refused_before_loading(tmp_path: Path) -> None:
    width = math.ceil(2 * psutil.virtual_memory().total / 4e6)
    architecture = Architecture(
        vocab_size=10**6, width=width, heads=1, kv_heads=1, head_dim=2, mlp_width=1,
        prelude=1, recurrent=0, coda=0, tied_embeddings=True,
    )  # fmt: skip
    hollow(tmp_path, architecture)
    assert read_layout(tmp_path).architecture == architecture
    sizes = r"The weights need \d+\.\d GB in {}, and \d+\.\d GB of memory are available on cpu; "
    with pytest.raises(
        CheckpointError,
        match=sizes.format("float32") + r"--dtype bfloat16 needs \d+\.\d GB, --device-map auto .*, or take a",
    ):
        load_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=sizes.format("bfloat16") + "--device-map auto spreads .*, or take a machine with more"
    ):
        load_checkpoint(tmp_path, dtype=torch.bfloat16)


def test_a_limit_on_a_group_of_processes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(folder: Path, limit: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("1000000\n")
        (folder / "memory.stat").write_text("anon 300000\nfile 700000\nactive_file 200000\ninactive_file 400000\n")

    cpu = torch.device("cpu")
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert available_memory(cpu) > 5_000_000
    limited(tmp_path / "groups" / "job" / "step", "max")
    limited(tmp_path / "groups" / "job", "2000000")
    assert available_memory(cpu) == 1_600_000
    limited(tmp_path / "groups" / "job" / "step", "900000")
    assert available_memory(cpu) == 500_000
    publish(tmp_path, HUGINN)
    with pytest.raises(
        CheckpointError, match=r"need 0\.8 MB in float32, and 0\.5 MB .* --dtype bfloat16 needs 0\.4 MB"
    ):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, dtype=torch.bfloat16).family == "huginn"


@given(settings=st.sampled_from(CASES), gate=st.booleans(), head_dim=st.sampled_from([2, 6]))
def test_parameters_and_their_shapes_are_known_without_a_model(
    settings: dict[str, Any], gate: bool, head_dim: int
) -> None:
    settings = dict(settings)
    prelude, recurrent, coda = settings.pop("layout")
    settings.pop("state")
    settings |= settings.pop("window")
    architecture = Architecture(
        vocab_size=19, width=12, heads=4, head_dim=head_dim, mlp_width=20, prelude=prelude, recurrent=recurrent,
        coda=coda, exit_gate=gate and settings["loop_norm"] == "recurrence" and coda == 0, **settings,
    )  # fmt: skip
    with torch.device("meta"):
        model = LoopedTransformer(architecture)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(architecture).items()) == list(shapes.items())
    assert architecture.parameters == sum(math.prod(shape) for shape in shapes.values())
