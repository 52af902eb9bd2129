"""`capture`: every state of one run by name, and a clear sentence for what does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import loopscope
from loopscope import LoopedTransformer, Observer, Visit
from loopscope.errors import ConfigError, NonFiniteError, PromptError
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch, Run, Subject
from loopscope.models.visits import LoopState
from random_model import random_ids, random_model
from small_models import INJECTED, hooked_native

FEED_FORWARD: dict[str, Any] = {
    "prelude": 3,
    "recurrent": 0,
    "coda": 0,
    "recurrences": 1,
    "injection": "none",
    "state_init": "embeddings",
}


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    return random_model()


@pytest.fixture(scope="module")
def feed_forward() -> LoopedTransformer:
    return random_model(**FEED_FORWARD)


def test_visits_come_in_the_order_of_the_run(model: LoopedTransformer) -> None:
    trace = loopscope.capture(model, random_ids(2, 5), recurrences=2)
    assert trace.visits == [
        ("prelude", 0, 0),
        ("recurrent", 0, 1),
        ("recurrent", 1, 1),
        ("recurrent", 0, 2),
        ("recurrent", 1, 2),
        ("coda", 0, 0),
    ]
    assert len(trace.visits) == model.architecture.visits(2)


def test_shapes_and_dtypes_are_those_documented(model: LoopedTransformer) -> None:
    trace = loopscope.capture(model, random_ids(2, 5), attention=True)
    for visit in trace.visits:
        assert trace.residual(*visit).shape == (2, 5, 12)
        assert trace.attention(*visit).shape == (2, 4, 5, 5)
    for recurrence in range(1, 4):
        assert trace.loop_state(recurrence).shape == trace.injected(recurrence).shape == (2, 5, 12)
    assert trace.initial_state.shape == (2, 5, 12)
    assert trace.logits.shape == (2, 5, 19)
    assert not trace.logits.requires_grad


def test_states_are_named_by_what_carries_them_on(model: LoopedTransformer) -> None:
    """Each named state, computed from the one before it by the model's own parts."""
    trace = loopscope.capture(model, random_ids(2, 5))
    sequence = model.encode(trace.input_ids)
    states = [trace.initial_state, *(trace.loop_state(recurrence) for recurrence in range(1, 4))]
    for recurrence in range(1, 4):
        assert torch.equal(
            trace.injected(recurrence), model.inject(states[recurrence - 1], trace.residual("prelude", 0))
        )
        after, _ = model.recurrent[0](trace.injected(recurrence), sequence.context)
        assert torch.equal(trace.residual("recurrent", 0, recurrence), after)
        assert torch.equal(trace.residual("recurrent", 1, recurrence), states[recurrence])
    assert torch.equal(model.decode(trace.loop_state(3), sequence), trace.logits)


def test_the_loop_state_is_normed_where_the_recurrence_ends_with_a_norm() -> None:
    model = random_model(loop_norm="recurrence", coda=0)
    trace = loopscope.capture(model, random_ids(1, 4))
    raw = trace.residual("recurrent", 1, 3)
    assert torch.equal(trace.loop_state(3), model.norm(raw))
    assert not torch.allclose(trace.loop_state(3), raw)
    assert torch.equal(trace.logits, model.unembed(trace.loop_state(3)))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_does_not_change_the_output(attention: bool, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    ids = random_ids(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, :2] = False
    trace = loopscope.capture(model, ids, recurrences=4, attention=attention, attention_mask=mask, seed=8)
    assert torch.equal(trace.logits, model(ids, recurrences=4, attention_mask=mask, seed=8))


def test_a_feed_forward_models_layers_are_its_prelude(feed_forward: LoopedTransformer) -> None:
    ids = random_ids(2, 5)
    trace = loopscope.capture(feed_forward, ids)
    assert trace.visits == [("prelude", 0, 0), ("prelude", 1, 0), ("prelude", 2, 0)]
    assert trace.recurrences == 0
    assert torch.equal(trace.logits, feed_forward(ids))
    assert torch.equal(trace.initial_state, trace.residual("prelude", 2))
    assert torch.equal(loopscope.capture(feed_forward, ids, recurrences=1).logits, trace.logits)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (("recurrent", 2, 1), "no visit of layer 2 in the recurrent at recurrence 1; the recurrent has 2 layers"),
        (("recurrent", 0, 0), "at recurrence 0; .* the trace 3 recurrences, counted from 1"),
        (("recurrent", 0, 4), "at recurrence 4; .* the trace 3 recurrences, counted from 1"),
        (("recurrent", -1, 1), "layer -1"),
        (("prelude", 0, 1), "no visit of layer 0 in the prelude at recurrence 1"),
        (("coda", 1, 0), "the coda has 1 layers"),
    ],
)
def test_a_visit_that_was_not_made_is_a_key_error(
    model: LoopedTransformer, site: tuple[Any, int, int], message: str
) -> None:
    trace = loopscope.capture(model, random_ids(1, 3), attention=True)
    with pytest.raises(KeyError, match=message):
        trace.residual(*site)
    with pytest.raises(KeyError, match=message):
        trace.attention(*site)


