"""Loops that are found by themselves: from the order in which a model calls its layers, and from what changes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import loopscope
from foreign_models import VOCAB, WIDTH, Block, ForeignLoop, assert_untouched
from loopscope.analysis.settings import parts_except
from loopscope.errors import ConfigError
from loopscope.models.hooks.how_often import Repeats, find_repeats, is_one_loop, order_in_words

IDS = [[3, 1, 4, 1, 5, 9]]


@given(st.integers(0, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 4))
def test_one_loop_is_found_wherever_it_lies(before: int, length: int, times: int, after: int) -> None:
    block = list(range(before, before + length))
    order = [*range(before), *block * times, *range(before + length, before + length + after)]
    found = find_repeats(order)
    assert found == Repeats(before, length, times)
    assert is_one_loop(order, found)


@pytest.mark.parametrize(
    ("order", "found", "one"),
    [
        ([0, 1, 2], None, False),
        ([0, 0, 0, 1, 0, 0, 0, 1], Repeats(0, 4, 2), True),  # a stack within a stack: the outer loop
        ([0, 1, 1, 2, 2, 2, 3], Repeats(3, 1, 3), False),  # two loops
        ([0, 1, 0, 1, 2, 0, 1, 0, 1], Repeats(0, 2, 2), False),
        ([1, 2, 1, 2, 1], Repeats(0, 2, 2), False),  # half a recurrence more
    ],
)
def test_orders_that_are_more_than_one_loop(order: list[int], found: Repeats | None, one: bool) -> None:
    assert find_repeats(order) == found
    assert (found is not None and is_one_loop(order, found)) == one


class Model(nn.Module):
    """Embedding and head; how often it loops over what is a subclass's matter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
            self.make()

    def make(self) -> None:
        self.body = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.run(self.embedding(tokens)))
        return logits

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def over(self, layers: nn.Module, x: Tensor) -> Tensor:
        for layer in layers.children():
            x = layer(x)
        return x


@dataclass
class Settings:
    heads: int = 3
    loops: int = 3


class InASetting(Model):
    """The number is in a configuration, beside another of the same size."""

    def make(self) -> None:
        super().make()
        self.config = Settings()

    def run(self, x: Tensor) -> Tensor:
        for _ in range(self.config.loops):
            x = self.over(self.body, x)
        return x


class CopiesItsSetting(Model):
    """As Ouro's published code does: the configuration is read when the model is built, and not again."""

    def make(self) -> None:
        super().make()
        self.config = SimpleNamespace(total_ut_steps=4)
        self.inner = nn.Module()
        self.inner.total_ut_steps = self.config.total_ut_steps
        self.inner.layers = nn.ModuleList([Block()])
        self.inner.norm = nn.LayerNorm(WIDTH)

    def run(self, x: Tensor) -> Tensor:
        for _ in range(int(self.inner.total_ut_steps)):  # type: ignore[arg-type]
            x = self.inner.norm(self.over(self.inner.layers, x))  # type: ignore[operator, arg-type]
        return x


class OneBlock(Model):
    """A universal transformer: one block, with a list of modules inside, and a number that is an argument."""

    def make(self) -> None:
        self.block = Block()

    def forward(self, tokens: Tensor, steps: int = 5) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(steps):
            x = self.block(x)
        logits: Tensor = self.head(x)
        return logits


class Stacks(Model):
    """High and low cycles over one stack, which ends with a norm: a recurrence is four times the stack."""

    def make(self) -> None:
        self.stack = Stack()
        self.high, self.low = 2, 3

    def run(self, x: Tensor) -> Tensor:
        slow, fast = x, torch.zeros_like(x)
        for _ in range(self.high):
            for _ in range(self.low):
                fast = self.stack(fast + slow + x)
            slow = self.stack(slow + fast)
        return slow


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.norm(x)
        return normed


