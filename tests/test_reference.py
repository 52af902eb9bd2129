"""The model against the numbers that the families' published modelling code computes, on tiny random checkpoints.

Each case goes the user's way, through `load` and `capture`, and every tensor that is recorded is compared.
"""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loopscope
from loopscope import Trace
from loopscope.errors import ConfigError
from loopscope.models.native.subject import NativeSubject

REFERENCE = Path(__file__).resolve().parent / "reference"
HUGINN = REFERENCE / "huginn-tiny"

FAMILIES = {
    "huginn-tiny": "huginn",
    "retrofit-llama-tiny": "retrofit-llama",
    "retrofit-tinyllama-tiny": "retrofit-llama",
    "retrofit-olmo-tiny": "retrofit-olmo",
    "ouro-tiny": "ouro",
    "llama-tiny": "llama",
    "olmo2-tiny": "olmo2",
    "qwen3-tiny": "qwen3",
}
"""What each case is recognised as."""

pytestmark = pytest.mark.reference

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """A folder of the reference data."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
        return content

    @property
    def weights(self) -> Tensors:
        return load_file(self.folder / "model.safetensors")

    @cached_property
    def expected(self) -> Tensors:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def subject(self) -> NativeSubject:
        subject = loopscope.load(self.folder, device="cpu")
        assert isinstance(subject, NativeSubject)
        return subject

    def trace(self, folder: Path | None = None, **options: Any) -> Trace:
        """The run that was recorded, of the model in another folder, or with other options."""
        subject = self.subject if folder is None else loopscope.load(folder, device="cpu")
        recorded = {
            "input_ids": self.expected["input_ids"],
            "recurrences": self.about["recurrences"],
            "initial_state": self.expected.get("initial_state"),
        }
        return loopscope.capture(subject, **(recorded | options))

    def close(self, ours: Tensor, recorded: str) -> None:
        """Within the tolerance that is recorded with the case."""
        tolerance = self.about["tolerance"]
        torch.testing.assert_close(
            ours,
            self.expected[recorded],
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda text: f"{recorded}: {text}",
        )


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """A case that is kept beside this file, or else lies beside the checkout."""
    kept = REFERENCE / request.param
    return Case(kept if kept.is_dir() else request.getfixturevalue("reference_case")(request.param))


@pytest.fixture(scope="module")
def huginn() -> Case:
    return Case(HUGINN)


@pytest.fixture(scope="module")
def ouro() -> Case:
    return Case(REFERENCE / "ouro-tiny")


def found(case: Case, trace: Trace) -> Tensors:
    """Everything that a trace tells, by the names of the recorded tensors."""
    model = case.subject.model
    found = {"logits": trace.logits, "embeddings": model.embed(trace.input_ids)}
    last = trace.visits[-1]
    for stage, layer, recurrence in trace.visits:
        site = f"{stage}.{recurrence - 1}.{layer}" if stage == "recurrent" else f"{stage}.{layer}"
        if not case.subject.info.is_looped:
            site = f"layer.{layer}"
        found[site] = trace.residual(stage, layer, recurrence)
        found[f"attention.{site}".replace("attention.layer", "attention")] = trace.attention(stage, layer, recurrence)
    for recurrence in range(trace.recurrences):
        found[f"injected.{recurrence}"] = trace.injected(recurrence + 1)
        found[f"loop_end.{recurrence}"] = trace.loop_state(recurrence + 1)
    if model.exit_gate is not None:
        for recurrence in range(trace.recurrences):
            found[f"gate.{recurrence}"] = trace.gate(recurrence + 1)
            found[f"logits.{recurrence}"] = model.unembed(trace.loop_state(recurrence + 1))
        return found | {"exit_distribution": trace.exit_distribution, "exit_step": trace.exit_step - 1}
    if trace.recurrences:
        end = trace.loop_state(trace.recurrences)
        found["coda_input"] = model.norm(end) if model.architecture.loop_norm == "loop" else end
    return found | {"final_hidden": model.norm(trace.residual(*last))}


@pytest.mark.parametrize("case", list(FAMILIES), indirect=True)
def test_every_recorded_tensor_is_computed(case: Case) -> None:
    trace = case.trace(attention=True)
    ours = found(case, trace)
    assert case.subject.info.family == FAMILIES[case.folder.name]
    assert set(case.expected) - set(ours) <= {"input_ids", "initial_state"}
    for recorded in case.expected.keys() & ours.keys():
        case.close(ours[recorded], recorded)


@pytest.mark.parametrize("case", list(FAMILIES), indirect=True)
def test_every_layer_is_visited_in_every_recurrence(case: Case) -> None:
    layers, info, trace = case.about["layers"], case.subject.info, case.trace()
    stages = ("prelude", "recurrent", "coda") if info.is_looped else ("layers", None, None)
    assert (info.prelude, info.recurrent, info.coda) == tuple(layers.get(stage, 0) for stage in stages)
    assert trace.recurrences == (case.about["recurrences"] or 0)
    assert len(trace.visits) == info.prelude + info.recurrent * trace.recurrences + info.coda


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", list(FAMILIES), indirect=True)
def test_padding_on_either_side_changes_nothing(case: Case, side: str) -> None:
    def padded(values: Tensor, padding: int) -> Tensor:
        """Three positions more on one side."""
        extra = torch.full((values.shape[0], 3, *values.shape[2:]), padding, dtype=values.dtype)
        return torch.cat([extra, values] if side == "left" else [values, extra], dim=1)

    ids, state = case.expected["input_ids"], case.expected.get("initial_state")
    trace = case.trace(
        input_ids=padded(ids, 5),
        attention_mask=padded(torch.ones_like(ids), 0),
        initial_state=None if state is None else padded(state, 0),
    )
    case.close(trace.logits[:, 3:] if side == "left" else trace.logits[:, :-3], "logits")


LOOPED = [name for name, family in FAMILIES.items() if "retrofit" in family or family in ("huginn", "ouro")]


@pytest.mark.parametrize("case", LOOPED, indirect=True)
def test_recurrences_are_those_asked_for_and_else_the_trained_number(case: Case) -> None:
    recorded = case.about["recurrences"]
    for asked in (2, recorded + 4):
        trace = case.trace(recurrences=asked)
        assert trace.recurrences == asked
        for recurrence in range(min(asked, recorded)):
            case.close(trace.loop_state(recurrence + 1), f"loop_end.{recurrence}")
    config = json.loads((case.folder / "config.json").read_text())
    trained = config.get("mean_recurrence", config.get("total_ut_steps"))
    assert case.trace(recurrences=None).recurrences == case.subject.info.trained_recurrences == trained


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6, 0.75, 0.9, 0.97, 1.0])
def test_ouro_answers_each_token_from_where_it_stops(ouro: Case, tmp_path: Path, threshold: float) -> None:
    shutil.copy(ouro.folder / "model.safetensors", tmp_path)
    config = json.loads((ouro.folder / "config.json").read_text()) | {"early_exit_threshold": threshold}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trace = ouro.trace(tmp_path)
    cumulated = ouro.expected["exit_distribution"].cumsum(-1)
    for batch, token in torch.cartesian_prod(torch.arange(2), torch.arange(11)).tolist():
        shares = cumulated[batch, token]
        assert float((shares[:-1] - threshold).abs().min()) > 1e-5, "too close to the threshold to say"
        step = next((r for r in range(4) if float(shares[r]) >= threshold), 3)
        assert int(trace.exit_step[batch, token]) == step + 1
        torch.testing.assert_close(
            trace.logits[batch, token], ouro.expected[f"logits.{step}"][batch, token], atol=1e-4, rtol=1e-5
        )


def test_huginn_configuration_is_read(huginn: Case) -> None:
    subject = loopscope.load(HUGINN, device="cpu")
    assert (subject.info.prelude, subject.info.recurrent, subject.info.coda) == (2, 4, 2)
    assert subject.info.trained_recurrences == 32
    assert subject.info.family == "huginn"
    assert subject.info.max_positions == 64
    assert subject.tokenizer is None
    assert isinstance(subject, NativeSubject)
    # sqrt(D) sqrt(2 / (5 D)), whatever the width is
    assert subject.model.architecture.state_std == pytest.approx((2 / 5) ** 0.5)


@pytest.mark.parametrize("left_out", [["lm_head.weight"], ["freqs_cis"], ["lm_head.weight", "freqs_cis"]])
def test_huginn_needs_neither_the_tied_head_nor_the_rotation_table(
    huginn: Case, tmp_path: Path, left_out: list[str]
) -> None:
    shutil.copy(HUGINN / "config.json", tmp_path)
    weights = {name: tensor for name, tensor in huginn.weights.items() if name not in left_out}
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(huginn.trace(tmp_path).logits, huginn.trace().logits)


def test_huginns_rotation_table_is_computed_and_never_read(huginn: Case, tmp_path: Path) -> None:
    shutil.copy(HUGINN / "config.json", tmp_path)
    save_file(huginn.weights | {"freqs_cis": torch.zeros(1, 64, 1, 6, 2)}, tmp_path / "model.safetensors")
    assert torch.equal(huginn.trace(tmp_path).logits, huginn.trace().logits)


def test_huginn_keeps_no_attention_unless_asked(huginn: Case) -> None:
    trace = huginn.trace(attention=False)
    with pytest.raises(ConfigError, match=r"kept no attention; call capture\(\.\.\., attention=True\)"):
        trace.attention("recurrent", 0, 1)


def test_huginn_in_float64_is_closer_than_the_recorded_rounding(huginn: Case) -> None:
    exact = loopscope.capture(
        loopscope.load(HUGINN, dtype="float64", device="cpu"),
        huginn.expected["input_ids"],
        recurrences=5,
        initial_state=huginn.expected["initial_state"].double(),
    )
    rounding = huginn.about["rounding"]["largest_difference_to_float64"]
    difference = max(
        float((exact.loop_state(r + 1) - huginn.expected[f"loop_end.{r}"].double()).abs().max()) for r in range(5)
    )
    assert 0 < difference < 2 * rounding
