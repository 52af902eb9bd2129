"""The command line: what it says about input that it cannot use, and what it ends with."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import loopscope
from loopscope import AnalyzeSettings, Study
from loopscope.analysis.settings import Preset
from loopscope.cli import console, main
from loopscope.cli.commands import COMMANDS, Analyze, Compare, Models, Train
from loopscope.cli.control import ControlTokens
from loopscope.cli.experiment import PhaseDiagram
from loopscope.cli.parsing import parse
from loopscope.errors import ConfigError
from loopscope.models.checkpoints import FAMILIES
from loopscope.models.checkpoints.find import demo_names
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.report.page import write as write_pages
from small_models import architecture, byte_tokenizer, checkpoint
from synthetic_study import contracting, looped_study, with_behaviour

COMMAND = str(Path(sys.executable).with_name("loopscope"))
SHORT = ("--recurrences", "3", "--horizon", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with which nothing is wrong."""
    return checkpoint(tmp_path_factory.mktemp("model") / "good", max_positions=40)


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run(*arguments: str | Path) -> int:
    """The exit status of `loopscope ARGUMENTS`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The sentence with which `loopscope ARGUMENTS` is refused."""
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return one_sentence(shown.err)


def one_sentence(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("loopscope: ")
    assert lines[0].endswith(".")
    assert "Traceback" not in stderr
    return lines[0]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.jsonl", None, ("--field", "question"), "missing.jsonl does not exist"),
        ("empty.txt", "\n\n", (), "empty.txt holds no prompts"),
        ("a.jsonl", '{"question": "x", "id": 1}\n', ("--field", "prompt"), "no field 'prompt'.*question, id"),
        ("a.jsonl", '{"question": "x"}\n', (), "name the field"),
        ("a.jsonl", '{"question": "x"}\n{"question": " "}\n', ("--field", "question"), "Line 2 .* is empty or blank"),
        ("a.jsonl", '{"question": "x"\n', ("--field", "question"), "Line 1 .* is not JSON"),
        ("a.txt", "x" * 41, (), "has 41 tokens, but the model has 40 positions.*--truncate 40"),
        ("a.jsonl", '{"ids": [1, 256]}', ("--field", "ids"), "token id 256, but the model has 256"),
        ("a.jsonl", '{"ids": [1, -2]}', ("--field", "ids"), "list of token ids"),
        ("a.txt", "two\nlines", ("--limit", "0"), "--limit must be at least 1"),
        ("a.txt", "one", ("--track", "9:0"), "--track 9:0: prompts are counted from 0, and the last one is 0"),
        ("a.txt", "one", ("--track", "0:3"), "--track 0:3: prompt 0 has 3 tokens"),
        ("a.txt", "one", ("--track", "last"), "PROMPT:TOKEN"),
        ("a.txt", "one", ("--readout", "99"), "--readout asks for 99"),
        ("a.txt", "one", ("--recurrences", "0"), "--recurrences must be at least 1, got 0"),
        ("a.txt", "one", ("--recurrences", "1e3"), "--recurrences takes a whole number, got '1e3'"),
        ("a.txt", "one", ("--batch-size", "many"), "--batch-size takes a whole number or auto, got 'many'"),
        ("a.txt", "one", ("--horizon", "1"), "--horizon must be at least 2"),
        ("a.txt", "one", ("--batch-size", "0"), "--batch-size must be at least 1"),
        ("a.txt", "one", ("--threads", "0"), "--threads must be at least 1"),
        ("a.txt", "one", ("--device", "toaster"), "device 'toaster' cannot be used.*--device cpu"),
        ("a.txt", "one", ("--text", "two"), "both were given"),
        ("a.txt", "one", ("--skip", "readout", "--answer", "5"), "--answer is about readout, which --skip leaves out"),
        ("a.txt", "one", ("--answer", ""), "--answer takes texts, of which none may be empty"),
        ("a.txt", "one", ("--system-prompt", "nowhere.txt"), "nowhere.txt does not exist"),
    ],
)
def test_prompts_and_settings_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str],
    good: Path,
    tmp_path: Path,
    name: str,
    content: str | None,
    options: tuple[str, ...],
    message: str,
) -> None:
    prompts = tmp_path / name
    if content is not None:
        write(prompts, content)
    out = tmp_path / "study"
    sentence = refused(capsys, "analyze", good, "--prompts", prompts, *SHORT, "--out", out, *options)
    assert matches(message, sentence)
    assert not out.exists()


