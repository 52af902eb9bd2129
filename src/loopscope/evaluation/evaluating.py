"""The job: a model, some tasks and some numbers of recurrences in, results and curves out."""

from __future__ import annotations

import difflib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from loopscope._util.files import check_no_other, write_atomically
from loopscope._util.hub import require
from loopscope._util.ranges import Range
from loopscope.errors import ConfigError, LoopscopeError, last_resort, one_line
from loopscope.evaluation.likelihood import likelihoods, numbers_of
from loopscope.evaluation.result import CURVE, Evaluation, TaskCurve, step_points, task_curve
from loopscope.evaluation.synthetic import ANSWER_AFTER, SYNTHETIC, SyntheticTask
from loopscope.models.loading import subject_of
from loopscope.models.subject import Subject

HARNESS = "harness-{number}.json"
"""The harness's own results after that many recurrences."""
SAMPLES = "samples-{number}.jsonl"
"""A line for each document, as the harness logs them."""


@last_resort("evaluating a model")
def evaluate(
    model: str | Path | nn.Module | Subject,
    tasks: str | Sequence[str],
    *,
    recurrences: Sequence[int] | None = None,
    out: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Accuracy of a model by number of recurrences, on tasks of loopscope's own (`permutations`, `addition`) and of
    lm-evaluation-harness (the extra `lm-eval`).

    Of a task of loopscope's own an answer is right if each of its tokens is the likeliest one. Likelihoods of all
    numbers come from one pass; texts are generated greedily. Tasks of the harness are programs of its authors, or
    yours: a task file may call Python.

    **Arguments**

    - `recurrences`: the trained number unless given.
    - `out`: folder for `curve.json`, the harness's results and its samples, which must hold no other evaluation;
      nothing is written without one.
    - `include_path`: a folder with task files of your own.
    - `limit`: the most documents of a task, the first ones.
    - `fewshot`: examples before each question of a task of the harness, instead of its own number.
    - `chat`: make each request of a task of the harness the user's turn of a chat, by the model's chat template.
    - `seed`: of random initial states.
    - `done`: told how many requests were answered.

    The harness sets the seeds of Python's, numpy's and torch's random numbers. Raises `ConfigError` for a task that is
    not there or cannot be run, numbers of recurrences that the model cannot have, a model without a tokenizer, and a
    folder that holds an evaluation; `MissingDependencyError` without the extra; and the errors of `load`.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    out, include_path = (None if each is None else Path(each) for each in (out, include_path))
    if not tasks:
        raise ConfigError("No task was given; name one, such as arc_easy.")
    for name, given, least in (("limit", limit, 1), ("fewshot", fewshot, 0), ("seed", seed, 0)):
        broken = None if given is None else Range(least, 2**31).broken_by(given)
        if broken:
            raise ConfigError(f"{name} must {broken}, got {given}.")
    if out is not None:
        check_no_other(out, CURVE)
        if (out / CURVE).exists():
            raise ConfigError(f"{out} holds an evaluation already; name another folder.")
    subject = subject_of(model, revision=revision, dtype=dtype, device=device)
    numbers = numbers_of(subject.info, recurrences)
    named = [each for each in tasks if each not in SYNTHETIC]
    if not named and (fewshot is not None or include_path is not None):
        raise ConfigError("fewshot and include_path mean nothing to loopscope's own tasks; leave them out.")
    if chat:
        _check_chat(subject, [each for each in tasks if each in SYNTHETIC])
    curves: list[TaskCurve] = []
    steps: dict[int, list[float]] = {number: [] for number in numbers}
    for name in [each for each in tasks if each in SYNTHETIC]:
        own, found_steps = _of_synthetic(subject, SYNTHETIC[name], numbers, limit=limit, seed=seed, done=done)
        curves += own
        steps = {number: steps[number] + found_steps[number] for number in numbers}
    if named:
        own, found_steps = _of_harness(
            subject, named, numbers, out, include_path, limit=limit, fewshot=fewshot, chat=chat, seed=seed, done=done
        )
        curves += own
        steps = {number: steps[number] + found_steps[number] for number in numbers}
    found = Evaluation(
        model=subject.info.name,
        weights_sha256=subject.info.weights_sha256,
        dtype=subject.info.dtype,
        trained_recurrences=subject.info.trained_recurrences,
        recurrences=numbers,
        seed=seed,
        limit=limit,
        chat=chat,
        curves=tuple(curves),
        steps=step_points(steps),
    )
    if out is not None:
        found.save(out)
    return found


def _check_chat(subject: Subject, own: Sequence[str]) -> None:
    if own:
        raise ConfigError(f"The documents of {own[0]} are no chats; leave --chat out for loopscope's own tasks.")
    if subject.tokenizer is None or subject.tokenizer.chat_template is None:
        raise ConfigError(
            f"--chat needs the model's chat template, and {subject.info.name} has none (no chat_template in "
            "tokenizer_config.json, no chat_template.jinja beside it); leave --chat out."
        )


def _of_synthetic(
    subject: Subject,
    task: SyntheticTask,
    numbers: Sequence[int],
    *,
    limit: int | None,
    seed: int,
    done: Callable[[int], None],
) -> tuple[list[TaskCurve], dict[int, list[float]]]:
    """Curves of all documents and of those of each difficulty, and the steps by number of recurrences."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{subject.info.name} has no tokenizer, and tasks are texts; loopscope.hook takes a tokenizer."
        )
    documents = task.split()[1][:limit]
    before = [token.id for token in tokenizer.before]
    requests = []
    for each in documents:
        question = [*before, *tokenizer.encode(f"{each.question}{ANSWER_AFTER}", add_special_tokens=False).ids]
        whole = [*before, *tokenizer.encode(each.text, add_special_tokens=False).ids]
        requests.append((tuple(question), tuple(whole[len(question) :])))
    found = likelihoods(subject, requests, numbers, seed=seed, done=done)

    def curve(part: str, places: Sequence[int]) -> TaskCurve:
        scores = {number: [float(found[number][place].greedy) for place in places] for number in numbers}
        return task_curve(task.name, "accuracy", scores, trained=subject.info.trained_recurrences, part=part)

    levels = sorted({each.difficulty for each in documents})
    parts = {level: [place for place, each in enumerate(documents) if each.difficulty == level] for level in levels}
    curves = [curve("", range(len(documents)))]
    curves += [curve(task.level.format(level), places) for level, places in parts.items()] if len(parts) > 1 else []
    return curves, {number: [each.step for each in found[number]] for number in numbers}


def _of_harness(
    subject: Subject,
    tasks: Sequence[str],
    numbers: Sequence[int],
    out: Path | None,
    include_path: Path | None,
    *,
    limit: int | None,
    fewshot: int | None,
    chat: bool,
    seed: int,
    done: Callable[[int], None],
) -> tuple[list[TaskCurve], dict[int, list[float]]]:
    """Curves, and the steps of all requests by number of recurrences."""
    needing = f"The task {tasks[0]!r}, which is none of loopscope's own ({', '.join(SYNTHETIC)}),"
    with _quiet():  # bars are drawn or not as is said when their package is imported
        harness, _ = (require(each, needing, "lm-eval") for each in ("lm_eval", "lm_eval.tasks"))
        from loopscope.evaluation.harness import LoopedLM  # noqa: PLC0415 (an optional extra)

    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"{include_path} is no folder; --include-path names one with task files.")
    models = LoopedLM.several(subject, numbers, seed=seed, done=done)
    results: dict[int, dict[str, Any]] = {}
    with _quiet():
        manager = harness.tasks.TaskManager(include_path=include_path and str(include_path), include_defaults=False)
        if not set(tasks) <= set(manager.all_tasks):  # to read the harness's own 15,000 takes half a minute
            manager = harness.tasks.TaskManager(include_path=include_path and str(include_path))
        for task in tasks:
            if task not in manager.all_tasks:
                near = difflib.get_close_matches(task, [*SYNTHETIC, *manager.all_tasks], n=3)
                nearest = f"; the nearest are {', '.join(near)}" if near else ""
                raise ConfigError(
                    f"lm-evaluation-harness {version('lm_eval')} has no task {task!r}{nearest}; a task file of your "
                    f"own is found with --include-path FOLDER, and loopscope's own are {', '.join(SYNTHETIC)}."
                )
        for number in numbers:
            try:
                results[number] = harness.simple_evaluate(
                    model=models[number],
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    num_fewshot=fewshot,
                    apply_chat_template=chat,
                )
            except LoopscopeError:
                raise
            except Exception as error:  # of the harness, of what a task file calls, of whatever fetches its data
                raise ConfigError(
                    f"lm-evaluation-harness could not run {', '.join(tasks)} ({type(error).__name__}: "
                    f"{one_line(error)}); its data are fetched from the Hugging Face hub unless its file names local "
                    "ones."
                ) from error
    samples = {number: found.pop("samples") for number, found in results.items()}
    if out is not None:
        for number, found in results.items():
            _write(out / HARNESS.format(number=number), [found], indent=1)
            _write(out / SAMPLES.format(number=number), [each for own in samples[number].values() for each in own])
    curves = list(_curves(results, samples, subject.info.trained_recurrences))
    if not curves:
        raise ConfigError(f"The tasks {', '.join(tasks)} gave no number that a curve could be drawn of.")
    return curves, models[numbers[0]].steps()


def _curves(
    results: Mapping[int, dict[str, Any]], samples: Mapping[int, dict[str, Any]], trained: int | None
) -> Iterator[TaskCurve]:
    """Of each task and each number that it gives, which the harness calls `metric,filter`."""
    first = next(iter(results.values()))
    for task, found in first["results"].items():
        for name in found:
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            values = {
                number: (
                    float(each["results"][task][name]),
                    _number(each["results"][task], f"{metric}_stderr,{filtered}"),
                )
                for number, each in results.items()
            }
            scores = {number: _scores(own.get(task, []), metric, filtered) for number, own in samples.items()}
            label = metric if filtered == "none" else name
            yield task_curve(task, label, scores, trained=trained, values=values)


def _scores(documents: Sequence[Mapping[str, Any]], metric: str, filtered: str) -> list[float]:
    """Of each document; none where a metric is of all of them together, such as a perplexity."""
    own = sorted((each for each in documents if each["filter"] == filtered), key=lambda each: each["doc_id"])
    found = [each.get(metric) for each in own]
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return numbers if len(numbers) == len(found) else []


def _number(found: Mapping[str, Any], name: str) -> float | None:
    value = found.get(name)
    return float(value) if isinstance(value, int | float) else None  # the harness writes N/A


def _write(path: Path, objects: Sequence[Any], indent: int | None = None) -> None:
    lines = [json.dumps(each, default=str, indent=indent, ensure_ascii=False) for each in objects]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness and the packages that it uses log, print and draw bars of."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
