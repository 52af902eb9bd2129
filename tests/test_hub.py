"""Models and presets from the hub, against a real server: what is downloaded, what is cached, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loopscope
from hub_server import Files, Hub, believed_hub, point_to
from loopscope.errors import (
    CheckpointError,
    ConfigError,
    LoopscopeError,
    MissingDependencyError,
    PromptError,
    StorageError,
)
from loopscope.models.checkpoints.find import find_checkpoint
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.prompts.load import load_prompts
from loopscope.prompts.sources import HUB_PRESETS
from small_models import checkpoint

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub` is not installed")

NAME = "organisation/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model's files, and others that no instrument needs."""
    folder = checkpoint(tmp_path_factory.mktemp("model"))
    wanted = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return wanted | {
        "chat_template.jinja": b"{{ messages[0].content }}",
        "README.md": b"# tiny",
        "modeling_tiny.py": b"raise SystemExit('code ran')",
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"the weights again",
        "onnx/model.safetensors": b"the weights once more",
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client believes in, an empty cache, and nobody logged in."""
    with believed_hub(tmp_path, monkeypatch) as hub:
        yield hub


def refused(kind: type[LoopscopeError], sentence: str, name: str = NAME, revision: str | None = None) -> str:
    with pytest.raises(kind, match=sentence) as caught:
        find_checkpoint(name, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody listens where the hub was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)


# Downloads


def test_a_model_is_downloaded_without_code_and_pickles(hub: Hub, files: Files) -> None:
    commit = hub.publish(NAME, files)
    found = find_checkpoint(NAME)
    assert found.revision == commit
    assert {path.name for path in found.folder.rglob("*")} == {
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    subject = loopscope.load(NAME)
    assert subject.info.name == NAME
    assert subject.info.revision == commit
    assert subject.tokenizer is not None
    assert subject.tokenizer.chat_template is not None


def test_the_second_time_nothing_is_downloaded(hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(NAME, files)
    first = find_checkpoint(NAME)
    hub.requests.clear()
    assert find_checkpoint(NAME) == first
    assert not [request for request in hub.requests if "/resolve/" in request]
    unplug(monkeypatch)
    assert find_checkpoint(NAME) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(NAME) == first
    assert find_checkpoint(NAME, first.revision) == first


def test_another_revision(hub: Hub, files: Files, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    old = hub.publish(NAME, files)
    new = hub.publish(NAME, files | {"model.safetensors": other.read_bytes()})
    assert find_checkpoint(NAME).revision == new
    assert find_checkpoint(NAME, "main").revision == new
    assert find_checkpoint(NAME, old).revision == old
    hashes = {loopscope.load(NAME, revision=revision).info.weights_sha256 for revision in (old, new)}
    assert len(hashes) == 2


def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(NAME, files)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # whole chunks are kept, and the files here are small
    hub.cuts["model.safetensors"] = 1000
    find_checkpoint(NAME)
    assert [request for request in hub.requests if request.endswith("/model.safetensors bytes=1000-")]
    assert loopscope.load(NAME).info.parameters > 0


def test_an_interrupted_download_keeps_the_files_that_arrived(
    hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(NAME, files)
    hub.broken.add("model.safetensors")
    refused(CheckpointError, "the hub answered HTTP 500; try again later")
    with monkeypatch.context() as offline:  # what there is is not the whole model
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        refused(CheckpointError, "HF_HUB_OFFLINE forbids the network")
    hub.broken.clear()
    hub.requests.clear()
    find_checkpoint(NAME)
    fetched = {
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "resolve" in request
    }
    assert fetched == {"model.safetensors"}


def test_the_manifest_says_which_commit_it_was(hub: Hub, files: Files, tmp_path: Path) -> None:
    """The whole command, in a process of its own that knows the hub by its environment."""
    commit = hub.publish(NAME, files)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [f"{Path(sys.executable).parent}/loopscope", "analyze", NAME, "--revision", "main", "--text", "Why?"]
    options = ["--recurrences", "2", "--horizon", "2", "--no-report", "--out", "out"]
    process = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"]["name"] == NAME
    assert manifest["model"]["revision"] == commit
    assert manifest["identity"]["model"]["revision"] == commit
    assert manifest["settings"]["revision"] == "main"


# What stands in the way


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    sentence = refused(CheckpointError, "'organisation/tiny' cannot be downloaded: the hub has no organisation/tiny")
    assert "`hf auth login`" in sentence
    assert "check the path" in sentence


def test_a_revision_that_is_not_there(hub: Hub, files: Files) -> None:
    hub.publish(NAME, files)
    refused(CheckpointError, "has no revision 'v9'; give one of its branches, tags or commits", revision="v9")
    refused(CheckpointError, f"has no revision '{'0' * 40}'", revision="0" * 40)


def test_a_gated_repository(hub: Hub, files: Files) -> None:
    hub.publish(NAME, files)
    hub.gated.add(NAME)
    refused(CheckpointError, "is gated; accept its terms .* log in with `hf auth login`")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(monkeypatch)
    refused(CheckpointError, "not in the cache, and the hub cannot be reached; connect to the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(CheckpointError, "HF_HUB_OFFLINE forbids the network; unset HF_HUB_OFFLINE")


def test_a_hub_that_is_down(hub: Hub) -> None:
    hub.status = 503
    refused(CheckpointError, "the hub answered HTTP 503; try again later")


def test_a_full_disk(hub: Hub, files: Files, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are Unix's")
    hub.publish(NAME, files)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        refused(StorageError, re.escape(f"no room left to download '{NAME}' into {tmp_path / 'hub'}; free some space"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_checkpoint(NAME).revision is not None


def test_without_the_extra(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        MissingDependencyError,
        re.escape("'organisation/tiny' is no folder") + ".*" + re.escape("pip install 'loopscope[hub]'"),
    )


@pytest.mark.parametrize(
    "name", ["./models/tiny", "models/tiny/x", "/organisation/tiny", "~/tiny", "../tiny", "tiny", "a b/c"]
)
def test_a_path_is_never_looked_for_on_the_hub(hub: Hub, name: str) -> None:
    refused(CheckpointError, "is neither a folder nor a shipped model", name)
    with pytest.raises(CheckpointError, match="is neither a folder nor a shipped model"):
        find_checkpoint(Path(NAME))
    assert not hub.requests


def test_a_folder_goes_before_the_hub(hub: Hub, files: Files, tmp_path: Path) -> None:
    hub.publish(NAME, files)
    folder = checkpoint(tmp_path / NAME)
    assert find_checkpoint(NAME).folder.resolve() == folder
    assert find_checkpoint(NAME).revision is None
    assert not hub.requests
    refused(ConfigError, "--revision v1 chooses a version on the Hugging Face hub, .* leave it out", revision="v1")
    refused(ConfigError, "--revision v1", "demo:injected", revision="v1")


def test_a_subject_in_memory_has_its_revision_already(tmp_path: Path) -> None:
    subject = loopscope.load(checkpoint(tmp_path / "model"))
    with pytest.raises(ConfigError, match="revision='v1' comes too late"):
        loopscope.analyze(subject, [[1, 2]], recurrences=2, horizon=2, revision="v1")


# Pickles


def test_a_repository_with_pickles_alone(hub: Hub, files: Files) -> None:
    without = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    commit = hub.publish(NAME, without | {"model-copy/model.safetensors": b"", "training_args.bin": b""})
    sentence = refused(CheckpointError, "holds pytorch_model.bin and no safetensors; pickle files can run code")
    assert f"`hf download {NAME} --revision {commit} --local-dir tiny`" in sentence
    assert "python -c" in sentence
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]


def test_a_repository_with_an_adapter(hub: Hub, files: Files) -> None:
    hub.publish(NAME, files | {"adapter_config.json": b"{}", "adapter_model.safetensors": b"what it adds"})
    for read in (loopscope.inspect_model, loopscope.load):
        with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config\.json\), without which"):
            read(NAME)


def test_a_repository_without_weights(hub: Hub, files: Files) -> None:
    hub.publish(NAME, {"config.json": files["config.json"]})
    refused(CheckpointError, "holds no weights at its top level as safetensors")


@pytest.mark.parametrize("shards", [1, 3])
def test_the_command_that_is_named_converts(tmp_path: Path, shards: int) -> None:
    source = checkpoint(tmp_path / "source")
    folder = tmp_path / "a folder's name"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    # As trainers leave them: a matrix that is stored by columns, and two tensors in one memory.
    names = sorted(tensors, key=lambda name: (tensors[name].ndim, name))
    tensors[names[-1]] = tensors[names[-1]].T.contiguous().T
    both = torch.stack([tensors[name] for name in names[:2]])
    tensors |= dict(zip(names[:2], both, strict=True))
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in names[shard::shards]}, folder / file)
    torch.save({"learning_rate": 1e-3, "object": re.compile("x")}, folder / "training_args.bin")
    with pytest.raises(CheckpointError, match="pickle files can run code and are not read") as caught:
        load_checkpoint(folder)
    command = str(caught.value).partition("convert it with ")[2]
    assert "\n" not in command
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    converted, original = load_checkpoint(folder).model, load_checkpoint(source).model
    for name, parameter in original.named_parameters():
        assert torch.equal(converted.get_parameter(name), parameter), name


# Presets


def test_a_preset_is_downloaded_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = HUB_PRESETS["math500"]
    content = json.dumps({"problem": "Find $x$."}).encode()
    hub.repositories[preset.repo] = {preset.revision: {preset.file: content}}
    assert [prompt.text for prompt in load_prompts(prompts="math500")] == ["Find $x$."]
    assert any(f"/datasets/{preset.repo}/resolve/{preset.revision}/" in request for request in hub.requests)
    unplug(monkeypatch)
    assert [prompt.text for prompt in load_prompts(prompts="math500")] == ["Find $x$."]


def test_a_preset_that_cannot_be_had(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = HUB_PRESETS["math500"]
    with pytest.raises(PromptError, match=f"The preset 'math500' cannot be downloaded: the hub has no {preset.repo}"):
        load_prompts(prompts="math500")
    hub.repositories[preset.repo] = {preset.revision: {"other.jsonl": b""}}
    with pytest.raises(PromptError, match=f"{preset.repo} no longer has the file; look for a newer loopscope"):
        load_prompts(prompts="math500")
    unplug(monkeypatch)
    with pytest.raises(PromptError, match=r"hub cannot be reached; .*--prompts FILE --field problem"):
        load_prompts(prompts="math500")
