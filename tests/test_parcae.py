"""Parcae: pickles that a converter makes readable, and numbers of its published code (`parcae/make.py`)."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loopscope
from loopscope.errors import CheckpointError, LoopscopeError
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.subject import Batch

REFERENCE = Path(__file__).resolve().parent / "parcae"
CASE = json.loads((REFERENCE / "case.json").read_text())


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parcae")
    for name in ("config.json", "model.pt"):
        shutil.copy(REFERENCE / name, folder)
    return folder


@pytest.fixture(scope="module")
def folder(pickled: Path) -> Path:
    """Converted by the command that loading names, which runs apart."""
    with pytest.raises(
        CheckpointError, match=r"holds model\.pt .* pickle files can run code and are not read"
    ) as refused:
        loopscope.load(pickled)
    _, *arguments = shlex.split(str(refused.value).partition("convert it with ")[2])
    assert "weights_only=True" in arguments[1]
    subprocess.run([sys.executable, *arguments], check=True)
    return pickled


def test_every_number_is_that_of_the_published_code(folder: Path) -> None:
    expected = load_file(REFERENCE / "expected.safetensors")
    subject = loopscope.load(folder, device="cpu")
    assert isinstance(subject, NativeSubject)
    assert (subject.info.family, subject.model.architecture.layout) == ("parcae", "(1, 2 ⊗ 4, 1)_I")
    trace = loopscope.capture(
        subject,
        expected["input_ids"],
        recurrences=CASE["recurrences"],
        initial_state=expected["initial_state"],
        attention=True,
    )
    found = {"logits": trace.logits}
    for stage, layer, recurrence in trace.visits:
        found[f"{stage}.{recurrence - 1}.{layer}" if stage == "recurrent" else f"{stage}.{layer}"] = trace.residual(
            stage, layer, recurrence
        )
    for recurrence in range(trace.recurrences):
        found[f"injected.{recurrence}"] = trace.injected(recurrence + 1)
    assert set(expected) - set(found) == {"input_ids", "initial_state", "encoded"}
    for name, ours in found.items():
        torch.testing.assert_close(ours, expected[name], **CASE["tolerance"])


def test_its_contraction_factors_stand_beside_the_measured_rates(folder: Path) -> None:
    subject = loopscope.load(folder, device="cpu")
    assert subject.info.injection_factors == pytest.approx((CASE["factors"]["mean"], CASE["factors"]["largest"]))
    study = loopscope.analyze(subject, [[3, 1, 4, 1, 5]], recurrences=4, horizon=8, skip=("heads", "maps", "twin"))
    (answer,) = (each for each in loopscope.quick_answers(study) if each.key == "stability")
    assert "would multiply a coordinate of the state by 0.527 (mean; at most 0.829)" in answer.sentence
    assert "The predicted rate per recurrence is" in answer.sentence


def test_eigenvalues_and_padding_take_value_embeddings_along(folder: Path) -> None:
    subject = loopscope.load(folder, device="cpu", dtype="float64")
    prompts = [[3, 1, 4, 1, 5], [2, 7]]
    together = loopscope.leading_eigenvalues(subject, prompts, recurrences=8, products=32, search=0)
    alone = loopscope.leading_eigenvalues(subject, prompts[1:], recurrences=8, products=32, search=0)
    assert abs(together.eigenvalues[1, :2, 0]) == pytest.approx(abs(alone.eigenvalues[0, :, 0]), rel=1e-6)
    run = subject.start(Batch.of(prompts[1:]), recurrences=9)
    for _ in range(8):
        run.advance()
    assert isinstance(run, NativeRun)
    one = run.recurrence_map(recurrence=9)
    jacobian = torch.autograd.functional.jacobian(one, run.state)[0, 1, :, 0, 1]
    largest = torch.linalg.eigvals(jacobian).abs().max()
    assert abs(together.eigenvalues[1, 1, 0]) == pytest.approx(float(largest), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_strategy": "takase"}, "init_strategy = 'takase'; loopscope implements Parcae with 'scaled-zero' only"),
        ({"injection_type": "linear"}, "injection_type = 'linear'; loopscope implements Parcae with 'diagonal' only"),
        ({"rope_settings": {"rope_base": 1e4}}, "rope_settings.rope_base = 10000.0; loopscope implements"),
        (
            {"n_layers_in_recurrent_block": 1},
            r"value embeddings to layers \[0, 2\] and gates for them to layers \[1, 2\]",
        ),
        (
            {"recurrent_embedding_dimension": 64},
            "recurrent_embedding_dimension = 64; loopscope implements Parcae with 32",
        ),
        ({"soft_thing": 2}, "sets soft_thing = 2, which loopscope does not know in a Parcae model"),
    ],
)
def test_other_settings_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoopscopeError, match=message):
        loopscope.load(tmp_path, device="cpu")


def test_inspect_says_what_it_is(folder: Path) -> None:
    said = loopscope.inspect_model(folder)
    assert said.layout == "(1, 2 ⊗ 4, 1)_I"
    assert said.settings["injection"].startswith("what was in the state decays, by a learned factor below 1")
    assert said.settings["loop norm"].endswith("then a linear map, before the coda")
    assert "in the values of 2 of 4 layers" in said.settings["attention"]
    model = loopscope.load(folder, device="cpu").model
    assert said.parameters.total == sum(parameter.numel() for parameter in model.parameters())