@pytest.mark.parametrize("recurrence", [-1, 0, 4])
def test_a_recurrence_that_was_not_run_is_a_key_error(model: LoopedTransformer, recurrence: int) -> None:
    trace = loopscope.capture(model, random_ids(1, 3))
    message = f"no recurrence {recurrence}; the trace has 3, counted from 1"
    with pytest.raises(KeyError, match=message):
        trace.loop_state(recurrence)
    with pytest.raises(KeyError, match=message):
        trace.injected(recurrence)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_ids_may_be_tensors_arrays_or_lists_of_one_or_more_prompts(model: LoopedTransformer, dtype: type) -> None:
    ids = random_ids(2, 5)
    expected = loopscope.capture(model, ids).logits
    array: np.ndarray = ids.numpy().astype(dtype)
    for same in (array, torch.from_numpy(array), array.tolist()):
        assert torch.equal(loopscope.capture(model, same).logits, expected)
    for one in (ids[0], array[0], array[0].tolist()):
        torch.testing.assert_close(loopscope.capture(model, one).logits, expected[:1], rtol=1e-11, atol=1e-11)


def test_lists_of_different_lengths_are_padded_on_the_right(model: LoopedTransformer) -> None:
    trace = loopscope.capture(model, [[3], [5, 6, 7]])
    assert trace.mask.tolist() == [[True, False, False], [True, True, True]]
    alone = loopscope.capture(model, [3])
    torch.testing.assert_close(trace.logits[0, :1], alone.logits[0], rtol=1e-11, atol=1e-11)


def test_one_prompt_may_have_a_mask_of_its_own_shape(model: LoopedTransformer) -> None:
    mask = torch.tensor([False, True, True])
    trace = loopscope.capture(model, torch.tensor([0, 5, 6]), attention_mask=mask)
    alone = loopscope.capture(model, [5, 6])
    torch.testing.assert_close(trace.logits[0, 1:], alone.logits[0], rtol=1e-11, atol=1e-11)


def test_a_given_initial_state_is_where_the_loop_starts(model: LoopedTransformer) -> None:
    state = torch.full((1, 3, 12), 0.25, dtype=torch.float32)
    trace = loopscope.capture(model, random_ids(1, 3), initial_state=state)
    assert torch.equal(trace.initial_state, state.double())
    assert not torch.allclose(trace.logits, loopscope.capture(model, random_ids(1, 3)).logits)


