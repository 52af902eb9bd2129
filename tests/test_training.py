"""Whole training runs: they learn, they are refused where they would do harm, and they resume exactly."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from loopscope.errors import CheckpointError, ConfigError, FolderBusyError, NonFiniteError
from loopscope.experiments.training.config import OptimizerConfig, TrainConfig
from loopscope.experiments.training.data import DataFiles
from loopscope.experiments.training.loop import TrainResult, train
from loopscope.experiments.training.step import build_optimizer
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.models.native.transformer import LoopedTransformer

CONFIG = TrainConfig.from_dict(
    {
        "architecture": {
            "vocab_size": 280,
            "width": 16,
            "heads": 2,
            "kv_heads": 2,
            "head_dim": 8,
            "mlp_width": 32,
            "prelude": 1,
            "recurrent": 1,
            "coda": 1,
            "recurrences": 2,
            "injection": "linear",
            "state_init": "normal",
            "tied_embeddings": True,
            "embedding_scale": 4.0,
        },
        "data": {"train": "train.jsonl", "test": "test.txt", "template": "{a} is followed by {b}."},
        "steps": 24,
        "batch_size": 4,
        "context": 24,
        "recurrences": {"distribution": "poisson-lognormal", "cap": 6, "backprop_last": 2},
        "optimizer": {"peak_lr": 0.02, "warmup_steps": 4},
        "evaluation": {"every": 8, "recurrences": [1, 2, 4], "sequences": 2},
        "log_every": 1,
        "checkpoint_every": 5,
    }
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(config: TrainConfig, folder: Path, out: Path) -> TrainResult:
    return train(config, out, DataFiles.of(config.data, folder), threads=1, console=quiet())


def log_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name != "seconds"}
        for entry in entries
        if entry["kind"] == kind
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the training and the test text of `CONFIG`."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"a": number, "b": number + 1}) for number in range(60)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "test.txt").write_text("\n\n".join(f"{number} is followed by {number + 1}." for number in range(60, 90)))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(CONFIG, texts, tmp_path_factory.mktemp("runs") / "uninterrupted")


def test_a_run_learns_what_the_entropies_cannot(tmp_path: Path) -> None:
    # What follows a space is settled by what came four tokens before, which a bigram cannot see.
    text = "\n\n".join("1 2 1 3 " * number for number in range(5, 25))
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text(text)
    config = dataclasses.replace(
        CONFIG, steps=150, init_std=0.1, data=dataclasses.replace(CONFIG.data, train="train.txt"), checkpoint_every=150
    )
    results = run(config, tmp_path, tmp_path / "run").results
    assert results is not None
    test = results["test"]
    assert test["bigram_entropy"] < test["unigram_entropy"]
    for loss in test["loss"].values():
        assert loss < 0.5 * test["bigram_entropy"]


def test_results_say_what_was_trained_and_measured(uninterrupted: TrainResult) -> None:
    results = json.loads((uninterrupted.folder / "results.json").read_text())
    assert results == uninterrupted.results
    assert results["layout"] == "(1, 1 ⊗ 2, 1)_I"
    assert results["training"]["step"] == 24
    assert results["training"]["tokens"] == 24 * 4 * 24
    assert set(results["test"]["loss"]) == {"1", "2", "4"}
    model = load_checkpoint(uninterrupted.folder).model
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_the_log_tells_configuration_steps_and_evaluations(uninterrupted: TrainResult) -> None:
    (start,) = log_of(uninterrupted.folder, "start")
    assert TrainConfig.from_dict(start["config"]) == CONFIG
    steps = log_of(uninterrupted.folder, "step")
    assert [entry["step"] for entry in steps] == list(range(1, 25))
    assert {"tokens", "loss", "lr", "grad_norm", "recurrences"} <= set(steps[0])
    assert len({entry["recurrences"] for entry in steps}) > 1
    assert max(entry["recurrences"] for entry in steps) <= 6
    evaluations = log_of(uninterrupted.folder, "evaluation")
    assert [entry["step"] for entry in evaluations] == [8, 16, 24]
    assert "bigram_entropy" in evaluations[-1]


def test_the_model_is_a_checkpoint_that_loads_with_its_tokenizer(uninterrupted: TrainResult) -> None:
    checkpoint = load_checkpoint(uninterrupted.folder)
    assert checkpoint.model.architecture == CONFIG.architecture
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}
    assert (uninterrupted.folder / "tokenizer.json").is_file()


PROGRAM = """
import sys
from pathlib import Path
from loopscope.experiments.training.config import TrainConfig
from loopscope.experiments.training.data import DataFiles
from loopscope.experiments.training.loop import train
texts, out = map(Path, sys.argv[1:])
config = TrainConfig.load(texts / "config.json")
result = train(config, out, DataFiles.of(config.data, texts), threads=1)
sys.exit(0 if result.finished else 3)
"""


def start_and_signal(texts: Path, out: Path, number: int, after_step: int) -> tuple[int, str]:
    """Train in another process and signal it once it has logged `after_step`; its exit status and what it said."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(texts), str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not _logged(out, after_step):
                assert process.poll() is None, "it ended before it was signalled"
                assert time.monotonic() < deadline, "it did not come so far"
                time.sleep(0.002)
        finally:
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


