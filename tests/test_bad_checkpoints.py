"""Checkpoints that cannot be loaded exactly: one sentence names the culprit, and nothing is unpickled."""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loopscope
from loopscope.errors import CheckpointError, LoopscopeError, NonFiniteError
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.checkpoints.store import TensorStore
from random_model import random_model

HUGINN = Path(__file__).resolve().parent / "reference" / "huginn-tiny"
QUERY = "recurrent.1.attention.query.weight"
HUGINN_QKV = "transformer.core_block.2.attn.Wqkv.weight"

Change = Callable[[Path], object]


@pytest.fixture
def native(tmp_path: Path) -> Path:
    folder = tmp_path / "native"
    save_checkpoint(folder, random_model(dtype=torch.float32))
    return folder


@pytest.fixture
def huginn(tmp_path: Path) -> Path:
    folder = tmp_path / "huginn"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(HUGINN / name, folder / name)
    return folder


def refused(folder: Path | str, message: str, error: type[LoopscopeError] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        loopscope.load(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


def configure(**changes: Any) -> Change:
    """Set fields of config.json; a dotted name goes into an object."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, value in changes.items():
            *outer, leaf = name.split("__")
            place = config
            for key in outer:
                place = place[key]
            if value is ...:
                del place[leaf]
            else:
                place[leaf] = value
        path.write_text(json.dumps(config))

    return change


def weigh(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors of model.safetensors."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)

    return rewrite


def put(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return weigh(lambda weights: weights.update({name: value(weights[name])}))


def filled(number: float) -> Callable[[Tensor], Tensor]:
    """The same tensor, with one bad entry at its end."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return change


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def rename(name: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def lead_nowhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")


def move(inside: str) -> Change:
    """All files into a folder below."""

    def change(folder: Path) -> None:
        files = list(folder.iterdir())
        (folder / inside).mkdir(parents=True)
        for path in files:
            path.rename(folder / inside / path.name)

    return change


NATIVE: list[tuple[str, Change, str]] = [
    ("no config", remove("config.json"), "has no config.json; give the folder that holds"),
    ("broken JSON", write("config.json", '{"model_type": '), r"config\.json is not valid JSON \(.*line 1"),
    ("no text", write("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    ("endless", write("config.json", "[" * 100_000), r"config\.json is not valid JSON \(more than 64 lists"),
    ("long number", write("config.json", '{"model_type": ' + "9" * 5000 + "}"), r"config\.json is not valid JSON"),
    ("no object", write("config.json", "[1]"), r"config\.json must hold a JSON object, got a list"),
    ("link to nothing", lead_nowhere, r"model\.safetensors is a link to a file that is not there; download"),
    (
        "no weights",
        remove("model.safetensors"),
        r"has no model\.safetensors \(and no model\.safetensors\.index\.json\)",
    ),
    ("another name", rename("model-00001-of-00001.safetensors"), r"if model-00001-of-00001\.safetensors holds all of"),
    (
        "adapter alone",
        rename("adapter_model.safetensors"),
        r"adapter_model\.safetensors is an adapter, .*: merge it into",
    ),
    ("hub's cache", move("snapshots/abc"), r"it is a folder of the hub's cache, so give .*snapshots/abc\."),
    ("folder around", move("model"), r"index\.json\); give .*/model, if that is the model"),
    ("empty weights", write("model.safetensors", b""), r"model\.safetensors is truncated or damaged"),
    ("garbage", write("model.safetensors", bytes(range(256)) * 40), r"model\.safetensors is truncated or damaged"),
    ("zeros", write("model.safetensors", bytes(4096)), r"model\.safetensors is truncated or damaged"),
    (
        "another family",
        configure(model_type="llama"),
        r"says model_type 'llama', but its tensors are named as those of loopscope; one of the two belongs to",
    ),
    ("adapter", write("adapter_config.json", "{}"), r"holds an adapter \(adapter_config\.json\), .*: merge it into"),
    ("next version", configure(format_version=2), "format_version 2; this loopscope reads version 1"),
    ("no version", configure(format_version=...), "format_version None"),
    ("no architecture", configure(architecture=...), "no object named 'architecture'"),
    (
        "unknown field",
        configure(architecture__dropout=0.1),
        r"config\.json: Unknown field 'dropout' in the Architecture",
    ),
    ("missing field", configure(architecture__heads=...), r"config\.json: The Architecture lacks the field 'heads'"),
    (
        "endless number",
        configure(architecture__rope_base=10**400),
        r"config\.json: The field 'rope_base' .* must be float",
    ),
    ("endless count", configure(architecture__recurrences=10**400), r"'recurrences' .* must be int, got 1000"),
    (
        "odd kind",
        configure(architecture__rope_scaling={"kind": ["yarn"]}),
        r"'kind' of 'rope_scaling' .* got \['yarn'\]",
    ),
    ("wrong choice", configure(architecture__injection="sum"), r"config\.json: .*'injection'.* must be one of"),
    ("impossible", configure(architecture__heads=3), r"config\.json: .*heads \(3\) must be a multiple of kv_heads"),
    ("too wide", configure(architecture__width=10**15), r"config\.json: .*width must be at most 1000000"),
    ("more layers", configure(architecture__coda=2), r"lacks 9 tensors that a loopscope model .*first 'coda\.1\."),
    ("fewer layers", configure(architecture__coda=0), r"holds 9 tensors .* does not have, first 'coda\.0\."),
    ("wider", configure(architecture__width=14), r"has shape \(.*\); config\.json asks for \(.*14"),
    ("missing tensor", weigh(lambda w: w.pop(QUERY)), f"lacks 1 tensor .*first '{re.escape(QUERY)}'"),
    (
        "unknown prefix",
        weigh(lambda w: [w.update({f"student.{name}": w.pop(name)}) for name in list(w)]),
        r"lacks .*; all of its tensors begin with 'student\.', without which they must be saved",
    ),
    ("unknown tensor", weigh(lambda w: w.update(extra=torch.ones(1))), r"holds 1 tensor .*'extra' \(in model\.saf"),
    ("wrong shape", put(QUERY, lambda t: t[:-1]), rf"'{re.escape(QUERY)}' in .* has shape \(15, 12\); .* \(16, 12\)"),
    ("transposed", put("head.weight", lambda t: t.T), r"'head.weight' .* has shape \(12, 19\)"),
    ("scalar", put("norm.weight", lambda t: t[0]), r"'norm.weight' .* has shape \(\)"),
    (
        "integers",
        put(QUERY, lambda t: t.to(torch.int8)),
        f"'{re.escape(QUERY)}' in .* is stored as int8; .* before it was quantised",
    ),
]

HUGINN_CASES: list[tuple[str, Change, str]] = [
    ("bias", configure(bias=True), "bias = True; loopscope implements Huginn with False only"),
    ("injection", configure(injection_type="add"), "injection_type = 'add'; loopscope implements Huginn with 'linear'"),
    ("mlp", configure(mlp_class_name="BaseMLP"), "mlp_class_name = 'BaseMLP'"),
    ("activation", configure(nonlin_name="GELU"), "nonlin_name = 'GELU'"),
    ("norm", configure(norm_class_name="LayerNorm"), "norm_class_name = 'LayerNorm'"),
    ("block", configure(block_class_name="PreNorm"), "block_class_name = 'PreNorm'"),
    ("state", configure(state_init="zero"), "state_init = 'zero'"),
    ("noise", configure(test_time_noise=0.1), r"test_time_noise = 0\.1"),
    ("untied", configure(tie_embeddings=False), "tie_embeddings = False"),
    ("grouped heads", configure(num_key_value_heads=2), "num_key_value_heads = 2; .* with 4 only"),
    ("no heads", configure(n_heads=0), "n_heads must be at least 1, got 0"),
    ("no recurrent layer", configure(n_layers_in_recurrent_block=0), r"config\.json: .*without recurrent layers"),
    ("missing field", configure(n_embd=...), "lacks the field 'n_embd', which a Huginn checkpoint has"),
    ("text", configure(n_embd="48"), "n_embd must be a whole number, got '48'"),
    ("fraction", configure(mean_recurrence=3.5), r"mean_recurrence must be a whole number, got 3\.5"),
    ("no init", configure(init_values=...), "lacks the field 'init_values'"),
    ("init is no object", configure(init_values=[1]), r"init_values must be an object, got \[1\]"),
    ("no std", configure(init_values__std=...), "lacks the field 'init_values.std'"),
    ("negative std", configure(init_values__std=-1.0), "state_std must be a positive finite number"),
    ("infinite base", configure(rope_base=float("inf")), "rope_base must be a finite number, got inf"),
    (
        "other head",
        put("lm_head.weight", lambda t: t * 1.001),
        r"'lm_head\.weight' differs from 'transformer\.wte\.weight'",
    ),
    (
        "shorter head",
        put("lm_head.weight", lambda t: t[:-1]),
        r"'lm_head\.weight' in .* has shape \(96, 48\); config\.json asks for \(97, 48\)",
    ),
    ("missing", weigh(lambda w: w.pop(HUGINN_QKV)), f"lacks 1 tensor .*'{re.escape(HUGINN_QKV)}'"),
    (
        "missing norm",
        weigh(lambda w: w.pop("transformer.core_block.0.norm_3.weight")),
        r"lacks 1 tensor .*'transformer\.core_block\.0\.norm_3\.weight'",
    ),
    ("unknown", weigh(lambda w: w.update(bias=torch.ones(1))), "holds 1 tensor that a huginn model .*'bias'"),
    ("shape", put(HUGINN_QKV, lambda t: t[:-12]), r"Wqkv.* has shape \(132, 48\); config\.json asks for \(144, 48\)"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in NATIVE], ids=[case[0] for case in NATIVE])
def test_a_native_checkpoint_that_does_not_fit_is_refused(native: Path, change: Change, message: str) -> None:
    change(native)
    refused(native, message)


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in HUGINN_CASES], ids=[case[0] for case in HUGINN_CASES]
)
def test_a_huginn_checkpoint_that_does_not_fit_is_refused(huginn: Path, change: Change, message: str) -> None:
    change(huginn)
    refused(huginn, message)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(native: Path, huginn: Path, number: float) -> None:
    put(QUERY, filled(number))(native)
    refused(
        native, rf"'{re.escape(QUERY)}' in .*model\.safetensors holds NaN or infinity in torch\.float32", NonFiniteError
    )
    put(HUGINN_QKV, filled(number))(huginn)
    refused(huginn, f"'{re.escape(HUGINN_QKV)}'", NonFiniteError)


def test_weights_that_are_infinite_in_a_narrow_dtype_are_refused_there_alone(native: Path) -> None:
    put(QUERY, filled(1e5))(native)
    refused(native, r"infinity in torch\.float16; .* needs a wider dtype", NonFiniteError, dtype="float16")
    assert loopscope.load(native, dtype="bfloat16", device="cpu").info.dtype == "bfloat16"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_anywhere_is_refused(huginn: Path, share: float) -> None:
    content = (HUGINN / "model.safetensors").read_bytes()
    (huginn / "model.safetensors").write_bytes(content[: int(share * len(content))])
    refused(huginn, r"model\.safetensors is truncated or damaged .*; copy or download it again")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(native: Path, position: int, byte: int) -> None:
    original = (native / "model.safetensors").read_bytes()
    damaged = bytearray(original)
    damaged[position] = byte
    (native / "model.safetensors").write_bytes(damaged)
    # Only the exceptions made for users may come out.
    with contextlib.suppress(LoopscopeError):
        loopscope.load(native, device="cpu")
    (native / "model.safetensors").write_bytes(original)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(native: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "unpickled"
    content = pickle.dumps(Trap(mark))
    (native / "model.safetensors").unlink()
    (native / name).write_bytes(content)
    refused(native, rf"holds {re.escape(name)} and no model\.safetensors; pickle files can run code and are not read")
    # Nor is a pickle opened that calls itself safetensors.
    (native / "model.safetensors").write_bytes(content)
    refused(native, r"model\.safetensors is truncated or damaged")
    assert not mark.exists()
    Path.touch(*Trap(mark).__reduce__()[1])  # type: ignore[arg-type]
    assert mark.exists(), "the trap would have gone off"


def test_code_in_the_folder_is_not_run(huginn: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (huginn / "raven_modeling_minimal.py").write_text(f"open({str(mark)!r}, 'w').close()")
    configure(auto_map={"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"})(huginn)
    assert loopscope.load(huginn, device="cpu").info.family == "huginn"
    assert not mark.exists()


def index(folder: Path, files: dict[str, str]) -> None:
    content = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors") | files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {QUERY: "model-00002-of-00002.safetensors"},
            "names the file 'model-00002-of-00002.safetensors', which is not in",
        ),
        ({QUERY: "../huginn/model.safetensors"}, r"names the file '\.\./huginn/model\.safetensors', which is not in"),
        ({"extra.weight": "model.safetensors"}, r"says that 'extra\.weight' is in model\.safetensors, where it is not"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(native: Path, huginn: Path, files: dict[str, str], message: str) -> None:
    assert huginn.is_dir()
    index(native, files)
    refused(native, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "has no weight_map"), ('{"weight_map": []}', "has no weight_map"), ("{", r"index\.json is not valid JSON")],
)
def test_a_broken_index_is_refused(native: Path, content: str, message: str) -> None:
    (native / "model.safetensors.index.json").write_text(content)
    refused(native, message)


def test_a_tensor_in_two_files_is_refused(native: Path) -> None:
    save_file({QUERY: torch.zeros(16, 12)}, native / "more.safetensors")
    index(native, {QUERY: "more.safetensors"})
    refused(native, f"'{re.escape(QUERY)}' is in both model.safetensors and more.safetensors")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", ""])
def test_names_with_the_prefix_of_a_wrapper_are_read_without_it(huginn: Path, wrapper: str) -> None:
    expected = loopscope.load(huginn, device="cpu").info.to_dict()
    weights = load_file(huginn / "model.safetensors")
    save_file({wrapper + name: tensor for name, tensor in weights.items()}, huginn / "model.safetensors")
    model = loopscope.load(huginn, device="cpu")
    assert model.info.to_dict() == expected | {"weights_sha256": model.info.weights_sha256}
    assert loopscope.inspect_model(huginn).family == "huginn"
    assert torch.equal(model.model.get_parameter("embedding.weight"), weights["transformer.wte.weight"])
    layer = "transformer.core_block.1."
    around = f"{layer}_checkpoint_wrapped_module._orig_mod."
    inside = {name.replace(layer, around): each.clone() for name, each in weights.items()}
    save_file({wrapper + name: each for name, each in inside.items()}, huginn / "model.safetensors")
    assert loopscope.load(huginn, device="cpu").info.to_dict() == expected | {
        "weights_sha256": loopscope.load(huginn, device="cpu").info.weights_sha256
    }
    save_file({wrapper + name: each for name, each in (weights | inside).items()}, huginn / "model.safetensors")
    with pytest.raises(CheckpointError, match="are one tensor by their names without those of wrappers"):
        loopscope.load(huginn, device="cpu")
    weights["more"] = torch.ones(2)
    save_file({wrapper + name: tensor for name, tensor in weights.items()}, huginn / "model.safetensors")
    with pytest.raises(CheckpointError, match="more"):
        loopscope.load(huginn, device="cpu")


def test_two_sets_of_weights_are_refused(native: Path) -> None:
    weights = load_file(native / "model.safetensors")
    save_file(weights, native / "model-00001-of-00001.safetensors")
    index(native, dict.fromkeys(weights, "model-00001-of-00001.safetensors"))
    refused(
        native, r"holds both model\.safetensors and model\.safetensors\.index\.json, which names other files; one of"
    )


def overwritten(path: Path) -> None:
    """The same file with other values, as a training run writes its next checkpoint."""
    content = bytearray(path.read_bytes())
    content[-4:] = bytes(4)
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))  # the clock of some file systems is slow


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def exchanged(path: Path) -> None:
    """Another file in its place, with the tensors elsewhere."""
    weights = load_file(path)
    save_file({"a.first": torch.ones(3), **weights}, path.with_name("next"))
    path.with_name("next").replace(path)


@pytest.mark.parametrize("change", [overwritten, cut, exchanged])
def test_a_file_that_changes_while_it_is_read_is_refused(native: Path, change: Callable[[Path], None]) -> None:
    store = TensorStore(native)
    assert store.rows(QUERY, 0, 2).shape == (2, 12)
    change(native / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while it was being read; load it again"):
        store.rows(QUERY, 0, 2)
    with pytest.raises(CheckpointError, match="was changed while it was being read"):
        store.sha256()


def test_a_path_that_is_no_folder_is_refused(native: Path, tmp_path: Path) -> None:
    refused(
        tmp_path / "nowhere",
        "nowhere' is neither a folder nor a shipped model; the shipped ones are demo:addition, demo:feedforward",
    )
    refused(native / "config.json", r"config\.json is a file; give the folder")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo:injectd", r"no shipped model 'demo:injectd' \(did you mean 'demo:injected'\?\)"),
        ("injected", r"neither a folder nor a shipped model \(did you mean 'demo:injected'\?\)"),
        ("demo:../../errors", "There is no shipped model"),
        ("demo:", "There is no shipped model 'demo:'"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, message: str) -> None:
    refused(name, message)


def test_a_limit_on_addresses_is_told_from_damage(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(path: Path, framework: str) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("loopscope.models.checkpoints.store.safe_open", limited)
    refused(native, r"cannot be looked at within this process's limit on addresses \(ulimit -v\)")
