"""Checkpoints that are as they should be: what is saved is loaded, bit for bit, and nothing is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loopscope
from loopscope import LoopedTransformer
from loopscope.errors import ConfigError, PromptError, StorageError
from loopscope.models.checkpoints.find import demo_names
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.models.checkpoints.native import save_checkpoint
from random_model import random_ids, random_model

HUGINN = Path(__file__).resolve().parent / "reference" / "huginn-tiny"
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"one": 0, "two": 1}, "unk_token": "one"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
)

MODELS = {
    "injected": random_model(dtype=torch.float32, tied_embeddings=True),
    "every norm and bias": random_model(
        dtype=torch.float32, norm_placement="residual", qk_norm="head", qk_bias=True, loop_norm="loop"
    ),
    "feed-forward": random_model(
        dtype=torch.float32, recurrent=0, recurrences=1, injection="none", state_init="embeddings", mlp="plain"
    ),
}


@pytest.fixture
def model() -> LoopedTransformer:
    return MODELS["injected"]


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_saved_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    about = {"note": "für später", "loss": {"8": 1.25}}
    save_checkpoint(tmp_path / "deep" / "folder", model, TOKENIZER, about)
    checkpoint = load_checkpoint(tmp_path / "deep" / "folder")
    assert checkpoint.model.architecture == model.architecture
    assert checkpoint.family == "loopscope"
    assert json.loads((tmp_path / "deep" / "folder" / "config.json").read_text())["about"] == about
    assert (tmp_path / "deep" / "folder" / "tokenizer.json").read_text() == TOKENIZER
    ours, theirs = dict(checkpoint.model.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not checkpoint.model.training
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert torch.equal(checkpoint.model(random_ids(2, 4)), model(random_ids(2, 4)))


def test_a_subject_knows_what_it_was_loaded_from(tmp_path: Path, model: LoopedTransformer) -> None:
    save_checkpoint(tmp_path, model, TOKENIZER)
    subject = loopscope.load(tmp_path, device="cpu")
    assert subject.info.name == str(tmp_path)
    assert subject.info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (subject.info.dtype, subject.info.device) == ("float32", "cpu")
    assert subject.tokenizer is not None
    assert subject.tokenizer.encode("two one").ids == [1, 0]


def test_the_hash_is_that_of_the_weights_file(tmp_path: Path, model: LoopedTransformer) -> None:
    def digest() -> str:
        return load_checkpoint(tmp_path).weights_sha256

    save_checkpoint(tmp_path, model)
    first = digest()
    save_checkpoint(tmp_path, model, about={"note": "another"})
    assert digest() == first
    changed = random_model(dtype=torch.float32, tied_embeddings=True)
    with torch.no_grad():
        changed.norm.weight[0] += 1e-6
    save_checkpoint(tmp_path, changed)
    assert digest() != first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float32"])
def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path, model: LoopedTransformer, dtype: str) -> None:
    save_checkpoint(tmp_path, model)
    subject = loopscope.load(tmp_path, dtype=dtype, device="cpu")
    assert subject.info.dtype == dtype
    wanted = getattr(torch, dtype)
    for ours, theirs in zip(subject.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(wanted))
    assert loopscope.capture(subject, [1, 2, 3]).logits.dtype == wanted


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_files_may_hold_another_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    model = random_model(dtype=stored)
    save_checkpoint(tmp_path, model)
    assert load_file(tmp_path / "model.safetensors")["norm.weight"].dtype == stored
    loaded = load_checkpoint(tmp_path).model
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


def test_weights_outlive_their_file(tmp_path: Path, model: LoopedTransformer) -> None:
    save_checkpoint(tmp_path, model)
    loaded = load_checkpoint(tmp_path).model
    # Written over in place: a mapped file would show through.
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(loaded(random_ids(1, 3)), model(random_ids(1, 3)))


def sharded(folder: Path, files: int = 3) -> Path:
    """Huginn's published files: several, with an index."""
    folder.mkdir()
    shutil.copy(HUGINN / "config.json", folder)
    weights = load_file(HUGINN / "model.safetensors")
    place = {name: f"model-{number % files + 1:05}-of-{files:05}.safetensors" for number, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: weights[name] for name in weights if place[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_several_files_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    whole, parts = load_checkpoint(HUGINN), load_checkpoint(sharded(tmp_path / "sharded"))
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert parts.weights_sha256 != whole.weights_sha256
    assert parts.weights_sha256 == load_checkpoint(sharded(tmp_path / "again")).weights_sha256


def test_pickle_files_beside_the_weights_are_left_alone(tmp_path: Path, model: LoopedTransformer) -> None:
    save_checkpoint(tmp_path, model)
    (tmp_path / "training_args.bin").write_bytes(b"cos\nabort\n(tR.")
    assert load_checkpoint(tmp_path).family == "loopscope"


@pytest.mark.parametrize("name", demo_names())
def test_the_shipped_models_load_and_can_read(name: str) -> None:
    subject = loopscope.load(name, device="cpu")
    assert subject.tokenizer is not None
    assert subject.tokenizer.vocab_size == subject.info.vocab_size
    ids = subject.tokenizer.encode("Tom has 3 apples and buys 4 more.").ids
    assert bool(torch.isfinite(loopscope.capture(subject, ids, recurrences=None).logits).all())


def test_there_are_shipped_models() -> None:
    assert "demo:injected" in demo_names()


def test_a_damaged_tokenizer_is_named(tmp_path: Path, model: LoopedTransformer) -> None:
    save_checkpoint(tmp_path, model, "{}")
    with pytest.raises(PromptError, match=r"tokenizer\.json is not a readable tokenizer"):
        loopscope.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be auto, stored or one of float32, float64, bfloat16, float16, got 'float8'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used .* try --device cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used .* try --device cpu"),
    ],
)
def test_another_dtype_or_device_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loopscope.load(HUGINN, **options)


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path, model: LoopedTransformer) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "model", model)