class Chained(Model):
    """What goes on is the stack's norm, not its last layer."""

    def make(self) -> None:
        self.core, self.turns = Stack(), 3

    def run(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = self.core(x)
        return x


class Timed(Model):
    """With an embedding for each of its recurrences, so that it cannot run one more."""

    def make(self) -> None:
        super().make()
        self.times, self.turns = nn.Parameter(torch.randn(4, WIDTH)), 4

    def run(self, x: Tensor) -> Tensor:
        for turn in range(self.turns):
            x = self.over(self.body, x + self.times[turn])
        return x


class InADictionary(Model):
    def make(self) -> None:
        super().make()
        self.options: dict[str, Any] = {"name": "body", "loops": 4}

    def run(self, x: Tensor) -> Tensor:
        for _ in range(self.options["loops"]):
            x = self.over(self.body, x)
        return x


class WeightsForEach(Model):
    """A small adapter before each recurrence, in a list of its own."""

    def make(self) -> None:
        super().make()
        self.turns = 3
        self.adapters = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)) for _ in range(self.turns)]
        )

    def run(self, x: Tensor) -> Tensor:
        for turn in range(self.turns):
            x = self.over(self.body, x + self.adapters[turn](x))
        return x


class Once(Model):
    """As released it runs its loop once, so that nothing comes twice."""

    def make(self) -> None:
        super().make()
        self.entry, self.heads, self.num_loops = nn.ModuleList([Block()]), 1, 1

    def run(self, x: Tensor) -> Tensor:
        x = self.entry[0](x)
        for _ in range(self.num_loops):
            x = self.over(self.body, x)
        return x


