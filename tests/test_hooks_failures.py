"""However a hooked run ends, the model and the process are as they were."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import loopscope
from foreign_models import PATHS, ForeignLoop, assert_untouched
from loopscope.analysis.job import SilentProgress
from loopscope.errors import ConfigError, UnforeseenError
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.hooks.pausing import Pauses, Returned, SteppedCall
from loopscope.models.subject import Batch
from loopscope.models.visits import LoopState, Observer, Visit

BATCH = Batch.of([[3, 1, 4, 1, 5], [9, 2]])


def subject_in_training(**options: Any) -> HookedSubject:
    """With one module in evaluation mode, as when a part of a model is frozen."""
    model = ForeignLoop(**options).train()
    model.enter[0].eval()
    return loopscope.hook(model, **PATHS)


def assert_as_before(subject: HookedSubject) -> None:
    model = subject.model
    assert_untouched(model)
    assert [name for name, module in model.named_modules() if not module.training] == [
        name for name, _ in model.named_modules() if name.startswith("enter.0")
    ]
    assert model.loops == 3


def layer(subject: HookedSubject, index: int) -> nn.Module:
    return subject.model.get_submodule(f"cycle.{index}")


class Calls(Observer):
    """Calls a function at a visit."""

    def __init__(self, label: str, function: Callable[[], object]) -> None:
        self.label, self.function = label, function

    def visit(self, visit: Visit) -> None:
        if visit.label == self.label:
            self.function()


def test_between_recurrences_the_model_has_its_own_modes() -> None:
    subject = subject_in_training()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    seen: list[Any] = []
    run = subject.start(BATCH, recurrences=5)
    for _ in range(5):
        run.advance([Calls("recurrent.1@3", lambda: seen.append(subject.model.loops))])
        assert subject.model.loops == 3
        assert subject.model.training
    run.decode()
    run.close()
    assert_as_before(subject)
    assert seen == [3]
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_is_off_in_a_run() -> None:
    trained, evaluated = subject_in_training(), loopscope.hook(ForeignLoop().eval(), **PATHS)
    logits = [loopscope.capture(subject, BATCH.input_ids).logits for subject in (trained, evaluated)]
    assert torch.equal(*logits)


def test_modes_that_the_owner_changes_while_a_run_stands_still_are_no_matter_to_it() -> None:
    subject = loopscope.hook(ForeignLoop().eval(), **PATHS)
    run = subject.start(Batch(BATCH.input_ids, torch.ones_like(BATCH.mask)), recurrences=3)
    subject.model.train()
    for _ in range(3):
        run.advance()
    logits = run.decode()
    run.close()
    assert all(module.training for module in subject.model.modules())
    assert torch.equal(logits, subject.model.eval()(BATCH.input_ids)["logits"])


def test_the_owner_of_a_model_can_use_it_while_a_run_stands_still() -> None:
    subject = loopscope.hook(ForeignLoop().eval(), **PATHS)
    alone = loopscope.capture(subject, BATCH.input_ids, recurrences=4)
    expected = subject.model(BATCH.input_ids)["logits"]
    run = subject.start(Batch(BATCH.input_ids, torch.ones_like(BATCH.mask)), recurrences=4)
    for recurrence in range(1, 5):
        run.advance()
        assert torch.equal(subject.model(BATCH.input_ids)["logits"], expected)
        assert run.state is not None
        assert torch.equal(run.state, alone.loop_state(recurrence))
    assert torch.equal(run.decode(), alone.logits)
    run.close()


def test_an_error_in_a_layer_reaches_the_caller() -> None:
    subject = subject_in_training()

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("the layer is broken")

    run = subject.start(BATCH, recurrences=3)
    run.advance()
    handle = layer(subject, 1).register_forward_pre_hook(fail)
    with pytest.raises(
        ConfigError, match=r"ForeignLoop failed at recurrence 2 of 3 \(ValueError: the layer is broken\)"
    ) as caught:
        run.advance([Observer()])
    assert isinstance(caught.value.__cause__, ValueError)
    handle.remove()
    assert_as_before(subject)


def test_an_error_in_an_observer_ends_the_run() -> None:
    subject = subject_in_training()

    def fail() -> None:
        raise RuntimeError("the measure is broken")

    run = subject.start(BATCH, recurrences=3)
    with pytest.raises(RuntimeError, match="the measure is broken"):
        run.advance([Calls("recurrent.0@1", fail)])
    assert_as_before(subject)
    with pytest.raises(ConfigError, match="This run was closed"):
        run.advance()


def test_an_error_after_the_loop_does_not_leave_the_run_hanging() -> None:
    subject = subject_in_training()
    run = subject.start(BATCH, recurrences=1)
    run.advance()
    norm = subject.model.get_submodule("norm")
    handle = norm.register_forward_pre_hook(lambda module, args: torch.zeros(1) / 0 @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run.decode()
    with pytest.raises(ConfigError, match="This run was closed"):
        run.decode()
    handle.remove()
    assert_as_before(subject)


def test_ctrl_c_while_the_model_computes() -> None:
    subject = subject_in_training()
    run = subject.start(BATCH, recurrences=3)
    run.advance()
    entered = threading.Event()

    def interrupt(module: nn.Module, args: Any) -> None:
        entered.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)

    handle = layer(subject, 0).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.advance([Observer()])
    assert entered.is_set()
    handle.remove()
    assert_as_before(subject)


@pytest.mark.parametrize("recurrences", [0, 1, 3])
def test_a_run_that_is_closed_early(recurrences: int) -> None:
    subject = subject_in_training()
    run = subject.start(BATCH, recurrences=3)
    for _ in range(recurrences):
        run.advance()
    run.close()
    run.close()
    assert_as_before(subject)


def test_a_run_that_is_forgotten() -> None:
    subject = subject_in_training()
    run = subject.start(BATCH, recurrences=3)
    run.advance()
    del run
    gc.collect()
    assert_as_before(subject)


def test_an_analysis_that_fails_between_recurrences() -> None:
    subject = subject_in_training()

    class Progress(SilentProgress):
        def step(self, phase: str, count: int = 1) -> None:
            raise RuntimeError("no more")

    with pytest.raises(UnforeseenError, match="no more"):
        loopscope.analyze(subject, [[1, 2, 3]], recurrences=4, horizon=4, progress=Progress())
    assert_as_before(subject)


def test_the_interpreter_ends_while_a_run_stands_still() -> None:
    script = """
        import sys
        sys.path.insert(0, "tests")
        from foreign_models import PATHS, ForeignLoop
        import loopscope
        from loopscope.models.subject import Batch

        class Watched(ForeignLoop):
            def forward(self, *args):
                try:
                    return super().forward(*args)
                finally:
                    print("unwound", flush=True)

        subject = loopscope.hook(Watched(), **PATHS)
        print("hooked", flush=True)
        run = subject.start(Batch.of([[1, 2, 3]]), recurrences=3)
        run.advance()
        print("end", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.partition("hooked\n")[2].split() == ["end", "unwound"]


def test_memory_does_not_depend_on_the_number_of_recurrences() -> None:
    alive: list[int] = []
    states: list[weakref.ref[Tensor]] = []

    class Counts(Observer):
        def visit(self, visit: Visit) -> None:
            states.append(weakref.ref(visit.residual))
            alive.append(sum(state() is not None for state in states))

        def loop_state(self, loop_state: LoopState) -> None:
            states.append(weakref.ref(loop_state.state))

    run = loopscope.hook(ForeignLoop().eval(), **PATHS).start(BATCH, recurrences=30)
    for _ in range(30):
        run.advance([Counts()])
    run.close()
    assert len(states) == 90
    assert max(alive) <= 4


def test_what_torch_keeps_for_a_thread_is_the_callers() -> None:
    seen: list[tuple[bool, bool, int]] = []

    class Looks(ForeignLoop):
        def forward(self, *args: Any) -> dict[str, Tensor]:
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()))
            return super().forward(*args)

    subject = loopscope.hook(Looks(), **PATHS)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = loopscope.capture(subject, BATCH.input_ids)
        assert torch.equal(trace.logits, subject.bare_logits(Batch(BATCH.input_ids, BATCH.mask | True), recurrences=3))
    assert seen == [(False, True, torch.get_num_threads())] * 2
    assert trace.logits.dtype == torch.bfloat16


def test_a_compiled_model_is_run_without_its_compiled_code() -> None:
    plain = ForeignLoop().eval()
    compiled = ForeignLoop().eval()
    compiled.cycle[0].compile(backend="eager")
    compiled.cycle[1] = cast(nn.Module, torch.compile(compiled.cycle[1], backend="eager"))
    whole = torch.compile(ForeignLoop().eval(), backend="eager")
    reference, *others = [
        loopscope.capture(loopscope.hook(cast(nn.Module, model), **PATHS), BATCH.input_ids)
        for model in (plain, compiled, whole)
    ]
    for trace in others:
        assert torch.equal(trace.logits, reference.logits)
        assert trace.visits == reference.visits


def test_a_paused_call_is_a_generator_whose_frames_are_anybodys() -> None:
    threads: set[int] = set()

    def deep(pauses: Pauses[int]) -> str:
        threads.add(threading.get_ident())
        for number in range(3):
            pauses.pause(number)
        return "over"

    call: SteppedCall[int, str] = SteppedCall(deep)
    assert [call.resume() for _ in range(4)] == [0, 1, 2, Returned("over")]
    with pytest.raises(RuntimeError, match="is over"):
        call.resume()
    assert threading.get_ident() not in threads