def _logged(out: Path, step: int) -> bool:
    log = out / "log.jsonl"
    return log.exists() and any(f'"step": {number},' in log.read_text() for number in range(step, CONFIG.steps + 1))


def test_a_run_that_was_stopped_and_killed_ends_with_the_same_bits(
    texts: Path, tmp_path: Path, uninterrupted: TrainResult
) -> None:
    out = tmp_path / "run"
    status, said = start_and_signal(texts, out, signal.SIGINT, after_step=3)
    assert "the same command resumes it" in said
    assert status == 3

    status, _ = start_and_signal(texts, out, signal.SIGKILL, after_step=12)
    assert status == -signal.SIGKILL
    (out / ".state.safetensors.half_way.part").write_bytes(b"what a kill in the middle of writing leaves")
    assert not (out / "results.json").exists()

    result = run(CONFIG, texts, out)
    assert result.finished
    assert not (out / ".state.safetensors.half_way.part").exists()
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (uninterrupted.folder / name).read_bytes(), name
    assert len(log_of(out, "resume")) == 2
    for kind in ("step", "evaluation"):
        assert log_of(out, kind) == log_of(uninterrupted.folder, kind)


def test_a_finished_run_is_left_alone(texts: Path, uninterrupted: TrainResult) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted.folder.iterdir()}
    assert run(CONFIG, texts, uninterrupted.folder).results == uninterrupted.results
    assert {path.name: path.stat().st_mtime_ns for path in uninterrupted.folder.iterdir()} == before


def test_a_folder_of_another_run_is_refused_by_the_fields_that_differ(texts: Path, uninterrupted: TrainResult) -> None:
    other = dataclasses.replace(CONFIG, seed=1, optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=4))
    with pytest.raises(ConfigError, match=r"differing in config\.optimizer\.peak_lr, config\.seed;"):
        run(other, texts, uninterrupted.folder)


def test_text_may_move_but_not_change(texts: Path, tmp_path: Path, uninterrupted: TrainResult) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((texts / "train.jsonl").read_bytes())
    data = DataFiles.of(CONFIG.data, texts, train=moved)
    assert train(CONFIG, uninterrupted.folder, data, console=quiet()).finished
    moved.write_text(moved.read_text() + "\n" + json.dumps({"a": 1, "b": 2}))
    with pytest.raises(ConfigError, match=r"differing in sha256\.train;"):
        train(CONFIG, uninterrupted.folder, data, console=quiet())


def test_a_folder_with_other_things_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ConfigError, match=r"'letter\.txt' and no training run"):
        run(CONFIG, texts, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear reader"


def test_two_processes_do_not_share_a_folder(texts: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(FolderBusyError, match="Another loopscope process"):
        run(CONFIG, texts, tmp_path)


def test_a_damaged_state_is_named_and_kept(texts: Path, tmp_path: Path) -> None:
    half = dataclasses.replace(CONFIG, steps=6)
    run(half, texts, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        run(half, texts, tmp_path / "run")
    assert state.exists()


def test_divergence_is_said_before_it_reaches_the_weights(texts: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(
        CONFIG, optimizer=OptimizerConfig(peak_lr=1e30, warmup_steps=0), checkpoint_every=1, log_every=1
    )
    with pytest.raises(NonFiniteError, match=r"diverged at step \d+.*lower optimizer\.peak_lr"):
        run(wild, texts, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(("threads", "device", "said"), [(0, "cpu", "threads"), (1, "abacus", "device 'abacus'")])
def test_a_machine_that_is_not_there_is_refused(
    texts: Path, tmp_path: Path, threads: int, device: str, said: str
) -> None:
    data = DataFiles.of(CONFIG.data, texts)
    with pytest.raises(ConfigError, match=said):
        train(CONFIG, tmp_path / "run", data, threads=threads, device=device, console=quiet())


def test_test_text_shorter_than_a_window_is_refused(texts: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("1 is")
    with pytest.raises(ConfigError, match=r"The test text has .* fewer than one window of 25"):
        train(CONFIG, tmp_path / "run", DataFiles.of(CONFIG.data, texts, test=short), console=quiet())


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_its_folder(texts: Path, tmp_path: Path) -> None:
    brief = dataclasses.replace(CONFIG, steps=3)
    short = tmp_path / "short.txt"
    short.write_text("1 is")
    with pytest.raises(ConfigError, match="test text"):
        train(brief, tmp_path / "run", DataFiles.of(brief.data, texts, test=short), console=quiet())
    assert run(brief, texts, tmp_path / "run").finished
    assert len(log_of(tmp_path / "run", "start")) == 1


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    architecture = dataclasses.replace(CONFIG.architecture, qk_bias=True, tied_embeddings=False)
    model = LoopedTransformer(architecture).initialize(0)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
        for parameter in group["params"]
    }
    by_name = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert {name for name, value in by_name.items() if value == 0.0} == {
        name for name in by_name if "norm" in name or "bias" in name or name.startswith("embedding")
    }
    assert by_name["injection.weight"] == by_name["head.weight"] == 0.3