def matches(pattern: str, sentence: str) -> bool:
    return pytest.raises(ValueError, match=pattern).matches(ValueError(sentence))


def test_no_prompts_at_all(capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path) -> None:
    assert "neither was given" in refused(capsys, "analyze", good, *SHORT, "--out", tmp_path / "study")


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_weight(model: Path) -> None:
    change_weights(model, lambda weights: weights.pop("injection.weight"))


def add_weight(model: Path) -> None:
    change_weights(model, lambda weights: weights.update({"gate.weight": torch.ones(2)}))


def break_weight(model: Path) -> None:
    change_weights(model, lambda weights: weights["injection.weight"][3].fill_(torch.nan))


def reshape_weight(model: Path) -> None:
    change_weights(model, lambda weights: weights.update({"norm.weight": torch.ones(3)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "model.safetensors is truncated or damaged"),
        (drop_weight, "lacks 1 tensor .*'injection.weight'"),
        (add_weight, "holds 1 tensor .*'gate.weight'"),
        (break_weight, "'injection.weight' .* NaN or infinity"),
        (reshape_weight, r"'norm.weight' .* shape \(3,\).*asks for \(16,\)"),
        (lambda model: (model / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda model: (model / "config.json").unlink(), "no config.json"),
        (lambda model: write(model / "config.json", "{"), "config.json is not valid JSON"),
        (lambda model: write(model / "tokenizer.json", "{}"), "tokenizer.json is not a readable tokenizer"),
        (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)
def test_checkpoints_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(model)
    sentence = refused(capsys, "analyze", model, "--text", "one", *SHORT, "--out", tmp_path / "study")
    assert matches(message, sentence)


@pytest.mark.parametrize(
    ("name", "message"),
    [("demo:injectde", "did you mean 'demo:injected'"), ("no-such-model", "neither a folder nor a shipped model")],
)
def test_models_that_do_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, message: str) -> None:
    sentence = refused(capsys, "analyze", name, "--text", "one", *SHORT, "--out", tmp_path / "study")
    assert matches(message, sentence)
    assert "demo:injected" in sentence


def test_a_tokenizer_of_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", extra_tokens=9)
    text = ("--text", "one <extra 7>")
    sentence = refused(capsys, "analyze", model, *text, *SHORT, "--out", tmp_path / "study")
    assert "token id 263, but the model has 256 tokens" in sentence
    assert "its tokenizer has 265 tokens, so it belongs to another model" in sentence


@pytest.mark.parametrize("content", [None, {}, {"manifest.json": '{"status": "running"}'}, {"notes.txt": "mine"}])
def test_a_report_needs_a_study(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: dict[str, str] | None
) -> None:
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            write(folder / name, text)
    sentence = refused(capsys, "report", folder)
    assert str(folder) in sentence
    assert not (folder / "report.html").exists()


def test_a_report_is_written_in_place_of_reports_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_pages, "quick_answers", lambda *given: [])
    monkeypatch.setattr(write_pages, "render_page", lambda *given: "<!doctype html><html></html>")
    looped_study(contracting(), prompts=2).save(tmp_path)
    assert run("report", tmp_path) == run("report", tmp_path, "-o", tmp_path / "report.html") == 0
    capsys.readouterr()
    for name in ("study.nc", "manifest.json", "tokens.jsonl"):
        assert "of another kind" in refused(capsys, "report", tmp_path, "-o", tmp_path / name)
    assert "is a folder, and a file is written" in refused(capsys, "report", tmp_path, "-o", tmp_path)
    Study.load(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path, place: str
) -> None:
    write(tmp_path / "file", "mine")
    sentence = refused(capsys, "analyze", good, "--text", "one", *SHORT, "--out", tmp_path / place)
    assert "cannot be written" in sentence
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_an_analysis_ends_with_its_answers_and_the_report(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    assert run("analyze", good, "--text", "one", "two", *SHORT, "--out", out) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"report  {out / 'report.html'}"
    assert "fixed point" in shown
    assert [entry["text"] for entry in Study.load(out).tokens] == ["one", "two"]
    assert run("report", out, "--out", tmp_path / "other.html") == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8").startswith("<!")


def test_an_analysis_without_a_report(capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert run("analyze", good, "--text", "one", *SHORT, "--out", out, "--no-report") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"study  {out}"
    assert not (out / "report.html").exists()


def test_a_model_that_diverges_is_a_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net = LoopedTransformer(architecture(vocab_size=256)).initialize(0, 0.1)
    assert net.injection is not None
    with torch.no_grad():
        net.injection.weight.copy_(torch.cat([1000 * torch.eye(16), torch.eye(16)], dim=1))
    save_checkpoint(tmp_path / "model", net, byte_tokenizer().to_str())
    command = ("analyze", tmp_path / "model", "--text", "one", "two", "--recurrences", "30", "--horizon", "30")
    assert run(*command, "--device", "cpu", "--out", tmp_path / "study") == 0
    shown = capsys.readouterr()
    assert "diverge" in shown.out
    assert "Warning" not in shown.err
    found = Study.load(tmp_path / "study").dataset["diverged_at"].values
    assert ((found > 3) & (found < 14)).all()


def settings_by(monkeypatch: pytest.MonkeyPatch, *options: str) -> AnalyzeSettings:
    """Of an analysis with these options, which is not run."""
    found = []
    monkeypatch.setattr(Analyze, "run", lambda command: found.append(command.settings))
    assert run("analyze", "demo:injected", "--text", "one", "--out", "study", *options) == 0
    return AnalyzeSettings(**vars(found[0]))


def test_an_option_wins_over_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        settings_by(monkeypatch) == settings_by(monkeypatch, "--preset", "standard") == AnalyzeSettings(text=("one",))
    )
    quick = settings_by(monkeypatch, "--preset", "quick")
    assert quick == AnalyzeSettings.preset("quick", text=("one",))
    assert quick.judged_layers == "last"
    assert not {"readout", "behaviour"} & set(quick.skip)
    # Also where it gives what is the default without a preset.
    assert settings_by(monkeypatch, "--preset=quick", "--judged_layers", "all").judged_layers == "all"
    full = settings_by(monkeypatch, "--preset", "full", "--no-hooked-eigenvalues", "--map-limit=2", "--skip", "heads")
    assert (full.hooked_eigenvalues, full.map_limit, full.map_tokens, full.skip) == (False, 2, 256, ("heads",))
    less = settings_by(monkeypatch, "--preset", "quick", "--skip", "readout", "maps")
    assert less.skip == (*quick.skip, "readout")
    # What the preset says of a part that is left out is no contradiction.
    assert settings_by(monkeypatch, "--preset", "full", "--skip", "maps").map_tokens == 64
    assert settings_by(monkeypatch, "--preset", "quick", "--skip", "behaviour").judged_layers == "all"


def test_a_list_may_be_given_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    skips = ("--skip", "heads", "maps", "--text=two", "--limit", "2", "--skip=readout", "--text", "three")
    found = settings_by(monkeypatch, *skips)
    assert (found.text, found.skip, found.limit) == (("one", "two", "three"), ("heads", "maps", "readout"), 2)
    command = parse(COMMANDS, ["analyze", "--text=one", "demo:injected", "--text=two"])
    assert isinstance(command, Analyze)
    assert (command.model, command.prompt.text) == ("demo:injected", ("one", "two"))


def test_a_home_that_no_shell_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    command = parse(COMMANDS, ["compare", "a", "~/b", "--out=~/both"])
    assert isinstance(command, Compare)
    assert (command.studies, command.out) == ((Path("a"), Path("/home/ann/b")), Path("/home/ann/both"))


@pytest.mark.parametrize(
    ("option", "part"), [("--eigenvalue-products", "stability"), ("--other-starts", "path-independence")]
)
def test_an_option_of_what_a_preset_leaves_out_is_refused(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path, option: str, part: str
) -> None:
    options = ("--preset", "quick", option, "40")
    sentence = refused(capsys, "analyze", good, "--text", "one", *SHORT, "--out", tmp_path / "study", *options)
    assert sentence == (
        f"loopscope: {option} is about {part}, which --preset quick leaves out; give another preset, or leave the "
        "option out."
    )


def test_a_quick_analysis_judges_the_last_layer(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    size = ("--recurrences", "4", "--horizon", "16", "--device", "cpu")
    assert run("analyze", good, "--text", "one", *size, "--out", out, "--preset", "quick", "--no-report") == 0
    found = Study.load(out).dataset
    assert found.sizes["judged_layer"] == 1
    assert {"relative_distance", "loss", "verdict", "twin_floor"} <= set(found.data_vars)
    assert "predicted_rate" not in found


def test_the_shipped_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    shown = capsys.readouterr().out
    assert demo_names()
    for name in demo_names():
        assert name in shown
    assert tuple(family.name for family in FAMILIES) == console.FAMILIES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("analyze demo:injected --recurrence 3", ["loopscope analyze has no option --recurrence", "--recurrences"]),
        ("analyze demo:injected --prompt hi", ["loopscope analyze has no option --prompt", "--prompts"]),
        ("experiment phase --seed 3", ["loopscope experiment phase has no option --seed", "--seeds"]),
    ],
)
def test_an_option_that_does_not_exist_is_answered_in_three_lines(
    capsys: pytest.CaptureFixture[str], arguments: str, said: list[str]
) -> None:
    assert run(*arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert said[0] in lines[0]
    assert lines[1].startswith(f"The nearest are {said[1]}")
    assert lines[2].endswith(" --help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyz"], "no command 'analyz'; did you mean analyze"),
        (["experiment", "phases"], "no command 'phases'; did you mean phase"),
        (["analyze", "demo:injected", "--limit", "x"], "--limit takes a whole number, got 'x'"),
        (
            ["analyze", "demo:injected", "--dtype", "half"],
            "--dtype takes one of auto, bf16, bfloat16, float16,",
        ),
        (["describe"], "no command 'describe'; it has analyze, show,"),
        (["analyze", "demo:injected", "--preset", "slow"], "--preset takes one of full, quick, standard, got 'slow'"),
        (["analyze"], "Missing .*MODEL"),
        (["models", "all"], "No option takes all"),
        (["compare", "one", "--out", "folder", "other"], "No option takes other; what belongs to none comes before"),
    ],
)
def test_commands_and_values_that_cannot_be_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert matches(message, line)
    assert "None" not in line


