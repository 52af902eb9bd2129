"""Generation: with a cache as without, exits that are taken, against slow runs of whole texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import loopscope
from loopscope import AnalyzeSettings, analyze, generate
from loopscope._util.frames import study_frames
from loopscope.analysis.exits_at_work import RuleAtWork
from loopscope.analysis.greedy import grow
from loopscope.analysis.settings import parts_except
from loopscope.answers.calibration import calibrate_exit
from loopscope.answers.exit_rules import quantities
from loopscope.answers.exit_signals import SIGNALS
from loopscope.answers.quick import quick_answers
from loopscope.answers.rates import token_roles
from loopscope.answers.stopping import Condition, StoppingRule
from loopscope.cli import main
from loopscope.errors import ConfigError, NonFiniteError, PromptError
from loopscope.models.architecture import Architecture
from loopscope.models.native.attention import mix_values
from loopscope.models.native.cached import CachedRun, CacheKind
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import Sequence as TokenSequence
from loopscope.models.subject import Batch
from small_models import (
    ADDED,
    ARCHITECTURES,
    GATED,
    INJECTED,
    LOOP_NORM,
    PROMPTS,
    RESIDUAL_NORM,
    VOCAB,
    architecture,
    hooked_native,
    subject,
)

SHAPES = ARCHITECTURES | {"gated": GATED, "window": architecture(sliding_window=3)}


def full(model: NativeSubject, text: list[int], begun: int) -> Tensor:
    """The answer at a text's end, by a pass over all of it."""
    count = model.info.trained_recurrences or 0
    run = model.start(Batch.of([text]), recurrences=count, begun=begun)
    for _ in range(count):
        run.advance()
    return run.answer()[0, -1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("name", SHAPES)
def test_with_a_cache_answers_are_those_without(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Texts of several lengths, some of which end earlier."""
    model = subject(SHAPES[name], dtype=dtype, std=0.1)
    count = model.info.trained_recurrences or 0
    run, texts = CachedRun(model, PROMPTS, recurrences=count, most=6), [list(prompt) for prompt in PROMPTS]
    random = torch.Generator().manual_seed(0)
    logits, rows = run.logits, list(range(len(texts)))
    for step in range(5):
        wanted = torch.stack([full(model, texts[row], len(PROMPTS[row])) for row in rows])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
        rows = [0, 2, 3] if step == 1 else rows
        tokens = torch.randint(0, VOCAB, (len(rows),), generator=random).tolist()
        for row, token in zip(rows, tokens, strict=True):
            texts[row].append(token)
        logits, used = run.feed(rows, tokens)
        assert used == [count] * len(rows)


@pytest.mark.parametrize(
    "change", ["damp=0.5", "inject@2=frozen", "start=scale:2", "start=prelude", "mlp:recurrent.0=0"]
)
def test_under_interventions_too(change: str) -> None:
    model = subject(INJECTED, dtype=torch.float64).intervened(change)
    run = CachedRun(model, [PROMPTS[0]], recurrences=4, most=3)
    logits, _ = run.feed([0], [7])
    torch.testing.assert_close(logits[0], full(model, [*PROMPTS[0], 7], len(PROMPTS[0])), rtol=1e-10, atol=1e-12)


# Exits, against whole texts


class Slow:
    """One text, token by token, each by passes over the whole of it, in which keys and values of tokens that stopped,
    or of all before with a shared cache, are put in place of what the pass makes of them."""

    def __init__(self, model: NativeSubject, prompt: list[int], threshold: float, kind: CacheKind) -> None:
        self.model, self.text, self.begun, self.threshold, self.kind = model, list(prompt), len(prompt), threshold, kind
        self.count = model.info.trained_recurrences or 0
        self.stops = [self.count] * self.begun
        self.left: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Keys and values of a layer at a token, which it had in its last recurrence."""
        self.ended = torch.empty(0, model.info.width, dtype=torch.float64)
        """States of the tokens before, where each stopped."""
        self.logits = self._pass()

    def feed(self, token: int) -> Tensor:
        self.text.append(token)
        self.stops.append(0)
        self.logits = self._pass()
        return self.logits

    def _pass(self) -> Tensor:
        model, batch = self.model.model, Batch.of([self.text])
        applied = self.model.applied(batch, 0)
        sequence = model.encode(batch.input_ids, batch.mask, applied=applied)
        state = model.initial_state(sequence, 0, self.begun)
        ended = state.clone()
        seen: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        last = len(self.text) - 1
        for recurrence in range(1, self.count + 1):
            before = state
            state = model.recur(state, self._replacing(sequence, recurrence, seen), recurrence)
            step = float((state[0, last] - before[0, last]).norm() / state[0, last].norm())
            if not self.stops[last] and (step <= self.threshold or recurrence == self.count):
                self.stops[last] = recurrence
            for token, stop in enumerate(self.stops):
                if stop == recurrence:
                    ended[0, token] = state[0, token]
        if self.kind == "last":
            for (layer, token, recurrence), pair in seen.items():
                if recurrence == self.stops[token]:
                    self.left.setdefault((layer, token), pair)
            ended[0, : len(self.ended)] = self.ended
        self.ended = ended[0].clone()
        return model.decode(ended, sequence)[0, -1]

    def _replacing(self, sequence: TokenSequence, recurrence: int, seen: dict[Any, Any]) -> TokenSequence:
        layers = iter(range(10))

        def mix(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
            layer, key, value = next(layers), key.clone(), value.clone()
            for token in range(key.shape[2]):
                stop = self.stops[token]
                if self.kind == "last" and (layer, token) in self.left:
                    key[0, :, token], value[0, :, token] = self.left[layer, token]
                elif stop and stop < recurrence:
                    key[0, :, token], value[0, :, token] = seen[layer, token, stop]
                seen[layer, token, recurrence] = key[0, :, token].clone(), value[0, :, token].clone()
            return mix_values(query, key, value, allowed)

        return dataclasses.replace(sequence, context=dataclasses.replace(sequence.context, mix=mix))


@pytest.mark.parametrize("kind", ["per-recurrence", "last"])
@pytest.mark.parametrize(
    ("shape", "threshold"),
    [(INJECTED, 1.0), (RESIDUAL_NORM, 1.0), (LOOP_NORM, 0.7), (ADDED, 0.4)],
    ids=["injected", "residual", "loop", "added"],
)
def test_exits_with_a_cache_are_those_of_slow_passes_over_whole_texts(
    shape: Architecture, threshold: float, kind: CacheKind
) -> None:
    model = subject(shape, dtype=torch.float64)
    rule = RuleAtWork(StoppingRule.parse(f"step <= {threshold}"), model.info, 4)
    run = CachedRun(model, [PROMPTS[0]], recurrences=4, most=12, kind=kind)
    slow = Slow(model, PROMPTS[0], threshold, kind)
    torch.testing.assert_close(run.logits[0], slow.logits, rtol=1e-9, atol=1e-11)
    used = []
    for token in (3, 9, 9, 1, 30, 41, 7, 7, 2, 11):
        logits, (taken,) = run.feed([0], [token], rule)
        torch.testing.assert_close(logits[0], slow.feed(token), rtol=1e-9, atol=1e-11)
        assert taken == slow.stops[-1]
        used.append(taken)
    assert len(set(used)) > 1, used


def test_texts_that_grow_together_are_those_that_grow_alone() -> None:
    model = subject(INJECTED, dtype=torch.float64)
    rule = StoppingRule.parse("step <= 1 | top1 >= 1")
    settings: dict[str, Any] = {"recurrences": 4, "most": 9, "is_over": lambda ids: ids[-1] in (3, 8)}
    together = grow(model, PROMPTS, exits=RuleAtWork(rule, model.info, 4), **settings)
    alone = [grow(model, [prompt], exits=RuleAtWork(rule, model.info, 4), **settings)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({taken for text in together for taken in text.recurrences}) > 1


@pytest.mark.parametrize("shape", [GATED, ADDED], ids=["gate", "coda"])
def test_tokens_stop_where_a_study_says_that_they_would(shape: Architecture) -> None:
    """Each token of a text behind a prompt that was run in full, against its stop time in the study of the text. With a
    coda that attends, predictions on the way see others than in a study, and are left out."""
    model = subject(shape)
    settings = AnalyzeSettings(
        recurrences=5, horizon=4, exit_recurrences=5, track=(), skip=parts_except("readout", "heads")
    )
    known = quantities(analyze(model, [PROMPTS[0]], settings=settings).dataset)
    found = 0
    for signal in SIGNALS.values():
        if (signal.decodes and shape.coda) or not set(signal.variables) <= set(known):
            continue
        values = signal.of(known)[:-1, 0, 1:]
        between = np.unique(values[np.isfinite(values)])
        # The one that tells tokens apart best, between two values: signals are computed in batches of other shapes.
        rules = [StoppingRule((Condition(signal.key, float(each)),)) for each in (between[1:] + between[:-1]) / 2]
        rule = max(rules, key=lambda rule: len(set(rule.stop_times(known)[0].tolist())))
        wanted = rule.stop_times(known)[0]
        assert len(set(wanted.tolist())) > 1, signal.key
        for place in range(1, len(PROMPTS[0])):
            run = CachedRun(model, [PROMPTS[0][:place]], recurrences=5, most=1)
            _, (taken,) = run.feed([0], [PROMPTS[0][place]], RuleAtWork(rule, model.info, 5))
            assert taken == wanted[place], (signal.key, place)
        found += 1
    assert found == (12 if shape.exit_gate else 5)


# The call


@pytest.mark.parametrize("shape", [INJECTED, LOOP_NORM, GATED], ids=["injected", "loop", "gate"])
def test_a_threshold_of_0_is_the_full_run(shape: Architecture) -> None:
    model = subject(shape)
    found = generate(model, PROMPTS[0], exit="step <= 0", max_new_tokens=8)
    assert found.saved == 0
    assert found.tokens == found.full_tokens
    assert found.recurrences == (4,) * 8
    assert found.sentences() == [
        "The exit rule step <= 0 stopped none of its 8 tokens.",
        "The text is the full run's.",
    ]
    without = generate(model, PROMPTS[0], cache="none", max_new_tokens=8)
    own = generate(model, PROMPTS[0], max_new_tokens=8)
    assert own.tokens == without.tokens
    assert own.sentences() == []
    if shape is not GATED:
        assert own.tokens == found.tokens


def test_what_was_saved_and_changed_is_counted() -> None:
    found = generate(subject(INJECTED), PROMPTS[0], exit="step <= 100", max_new_tokens=5)
    assert found.recurrences == (4, 1, 1, 1, 1)  # the prompt is run in full
    assert found.saved == pytest.approx(1 - 8 / 20)
    assert found.full_tokens is not None
    pairs = zip(found.tokens, found.full_tokens, strict=True)
    differing = [place for place, (own, other) in enumerate(pairs, 1) if own != other]
    assert found.different == len(differing)
    assert found.first_difference == (differing[0] if differing else None)
    assert json.loads(json.dumps(found.to_dict()))["saved"] == found.saved


def test_a_model_that_is_watched_generates_without_a_cache() -> None:
    native, hooked = hooked_native(LOOP_NORM)
    assert (
        generate(hooked, PROMPTS[0], max_new_tokens=4).tokens == generate(native, PROMPTS[0], max_new_tokens=4).tokens
    )
    with pytest.raises(ConfigError, match="only watched"):
        generate(hooked, PROMPTS[0], exit="step <= 0.1")
    with pytest.raises(ConfigError, match="only watched"):
        generate(hooked, PROMPTS[0], cache="last")


def test_what_cannot_be_generated_says_why() -> None:
    model = subject(architecture(max_positions=12))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_new_tokens": 6}, "need more positions than the 12"),
        ({"max_new_tokens": 0}, "1 token or more"),
        ({"max_new_tokens": 2.5}, "a whole number of them, got 2.5"),
        ({"exit": ""}, "The exit rule '' cannot be read"),
        ({"exit": 3}, "got 3"),
        ({"exit": "gate >= 0.5"}, "has no exit gate"),
        ({"exit": "top1 >= 4"}, "never fires"),
        ({"exit": "step"}, "names no threshold of step"),
        ({"exit": "step <= 1", "cache": "none"}, "since cache is none"),
        ({"exit": "nowhere.json"}, "cannot be read"),
        ({"cache": "first"}, "cache must be one of"),
        ({"intervene": "token:1@2=zeros"}, "names a token of a prompt"),
    )
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            generate(model, PROMPTS[0], **{"max_new_tokens": 2, **settings})
    for prompt in ([], None, b"ab", [True], [1.5]):
        with pytest.raises(PromptError, match="token ids"):
            generate(model, cast("Any", prompt))
    with pytest.raises(ConfigError, match="nothing to stop"):
        generate(subject(ARCHITECTURES["feed-forward"]), PROMPTS[0], exit="step <= 1", max_new_tokens=2)
    broken = subject(INJECTED)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="is NaN"):
        generate(broken, PROMPTS[0], max_new_tokens=2)


def test_a_shipped_model_writes_with_a_rule_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loopscope.load("demo:injected")
    texts = ["Ann has 6 hens.", "How many eggs are left?", "Tom buys 3 books", "A train goes 60 miles"]
    settings = AnalyzeSettings(recurrences=8, horizon=8, track=(), skip=parts_except("readout"))
    study = analyze(model, texts, settings=settings)
    rule = calibrate_exit(study, "step & top1 >= 2", loss=0.1, changed=0.5).save(tmp_path / "rule.json")
    by_file = generate(model, "Ann has 6 hens and each", exit=tmp_path / "rule.json", max_new_tokens=6)
    assert by_file == generate(model, "Ann has 6 hens and each", exit=rule, max_new_tokens=6)
    assert by_file == generate(model, "Ann has 6 hens and each", exit=str(rule.rule), max_new_tokens=6)  # as shown
    assert 0 < by_file.saved < 1
    with pytest.raises(ConfigError, match="has other weights"):
        generate("demo:uninjected", "Ann", exit=rule)
    with pytest.raises(ConfigError, match="for full runs of 8 recurrences, not 4"):
        generate(model, "Ann", exit=rule, recurrences=4)
    main(
        [
            "generate",
            "demo:injected",
            "Ann has 6 hens and each",
            "--exit",
            str(tmp_path / "rule.json"),
            "--max-new-tokens",
            "6",
        ]
    )
    said = capsys.readouterr().out
    assert said.startswith(str(by_file.text))
    assert "of 8 recurrences on average" in said


# Analysed while generating


@pytest.mark.parametrize("watched", [False, True], ids=["native", "hooked"])
def test_an_analysis_of_generated_tokens_is_that_of_the_same_tokens_as_prompts(watched: bool) -> None:
    model = hooked_native(LOOP_NORM)[1] if watched else subject(INJECTED)
    settings = AnalyzeSettings(recurrences=4, horizon=4, track=(), skip=parts_except("readout"))
    study = analyze(model, PROMPTS, settings=settings, generate=5)
    for entry, prompt in zip(study.tokens, PROMPTS, strict=True):
        written = generate(model, prompt, max_new_tokens=5)
        assert tuple(entry["token_ids"]) == (*prompt, *written.tokens)
        assert entry["generated_tokens"] == len(written.tokens) == 5
    same = analyze(model, [list(entry["token_ids"]) for entry in study.tokens], settings=settings)
    for name in ("relative_step", "loss", "token_relative_step"):
        np.testing.assert_array_equal(study.dataset[name], same.dataset[name])
    prompts = study.manifest["prompts"]
    assert (prompts["generated_tokens"], prompts["generated_after"]) == (25, 4)
    assert study.manifest["identity"]["settings"]["generate"] == 5
    assert prompts["sha256"] == same.manifest["prompts"]["sha256"]
    limits = quick_answers(study)[-1]
    assert "25 tokens of 49 were written by the model itself" in " ".join([limits.sentence, *limits.limits])
    roles = token_roles(study.tokens, study.dataset.sizes["token"])
    assert roles["generated"].sum() == 25
    assert not (roles["generated"] & roles["question"]).any()
    assert study_frames(study.dataset, study.tokens)["tokens"]["generated"].sum() == 25


def test_a_text_that_ends_grows_no_more_and_what_a_tokenizer_puts_behind_goes() -> None:
    model = loopscope.load("demo:injected")
    study = analyze(model, ["Ann has 6 hens and each of"], recurrences=1, horizon=2, generate=64, skip=parts_except())
    (entry,) = study.tokens
    assert model.tokenizer is not None
    assert model.tokenizer.end is not None
    own = generate(model, "Ann has 6 hens and each of")
    assert own.ended == "end of text"
    assert own.tokens[-1] == model.tokenizer.end.id
    assert entry["generated_tokens"] == len(own.tokens) < 64
    assert tuple(entry["token_ids"]) == (*own.prompt, *own.tokens)


def test_what_an_analysis_cannot_generate_says_why() -> None:
    with pytest.raises(ConfigError, match="need more positions than the 12"):
        analyze(subject(architecture(max_positions=12)), PROMPTS, generate=6)
    with pytest.raises(ConfigError, match="--generate would change"):
        AnalyzeSettings(chunk=8, generate=4)
    with pytest.raises(ConfigError, match="--generate must be at least 1"):
        AnalyzeSettings(generate=0)
    with pytest.raises(ConfigError, match="names a token of a prompt"):
        analyze(subject(), PROMPTS, generate=3, intervene="token:0@1=zeros")
