"""Accuracy against recurrences: likelihoods from one pass, greedy texts, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import loopscope
from loopscope.analysis import answering
from loopscope.analysis.answering import rows_at_once
from loopscope.analysis.greedy import generate_greedily
from loopscope.cli import main
from loopscope.errors import ConfigError, MissingDependencyError, PromptError, StudyError
from loopscope.evaluation import likelihood
from loopscope.evaluation.evaluating import evaluate
from loopscope.evaluation.likelihood import Request, likelihoods, numbers_of
from loopscope.evaluation.result import Evaluation, TaskCurve, step_points, task_curve
from loopscope.evaluation.synthetic import SYNTHETIC, SyntheticTask
from loopscope.experiments.training.config import TrainConfig
from loopscope.experiments.training.data import DataFiles, read_documents
from loopscope.models.subject import Batch, Subject
from loopscope.prompts.chat import ChatTemplate
from loopscope.report.page.evaluation_page import evaluation_answer
from loopscope.report.page.write import write_evaluation
from small_models import ADDED, FEED_FORWARD, GATED, INJECTED, LOOP_NORM, PROMPTS, RESIDUAL_NORM, hooked_native, subject

NUMBERS = (1, 2, 3, 6)
REQUESTS: list[Request] = [
    (tuple(prompt[:cut]), tuple(prompt[cut:]))
    for prompt in PROMPTS
    for cut in {1, len(prompt) - 1}
    if 0 < cut < len(prompt)
]


LOOPS = {"injected": INJECTED, "residual norm": RESIDUAL_NORM, "loop norm": LOOP_NORM, "added": ADDED, "gated": GATED}


@pytest.mark.parametrize("name", [*LOOPS, "hooked"])
def test_all_numbers_from_one_pass_are_those_of_runs_with_one_number(name: str) -> None:
    model: Subject = hooked_native(LOOP_NORM)[1] if name == "hooked" else subject(LOOPS[name])
    together = likelihoods(model, REQUESTS, NUMBERS)
    for number in NUMBERS:
        for (context, continuation), found in zip(REQUESTS, together[number], strict=True):
            logits = loopscope_logits(model, [*context, *continuation][:-1], number)[len(context) - 1 :]
            scores = torch.log_softmax(logits.float(), -1)
            alone = float(scores[range(len(continuation)), list(continuation)].sum())
            assert found.logprob == pytest.approx(alone, abs=1e-5)
            assert found.greedy == (logits.argmax(-1).tolist() == list(continuation))


def loopscope_logits(model: Subject, ids: list[int], number: int) -> torch.Tensor:
    run = model.start(Batch.of([ids]), recurrences=number)
    for _ in range(number):
        run.advance()
    return run.answer()[0]


def test_steps_are_those_of_the_state_where_the_continuation_is_predicted() -> None:
    model, (context, continuation) = subject(INJECTED), REQUESTS[0]
    run = model.start(Batch.of([[*context, *continuation][:-1]]), recurrences=3)
    states = [run.state]
    for _ in range(3):
        run.advance()
        states.append(run.state)
    for number in (1, 3):
        before, after = (state[0, len(context) - 1 :].double() for state in states[number - 1 : number + 1])
        expected = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean()
        found = likelihoods(model, REQUESTS, (number,))[number][0]
        assert found.step == pytest.approx(float(expected), rel=1e-5)
    assert math.isnan(likelihoods(subject(FEED_FORWARD), REQUESTS, (1,))[1][0].step)


def test_batches_follow_memory_and_are_halved_where_it_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    info = subject(INJECTED).info
    rows = [rows_at_once(info, 100, memory) for memory in (0, 10**6, 10**7, 10**8, 10**12)]
    assert rows == sorted(rows)
    assert rows[0] == 1
    assert 1 < rows[2] < rows[-1] == 64
    assert rows_at_once(info, 1000, 10**7) < rows[2]

    whole, sizes = likelihoods(subject(INJECTED), REQUESTS, NUMBERS), []
    answers = answering.answers

    def short(model: Subject, prompts: Sequence[Any], *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers(model, prompts, *rest)

    monkeypatch.setattr(likelihood, "answers", short)
    parts = likelihoods(subject(INJECTED), REQUESTS, NUMBERS)
    assert max(sizes) == len(REQUESTS)
    for number in NUMBERS:
        for one, other in zip(whole[number], parts[number], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_generation_is_the_likeliest_token_again_and_again_with_each_number() -> None:
    model, prompts = subject(INJECTED), [[3, 1, 4], [2]]
    found = generate_greedily(model, prompts, NUMBERS, most=5, is_over=lambda ids: ids[-1] == 7)
    for number in NUMBERS:
        for prompt, text in zip(prompts, found[number], strict=True):
            expected: list[int] = []
            while len(expected) < 5 and 7 not in expected:
                run = model.start(Batch.of([[*prompt, *expected]]), recurrences=number, begun=len(prompt))
                for _ in range(number):
                    run.advance()
                expected.append(int(run.answer()[0, -1].argmax()))
            assert text == expected


def test_numbers_of_recurrences_are_checked() -> None:
    assert numbers_of(subject(INJECTED).info, None) == (4,)
    assert numbers_of(subject(INJECTED).info, [8, 1, 8]) == (1, 8)
    assert numbers_of(subject(FEED_FORWARD).info, [1]) == (1,)
    for shape, asked, said in (
        (FEED_FORWARD, [2], "means nothing"),
        (INJECTED, [0], "at least 1"),
        (INJECTED, [], "No"),
    ):
        with pytest.raises(ConfigError, match=said):
            numbers_of(subject(shape).info, asked)


def test_a_curve_says_what_changes_by_document_and_not_more() -> None:
    right = [1.0, 0.0] * 20
    scores = {1: [0.0] * 40, 4: right, 8: right, 16: [*right[:-2], 0.0, 0.0]}
    curve = task_curve("t", "accuracy", scores, trained=4)
    assert curve.reference == 4
    first, reference, alike, beyond = curve.points
    assert (first.value, first.change, first.unlike) == (0.0, -0.5, 20)
    assert reference.stderr == pytest.approx(math.sqrt(0.25 / 39))
    assert reference.change is None
    assert (alike.change, alike.unlike) == (0.0, 0)
    assert beyond.unlike == 1
    found = Evaluation(
        model="m",
        weights_sha256="",
        dtype="float32",
        trained_recurrences=4,
        recurrences=tuple(scores),
        seed=0,
        limit=None,
        curves=(curve,),
        steps=step_points({4: [0.1, math.nan, 0.3], 16: [math.nan]}),
    )
    assert [point.recurrences for point in found.steps] == [4]
    lower, higher = found.sentences()
    assert "after 1 instead of 4 recurrences accuracy is lower" in lower
    assert "not measurably different" in higher
    assert [row[3] for row in found.tables()[0].rows][2] == "none"


def values(curve: TaskCurve) -> list[float]:
    return [point.value for point in curve.points if point.value is not None]


def test_own_tasks_give_a_curve_by_difficulty_and_figures(tmp_path: Path) -> None:
    found = evaluate(
        "demo:permutations", ["permutations"], recurrences=[1, 4], limit=48, device="cpu", out=tmp_path / "found"
    )
    assert Evaluation.load(tmp_path / "found") == found
    with pytest.raises(ConfigError, match="holds an evaluation already"):
        evaluate("demo:permutations", "permutations", device="cpu", out=str(tmp_path / "found"))
    (tmp_path / "study").mkdir()
    (tmp_path / "study/manifest.json").touch()
    with pytest.raises(StudyError, match="holds a study"):  # whose report it would replace
        evaluate("demo:permutations", "permutations", device="cpu", out=tmp_path / "study")
    with pytest.raises(ConfigError, match="mean nothing to loopscope's own tasks"):
        evaluate("demo:permutations", "permutations", device="cpu", fewshot=3)
    whole, *parts = found.curves
    assert whole.documents == 48 == sum(part.documents for part in parts)
    once, trained = values(whole)
    assert trained > once + 0.1
    assert whole.points[0].change == pytest.approx(once - trained)
    weighted = [[value * part.documents for value in values(part)] for part in parts]
    assert [sum(each) / 48 for each in zip(*weighted, strict=True)] == pytest.approx([once, trained])
    (figures,) = loopscope.write_figures(tmp_path / "found", tmp_path / "figures", formats=["svg"])
    assert list(figures.files) == ["accuracy-permutations-accuracy"]
    one = dataclasses.replace(found, recurrences=(4,), curves=(dataclasses.replace(whole, points=whole.points[1:]),))
    with pytest.raises(StudyError, match="accuracy-permutations-accuracy: a curve takes two numbers of recurrences"):
        loopscope.write_figures(one, tmp_path / "figures")

    page = write_evaluation(found, tmp_path / "report.html").read_text()
    for said in ("Does accuracy on permutations rise with recurrences?", "rises to 4", "8 swaps", "one standard error"):
        assert said in page

    # An answer counts as right if it is what greedy generation writes.
    model, documents = loopscope.load("demo:permutations", device="cpu"), SYNTHETIC["permutations"].split()[1][:8]
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(f"{each.question}>").ids for each in documents]
    written = generate_greedily(model, prompts, [1], most=5, is_over=lambda ids: False)[1]
    right = [model.tokenizer.decode(ids) == each.answer for ids, each in zip(written, documents, strict=True)]
    some = evaluate("demo:permutations", ["permutations"], recurrences=[1], limit=8, device="cpu")
    assert some.curves[0].points[0].value == sum(right) / 8


def test_without_the_harness_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'loopscope\[lm-eval\]'"):
        evaluate("demo:injected", ["arc_easy"])


# The harness and what it imports warn of their own old ways.
harness = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    # Tasks of the harness come from files here; nothing may be looked for on the hub.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
        import lm_eval.api.instance  # noqa: PLC0415 (an optional extra)
        import lm_eval.tasks  # noqa: PLC0415

        yield lm_eval


@pytest.fixture
def instances(lm_eval: Any) -> Callable[..., list[Any]]:
    def made(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [lm_eval.api.instance.Instance(kind, {}, each, place) for place, each in enumerate(arguments)]

    return made


@harness
def test_of_a_feed_forward_model_everything_is_as_the_harness_own_model_has_it(
    instances: Callable[..., list[Any]], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 (an optional extra)

    from loopscope.evaluation.harness import LoopedLM  # noqa: PLC0415

    demo = Path(loopscope.__file__).parent / "demo/models/feedforward/tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(demo), bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    own = transformers.LlamaForCausalLM(config).eval()
    own.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = HFLM(pretrained=own, tokenizer=tokenizer, batch_size=4, device="cpu")
    ours = LoopedLM(loopscope.load(tmp_path, device="cpu"))

    texts = ["Tom has 3 apples.", "", "Nine birds sat on a fence. " * 5, "A", "What is 2 plus 2? It is "]
    pairs = instances("loglikelihood", [(text, end) for text in texts for end in (" 4", " four birds")])
    for one, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5)
        assert one[1] == other[1]
    rolling = instances("loglikelihood_rolling", [(text,) for text in texts if text])
    found = zip(ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), strict=True)
    for mine, other in found:
        assert mine == pytest.approx(other, abs=2e-5 * max(1, abs(other) / 100))
    asked = [(text, {"until": ["e", "."], "max_gen_toks": 8}) for text in texts if text]
    asked += [(text, {"until": [], "max_gen_toks": 3}) for text in texts if text]
    # One by one: the harness cuts the beginning of a batch's texts after it has padded them.
    expected = [theirs.generate_until(instances("generate_until", [each]))[0] for each in asked]
    assert ours.generate_until(instances("generate_until", asked)) == expected


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of choices and one of generated texts, over a file of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"q": f"{n} plus {n + 1} is", "choices": [str(2 * n + 1), str(n)], "gold": n % 2} for n in range(6)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'data.jsonl'}\n"
        f"  cache_dir: {folder / 'cache'}\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
    )
    (folder / "sums.yaml").write_text(
        f"task: own_sums\n{shared}output_type: multiple_choice\ndoc_to_choice: '{{{{choices}}}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "said.yaml").write_text(
        f"task: own_said\n{shared}output_type: generate_until\ndoc_to_target: '{{{{choices[gold]}}}}'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n  do_sample: false\nmetric_list:\n"
        "  - metric: exact_match\n"
    )
    return folder


@harness
def test_tasks_of_a_folder_give_results_of_the_harness_and_curves(
    lm_eval: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--include-path",
        str(tasks),
        "--recurrences",
        "1",
        "4",
        "16",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    main(["evaluate", "demo:injected", "--tasks", "own_sums,own_said", *arguments])
    shown = capsys.readouterr().out
    assert "own_sums, 6 documents" in shown
    found = Evaluation.load(tmp_path)
    assert {(curve.task, curve.metric) for curve in found.curves} == {("own_sums", "acc"), ("own_said", "exact_match")}
    for curve in found.curves:
        assert curve.documents == 6
        assert curve.reference == 16  # the trained 8 was not asked for
        for point in curve.points:
            own = json.loads((tmp_path / f"harness-{point.recurrences}.json").read_text())["results"][curve.task]
            assert point.value == own[f"{curve.metric},none"]
            assert point.stderr == own[f"{curve.metric}_stderr,none"]
    assert len((tmp_path / "samples-4.jsonl").read_text().splitlines()) == 12
    # The last step gets shorter on this model.
    assert [point.recurrences for point in found.steps] == [1, 4, 16]
    assert found.steps[0].median > found.steps[1].median > found.steps[2].median

    # With one number at a time, every answer is the same.
    alone = evaluate(
        "demo:injected", ["own_sums"], recurrences=[4], include_path=tasks, device="cpu", out=tmp_path / "4"
    )
    assert alone.curves[0].points[0].value == found.curves[0].points[1].value
    both = [
        [entry["resps"] for entry in map(json.loads, path.read_text().splitlines()) if len(entry["resps"]) == 2]
        for path in (tmp_path / "samples-4.jsonl", tmp_path / "4/samples-4.jsonl")
    ]
    for one, other in zip(*both, strict=True):
        for (mine,), (theirs,) in zip(one, other, strict=True):
            assert float(mine[0]) == pytest.approx(float(theirs[0]), abs=1e-4)


def answer_of(values: list[list[float]]) -> tuple[str, str]:
    """From scores of documents after 1, 2 and 4 recurrences, of a model trained with 2."""
    curve = task_curve("sums", "acc", dict(zip((1, 2, 4), values, strict=True)), trained=2)
    found = Evaluation(
        model="m",
        weights_sha256="",
        dtype="float32",
        trained_recurrences=2,
        recurrences=(1, 2, 4),
        seed=0,
        limit=None,
        curves=(curve,),
        steps=(),
    )
    answer = evaluation_answer(found, curve)
    return str(answer.outcome), answer.verdict


def test_the_page_claims_no_more_than_the_intervals() -> None:
    low, high, other = [0.0] * 20, [1.0] * 20, [0.0] * 10 + [1.0] * 10
    assert answer_of([low, high, high]) == ("yes", "rises to 2, no measurable change beyond 2")
    assert answer_of([low, high, other]) == ("partly", "rises to 2, falls beyond 2")
    assert answer_of([high, other, low]) == ("no", "falls to 2, falls beyond 2")
    assert answer_of([high, high, high])[0] == "no"
    assert answer_of([[1.0, *low[1:]], low, low])[0] == "cannot tell"
    assert answer_of([[0.0], [1.0], [1.0]]) == ("cannot tell", "not compared")


@harness
def test_requests_become_chats_of_the_models_template(lm_eval: Any, tasks: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(loopscope.__file__).parent / "demo" / "models" / "injected", model)
    with pytest.raises(ConfigError, match="needs the model's chat template"):
        evaluate(model, ["own_sums"], chat=True, include_path=tasks, device="cpu")
    template = "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}(assistant){% endif %}")
    with pytest.raises(ConfigError, match="are no chats"):
        evaluate(model, ["addition"], chat=True, device="cpu")
    settings: dict[str, Any] = {"recurrences": [2], "include_path": tasks, "device": "cpu", "limit": 2, "fewshot": 0}
    found = evaluate(model, ["own_said"], chat=True, out=tmp_path / "out", **settings)
    assert Evaluation.load(tmp_path / "out") == found
    assert found.chat
    lines = (tmp_path / "out/samples-2.jsonl").read_text().splitlines()
    asked = [json.loads(line)["arguments"][0][0] for line in lines]
    assert asked == ["(user) 0 plus 1 is\n(assistant)", "(user) 1 plus 2 is\n(assistant)"]


def test_a_chat_goes_on_with_what_the_assistant_has_begun() -> None:
    chat = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}", {})
    now = datetime(2026, 1, 1, tzinfo=UTC)
    turns = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "It is "}]
    assert chat.write(turns, now=now) == "<user>So?</s><assistant>It is"
    assert chat.write(turns[:1], now=now) == "<user>So?</s>"
    deaf = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(PromptError, match="changes what the assistant has begun"):
        deaf.write(turns, now=now)


@harness
def test_what_cannot_be_run_is_said_in_a_sentence(
    lm_eval: Any,
    instances: Callable[..., list[Any]],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loopscope.evaluation.harness import LoopedLM  # noqa: PLC0415 (an optional extra)

    # To read the harness's own tasks takes long.
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    with pytest.raises(ConfigError, match="has no task 'own_sum'; the nearest are own_sums"):
        evaluate("demo:injected", ["own_sum"], include_path=tasks, device="cpu")
    with pytest.raises(ConfigError, match="has no task 'permutation'; the nearest are permutations"):
        evaluate("demo:injected", ["permutation"], include_path=tasks, device="cpu")
    with pytest.raises(ConfigError, match="is no folder"):
        evaluate("demo:injected", ["own_sums"], include_path=tmp_path / "none", device="cpu")
    (tmp_path / "broken.yaml").write_text((tasks / "sums.yaml").read_text().replace("data.jsonl", "gone.jsonl"))
    with pytest.raises(ConfigError, match="could not run own_sums"):
        evaluate("demo:injected", ["own_sums"], include_path=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        LoopedLM(subject(INJECTED))
    model = LoopedLM(loopscope.load("demo:injected", device="cpu"))
    with pytest.raises(ConfigError, match="generates greedily only"):
        model.generate_until(instances("generate_until", [("A", {"do_sample": True, "temperature": 0.7})]))
    with pytest.raises(ConfigError, match="asks for 5000 generated tokens"):
        model.generate_until(instances("generate_until", [("A", {"max_gen_toks": 5000})]))


@pytest.mark.parametrize("task", SYNTHETIC.values(), ids=SYNTHETIC)
def test_synthetic_documents_follow_their_rules_and_do_not_repeat(task: SyntheticTask, tmp_path: Path) -> None:
    train, test = task.split()
    assert len({len(each.text) for each in train + test}) == 1
    assert len({each.text for each in train + test}) == len(train) + len(test)
    for each in test:
        assert (_swapped if task.name == "permutations" else _added)(each.question) == (each.answer, each.difficulty)
    task.write(tmp_path)
    for name, documents in (("train", train), ("test", test)):
        assert read_documents(tmp_path / f"{name}.txt", "") == [each.text for each in documents]
    # The shipped model was trained on these very files, with the shipped configuration.
    demo = Path(loopscope.__file__).parent / "demo"
    made = json.loads((demo / "models" / task.name / "train.json").read_text())
    config = TrainConfig.load(demo / "configs" / f"{task.name}.json")
    files = DataFiles(train=tmp_path / "train.txt", test=tmp_path / "test.txt")
    assert (TrainConfig.from_dict(made["config"]), made["sha256"]) == (config, files.hashes())


def _swapped(question: str) -> tuple[str, int]:
    items = list("abcde")
    for swap in map(int, question.replace("0", "")):
        items[swap - 1 : swap + 1] = items[swap], items[swap - 1]
    return "".join(items), 8 - question.count("0")


def _added(question: str) -> tuple[str, int]:
    first, second = (int(question[start::2][::-1]) for start in (0, 1))
    # A carry that the lowest columns make goes through all the nines behind them.
    sums = [int(a) + int(b) for a, b in zip(question[::2], question[1::2], strict=True)]
    through = [
        length
        for low in range(1, 5)
        for length in range(1, 6 - low)
        if sums[low - 1] > 9 and sums[low : low + length] == [9] * length
    ]
    return f"{first + second:06d}", max(through, default=0)
