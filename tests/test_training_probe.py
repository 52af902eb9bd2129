"""What a probe says of a loop while it is trained, in a training loop of one's own and in transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from loopscope.errors import ConfigError
from loopscope.experiments.training.probe import LoopProbe
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch
from loopscope.models.trace import capture
from small_models import FEED_FORWARD, INJECTED, LOOP_NORM, PROMPTS, architecture, hooked_native, relaxation, subject

LONG = [prompt for prompt in PROMPTS if len(prompt) > 1]


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_of_a_linear_loop_everything_is_known(rate: float) -> None:
    # s_t = e + rate^t (s_0 - e): in float64 and far from rounding.
    depth = 6
    found = LoopProbe(relaxation(rate, state_init="normal"), LONG, recurrences=depth)()
    in_weights = float(torch.tensor(rate))  # which are made in float32
    assert found["loop/rate"] == pytest.approx(in_weights, rel=1e-9)
    run = relaxation(rate, state_init="normal").start(Batch.of(LONG), recurrences=2 * depth)
    mask, states = Batch.of(LONG).mask, []
    for _ in range(2 * depth):
        run.advance()
        states.append(run.state[mask])
    step, last = ((states[t - 1] - states[t - 2]).norm(dim=-1) / states[t - 1].norm(dim=-1) for t in (depth, 2 * depth))
    assert found["loop/step"] == pytest.approx(float(step.median()))
    away = (states[depth - 1] - states[-1]).norm(dim=-1) / states[-1].norm(dim=-1)
    assert found["loop/distance"] == pytest.approx(float(away.median()))
    assert found["loop/norm"] == pytest.approx(float(states[depth - 1].norm(dim=-1).median()))
    assert found["loop/small_step_share"] == float((last <= 0.01).double().mean())


def test_losses_and_entropy_are_those_of_the_model() -> None:
    model = subject(INJECTED)
    found = LoopProbe(model, LONG, recurrences=3)()
    for name, number in (("1", 1), ("R", 3), ("2R", 6)):
        losses = torch.cat(
            [
                functional.cross_entropy(
                    model(prompt, recurrences=number)[0, :-1], torch.tensor(prompt[1:]), reduction="none"
                )
                for prompt in LONG
            ]
        )
        assert found[f"loop/loss_at_{name}"] == pytest.approx(float(losses.mean()), rel=1e-5)
    entropies = []
    for prompt in LONG:
        trace = capture(model, prompt, recurrences=3, attention=True)
        for layer in range(INJECTED.recurrent):
            rows = trace.attention("recurrent", layer, 3)[0]
            entropies.append(torch.special.entr(rows).sum(-1).flatten())
    assert found["loop/attention_entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)


def test_a_hooked_model_has_the_numbers_of_the_native_one() -> None:
    native, hooked = hooked_native(LOOP_NORM)
    one, other = (LoopProbe(model, LONG, recurrences=3)() for model in (native, hooked))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-4), name


def test_what_is_not_finite_is_not_hidden() -> None:
    model = LoopedTransformer(INJECTED).initialize(0, 0.3)
    probe = LoopProbe(model, LONG)
    with torch.no_grad():
        model.get_parameter("prelude.0.mlp.down.weight").fill_(math.nan)
    found = probe()
    assert math.isnan(found["loop/norm"])
    assert math.isnan(found["loop/loss_at_R"])
    assert found["loop/small_step_share"] == 0.0
    assert "loop/rate" not in found


def test_what_cannot_be_followed_is_said() -> None:
    with pytest.raises(ConfigError, match="no loop to follow"):
        LoopProbe(subject(FEED_FORWARD), LONG)
    with pytest.raises(ConfigError, match="one token each"):
        LoopProbe(subject(INJECTED), [[1], [2]])
    with pytest.raises(ConfigError, match="at least 1"):
        LoopProbe(subject(INJECTED), LONG, recurrences=0)


def test_training_goes_on_as_if_there_were_no_probe() -> None:
    def trained(probed: bool) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
        model = LoopedTransformer(architecture(state_init="embeddings", injection="add")).initialize(0, 0.3).train()
        probe, found = LoopProbe(model, LONG), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(0)
        for _ in range(3):
            ids = torch.randint(0, 48, (2, 6))
            functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if probed:
                found.append(probe())
        assert model.training
        return [weight.detach() for weight in model.parameters()], found

    (with_probe, found), (without, _) = trained(True), trained(False)
    assert all(torch.equal(one, other) for one, other in zip(with_probe, without, strict=True))
    assert len({each["loop/loss_at_R"] for each in found}) == 3  # of the model as it is then


class _ForTrainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = LoopedTransformer(INJECTED).initialize(0, 0.3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.inner(input_ids)
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


@pytest.mark.filterwarnings("ignore")  # what the Trainer and its packages say of their own use of torch
def test_the_trainer_logs_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    pytest.importorskip("accelerate", reason="the extra `devices` is not installed")
    from loopscope.experiments.training.callback import LoopCallback  # noqa: PLC0415 (an optional extra)

    model = _ForTrainer()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, logging_steps=5, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rows: list[dict[str, Any]] = [{"input_ids": row, "labels": row} for row in torch.randint(0, 48, (8, 6))]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    probe = LoopProbe(model.inner, LONG)
    trainer.add_callback(LoopCallback(trainer, probe, every=2))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loop/rate" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[0]["loop/loss_at_R"] != logged[1]["loop/loss_at_R"]
    with pytest.raises(ConfigError, match="every must be at least 1"):
        LoopCallback(trainer, probe, every=0)
