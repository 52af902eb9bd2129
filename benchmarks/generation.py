"""What generation costs with a cache of keys and values, and with exits, as ratios of processor time.

    python benchmarks/generation.py

On one thread, the sides taking turns: `demo:injected` writes behind one prompt, `max_new_tokens` at most, the end of a
text being none. Without a cache every token is a pass over the whole text.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import loopscope
from loopscope.analysis.exits_at_work import RuleAtWork
from loopscope.analysis.greedy import grow
from loopscope.answers.stopping import StoppingRule
from loopscope.models.native.subject import NativeSubject

PROMPT = "A farmer has 12 hens. Each hen lays 5 eggs a week, and he sells a dozen eggs for 3 dollars."
RECURRENCES, ROUNDS = 8, 3
LENGTHS = (32, 128)
RULES = ("step <= 0.3966 & top1 >= 2", "step <= 0.3966", "kl <= 5e-4", "attention <= 0.14")


def main() -> None:
    torch.set_num_threads(1)
    model = loopscope.load("demo:injected", device="cpu")
    assert isinstance(model, NativeSubject)
    assert model.tokenizer is not None
    ids = tuple(model.tokenizer.encode(PROMPT).ids)
    without_end = NativeSubject(model.model, weights_sha256=model.info.weights_sha256)
    for most in LENGTHS:
        sides: dict[str, Callable[[], float]] = {
            "a cache for every recurrence": partial(_grown, model, ids, most),
            "no cache": partial(_rerun, without_end, ids, most),
            **{rule: partial(_grown, model, ids, most, rule) for rule in RULES},
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        used = {}
        for _ in range(ROUNDS):
            for name, side in sides.items():
                began = time.process_time()
                used[name] = side()
                seconds[name].append(time.process_time() - began)
        base = seconds["a cache for every recurrence"]
        print(f"{len(ids)} tokens of a prompt and {most} written, {statistics.median(base):.2f} s with a cache")
        for name in sides:
            ratio = statistics.median(own / one for own, one in zip(seconds[name], base, strict=True))
            print(f"  {name:32} {ratio:6.2f} times, {used[name]:.2f} recurrences a token")


def _grown(model: NativeSubject, ids: tuple[int, ...], most: int, rule: str | None = None) -> float:
    exits = None if rule is None else RuleAtWork(StoppingRule.parse(rule), model.info, RECURRENCES)
    (found,) = grow(model, [ids], recurrences=RECURRENCES, most=most, is_over=lambda tokens: False, exits=exits)
    return statistics.mean(found.recurrences)


def _rerun(model: NativeSubject, ids: tuple[int, ...], most: int) -> float:
    found = loopscope.generate(model, ids, recurrences=RECURRENCES, max_new_tokens=most, cache="none")
    return statistics.mean(found.recurrences)


if __name__ == "__main__":
    main()