IDS = random_ids(2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": [[0, 19]]}, "between 0 and 18, the model's vocabulary"),
        ({"input_ids": [[0, -1]]}, "between 0 and 18"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [[1], []]}, "input_ids is empty"),
        (
            {"input_ids": torch.zeros(0, 3, dtype=torch.int64)},
            r"whole numbers of shape \(batch, token\), got .*\(0, 3\)",
        ),
        ({"input_ids": torch.zeros(1, 1, 3, dtype=torch.int64)}, r"got torch.int64 \(1, 1, 3\)"),
        ({"input_ids": torch.zeros(1, 3)}, "got torch.float32"),
        ({"input_ids": np.zeros((1, 3), dtype=bool)}, "got torch.bool"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\), input_ids \(2, 3\)"),
        ({"input_ids": [[1], [2, 3]], "attention_mask": torch.ones(2, 2)}, "goes with a tensor of input_ids"),
        ({"initial_state": torch.zeros(2, 3, 11)}, r"shape \(2, 3, 11\); .* need \(2, 3, 12\)"),
        ({"initial_state": torch.zeros(1, 3, 12)}, r"shape \(1, 3, 12\); .* need \(2, 3, 12\)"),
        ({"recurrences": 0}, "recurrences must be at least 1, got 0"),
        ({"input_ids": "The cat sat"}, "unnamed has no tokenizer, so that it takes token ids and no text"),
        ({"input_ids": ["The cat", "sat"]}, "unnamed has no tokenizer"),
        ({"input_ids": ["The cat", 3]}, "token ids and texts mixed"),
        ({"input_ids": [[1, 2.0]]}, "must be lists of whole numbers, got"),
        ({"input_ids": [1, [2]]}, "must be lists of whole numbers, got"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "hides a whole prompt"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear failed when it was tried on a few tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model: LoopedTransformer, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": model, "input_ids": IDS} | options
    with pytest.raises(ConfigError, match=message):
        loopscope.capture(**arguments)


def test_token_ids_may_be_of_any_library(model: LoopedTransformer) -> None:
    expected = loopscope.capture(model, [[1, 2, 3], [4, 5]]).logits
    for given in ([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], [np.array([1, 2, 3]), (4, 5)]):
        assert torch.equal(loopscope.capture(model, given).logits, expected)
    assert torch.equal(
        loopscope.capture(model, list(np.array([4, 5]))).logits[0], loopscope.capture(model, [4, 5]).logits[0]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_initial_state_that_is_not_finite_is_refused(model: LoopedTransformer, bad: float) -> None:
    state = torch.zeros(2, 3, 12)
    state[1, 2, 5] = bad
    with pytest.raises(NonFiniteError, match="initial_state holds NaN or infinity"):
        loopscope.capture(model, IDS, initial_state=state)


@pytest.mark.parametrize("options", [{"recurrences": 2}, {"initial_state": torch.zeros(2, 3, 12)}])
def test_a_feed_forward_model_has_no_loop_to_set(feed_forward: LoopedTransformer, options: dict[str, Any]) -> None:
    given = "recurrences=2" if "recurrences" in options else "initial_state"
    message = f"has no recurrent layers, so {given} means nothing"
    with pytest.raises(ConfigError, match=message):
        loopscope.capture(feed_forward, IDS, **options)
    with pytest.raises(ConfigError, match=message):
        feed_forward(IDS, **options)


def test_a_folder_or_a_subject_is_captured_as_its_model(model: LoopedTransformer, tmp_path: Path) -> None:
    expected = loopscope.capture(model, IDS).logits
    assert torch.equal(loopscope.capture(NativeSubject(model), IDS).logits, expected)
    save_checkpoint(tmp_path, model)
    narrow = loopscope.capture(tmp_path, IDS).logits
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double().cpu(), expected, rtol=1e-3, atol=1e-4)


def test_logits_after_a_recurrence_are_those_of_a_run_that_ends_there(model: LoopedTransformer) -> None:
    trace = loopscope.capture(model, IDS, recurrences=3)
    for recurrence in range(1, 4):
        alone = loopscope.capture(model, IDS, recurrences=recurrence).logits
        assert torch.equal(trace.logits_at(recurrence), alone)
    with pytest.raises(KeyError, match="There is no recurrence 4"):
        trace.logits_at(4)


def test_a_hooked_model_is_decoded_as_it_runs() -> None:
    native, hooked = hooked_native(INJECTED)
    told = loopscope.capture(hooked, IDS, recurrences=3, readout=True)
    known = loopscope.capture(native, IDS, recurrences=3)
    for recurrence in range(1, 4):
        torch.testing.assert_close(told.logits_at(recurrence), known.logits_at(recurrence))
    with pytest.raises(ConfigError, match=r"call capture\(\.\.\., readout=True\)"):
        loopscope.capture(hooked, IDS, recurrences=3).logits_at(1)


def test_a_subject_is_called_as_its_model_is_with_ids_or_text() -> None:
    native, hooked = hooked_native(INJECTED)
    for subject in (native, hooked):
        assert torch.equal(subject(IDS, recurrences=3), loopscope.capture(subject, IDS, recurrences=3).logits)
    demo = loopscope.load("demo:injected")
    text = "Ann has 3 apples."
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode(text).ids
    assert torch.equal(demo(text, recurrences=2), loopscope.capture(demo, [ids], recurrences=2).logits)
    assert torch.equal(loopscope.capture(demo, [text], recurrences=2).logits, demo(ids, recurrences=2))
    assert demo.tokenizer.decode(ids, skip_special_tokens=True) == text
    with pytest.raises(PromptError, match="99999 is the number of no token"):
        demo.tokenizer.decode([99999])


def test_what_a_notebook_shows_is_short_and_no_markup() -> None:
    subject = NativeSubject(random_model(), name="<b>mine</b>")
    trace = loopscope.capture(subject, IDS, recurrences=2)
    assert repr(trace) == (
        "<Trace of <b>mine</b>: 2 prompts of 6 tokens, 2 recurrences, 6 residual states, 0 attention maps>"
    )
    for shown in (subject, trace):
        assert "&lt;b&gt;mine" in shown._repr_html_()
        assert "<b>" not in shown._repr_html_()
        assert len(repr(shown)) < 200


def test_some_visits_alone_are_kept_and_no_more_is_run(model: LoopedTransformer) -> None:
    whole = loopscope.capture(model, IDS, recurrences=5, attention=True)
    asked = [("prelude", 0, 0), ("recurrent", 1, 2)]
    some = loopscope.capture(model, IDS, recurrences=5, attention=True, sites=asked)  # type: ignore[arg-type]
    assert some.visits == asked
    assert some.recurrences == 2
    for site in some.visits:
        assert torch.equal(some.residual(*site), whole.residual(*site))
        assert torch.equal(some.attention(*site), whole.attention(*site))
    with pytest.raises(ConfigError, match=r"This trace has no logits: .* keeps those visits alone"):
        _ = some.logits
    with pytest.raises(ConfigError, match="no states between layers"):
        some.loop_state(1)
    to_the_end = loopscope.capture(model, IDS, recurrences=5, sites=[("coda", 0, 0)])
    assert torch.equal(to_the_end.logits, whole.logits)
    with pytest.raises(ConfigError, match=r"sites has \('recurrent', 1, 6\); a run of unnamed with 5 recurrences"):
        loopscope.capture(model, IDS, recurrences=5, sites=[("recurrent", 1, 6)])


def test_observers_are_told_what_a_trace_keeps(model: LoopedTransformer) -> None:
    told: list[str] = []

    class Diary(Observer):
        def visit(self, visit: Visit) -> None:
            told.append(visit.label)

        def injected(self, recurrence: int, state: Tensor) -> None:
            told.append(f"injected {recurrence}")

        def loop_state(self, loop_state: LoopState) -> None:
            told.append(f"end {loop_state.recurrence}")

    model(IDS, recurrences=2, observers=[Diary()])
    assert told == [
        "prelude.0",
        *("injected 1", "recurrent.0@1", "recurrent.1@1", "end 1"),
        *("injected 2", "recurrent.0@2", "recurrent.1@2", "end 2"),
        "coda.0",
    ]


def test_the_native_subject_keeps_the_contract(model: LoopedTransformer) -> None:
    subject = NativeSubject(model)
    assert isinstance(subject, Subject)
    run = subject.start(Batch.of([[1, 2]]), recurrences=1)
    assert isinstance(run, Run)
    run.advance()
    first = run.decode()
    assert torch.equal(run.decode(), first), "decoding leaves the run where it stands"
    run.advance()
    assert torch.equal(run.decode(), model(torch.tensor([[1, 2]]), recurrences=2))
