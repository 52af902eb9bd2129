"""What a model may do that makes the states which hooks see other than its own: measured, and said or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import loopscope
from foreign_models import VOCAB, WIDTH, Block, assert_untouched
from loopscope.errors import ConfigError
from loopscope.models.contract.check import check_subject

HALTING, GOING = [1, 9, 3, 4], [1, 2, 3, 4]


class Model(nn.Module):
    """Embedding, a loop that is a subclass's matter, and a head."""

    def __init__(self, *body: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.loops = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB), 4
        self.body = nn.ModuleList(body)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.run(tokens, self.embedding(tokens)))
        return logits

    def run(self, tokens: Tensor, x: Tensor) -> Tensor:
        for turn in range(self.loops):
            x = self.step(x, turn)
        return x

    def step(self, x: Tensor, turn: int) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return x


class Step(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x + super().forward(x), x.shape[-1:])


class Halts(Model):
    """Keeps the old state of a prompt that has halted, though its layer is called for the whole batch."""

    injects = False

    def run(self, tokens: Tensor, x: Tensor) -> Tensor:
        encoded, after = x, torch.where((tokens == 9).any(-1), 2, self.loops)
        for turn in range(int(after.max())):
            entered = x + encoded if self.injects else x
            x = torch.where((turn < after)[:, None, None], self.body[0](entered), x)
        return x


class HaltsWithInjection(Halts):
    injects = True


class HaltsBeforeTheLast(Halts):
    def run(self, tokens: Tensor, x: Tensor) -> Tensor:
        for turn in range(self.loops):
            stays = ((tokens == 9).any(-1) & (turn == self.loops - 1))[:, None, None]
            x = torch.where(stays, x, self.body[0](x))
        return x


@pytest.mark.parametrize("model", [Halts, HaltsWithInjection])
def test_a_prompt_that_halts_within_a_batch_is_refused(model: type[Model]) -> None:
    subject = loopscope.hook(model(Step()).eval())
    loopscope.capture(subject, [GOING, GOING])
    with pytest.raises(ConfigError, match=r"must be the same whatever the tokens are"):
        loopscope.capture(subject, [HALTING])
    for prompts, row in (([HALTING, GOING], 0), ([GOING, HALTING], 1)):
        with pytest.raises(ConfigError, match=f"without what its layers put out for prompt {row} of the batch"):
            loopscope.capture(subject, prompts)
        with pytest.raises(ConfigError, match="stop prompts, or tokens, by itself"):
            loopscope.analyze(subject, prompts, recurrences=4, horizon=4)
    assert_untouched(subject.model)


def test_a_prompt_that_halts_before_the_very_last_recurrence_is_noticed_behind_the_loop() -> None:
    subject = loopscope.hook(HaltsBeforeTheLast(Step()).eval())
    loopscope.capture(subject, [GOING, GOING])
    for prompts, row in (([HALTING, GOING], 0), ([GOING, HALTING], 1)):
        with pytest.raises(ConfigError, match=f"put out for prompt {row} of the batch in recurrence 4 of the loop"):
            loopscope.capture(subject, prompts)
    assert_untouched(subject.model)


def test_a_model_that_runs_the_others_of_a_batch_alone_says_what_may_be() -> None:
    class Gathers(Model):
        def run(self, tokens: Tensor, x: Tensor) -> Tensor:
            for turn in range(self.loops):
                going = ~((tokens == 9).any(-1) & (turn >= 2))
                x = x.clone().index_put((going,), self.body[0](x[going]))
            return x

    subject = loopscope.hook(Gathers(Step()).eval())
    with pytest.raises(ConfigError, match="to run only some prompts of the batch, as if it had stopped the others"):
        loopscope.capture(subject, [HALTING, GOING])


