"""Nothing of a checkpoint is executed or unpickled, and results are written to their own folder alone."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import loopscope
from loopscope.errors import CheckpointError, LoopscopeError
from loopscope.prompts.sandbox import RefusedError, sandbox
from loopscope.report.page.write import write_report
from small_models import checkpoint
from synthetic_study import contracting, looped_study

SECRET = "a-secret-that-no-message-may-show"


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ ''|map(attribute='__class__')|list }}{{ [messages]|map(attribute='__class__')|list }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{0.__class__}'|format(1) }}",
    "{{ ('{0.__class__}'|attr('format'))(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{ joiner.__init__.__globals__ }}{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}{{ strftime_now.__self__.__class__ }}",
    "{% set f = raise_exception %}{{ f.__code__ }}{{ f.__builtins__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% include 'MARK' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% extends '/etc/passwd' %}",
    "{{ open('MARK', 'w') }}{{ __import__('os').system('touch MARK') }}",
    "{% call(x) raise_exception.__class__('x') %}{% endcall %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_does_not_get_out_of_its_sandbox(source: str, tmp_path: Path) -> None:
    content = {"source": source.replace("MARK", str(tmp_path / "mark")), "variables": {}}
    turns = [{"role": "user", "content": "hello"}]
    try:
        text = sandbox().call("render", content, turns=turns, now=("2026-01-02T03:04:05", 0.0, "UTC"))
    except RefusedError:
        text = ""
    assert not any(found in text for found in ("<class", "<module", "<function", "<code", "{'__name__'", "root:"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["../outside/model.safetensors", "..", "/outside/model.safetensors", "sub/a", "", "."])
def test_an_index_names_files_of_its_own_folder_alone(file: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    checkpoint(tmp_path / "outside")
    named = str(tmp_path) + file if file.startswith("/") else file
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": named}}))
    with pytest.raises(CheckpointError, match=r"json names the file .*, which is not in|, which names other files"):
        loopscope.load(model, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_a_link_leads_to_is_neither_run_nor_shown(name: str, tmp_path: Path) -> None:
    """The hub's own cache is made of links, so they are followed; what they lead to has to be what it is taken for."""
    for number, content in enumerate((pickle.dumps(Trap(tmp_path / "mark")), SECRET.encode(), None)):
        model = checkpoint(tmp_path / f"model-{number}")
        outside = Path("/dev/zero") if content is None else tmp_path / f"outside-{number}"
        if content is not None:
            outside.write_bytes(content)
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(outside)
        if content is None and "tokenizer" in name:  # which a model can do without
            loopscope.load(model, device="cpu")
            continue
        with pytest.raises(LoopscopeError) as refused:
            loopscope.load(model, device="cpu")
        assert SECRET not in str(refused.value)
    assert not (tmp_path / "mark").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text(SECRET)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").symlink_to(tmp_path / "precious")
    write_report(looped_study(contracting(), prompts=2), out / "report.html")
    assert (tmp_path / "precious").read_text() == SECRET
    assert not (out / "report.html").is_symlink()
