"""The contract: right subjects pass, and each broken promise is found, named, and found alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import broken_subjects as broken
import loopscope
from broken_subjects import breaking, saying, with_maps
from contract_report import NAMES, SHORT, failures, skipped
from loopscope._util.shapes import Logits, States, TokenIds
from loopscope.errors import ConfigError
from loopscope.models.architecture import Llama3Scaling
from loopscope.models.checkpoints.find import demo_names
from loopscope.models.contract.check import check_subject
from loopscope.models.contract.results import Tolerances
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch, SubjectInfo
from loopscope.models.visits import LoopState, Observer, Visit
from random_model import random_model
from small_models import ARCHITECTURES, INJECTED, PROMPTS, subject

REFERENCE = Path(__file__).resolve().parent / "reference"
SETTINGS: dict[str, dict[str, Any]] = {
    "norms on branch outputs, q and k normed": {"norm_placement": "branch-out", "qk_norm": "full", "kv_heads": 4},
    "norm per head, tied": {"qk_norm": "head", "tied_embeddings": True, "activation": "gelu-tanh", "mlp": "plain"},
    "exit gate": {
        "norm_placement": "branch-in-out",
        "loop_norm": "recurrence",
        "prelude": 0,
        "coda": 0,
        "injection": "none",
        "state_init": "embeddings",
        "exit_gate": True,
        "exit_threshold": 0.6,
    },
    "sliding window": {"sliding_window": 2, "full_attention_layers": (1,)},
    "scaled rotation": {
        "rope_scaling": Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)
    },
    "one layer, no rotation": {"prelude": 0, "recurrent": 1, "coda": 0, "rotary": "none"},
    "few positions": {"max_positions": 4},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_models_keep_the_contract(name: str) -> None:
    given = subject(ARCHITECTURES[name])
    loop = {"recurrences", "decoding", "rounding"}
    expected = {
        "loop norm": {"initial state"},
        "feed-forward": {"initial state"} | loop,
    }
    assert skipped(given, prompts=PROMPTS, seed=5) == expected.get(name, set())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype_keeps_the_contract(dtype: str) -> None:
    assert check_subject(subject(INJECTED, dtype=getattr(torch, dtype)), SHORT).passed


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_models_of_every_setting_keep_the_contract(changes: dict[str, Any]) -> None:
    model = random_model(dtype=torch.float32, **changes).eval().requires_grad_(False)
    assert check_subject(NativeSubject(model), SHORT, recurrences=2, other_recurrences=[5]).passed


@pytest.mark.parametrize("name", demo_names())
def test_shipped_models_keep_the_contract(name: str) -> None:
    model = loopscope.load(name, device="cpu")
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(text).ids for text in ("Ann has 3 hens.", "Why?")]
    report = check_subject(model, prompts, recurrences=2 if model.info.is_looped else None)
    assert "largest relative difference" in next(check.detail for check in report.checks if check.name == "padding")


def case_folders() -> list[Path]:
    return sorted(path.parent for path in REFERENCE.glob("*/case.json"))


@pytest.mark.parametrize("folder", case_folders(), ids=lambda folder: folder.name)
def test_published_formats_keep_the_contract(folder: Path) -> None:
    if json.loads((folder / "case.json").read_text())["family"] in ("gpt2", "gpt_neox", "hrm_text"):
        pytest.importorskip("transformers")
    given = loopscope.load(folder, device="cpu")
    recurrences = 2 if given.info.is_looped else None
    report = check_subject(given, recurrences=recurrences)
    assert next(check.status for check in report.checks if check.name == "logits") == "passed"


class Gated(nn.Module):
    """A layer without attention: what came before enters as a running mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        earlier = state.cumsum(1) / torch.arange(1, state.shape[1] + 1)[:, None]
        added: Tensor = self.gate(state).sigmoid() * self.mix(earlier).tanh()
        return state + added


