"""What is measured of a module when it is hooked, since taking it for granted would give wrong numbers in silence."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import loopscope
from foreign_models import HEADS, PATHS, VOCAB, WIDTH, Block, ForeignLoop, assert_untouched
from loopscope.errors import ConfigError
from loopscope.models.contract.check import check_subject
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.subject import Batch
from loopscope.models.visits import Observer

IDS = [[3, 1, 4, 1, 5, 9]]


class Plain(nn.Module):
    """Two layers, `loops` times, from the embeddings; how a layer is called is a subclass's matter."""

    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
            self.body = nn.ModuleList([type(self).block() for _ in range(2)])
        self.loops = 3

    def forward(self, tokens: Tensor) -> Tensor:
        state = embedded = self.embedding(tokens)
        for turn in range(self.loops):
            for index in range(2):
                state = self.apply_layer(index, turn, state, embedded)
        logits: Tensor = self.head(state)
        return logits

    def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
        applied: Tensor = self.body[index](state)
        return applied


def hooked(model: nn.Module, **changes: Any) -> HookedSubject:
    return loopscope.hook(model.eval(), **{"recurrent": "body", "set_recurrences": "loops"} | changes)


class TakesTwo(Block):
    """Adds the prompt to the state itself."""

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + prompt)


class Argument(Plain):
    block = TakesTwo

    def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
        added: Tensor = self.body[index](state, embedded)
        return added


class Named(Plain):
    block = TakesTwo

    def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
        added: Tensor = self.body[index](prompt=embedded, x=state)
        return added


class BetweenLayers(Plain):
    def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
        added: Tensor = self.body[index](state if index == 0 else state + embedded)
        return added


@pytest.mark.parametrize("model", [Argument, Named, BetweenLayers])
def test_an_injection_within_the_loop_is_not_taken_for_none(model: type[Plain]) -> None:
    """The first layer receives the loop state unchanged, and yet the prompt enters in every recurrence."""
    subject = hooked(model())
    assert subject.facts.carries
    assert subject.info.injection is None
    assert any(sentence.startswith("Injection: the prompt enters within") for sentence in subject.unobservable)
    trace = loopscope.capture(subject, IDS)
    assert torch.equal(trace.initial_state, subject.model.get_submodule("embedding")(torch.tensor(IDS)))
    assert torch.equal(trace.injected(2), trace.loop_state(1))


def test_a_loop_that_only_its_initial_state_tells_of_the_prompt_has_no_injection() -> None:
    for subject in (hooked(Plain()), loopscope.hook(Plain(), recurrent="body")):
        assert subject.info.injection == "none"
        check_subject(subject, other_recurrences=None if subject.settable else ())


class Foresees(Plain):
    def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
        return super().apply_layer(index, turn, state * (1 + turn / self.loops), embedded)


def test_a_loop_that_knows_how_often_it_will_run_has_no_answer_on_the_way() -> None:
    subject = hooked(Foresees())
    assert any(sentence.startswith("Convergence: the loop knows") for sentence in subject.unobservable)
    trace = loopscope.capture(subject, IDS, recurrences=4)
    run = subject.start(Batch.of(IDS), recurrences=4)
    run.advance()
    with pytest.raises(
        ConfigError, match=r"depends on how often it will run, .* after 1 of 4 recurrences; start a run"
    ):
        run.decode()
    for _ in range(3):
        run.advance()
    assert torch.equal(run.decode(), trace.logits)
    run.close()
    # An analysis compares runs of different numbers of recurrences.
    with pytest.raises(ConfigError, match="depends on how often it will run"):
        loopscope.analyze(subject, IDS, recurrences=4, horizon=4)
    assert not hooked(Plain()).facts.foresees


def test_a_model_that_has_an_embedding_for_each_of_its_recurrences_is_not_asked_for_more() -> None:
    class Timed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.times = nn.Embedding(3, WIDTH)

        def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
            return super().apply_layer(index, turn, state + self.times.weight[turn], embedded)

    assert hooked(Timed()).info.trained_recurrences == 3


class OwnGenerator(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, tokens: Tensor) -> Tensor:
        noise = torch.randn(*tokens.shape, VOCAB, generator=self.generator)
        return super().forward(tokens) + noise


class Remembers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(tokens) * self.calls


@pytest.mark.parametrize("model", [OwnGenerator, Remembers])
def test_a_model_whose_runs_differ_is_refused(model: type[Plain]) -> None:
    bare = model()
    with pytest.raises(ConfigError, match="gives other numbers when it is run again"):
        hooked(bare)
    assert_untouched(bare)


