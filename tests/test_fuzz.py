"""Damaged inputs of every kind: success or one sentence, within limits, and nothing is changed that was there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from tokenizers import Tokenizer

import fuzzing
from loopscope import Study
from loopscope._util.files import clear_leftovers, write_atomically
from loopscope._util.reading import open_file, parse_json, read_json
from loopscope._util.signals import uninterrupted
from loopscope.cli import main
from loopscope.errors import ConfigError, LoopscopeError, PromptError, StudyError, UnforeseenError, last_resort
from loopscope.prompts import sandbox
from loopscope.prompts.chat import ChatTemplate
from loopscope.prompts.tokenizer import is_tame, load_tokenizer
from loopscope.study import read_manifest
from whole_inputs import whole_inputs


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)


@pytest.mark.parametrize("kind", fuzzing.KINDS, ids=lambda kind: kind.name)
def test_damaged_input_ends_well(kind: fuzzing.Kind) -> None:
    @settings(max_examples=14, phases=[Phase.generate])
    @given(kind.damage)
    def attempt(damage: Any) -> None:
        fuzzing.check(kind.prepare, damage)

    attempt()


@pytest.mark.parametrize("kind", fuzzing.KINDS, ids=lambda kind: kind.name)
def test_the_undamaged_input_is_read(kind: fuzzing.Kind) -> None:
    nothing: list[Any] = [([], None), ([], None, "q"), [], ("states.npy", [], None), {}, "{{ messages[0].content }}"]
    assert any(_read(kind, damage) for damage in nothing)


def _read(kind: fuzzing.Kind, damage: Any) -> bool:
    try:
        return fuzzing.check(kind.prepare, damage)
    except (AttributeError, TypeError, ValueError, fuzzing.BrokenPromiseError):  # of another kind
        return False


def test_what_nobody_foresaw_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    for error in (
        PanicException("no entry"),
        RecursionError("deep"),
        MemoryError(),
        UnicodeEncodeError("a", "b", 0, 1, "c"),
    ):

        def fail(self: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("loopscope.cli.commands.Models.run", fail)
        with pytest.raises(SystemExit) as stopped:
            main(["models"])
        said = capsys.readouterr().err
        assert stopped.value.code == 70
        assert said.startswith("loopscope: ")
        assert "Traceback" not in said
        assert said.count("\n") == 1
        account = Path(said.split("The full account is in ")[1].strip().rstrip("."))
        assert type(error).__name__ in account.read_text(encoding="utf-8")
        account.unlink()


def test_python_callers_get_the_original_as_the_cause() -> None:
    original = OverflowError("too large")
    with pytest.raises(UnforeseenError, match=r"counting.*too large") as caught, last_resort("counting"):
        raise original
    assert caught.value.__cause__ is original
    for passed in (KeyboardInterrupt(), ConfigError("no")):
        with pytest.raises(type(passed)), last_resort("counting"):
            raise passed


def test_messages_are_cut_in_the_middle() -> None:
    assert len(str(LoopscopeError("x" * 5000))) == 200
    said = str(LoopscopeError(f"The file /a/{'b' * 5000}/c.json is wrong; choose {'another, ' * 500}or none."))
    assert len(said) == 600
    assert said.startswith("The file /a/bbb")
    assert said.endswith("or none.")
    assert str(LoopscopeError("\udcff")) == "\\udcff"


def test_only_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "no", Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(OSError, match=r"folder|directory|pipe|name"):
            open_file(path)
    (tmp_path / "large").write_bytes(b"1" * 100)
    with pytest.raises(OSError, match="100 bytes"):
        read_json(tmp_path / "large", 99)


@pytest.mark.parametrize(
    "text", ["[" * 65 + "]" * 65, "[" * 10**6, '{"a":' * 10**5, '"\\ud800"', "9" * 5000, "", "{", "nul"]
)
def test_json_has_limits(text: str) -> None:
    with pytest.raises(ValueError, match=r"lists and objects|surrogate|digits|Expecting"):
        parse_json(text)


def test_json_within_the_limits_is_read() -> None:
    assert parse_json('["\\ud83d\\ude42"]') == ["🙂"]
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json("[[]," * 60 + "1" + "]" * 60)


def test_a_changed_file_of_a_study_is_named(tmp_path: Path) -> None:
    whole = whole_inputs() / "study"
    for name in ("study.nc", "tokens.jsonl", "manifest.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for path in whole.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(b"one", b"two") if name != "study.nc" else content + b"\0")
        if name == "manifest.json":
            (folder / name).write_bytes(content.replace(b'"horizon": 8', b'"horizon": 9'))
        with pytest.raises(StudyError, match=rf"{name}.*checksum"):
            Study.load(folder)
    manifest = read_manifest(whole)
    for name in ("files", "checksum"):
        del manifest[name]
    old = tmp_path / "old"
    old.mkdir()
    for path in whole.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    (old / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert Study.load(old).tokens == Study.load(whole).tokens


def test_a_template_that_does_not_end_is_ended() -> None:
    for source, reason in (
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes too long"),
        ("{{ 'x' * 100000000000 }}", "MemoryError"),
    ):
        with pytest.raises(PromptError, match=rf"refuses the prompt \({reason}"):
            ChatTemplate(source, {}).render("hello")
    # And the next one is run, by another process.
    assert ChatTemplate("<{{ messages[0].content }}>", {}).render("hello").text == "<hello>"


def test_a_tokenizer_with_expressions_gives_the_same_tokens_in_the_sandbox(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    fields = json.loads((whole_inputs() / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert is_tame(fields)
    level = {**fields["pre_tokenizer"], "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}+"}, "behavior": "Isolated", "invert": False}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    assert not is_tame(fields)
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.add_special_tokens(["<s>"])
    for text in ("one 42 🙂", "<s>two"):
        wanted, found = plain.encode(text), tokenizer.encode(text)
        assert (found.ids, found.tokens) == (wanted.ids, wanted.tokens)
        assert [tuple(each) for each in found.offsets] == wanted.offsets
    assert tokenizer.name(65) == plain.decode([65], skip_special_tokens=False)


def test_leftovers_of_a_killed_process_go_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    left = [tmp_path / ".study.nc.ab12cd_9.part", tmp_path / "shards" / ".00001.npz.abcdefgh.part"]
    kept = [tmp_path / ".hidden", tmp_path / "a.part", tmp_path / ".git.part"]
    for path in (*left, *kept):
        path.write_text("x", encoding="utf-8")
    write_atomically(tmp_path / "new.json", b"{}")
    clear_leftovers(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_are_answered_as_ctrl_c_is(number: signal.Signals, status: int, tmp_path: Path) -> None:
    script = (
        "import os, signal, time, loopscope.cli, loopscope.cli.commands as c\n"
        "def run(self):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)}); time.sleep(20)\n"
        "    finally:\n"
        f"        os.kill(os.getpid(), {int(number)}); time.sleep(0.05); print('tidied', flush=True)\n"
        "c.Models.run = run\n"
        "loopscope.cli.main(['models'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert "loopscope: interrupted." in done.stderr
    assert "Traceback" not in done.stderr
    # A second signal does not stop what the first one has begun.
    assert done.stdout == "tidied\n"


def test_a_worker_does_not_outlive_the_process_that_started_it() -> None:
    script = (
        "import os, time\n"
        "from loopscope.analysis.engine.processes import ProcessEngine\n"
        "worker = ProcessEngine(1).start(time.sleep)\n"
        "print(worker._process.pid, flush=True)\n"
        "import threading; threading.Thread(target=worker.call, args=(60,), daemon=True).start()\n"
        "time.sleep(0.7); os._exit(9)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    pid = int(found.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists() and "Z" not in _state(pid):
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or "Z" in _state(pid)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_signal_waits_while_a_library_may_hold_a_lock() -> None:
    reached = []

    def holding() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        holding()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