class Spinner(nn.Module):
    """A looped module of no known family; from noise, if `noisy`, with its embeddings added in each turn."""

    def __init__(self, noisy: bool = False, width: int = 12) -> None:
        super().__init__()
        self.noisy = noisy
        self.turns = 3
        self.embed = nn.Embedding(40, width)
        self.before = nn.ModuleList([Gated(width)])
        self.loop = nn.ModuleList([Gated(width), Gated(width)])
        self.after = Gated(width)
        self.head = nn.Linear(width, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        encoded: Tensor = self.before[0](self.embed(input_ids))
        state = torch.randn(encoded.shape) if self.noisy else encoded
        for _ in range(self.turns):
            state = state + encoded if self.noisy else state
            for layer in self.loop:
                state = layer(state)
        logits: Tensor = self.head(self.after(state))
        return logits


def spinner(noisy: bool = False, **options: Any) -> HookedSubject:
    torch.manual_seed(0)
    return loopscope.hook(Spinner(noisy), prelude="before", recurrent="loop", coda="after", **options)


@pytest.mark.parametrize("train", [False, True], ids=["evaluating", "training"])
def test_a_hooked_module_of_no_family_keeps_the_contract(train: bool) -> None:
    given = spinner(set_recurrences="turns")
    given.model.train(train)
    assert skipped(given) == {"attention", "initial state", "rounding"}
    assert given.model.training == train


def test_hooks_without_a_way_to_set_the_number_keep_what_is_left() -> None:
    assert skipped(spinner()) == {"attention", "initial state", "rounding", "recurrences", "decoding"}


def test_a_number_that_is_accepted_and_not_run_is_a_broken_promise() -> None:
    # The probe, which asks for few, finds nothing; another number is refused by nobody and yet not run.
    given = spinner(set_recurrences=lambda model, recurrences: setattr(model, "turns", min(recurrences, 4)))
    assert set(failures(given, recurrences=3, other_recurrences=[4])) == set()
    assert set(failures(given, recurrences=3, other_recurrences=[6])) == {"recurrences"}


def test_random_states_of_a_batch_are_left_out_with_the_reason() -> None:
    # A model that draws for a whole batch at once gives a prompt another state than alone, which was measured.
    given = spinner(noisy=True, set_recurrences="turns")
    report = check_subject(given)
    assert {"padding"} <= {check.name for check in report.skipped if "random states" in check.detail}
    assert failures(given, prompts=[[3, 1, 4, 1, 5]]) == {}


class Averaging:
    """A subject from scratch: `s -> (s + e) / 2` of each token, with nothing of loopscope's models in it."""

    tokenizer = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.embedding = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
        self.info = SubjectInfo(
            name="averaging",
            family="mine",
            prelude=0,
            recurrent=1,
            coda=0,
            trained_recurrences=3,
            injection=None,
            norm_placement=None,
            loop_norm=None,
            state_init=None,
            width=6,
            heads=None,
            vocab_size=11,
            max_positions=None,
            parameters=66,
            dtype="float32",
            device="cpu",
            weights_sha256="",
        )

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
    ) -> AveragingRun:
        return AveragingRun(self.embedding, batch)

    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        return None

    def raw_logits(self, input_ids: TokenIds, *, recurrences: int, seed: int) -> Logits:
        encoded = self.embedding[input_ids]
        state = (1 - 0.5**recurrences) * encoded
        return state @ self.embedding.T


class AveragingRun:
    def __init__(self, embedding: Tensor, batch: Batch) -> None:
        self.embedding = embedding
        self.encoded = embedding[batch.input_ids]
        self.state: States | None = torch.zeros_like(self.encoded)
        self.done = 0

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        assert self.state is not None
        before, self.state = self.state, (self.state + self.encoded) / 2
        self.done += 1
        for observer in observers:
            observer.injected(self.done, before)
            observer.visit(Visit("recurrent", 0, self.done, self.state, None))
            observer.loop_state(LoopState(self.done, self.state))

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        decoded = self.state if state is None else state
        assert decoded is not None
        return decoded @ self.embedding.T

    answer = decode

    def close(self) -> None:
        pass

    def rounding_error(self) -> Tensor | None:
        return None


def test_a_subject_from_scratch_keeps_the_contract() -> None:
    own = Averaging()
    without = {"attention", "initial state", "rounding", "untouched"}
    assert skipped(own, raw_logits=own.raw_logits) == without
    assert skipped(own) == without | {"logits"}


def test_a_raw_model_that_differs_is_found_by_its_prompt_and_token() -> None:
    own = Averaging()

    def off(input_ids: TokenIds, *, recurrences: int, seed: int) -> Logits:
        logits = own.raw_logits(input_ids, recurrences=recurrences, seed=seed)
        logits[:, 2:] *= 1.01
        return logits

    found = failures(own, raw_logits=off)
    assert set(found) == {"logits", "recurrences"}
    assert re.search(r"at logits at R = 3 \(prompt [013], token [2-6]: got", found["logits"])
    assert failures(own, raw_logits=off, tolerances=Tolerances(raw=0.02)) == {}


def test_the_report_prints_a_line_for_each_promise() -> None:
    lines = str(check_subject(subject(INJECTED))).splitlines()
    assert lines[0] == "small"
    assert [line.split()[0] for line in lines[1:]] == ["passed"] * len(NAMES)
    assert "1 + 2 x 4 + 1 = 10 visits" in lines[1]


def test_a_loop_that_knows_its_number_may_say_so() -> None:
    given = broken.KnowsItsNumber()
    assert failures(given, same_loop=False, other_recurrences=[3]) == {}


def test_looking_ahead_is_allowed_where_it_is_announced() -> None:
    assert failures(breaking(with_maps(broken.looks_ahead))(), causal=False) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrences": 0}, "recurrences must be at least 1, got 0"),
        ({"prompts": []}, "prompts holds an empty prompt or none at all"),
        ({"prompts": [[1], []]}, "prompts holds an empty prompt"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_subject(subject(INJECTED), **options)


def test_a_module_that_takes_no_tokens_cannot_be_a_subject() -> None:
    with pytest.raises(ConfigError, match="Linear failed when it was tried on a few tokens"):
        check_subject(torch.nn.Linear(2, 2))


def test_recurrences_without_a_loop_are_refused() -> None:
    with pytest.raises(ConfigError, match="no recurrent layers"):
        check_subject(subject(ARCHITECTURES["feed-forward"]), recurrences=2)


def test_a_subject_that_does_not_say_how_often_it_was_looped_needs_a_number() -> None:
    given = saying(trained_recurrences=None)()
    with pytest.raises(ConfigError, match="give recurrences"):
        check_subject(given)
    assert check_subject(given, recurrences=2).passed
