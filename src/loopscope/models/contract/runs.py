"""Checks that compare runs with each other and with the raw model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from loopscope._util.shapes import States
from loopscope.errors import LoopscopeError
from loopscope.models.contract.announcements import require_visits
from loopscope.models.contract.bench import Bench
from loopscope.models.contract.recording import Recording, require_close
from loopscope.models.contract.results import CheckFailed, CheckSkipped
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.subject import Batch

_OUTCOME = ("initial state", "state@", "logits")
"""What a run gives to those who do not watch it."""


def logits_are_raw(bench: Bench) -> str:
    """Each prompt alone, as the subject and as the raw model compute it."""
    return _against_raw(bench, bench.recurrences)


def _against_raw(bench: Bench, recurrences: int) -> str:
    expected = torch.cat([bench.raw(prompt, recurrences)[0] for prompt in bench.prompts])
    alone = [bench.start(Batch.of([prompt]), recurrences, observed=False).complete() for prompt in bench.prompts]
    got = torch.cat([run.tensors["logits"] for run in alone])
    label = f"logits at R = {recurrences}"
    limit = bench.tolerances.raw_in(bench.info.dtype, is_own=bench.raw_logits is None)
    places = [(number, token) for number, prompt in enumerate(bench.prompts) for token in range(len(prompt))]
    result = require_close({label: got}, {label: expected}, places, limit, "each prompt alone, the raw model differs")
    return f"{len(bench.prompts)} prompts, each alone: {result}"


def other_recurrences_are_honoured(bench: Bench) -> str:
    """Visits, states and logits of runs that are shorter and longer than the main one."""
    if not bench.info.is_looped:
        raise CheckSkipped("it has no loop")
    visits_fit = _visits_fit(bench)
    for count in bench.other_recurrences:
        other = bench.in_other_number(count)
        if visits_fit:
            require_visits(other, bench.info)
        if bench.same_loop:
            common = [f"state@{done}" for done in range(1, min(count, bench.recurrences) + 1)]
            require_close(
                {label: other.tensors[label] for label in common},
                {label: bench.main.tensors[label] for label in common},
                bench.main.places,
                bench.tolerances.repeated,
                f"runs of {count} and of {bench.recurrences} recurrences differ where both are",
            )
        if bench.has_raw:
            _against_raw(bench, count)
    return f"R = {', '.join(str(count) for count in bench.other_recurrences)} beside {bench.recurrences}"


def _visits_fit(bench: Bench) -> bool:
    """Whether the main run's visits are right; if not, another check tells, and once is enough."""
    try:
        require_visits(bench.main, bench.info)
    except CheckFailed:
        return False
    return True


def padding_is_not_seen(bench: Bench) -> str:
    """A padded batch against its prompts one by one, and against other ids where there is padding."""
    if isinstance(bench.subject, HookedSubject) and bench.subject.facts.random:
        raise CheckSkipped("it draws random states for a whole batch at once, so that a prompt alone has others")
    alone = [bench.start(Batch.of([prompt])).complete() for prompt in bench.prompts]
    expected = {
        label: torch.cat([_as_in_batch(run.tensors[label], label, bench.batch) for run in alone])
        for label in alone[0].tensors
    }
    main = bench.main
    result = require_close(
        main.tensors, expected, main.places, bench.regrouped, "in a padded batch and alone, a prompt differs"
    )
    if bool(bench.batch.mask.all()):
        return result
    other_ids = bench.batch.input_ids.masked_fill(~bench.batch.mask, bench.info.vocab_size - 1)
    other = bench.start(Batch(other_ids, bench.batch.mask)).complete()
    require_close(
        other.tensors, main.tensors, main.places, bench.regrouped, "with other token ids as padding, a prompt differs"
    )
    return result


def _as_in_batch(tensor: Tensor, label: str, batch: Batch) -> Tensor:
    """Maps of a prompt alone are as wide as it is long; in the batch, padding follows."""
    if not label.startswith("attention"):
        return tensor
    return functional.pad(tensor, (0, batch.input_ids.shape[1] - tensor.shape[-1]))


def runs_repeat(bench: Bench) -> str:
    """The same seed twice."""
    again = bench.start().complete()
    return _same(bench, again, bench.main, "the same run a second time differs")


def seed_decides(bench: Bench) -> str:
    """Another seed changes a random initial state, and nothing else."""
    other = bench.start(seed=bench.seed + 1).complete()
    if bench.info.state_init == "embeddings" or not bench.info.is_looped:
        return _same(bench, other, bench.main, "another seed differs, although nothing is drawn at random")
    label = "initial state" if "initial state" in bench.main.tensors else "state@1"
    changed = other.tensors[label] != bench.main.tensors[label]
    if bench.info.state_init is None:
        return f"another seed gives {'another' if bool(changed.any()) else 'the same'} {label}"
    for (prompt, token), row in zip(bench.main.places, changed, strict=True):
        if not bool(row.any()):
            raise CheckFailed(
                f"{label}: prompt {prompt}, token {token} has the same state with the seeds {bench.seed} and "
                f"{bench.seed + 1}, expected another, as info.state_init is 'normal'"
            )
    return f"seeds {bench.seed} and {bench.seed + 1} start elsewhere at every token"