def test_what_there_is_is_said_without_being_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == run("--help") == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n  {name} ") == 2 for name in COMMANDS)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"loopscope {loopscope.__version__}\n"
    assert run("analyse", "--help") == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert [name for name in ("prompt", "run", "machine", "measure") if f" {name} options " not in shown] == []
    assert run("generate", "--help") == 0
    shown = capsys.readouterr().out
    assert "{per-recurrence,last,none}" in shown
    assert " RULE " in shown


@pytest.mark.parametrize(
    ("command", "shown", "not_shown"),
    [
        ("compare", ["-o DIR,", "DIR ...", "(required)"], "(default: )"),
        ("report", ["-o FILE,"], "-o DIR"),
        ("exits", ["-o FILE,"], "-o DIR"),
        ("evaluate", ["--include-path DIR"], "(default: )"),
        ("experiment report", ["-o FILE,"], "(default: )"),
    ],
)
def test_help_says_what_is_taken(
    capsys: pytest.CaptureFixture[str], command: str, shown: list[str], not_shown: str
) -> None:
    assert run(*command.split(), "--help") == 0
    said = capsys.readouterr().out
    assert [each for each in shown if each not in said] == []
    assert not_shown not in said


@pytest.mark.parametrize("columns", ["0", "10"])
def test_there_is_always_some_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("--help") == run("models") == 0
    shown = capsys.readouterr().out
    assert "Show the answers" in shown
    assert "demo:" in shown


