"""Fields of config.json that change no number, and those that a user says to pass over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import loopscope
from loopscope.cli.commands import parse_and_run
from loopscope.errors import CheckpointError, ConfigError, LoopscopeError
from loopscope.models.inspection.inspecting import inspect_model

REFERENCE = Path(__file__).resolve().parent / "reference"
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def changed(folder: Path, case: str, **fields: Any) -> Path:
    """A copy of a reference case with more fields in its config."""
    config = json.loads((REFERENCE / case / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    shutil.copyfile(REFERENCE / case / "model.safetensors", folder / "model.safetensors")
    return folder


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return loopscope.capture(loopscope.load(folder, device="cpu", **options), IDS).logits


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("ouro-tiny", {"rltt_logprob_chunk_size": 2048, "rltt_loop_level_checkpointing": True}),
        ("llama-tiny", {"internal_version": "v1"}),
        ("retrofit-llama-tiny", {"initial_state_mode": "random"}),
        ("retrofit-olmo-tiny", {"initial_state_mode": "random"}),
    ],
)
def test_fields_of_training_change_nothing(case: str, fields: dict[str, Any], tmp_path: Path) -> None:
    assert torch.equal(logits(changed(tmp_path, case, **fields)), logits(REFERENCE / case))


def test_a_field_that_is_passed_over_is_recorded(tmp_path: Path) -> None:
    scaling = json.loads((REFERENCE / "llama-tiny" / "config.json").read_text())["rope_scaling"]
    folder = changed(tmp_path, "llama-tiny", note_to_self=7, rope_scaling=scaling | {"remark": "x"})
    with pytest.raises(CheckpointError, match=r"rope_scaling\.remark .* --ignore-config rope_scaling\.remark"):
        loopscope.load(folder)
    fields = ("note_to_self", "rope_scaling.remark")
    assert torch.equal(logits(folder, ignore_config=fields), logits(REFERENCE / "llama-tiny"))
    assert inspect_model(folder, ignore_config=fields).family == "llama"
    study = loopscope.analyze(folder, IDS, ignore_config=fields, device="cpu", out=tmp_path / "study")
    assert study.manifest["model"]["ignored_config"] == list(fields)
    assert study.manifest["settings"]["ignore_config"] == list(fields)
    page = loopscope.write_report(study, tmp_path / "report.html").read_text()
    assert "config.json without" in page
    assert "note_to_self, rope_scaling.remark" in page
    loaded = loopscope.load(folder, ignore_config=fields)
    assert loopscope.analyze(loaded, IDS).manifest["settings"]["ignore_config"] == list(fields)


def test_the_command_takes_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(changed(tmp_path, "ouro-tiny", first=1, second=2))
    with pytest.raises(CheckpointError, match=r"sets second = 2, .* pass over it with --ignore-config second"):
        parse_and_run(["inspect", folder, "--ignore-config", "first"])
    parse_and_run(["inspect", folder, "--ignore-config", "first", "--ignore-config", "second", "--json"])
    assert json.loads(capsys.readouterr().out)["recognised_by"].endswith("passed over in config.json: first, second")
    with pytest.raises(ConfigError, match="--ignore-config is of one model"):
        parse_and_run(["inspect", folder, folder, "--ignore-config", "first"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["hidden_size"], "cannot pass over hidden_size: loopscope knows that field"),
        (["attention_bias"], "cannot pass over attention_bias"),
        (["rope_scaling.factor"], r"cannot pass over rope_scaling\.factor"),
        (["nothing"], "names nothing, and config.json has no such field"),
        (["rope_scaling.nothing"], r"names rope_scaling\.nothing, and config.json has no such field"),
        (["vocab_size.nothing"], r"names vocab_size, and config.json has no such object"),
    ],
)
def test_what_a_reader_knows_cannot_be_passed_over(fields: list[str], message: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, "llama-tiny", attention_bias=False, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(LoopscopeError, match=message):
        loopscope.load(folder, ignore_config=fields)


def test_a_model_that_transformers_reads_has_nothing_to_pass_over(tmp_path: Path) -> None:
    folder = changed(tmp_path, "llama-tiny", attention_bias=True, note_to_self=7)
    for read in (loopscope.load, inspect_model):
        with pytest.raises(ConfigError, match="--ignore-config is for models that loopscope reads itself"):
            read(folder, ignore_config=["note_to_self"])