def initial_state_is_honoured(bench: Bench) -> str:
    """A run from a given state starts there, and from its own state is the same run."""
    other = bench.subject.other_initial_state(bench.batch, bench.seed)
    if not bench.info.can_start_elsewhere:
        if other is not None:
            raise CheckFailed(
                f"other_initial_state gives a state, expected None with injection {bench.info.injection!r}"
            )
        raise CheckSkipped("the prompt enters by the initial state, so that another would be another prompt")
    if other is None:
        raise CheckFailed(f"other_initial_state gives None, expected a state with injection {bench.info.injection!r}")
    own = _run_from(bench, bench.main.originals["initial state"])
    result = _same(bench, own, bench.main, "the run from its own initial state, given to it, differs")
    elsewhere = _run_from(bench, other)
    start = {"initial state": elsewhere.at_tokens(other)}
    require_close(elsewhere.tensors, start, elsewhere.places, 0.0, "the run does not start from the given state")
    for label in ("initial state", "injected@1"):
        if torch.equal(elsewhere.tensors[label], bench.main.tensors[label]):
            raise CheckFailed(f"{label} is the same from the other initial state, expected another")
    return result


def _run_from(bench: Bench, state: object) -> Recording:
    assert isinstance(state, torch.Tensor)
    return bench.start(initial_state=state).complete()


def observing_changes_nothing(bench: Bench) -> str:
    """A run of which every visit and map is looked at, against one that nobody watches."""
    return _same(bench, bench.unobserved, bench.main, "unobserved, the run differs")


def decoding_disturbs_nothing(bench: Bench) -> str:
    """Logits asked for on the way are those of a shorter run, or of a state that is given, and leave the run as it
    was.
    """
    if not bench.info.is_looped:
        raise CheckSkipped("it has no loop")
    decoded: list[Tensor] = []
    again: Tensor | None = None
    with bench.start(observed=False) as run:
        first: States | None = None
        for _ in range(bench.recurrences):
            run.advance()
            try:
                decoded.append(run.recording.at_tokens(run.run.decode()))
            except LoopscopeError as error:
                raise CheckSkipped(f"it cannot be decoded on the way: {error}") from error
            first = run.run.state if first is None else first
        if bench.info.state_can_be_set and first is not None:
            again = run.recording.at_tokens(run.run.decode(state=first))
        whole = run.finish()
    result = _same(bench, whole, bench.unobserved, "after decoding on the way, the run differs")
    if again is not None:
        require_close(
            {"logits@1": again},
            {"logits@1": decoded[0]},
            bench.main.places,
            bench.tolerances.repeated,
            "decoded after the first recurrence, and later of the state that it left, the result differs",
        )
    if bench.same_loop:
        _decoded_shorter(bench, decoded[0])
    return result


def _decoded_shorter(bench: Bench, decoded: Tensor) -> None:
    """The logits after one recurrence of the long run are those of a run of one."""
    with bench.start(recurrences=1, observed=False) as short:
        short.advance()
        expected = short.recording.at_tokens(short.run.decode())
        short.finish()
    require_close(
        {"logits@1": decoded},
        {"logits@1": expected},
        bench.main.places,
        bench.tolerances.repeated,
        f"decoded after 1 of {bench.recurrences} recurrences and in a run of 1, the result differs",
    )


def rounding_error_is_given(bench: Bench) -> str:
    """The estimate has its shape, is finite at real tokens, and leaves the run as it was."""
    info = bench.info
    if not info.is_looped:
        raise CheckSkipped("it has no loop")
    with bench.start(observed=False) as run:
        run.advance()
        error = run.run.rounding_error()
        for _ in range(1, bench.recurrences):
            run.advance()
        whole = run.finish()
    _same(bench, whole, bench.unobserved, "after rounding_error, the run differs")
    if error is None:
        raise CheckSkipped("it cannot tell its rounding error; without one, no noise floor is known")
    expected = (info.recurrent, *bench.batch.input_ids.shape)
    if error.shape != expected:
        raise CheckFailed(f"rounding_error has shape {tuple(error.shape)}, expected {expected}")
    values = torch.stack([run.recording.at_tokens(layer) for layer in error])
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise CheckFailed("rounding_error has negative or infinite entries at real tokens, expected relative errors")
    return f"at most {float(values.max()):.2g}"


def runs_take_turns(bench: Bench) -> str:
    """Two runs advanced in turn, as two initial states are followed side by side."""
    backwards = Batch.of(list(reversed(bench.prompts)))
    with (
        bench.start() as first,
        bench.start(backwards, seed=bench.seed + 1) as second,
    ):
        for _ in range(bench.recurrences):
            first.advance()
            second.advance()
        second.finish()
        return _same(bench, first.finish(), bench.main, "with another run in between, the run differs")


def abandoned_runs_leave_nothing(bench: Bench) -> str:
    """A run that is closed on the way; closing twice is allowed."""
    with bench.start(seed=bench.seed + 1) as run:
        if bench.recurrences > 1:
            run.advance()
        run.run.close()
    again = bench.start().complete()
    return _same(bench, again, bench.main, "after a run that was closed on the way, the run differs")


def _same(bench: Bench, got: Recording, expected: Recording, what: str) -> str:
    """The same computation twice: all that was announced is equal, or all that an unobserved run gives."""
    wanted = expected.of() if got.events else expected.of(*_OUTCOME)
    return require_close(got.tensors, wanted, expected.places, bench.tolerances.repeated, what)