class Full(io.StringIO):
    """Has no room: what is written fails at once, or when it is flushed."""

    def __init__(self, *, buffered: bool) -> None:
        super().__init__()
        self.buffered = buffered

    def write(self, text: str) -> int:
        if not self.buffered:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("arguments", ["--version", "--help", "models --help", "models"])
def test_output_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, buffered: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", Full(buffered=buffered))
    assert "cannot be written (No space left on device)" in refused(capsys, *arguments.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_real_process_whose_output_cannot_be_written_ends_as_others_do() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run([COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 2
    one_sentence(process.stderr)


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert run("models") == 0
    assert b"(2, 4 ? 8, 2)" in shown.getvalue()


@pytest.mark.parametrize(
    ("arguments", "command", "kept"),
    [
        ("models", Models, ""),
        ("control study -o folder", ControlTokens, "; what was finished is kept, the same command resumes it"),
        ("train config.json -o folder", Train, "; what was finished is kept, the same command resumes it"),
        ("experiment phase -o folder", PhaseDiagram, "; what was finished is kept, the same command resumes it"),
    ],
)
def test_ctrl_c_says_what_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, command: type, kept: str
) -> None:
    def interrupted(command: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert run(*arguments.split()) == 130
    assert capsys.readouterr().err == f"loopscope: interrupted{kept}.\n"


def test_other_words_for_model_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Analyze] = []
    monkeypatch.setattr(Analyze, "run", lambda command: found.append(command))
    for words in (
        "-o study --model=demo:injected --text one",
        "--text one --model demo:injected --output study",
        "demo:injected --out study --text one",
    ):
        assert run("analyse", *words.split()) == 0
    assert {(command.model, command.out) for command in found} == {("demo:injected", Path("study"))}


def test_a_study_without_a_folder_is_named_after_its_model(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("analyze", good, "--text", "one", *SHORT, "--preset", "quick", "--no-report") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert capsys.readouterr().out.splitlines()[-1] == f"study  {folder.relative_to(tmp_path)}"
    assert matches(r"good-\d{8}-\d{6}$", folder.name)
    assert len(Study.load(folder).tokens) == 1


def test_answers_of_a_study_are_shown_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    study = with_behaviour(looped_study(contracting(), recurrences=16, horizon=32))
    study.save(tmp_path)
    answers = loopscope.quick_answers(study)
    assert run("show", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(answers) + 1 <= 15
    assert all(len(line) <= 80 for line in lines[:-1])
    assert all(answer.verdict in line for answer, line in zip(answers, lines, strict=False))
    assert lines[-1] == f"study  {tmp_path}"
    assert run("show", tmp_path, "--verbose") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(answer.sentence.split()) in shown for answer in answers)
    assert run("show", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in found["answers"]] == [answer.key for answer in answers]


def test_neither_help_nor_models_wait_for_torch() -> None:
    code = "import sys, loopscope.cli\ntry: loopscope.cli.main(sys.argv[1:])\n"
    code += "finally: print({'torch', 'xarray', 'numpy'} & set(sys.modules))"
    for command in (["--help"], ["models"]):
        process = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
        assert process.stdout.splitlines()[-1] == "set()"


def test_a_preset_that_does_not_exist_is_refused_in_python_too() -> None:
    with pytest.raises(ConfigError, match="no preset 'fast'; the presets are quick, standard, full"):
        AnalyzeSettings.preset(cast(Preset, "fast"))


@pytest.mark.parametrize(
    "arguments",
    [["analyze", "demo:none", "--text", "one", "--out", "study"], ["report", "nowhere"]],
    ids=["analyze", "report"],
)
def test_a_real_process_ends_with_one_sentence_and_status_2(arguments: list[str], tmp_path: Path) -> None:
    process = subprocess.run(
        [COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 2
    assert process.stdout == ""
    one_sentence(process.stderr)


def test_settings_are_in_the_manifest_as_they_were_given(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", '{"q": "one"}\n{"q": "two"}\n{"q": "three"}\n')
    given = ("--field", "q", "--limit", "2", "--sample-seed", "0", "--seed", "7", "--skip", "readout", "noise-floor")
    out = tmp_path / "study"
    assert run("analyze", good, "--prompts", prompts, *given, *SHORT, "--no-report", "--out", out) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["prompts"] | {"field": "q", "limit": 2, "sample_seed": 0, "count": 2} == manifest["prompts"]
    wanted = {"seed": 7, "recurrences": 3, "horizon": 3, "skip": ["readout", "noise-floor"]}
    assert manifest["settings"] | wanted == manifest["settings"]