class MapFirst(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x @ x.transpose(1, 2), super().forward(x)


class Tuples(Plain):
    block = MapFirst

    def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
        applied: Tensor = self.body[index](state)[1]
        return applied


def test_a_map_that_is_handed_out_before_the_state_is_not_taken_for_it() -> None:
    with pytest.raises(ConfigError, match=r"first outputs differ in width .* whose first output is the state"):
        hooked(Tuples())


@dataclass
class Answer:
    cost: float
    hidden: Tensor


class Wrapping(Block):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return Answer(0.0, super().forward(x))


class Mapping(Block):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return {"cost": 0.0, "hidden": super().forward(x)}


@pytest.mark.parametrize("block", [Wrapping, Mapping])
def test_layers_may_return_mappings_and_dataclasses(block: type[nn.Module]) -> None:
    class Model(Plain):
        def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
            answer = self.body[index](state)
            applied: Tensor = answer["hidden"] if isinstance(answer, dict) else answer.hidden
            return applied

    Model.block = block
    plain, subject = hooked(Plain()), hooked(Model())
    subject.model.load_state_dict(plain.model.state_dict())
    traces = [loopscope.capture(each, IDS) for each in (plain, subject)]
    for site in traces[0].visits:
        assert torch.equal(traces[0].residual(*site), traces[1].residual(*site))


class Ahead(ForeignLoop):
    """Looks ahead, and reads the mask as if it named the padding."""

    def __init__(self) -> None:
        super().__init__(causal=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(tokens, None if attention_mask is None else ~attention_mask)


class Fails(ForeignLoop):
    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        if attention_mask is not None:
            raise NotImplementedError("no padding here")
        return super().forward(tokens)


@pytest.mark.parametrize(
    ("model", "message"),
    [(Ahead, r"its logits change by [\d.]+ of their size"), (Fails, r"fails with NotImplementedError \(no padding")],
)
def test_prompts_whose_numbers_padding_changes_are_run_apart(model: type[ForeignLoop], message: str) -> None:
    subject = loopscope.hook(model().eval(), **PATHS)
    assert any(re.match(f"Padding: when a prompt is padded, .*{message}", each) for each in subject.unobservable)
    prompts = [[1, 2, 3, 7], [4, 5], [6], [8, 9]]
    whole = loopscope.capture(subject, prompts, recurrences=5, attention=True)
    for row, ids in enumerate(prompts):
        alone = loopscope.capture(subject, [ids], recurrences=5, attention=True)
        close(whole.logits[row, : len(ids)], alone.logits[0])
        for site in alone.visits:
            close(whole.residual(*site)[row, : len(ids)], alone.residual(*site)[0])
            maps = whole.attention(*site)[row]
            close(maps[:, : len(ids), : len(ids)], alone.attention(*site)[0])
            assert float(maps.sum()) == pytest.approx(float(alone.attention(*site)[0].sum()), rel=1e-5)
    study = loopscope.analyze(subject, prompts, recurrences=4, horizon=4, batch_size=4)
    one_by_one = loopscope.analyze(subject, prompts, recurrences=4, horizon=4, batch_size=1)
    for name in ("residual_norm", "token_relative_step", "loss", "noise_floor_measured"):
        if name in study.dataset:
            np.testing.assert_allclose(study.dataset[name], one_by_one.dataset[name], rtol=1e-4, atol=1e-6)
    assert_untouched(subject.model)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_padding_before_a_prompt_is_refused() -> None:
    """The model would count its positions from the padding on, or look at it where it takes no mask."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    for subject in (hooked(Plain()), loopscope.hook(ForeignLoop(), **PATHS)):
        with pytest.raises(ConfigError, match="put padding behind the prompts"):
            loopscope.capture(subject, torch.tensor(IDS), attention_mask=mask)


class Buffered(Block):
    """Writes its keys, and the mask, into buffers that every call uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.zeros(1, HEADS, 16, WIDTH // HEADS)
        self.allowed = torch.zeros(16, 16, dtype=torch.bool)
        self.calls = 0

    def attend(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        tokens = x.shape[1]
        keys, mask = self.keys[:, :, :tokens].copy_(key), self.allowed[:tokens, :tokens]
        mask.fill_(True).tril_()
        mixed: Tensor = self.out(
            functional.scaled_dot_product_attention(query, keys, value, mask).transpose(1, 2).flatten(-2)
        )
        return mixed


def test_keys_that_the_model_overwrites_are_copied() -> None:
    class Model(Plain):
        block = Buffered

    plain, buffered = hooked(Plain()), hooked(Model())
    assert buffered.facts.overwrites
    traces = [loopscope.capture(subject, IDS, attention=True) for subject in (plain, buffered)]
    for site in traces[0].visits:
        torch.testing.assert_close(traces[1].attention(*site), traces[0].attention(*site), rtol=1e-5, atol=1e-6)


def test_a_function_that_is_compiled_within_a_layer_is_run_as_it_is_written() -> None:
    @torch.compile(backend="eager")
    def attend(block: Block, x: Tensor) -> Tensor:
        return Block.attend(block, x, None)

    class Compiled(Block):
        def attend(self, x: Tensor, allowed: Tensor | None) -> Tensor:
            mixed: Tensor = attend(self, x)
            return mixed

    class Model(Plain):
        block = Compiled

    plain, compiled = hooked(Plain()), hooked(Model())
    traces = [loopscope.capture(subject, IDS, attention=True) for subject in (plain, compiled)]
    for site in traces[0].visits:
        assert torch.equal(traces[0].attention(*site), traces[1].attention(*site))


def test_threads_may_run_one_model_at_once() -> None:
    subject = loopscope.hook(ForeignLoop(random_state=True), **PATHS)
    expected = {count: loopscope.capture(subject, IDS, recurrences=count, seed=count).logits for count in (2, 5)}
    failures: list[object] = []

    def work(count: int) -> None:
        try:
            for _ in range(12):
                logits = loopscope.capture(subject, IDS, recurrences=count, seed=count).logits
                if not torch.equal(logits, expected[count]):
                    failures.append(count)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(count,)) for count in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_untouched(subject.model)
    assert subject.model.training


def test_a_run_that_an_observer_of_another_closes() -> None:
    subject = loopscope.hook(ForeignLoop().eval(), **PATHS)
    other, run = (subject.start(Batch.of(IDS), recurrences=3) for _ in range(2))

    class Closes(Observer):
        def injected(self, recurrence: int, state: Tensor) -> None:
            other.close()

    for _ in range(3):
        run.advance([Closes()])
    assert torch.equal(run.decode(), loopscope.capture(subject, IDS).logits)
    run.close()
    assert_untouched(subject.model)


def test_a_number_of_recurrences_that_depends_on_the_tokens_is_said() -> None:
    class Varies(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            self.loops = int(tokens.max())
            return super().forward(tokens)

    subject = loopscope.hook(Varies(), recurrent="body")
    assert loopscope.capture(subject, [[1, 2, 0]]).recurrences == 2
    for tokens in ([1, 1], [1, 5]):
        with pytest.raises(ConfigError, match=r"2 recurrences were to be run: .* the same whatever the tokens are"):
            loopscope.capture(subject, [tokens])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eager", [True, False])
def test_half_precision_keeps_the_contract(dtype: torch.dtype, eager: bool) -> None:
    check_subject(loopscope.hook(ForeignLoop(eager=eager).to(dtype), **PATHS))


def test_weights_and_signatures_that_are_not_there_are_said() -> None:
    with pytest.raises(ConfigError, match="has weights on the device 'meta'"):
        hooked(Plain().to("meta"))
    with pytest.deprecated_call():
        traced = torch.jit.trace(Plain().eval(), torch.tensor(IDS))
    with pytest.raises(ConfigError, match="does not say what its forward takes"):
        loopscope.hook(traced, recurrent="body")


def test_layers_with_different_numbers_of_heads_have_maps_and_no_common_number() -> None:
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.body[1] = Heads(2)

    subject = hooked(Model())
    assert subject.info.heads is None
    assert any(sentence.startswith("Heads: the layers have different numbers") for sentence in subject.unobservable)
    check_subject(subject)
    trace = loopscope.capture(subject, IDS, attention=True)
    assert [trace.attention("recurrent", layer, 1).shape[1] for layer in (0, 1)] == [HEADS, 2]


class Heads(Block):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def attend(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


def test_state_and_prompt_may_enter_the_first_layer_side_by_side() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapt, self.block = nn.Linear(2 * WIDTH, WIDTH), Block()

        def forward(self, both: Tensor) -> Tensor:
            state: Tensor = self.block(self.adapt(both))
            return state

    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.body[0] = Adapter()

        def apply_layer(self, index: int, turn: int, state: Tensor, embedded: Tensor) -> Tensor:
            both = torch.cat((state, embedded), dim=-1) if index == 0 else state
            return super().apply_layer(index, turn, both, embedded)

    subject = hooked(Model())
    assert subject.info.injection is None
    assert subject.info.width == WIDTH
    check_subject(subject)
    assert loopscope.capture(subject, IDS).injected(2).shape == (1, 6, 2 * WIDTH)