def test_tokens_that_keep_their_state_are_said() -> None:
    """A mixture of recursions: the layers are called for all tokens, and some are routed past them."""

    class Routes(Model):
        def step(self, x: Tensor, turn: int) -> Tensor:
            return torch.where((x[..., :1] > 0) | (turn == 0), super().step(x, turn), x)

    subject = loopscope.hook(Routes(Step()).eval())
    assert any(sentence.startswith("Halting: of some tokens") for sentence in subject.unobservable)
    assert check_subject(subject).passed
    assert not loopscope.hook(Model(Step()).eval()).facts.keeps


def test_a_state_that_rounds_to_the_same_input_has_not_halted() -> None:
    """It converges to a fixed point bit for bit, with and without something added in between."""

    class Settles(Model):
        def step(self, x: Tensor, turn: int) -> Tensor:
            return super().step(0.01 * x, turn) + 100

    trace = loopscope.capture(loopscope.hook(Settles(Step()).eval()), [GOING, HALTING], recurrences=30)
    assert torch.equal(trace.loop_state(29), trace.loop_state(30))


class Experts(nn.Module):
    """Each multiplies all of its tokens at once, so that rounding depends on how many they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route = nn.Linear(width, 2)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        chosen = self.route(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            out[rows] = expert(flat[rows]).tanh()
        return functional.rms_norm(x + out.view_as(x), x.shape[-1:])


class Rounds(Model):
    """A causal model whose numbers change by rounding with the last token; `leak` of its mean goes to all others."""

    leak = 0.0

    def step(self, x: Tensor, turn: int) -> Tensor:
        x = x + 3e-7 * x[:, -1:] * x.abs().amax()
        return super().step(x + self.leak * x[:, -1:], turn)


def test_rounding_is_no_token_that_looks_ahead() -> None:
    subject = loopscope.hook(Rounds(Experts(256), width=256).eval())
    assert subject.facts.behind.causal
    assert subject.facts.behind.effect is None
    assert check_subject(subject).passed
    for leak in (1e-3, 1e-4):
        leaks = Rounds(Experts(256), width=256).eval()
        leaks.leak = leak
        assert not loopscope.hook(leaks).facts.behind.causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_leak_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    for causal in (True, False):
        subject = loopscope.hook(Model(Block(causal=causal)).to(dtype).eval())
        assert subject.facts.behind.causal == causal


class Accelerates(Model):
    """From the third recurrence on, it mixes in how far the whole prompt has moved."""

    begins = 2

    def step(self, x: Tensor, turn: int) -> Tensor:
        following = super().step(x, turn)
        if turn >= self.begins:
            following = following + 0.05 * (following - x).pow(2).mean().sqrt()
        return following


def test_a_leak_that_begins_late_is_found_at_the_number_that_is_run() -> None:
    subject = loopscope.hook(Accelerates(Step()).eval())
    assert not subject.facts.behind.causal
    later = Accelerates(Step()).eval()
    later.begins = 5
    subject = loopscope.hook(later)
    assert subject.facts.behind.causal
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    for recurrences in (4, 8):
        together = loopscope.capture(subject, prompts, recurrences=recurrences)
        alone = loopscope.capture(subject, prompts[1:], recurrences=recurrences)
        torch.testing.assert_close(together.logits[1:, :2], alone.logits, rtol=1e-5, atol=1e-6)
    assert any("is not causal" in sentence for sentence in subject.unobservable)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(functional.rms_norm(x, x.shape[-1:])))


class Sums(Model):
    """The sum is taken outside, and scaled where it is asked to be."""

    scale = 1.0

    def step(self, x: Tensor, turn: int) -> Tensor:
        for layer in self.body:
            x = x + self.scale * layer(x)
        return x


@pytest.mark.parametrize("layers", [1, 2])
def test_modules_that_return_branches_are_noticed(layers: int) -> None:
    subject = loopscope.hook(Sums(*[Branch() for _ in range(layers)]).eval())
    assert subject.branches is not None
    assert "what body.0 puts out is added to what it received" in subject.branches
    assert any(sentence.startswith("Layers: what body.0 puts out") for sentence in subject.unobservable)


def test_branches_that_are_scaled_may_be_branches() -> None:
    model = Sums(Branch(), Branch()).eval()
    model.scale = 0.3
    subject = loopscope.hook(model)
    assert subject.branches is not None
    assert "no watched layer receives what the one before it put out" in subject.branches
    assert loopscope.hook(Model(Step(), Step()).eval()).branches is None


def test_a_model_that_fails_beyond_its_own_number_says_when() -> None:
    class Timed(Model):
        def __init__(self) -> None:
            super().__init__(Step())
            self.times = nn.Parameter(torch.randn(4, WIDTH))

        def step(self, x: Tensor, turn: int) -> Tensor:
            return super().step(x + self.times[turn], turn)

    subject = loopscope.hook(Timed().eval())
    with pytest.raises(ConfigError, match=r"failed at recurrence 5 of 8 \(IndexError: .*its own number is 4"):
        loopscope.analyze(subject, [GOING], recurrences=4, horizon=4)
    assert any("by the number of the recurrence" in sentence for sentence in subject.unobservable)
    report = check_subject(subject)
    assert "R = 1, 3 beside 4" in str(report)


@pytest.mark.parametrize("extra", [3, -2])
def test_tokens_beside_the_prompts_are_said_with_the_shape(extra: int) -> None:
    class Registers(Model):
        def run(self, tokens: Tensor, x: Tensor) -> Tensor:
            more = torch.cat((x.new_zeros(len(x), max(extra, 0), WIDTH), x), 1)[:, max(-extra, 0) :]
            return functional.pad(super().run(tokens, more)[:, max(extra, 0) :], (0, 0, max(-extra, 0), 0))

    message = rf"received no states .*, but \(1, {11 + extra}, 12\) for \(1, 11\) tokens; "
    message += "if 3 tokens stand before the prompt's.*, say tokens_before=3" if extra > 0 else "name modules that map"
    with pytest.raises(ConfigError, match=message):
        loopscope.hook(Registers(Step()).eval(), recurrent="body", set_recurrences="loops")


class TestOfTheContract:
    """Its defaults are what was measured."""

    @pytest.mark.parametrize("causal", [True, False])
    def test_models_without_a_mask(self, causal: bool) -> None:
        assert check_subject(loopscope.hook(Model(Block(causal=causal)).eval())).passed

    def test_random_states_are_skipped_with_the_reason(self) -> None:
        class Random(Model):
            def run(self, tokens: Tensor, x: Tensor) -> Tensor:
                return super().run(tokens, x + torch.randn_like(x))

        report = check_subject(loopscope.hook(Random(Step()).eval()))
        skipped: dict[str, Any] = {check.name: check.detail for check in report.skipped}
        assert "draws random states for a whole batch" in skipped["padding"]

    def test_a_loop_that_knows_its_number(self) -> None:
        class Foresees(Model):
            def step(self, x: Tensor, turn: int) -> Tensor:
                return super().step(x * (1 + turn / self.loops), turn)

        subject = loopscope.hook(Foresees(Step()).eval())
        assert subject.facts.foresees
        assert check_subject(subject).passed


def test_a_map_that_changes_after_the_first_few_recurrences_is_no_one_map() -> None:
    class Coarse(Model):
        """An embedding for every four recurrences."""

        every = 4

        def __init__(self) -> None:
            super().__init__(Step())
            self.loops, self.times = 8, nn.Parameter(torch.randn(8, WIDTH))

        def step(self, x: Tensor, turn: int) -> Tensor:
            return super().step(x + self.times[turn // self.every], turn)

    assert loopscope.hook(Coarse().eval()).facts.one_map is False
    same = Coarse().eval()
    same.every = 8
    assert loopscope.hook(same).facts.one_map is True


class Registers(Model):
    """Three tokens in some place beside those of the text."""

    def __init__(self, place: int) -> None:
        super().__init__(Block())
        self.place, self.registers = place, nn.Parameter(torch.randn(1, 3, WIDTH))

    def run(self, tokens: Tensor, x: Tensor) -> Tensor:
        at = min(self.place, x.shape[1])
        x = super().run(tokens, torch.cat((x[:, :at], self.registers, x[:, at:]), 1))
        return torch.cat((x[:, :at], x[:, at + 3 :]), 1)


@pytest.mark.parametrize("place", [0, 4, 99])
def test_tokens_within_the_text_or_behind_it_are_not_taken_for_such_before(place: int) -> None:
    if place == 0:
        assert loopscope.hook(Registers(place).eval(), tokens_before=3).facts.behind.causal
        return
    with pytest.raises(
        ConfigError, match=r"another token 0 of 11 changes the state in place 0 of 14 before any layer, not 3\."
    ):
        loopscope.hook(Registers(place).eval(), tokens_before=3)


@pytest.mark.parametrize("tuple_of", [False, True])
def test_states_are_not_taken_for_logits(tuple_of: bool) -> None:
    class Headless(Model):
        normed = False

        def forward(self, tokens: Tensor) -> Any:
            x = self.run(tokens, self.embedding(tokens))
            x = functional.rms_norm(x, (WIDTH,)) if self.normed else x
            return (x, self.head(x)) if tuple_of else x

    model = Headless(Step()).eval()
    with pytest.raises(ConfigError, match="are the states of its last layer and no logits; give a model with a head"):
        loopscope.hook(model)
    model.normed = True
    assert any(
        one.startswith("Logits: what the model returns is as wide") for one in loopscope.hook(model).unobservable
    )


def test_of_many_answers_none_is_taken_for_the_last() -> None:
    class Supervised(Model):
        def forward(self, tokens: Tensor) -> Any:
            x, answers = self.embedding(tokens), []
            for _ in range(self.loops):
                x = self.body[0](x)
                answers.append(self.head(x))
            return answers

    model = Supervised(Step()).eval()
    with pytest.raises(
        ConfigError, match=r"returned 4 tensors of shape \(1, 11, 20\), as if it answered more than once"
    ):
        loopscope.hook(model)
    assert loopscope.hook(model, forward=lambda model, ids, mask: model(ids)[-1]).facts.carries


def test_latents_are_no_tokens() -> None:
    class Latents(Model):
        def run(self, tokens: Tensor, x: Tensor) -> Tensor:
            latents = x.mean(1, keepdim=True) + torch.linspace(0, 1, 24)[:, None]
            return super().run(tokens, latents)[:, : x.shape[1]]

    with pytest.raises(ConfigError, match="or states of others than tokens, are not supported"):
        loopscope.hook(Latents(Step()).eval(), tokens_before=13)


class Named(nn.Module):
    """Its state is `hidden`, wherever that stands."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        out: Tensor = self.step(hidden + 0.1 * context)
        return out


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_the_state_is_what_goes_round_in_whatever_argument(named: bool, other: bool) -> None:
    """Where the loop begins, it may be the same tensor as what the layer is given first."""

    class Given(Model):
        def run(self, tokens: Tensor, x: Tensor) -> Tensor:
            context = 2 * x if other else x
            for _ in range(self.loops):
                x = self.body[0](context=context, hidden=x) if named else self.body[0](context, x)
            return x

    subject = loopscope.hook(Given(Named()).eval())
    assert (subject.facts.carries, subject.facts.one_map, subject.facts.prompt_enters) == (True, True, True)
    assert check_subject(subject).passed


def test_a_loop_from_zero_to_which_the_prompt_is_added_returns_states() -> None:
    class Equilibrium(Model):
        def run(self, tokens: Tensor, x: Tensor) -> Tensor:
            state = torch.zeros_like(x)
            for _ in range(self.loops):
                state = self.body[0](state + x)
            return state

    assert loopscope.hook(Equilibrium(Step()).eval()).branches is None