class WrittenOut(Model):
    """A layer for each recurrence, all of the same weights, and a norm that they share too."""

    def make(self) -> None:
        self.entry = Block()
        self.steps = nn.ModuleList([nn.ModuleList([Block(), nn.LayerNorm(WIDTH)]) for _ in range(3)])
        shared = dict(self.steps[0].named_parameters())
        for step in self.steps[1:]:
            for name in shared:
                owner, _, leaf = name.rpartition(".")
                setattr(step.get_submodule(owner), leaf, shared[name])

    def run(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for step in self.steps:
            x = self.over(step, x)
        return x


class Fixed(Model):
    def run(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.over(self.body, x)
        return x


@pytest.mark.parametrize(
    ("model", "layout", "setting"),
    [
        (ForeignLoop, (2, 2, 3, 1, None), "loops sets"),
        (InASetting, (0, 2, 3, 0, None), "config.loops sets"),
        (CopiesItsSetting, (0, 1, 4, 0, "inner.norm"), "inner.total_ut_steps sets"),
        (OneBlock, (0, 1, 5, 0, None), "the argument steps of its forward sets"),
        (Stacks, (0, 8, 2, 0, None), "high sets"),
        (Chained, (0, 2, 3, 0, "core.norm"), "turns sets"),
        (Timed, (0, 2, 4, 0, None), "turns sets"),
        (InADictionary, (0, 2, 4, 0, None), "options.loops sets"),
        (WeightsForEach, (0, 2, 3, 0, None), "turns sets"),
        (Once, (1, 2, 1, 0, None), "a loop of body 0 1, 1 times, with 1 layers before and 0 after it; num_loops sets"),
        (WrittenOut, (1, 1, 3, 0, "steps.0.1"), "nothing was found that sets"),
        (Fixed, (0, 2, 3, 0, None), "nothing was found that sets"),
    ],
)
def test_a_model_alone_is_enough(model: type[nn.Module], layout: tuple[Any, ...], setting: str) -> None:
    bare = model().eval()
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    subject = loopscope.hook(bare)
    info, end = subject.info, subject.layout.loop_end
    path = None if end is None else end.path
    shown: tuple[Any, ...] = (info.prelude, info.recurrent, info.trained_recurrences, info.coda, path)
    assert shown == layout
    assert setting in repr(subject)
    prelude, recurrent, times, coda = layout[:4]
    recurrences = times + (subject.settable and model not in (Timed, WeightsForEach))
    trace = loopscope.capture(subject, IDS, recurrences=recurrences)
    assert len(trace.visits) == prelude + recurrent * recurrences + coda
    assert_untouched(bare)
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


def test_what_is_found_is_what_would_have_been_named() -> None:
    model = ForeignLoop().eval()
    named = loopscope.hook(model, prelude="enter", recurrent="cycle", coda="leave", set_recurrences="loops")
    found = loopscope.hook(model)
    assert found.layout == named.layout
    traces = [loopscope.capture(subject, IDS, recurrences=5) for subject in (found, named)]
    assert torch.equal(traces[0].logits, traces[1].logits)


def test_a_chain_is_called_one_only_after_it_was_run() -> None:
    class Chain(Model):
        def run(self, x: Tensor) -> Tensor:
            return self.over(self.body, x)

    subject = loopscope.hook(Chain().eval())
    assert not subject.info.is_looped
    assert subject.found == "2 layers, each called once: body 0 1"


class TwoLoops(Model):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.body:
            for _ in range(2):
                x = layer(x)
        return x


def test_an_order_that_is_no_single_loop_is_named_with_what_settles_it() -> None:
    with pytest.raises(
        ConfigError, match=r"calls its layers in the order body 0 0 1 1, which is not one loop .* recurrent=\.\.\."
    ):
        loopscope.hook(TwoLoops().eval())
    assert loopscope.hook(TwoLoops().eval(), recurrent="body.1", prelude=["body.0", "body.0"]).info.recurrent == 1


def test_a_loop_within_a_layer_is_not_taken_for_none() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.times, self.shared = nn.Linear(WIDTH, WIDTH), 3, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = torch.tanh(0.5 * x + self.cell(x))
            squared: Tensor = self.shared(x) * self.shared(x)
            return x + squared

    class Twice(Model):
        def make(self) -> None:
            self.body = nn.ModuleList([Inner(), Inner()])

        def run(self, x: Tensor) -> Tensor:
            return self.over(self.body, x)

    model = Twice().eval()
    with pytest.raises(ConfigError, match=r"multiplies states by body\.0\.cell\.weight 3 times .* within one of them"):
        loopscope.hook(model)
    for layer in model.body:
        vars(layer)["times"] = 1
    assert not loopscope.hook(model).info.is_looped


@pytest.mark.parametrize("entries", [True, False])
def test_a_loop_that_is_no_modules_is_not_taken_for_a_chain(entries: bool) -> None:
    class Functions(Model):
        def make(self) -> None:
            self.body = nn.ModuleList([Block(), Block()])
            self.weight, self.norm = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.LayerNorm(WIDTH)

        def run(self, x: Tensor) -> Tensor:
            x = self.body[0](x) if entries else x
            for _ in range(3):
                x = x + torch.tanh(functional.linear(self.norm(x), self.weight))
            return self.body[1](x) if entries else x

    message = (
        r"2 layers once, and multiplies states by weight 3 times in between" if entries else "No layers can be told"
    )
    with pytest.raises(ConfigError, match=message):
        loopscope.hook(Functions().eval())
    if entries:
        assert loopscope.hook(Functions().eval(), prelude="body").branches is not None


def test_an_order_of_many_calls_is_cut() -> None:
    words = order_in_words([f"{name}_of_the_model.{layer}" for name in ("lower", "upper") for layer in range(30)])
    assert words.startswith("lower_of_the_model.0 lower_of_the_model.1 ")
    assert words.endswith(" ... (60 calls)")
    assert len(words) < 320


def test_a_model_without_layers_says_what_it_called() -> None:
    class Nothing(Model):
        def run(self, x: Tensor) -> Tensor:
            return functional.rms_norm(x, x.shape[-1:])

    with pytest.raises(ConfigError, match=r"No layers can be told in Nothing, which called embedding, head: none"):
        loopscope.hook(Nothing().eval())


def test_a_setting_that_changes_nothing_is_said_with_the_one_that_does() -> None:
    with pytest.raises(
        ConfigError,
        match=r"set_recurrences='config\.total_ut_steps' changed nothing: .* called inner\.layers\.0 4 times .*"
        r"inner\.total_ut_steps does",
    ):
        loopscope.hook(
            CopiesItsSetting(), recurrent="inner.layers", loop_end="inner.norm", set_recurrences="config.total_ut_steps"
        )


def test_a_number_that_the_call_needs_before_it_can_be_counted() -> None:
    class Needs(OneBlock):
        def forward(self, tokens: Tensor, steps: int | None = None) -> Tensor:
            assert steps is not None, "steps must be given"
            return super().forward(tokens, steps)

    arguments: dict[str, Any] = {"set_recurrences": lambda _, count: {"steps": count}}
    with pytest.raises(ConfigError, match=r"steps must be given\); .* as in trained_recurrences=4"):
        loopscope.hook(Needs(), **arguments)
    assert loopscope.hook(Needs(), **arguments, trained_recurrences=4).info.trained_recurrences == 4


@pytest.fixture(scope="module")
def dory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DoryConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no Dory")
    config = transformers.DoryConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, n_input_layers=2, n_output_layers=2, n_recurrent_layers=4,
        sliding_window=3, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dory")
    torch.manual_seed(0)
    transformers.DoryForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inkling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Inkling2LoopConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no Inkling-2")
    text = {
        "vocab_size": 31, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "max_position_embeddings": 64, "num_hidden_layers": 8, "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2, "loop_layer_index_end": 6, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "unpadded_vocab_size": 31, "sliding_window_size": 4, "d_rel": 4, "rel_extent": 8, "loop_gate_rank": 4,
        "moe_intermediate_size": 20, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
        "text_hidden_size": 24, "projection_hidden_dim": 20,
    }  # fmt: skip
    config = transformers.Inkling2LoopConfig(text_config=text, vision_config=vision)
    folder = tmp_path_factory.mktemp("inkling")
    torch.manual_seed(0)
    transformers.Inkling2LoopForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "setting", "trained"),
    [("dory", "config.n_recurrent_loops", 2), ("inkling", "config.text_config.loop_num_passes", 3)],
)
def test_a_folder_is_enough(name: str, setting: str, trained: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    subject: Any = loopscope.load(folder, device="cpu")
    info = subject.info
    assert (info.prelude, info.recurrent, info.trained_recurrences, info.coda) == (2, 4, trained, 2)
    assert f"{setting} sets how often" in subject.found
    trace = loopscope.capture(subject, IDS, recurrences=4)
    owner, _, field = setting.rpartition(".")
    setattr(subject.model.get_submodule("") if not owner else _reach(subject.model, owner), field, 4)
    with torch.no_grad():
        assert torch.equal(trace.logits, subject.model(torch.tensor(IDS), use_cache=False).logits)
    said = loopscope.inspect_model(folder)
    assert said.layout == f"(2, 4 ⊗ {trained}, 2)"
    assert said.trained_recurrences == trained


def _reach(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part)
    return model


def test_what_goes_to_inklings_sink_is_measured_at_every_visit(inkling: Path) -> None:
    subject: Any = loopscope.load(inkling, device="cpu")
    assert subject.info.sink_heads == 4
    study = loopscope.analyze(subject, IDS, recurrences=3, horizon=3, skip=parts_except("heads"))
    seen: list[torch.Tensor] = []
    names = [name for name, module in subject.model.named_modules() if name.endswith("self_attn")]
    handles = [
        subject.model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output[1]))
        for name in names
        if "language_model" in name
    ]
    with torch.no_grad():
        subject.model(torch.tensor(IDS), use_cache=False)
    for handle in handles:
        handle.remove()
    expected = torch.stack([1 - maps.sum(-1).mean(-1).T for maps in seen])
    torch.testing.assert_close(torch.from_numpy(study.dataset["sink_mass"].values), expected)
