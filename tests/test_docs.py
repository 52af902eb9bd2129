"""The commands of README.md and docs/*.md work, and the tool that runs them sees what it should."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from run_doc_commands import CHECKOUT, Block, DocumentError, default_documents, find_blocks, make_scratch, run_block
from run_notebook import code_cells, run_notebook
from warm_python import WarmPython

ALL_BLOCKS = [block for document in default_documents() for block in find_blocks(document)]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    with closing(WarmPython(tmp_path_factory.mktemp("warm"))) as made:
        yield made


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all documents, so that an analysis which two of them show is run once."""
    return make_scratch(tmp_path_factory.mktemp("docs"))


# In order, and in one worker: a later command may use an earlier one's output.
@pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)
def test_commands_of_the_documentation(block: Block, scratch: Path, warm: WarmPython) -> None:
    if block.not_run is not None:
        pytest.skip(f"the document says: {block.not_run}")
    result = run_block(block, scratch, warm)
    assert result.returncode == 0, result.stdout


def test_a_document_reads_only_what_it_has_made_itself() -> None:
    for document in default_documents():
        made: set[str] = set()
        for block in find_blocks(document):
            if block.not_run is None:
                for before, folder in re.findall(r"(.{0,30})\b(out/[\w-]+)", block.script):
                    if re.search(r"(--out |out=\"|save\(\"|Path\(\"|write_figures\(study, \")$", before):
                        made.add(folder)
                    assert folder in made, f"{block}: {folder} comes from another document."


def write(folder: Path, text: str) -> Path:
    document = folder / "page.md"
    document.write_text(text, encoding="utf-8")
    return document


def test_console_blocks_hold_commands_and_output(tmp_path: Path) -> None:
    page = "Words\n\n```console\n$ echo one \\\n    two\none two\n$ echo three\nthree\n```\n\n```text\n$ false\n```\n"
    (block,) = find_blocks(write(tmp_path, page))
    assert block.script == "echo one \\\n    two\necho three\n"
    assert block.line == 3
    assert block.not_run is None


def test_a_python_block_is_a_script(tmp_path: Path, warm: WarmPython) -> None:
    (block,) = find_blocks(write(tmp_path, "```python\nwords = 'it''s'\nprint(words, '$HOME')\n```\n"))
    result = run_block(block, make_scratch(tmp_path / "scratch"), warm)
    assert result.returncode == 0
    assert "its $HOME" in result.stdout


def test_the_cells_of_a_notebook_are_one_script_and_show_what_they_end_with(tmp_path: Path, warm: WarmPython) -> None:
    picture = "class Picture:\n    def _repr_png_(self):\n        return b'png'"
    sources = [f"{picture}\nprint(1)\nPicture()", "names = 2", "names"]
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]
    notebook = tmp_path / "page.ipynb"
    notebook.write_text(
        json.dumps({"cells": [{"cell_type": "markdown", "source": ["words"]}, *cells]}), encoding="utf-8"
    )
    (block,) = find_blocks(notebook)
    assert run_block(block, make_scratch(tmp_path / "scratch"), warm).returncode == 0
    run_notebook(notebook)
    shown = [cell["outputs"] for cell in code_cells(notebook)]
    assert [output["output_type"] for output in shown[0]] == ["stream", "execute_result"]
    assert shown[0][1]["data"]["image/png"] == "cG5n\n"
    assert shown[1] == []
    assert shown[2][0]["data"]["text/plain"] == ["2"]


def test_the_notebook_is_kept_with_its_figures_and_small() -> None:
    path = CHECKOUT / "docs" / "tour.ipynb"
    assert path.stat().st_size < 1e6
    for cell in code_cells(path):
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_a_comment_leaves_the_next_block_out_and_no_other(tmp_path: Path) -> None:
    page = "<!-- not run: needs the\nnetwork -->\n```bash\nfalse\n```\n\n```bash\ntrue\n```\n"
    first, second = find_blocks(write(tmp_path, page))
    assert first.not_run == "needs the\nnetwork"
    assert second.not_run is None


def test_a_comment_does_not_reach_over_a_paragraph(tmp_path: Path) -> None:
    (block,) = find_blocks(write(tmp_path, "<!-- not run: slow -->\n\nWords.\n\n```bash\ntrue\n```\n"))
    assert block.not_run is None


def test_a_console_block_without_a_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"page\.md:1: a console block shows no command"):
        find_blocks(write(tmp_path, "```console\nloopscope models\n```\n"))


def test_a_failing_command_fails_its_block_and_is_named(tmp_path: Path, warm: WarmPython) -> None:
    (block,) = find_blocks(write(tmp_path, "```bash\ntrue\nls missing-file\necho never\n```\n"))
    result = run_block(block, make_scratch(tmp_path / "scratch"), warm)
    assert result.returncode != 0
    assert "+ ls missing-file" in result.stdout
    assert "never" not in result.stdout


def test_later_blocks_see_earlier_files_and_the_checkout_stays_clean(tmp_path: Path, warm: WarmPython) -> None:
    project = tmp_path / "project"
    (project / "out").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    page = "```bash\nmkdir -p out && date > out/now\n```\n\n```bash\ncat out/now\nls pyproject.toml\n```\n"
    scratch = make_scratch(tmp_path / "scratch", checkout=project)
    results = [run_block(block, scratch, warm) for block in find_blocks(write(tmp_path, page))]
    assert [result.returncode for result in results] == [0, 0], results
    assert list((project / "out").iterdir()) == []


def test_a_warm_command_is_a_process_of_its_own(tmp_path: Path, warm: WarmPython) -> None:
    leave = "import os, sys, torch\ntorch.set_num_threads(7)\nos.environ['HERE'] = '1'\nos.chdir('/')\nsys.exit(3)\n"
    look = "import os, torch\nprint(torch.get_num_threads() == 7, os.getcwd())\n"
    look += "print([os.environ.get(name) for name in ('HERE', 'THERE')])\n"
    script = f"python - <<'END' || echo status $?\n{leave}END\nexport THERE=2\npython - <<'END'\n{look}END\n"
    found = warm.run(script, tmp_path, 60)
    assert found.returncode == 0, found.stdout
    assert "\nstatus 3\n" in found.stdout
    assert f"\nFalse {tmp_path}\n[None, '2']\n" in found.stdout


def test_a_warm_script_finds_only_what_it_imports(tmp_path: Path, warm: WarmPython) -> None:
    found = warm.run("python - <<'END'\nimport loopscope\nloopscope.measures\nEND\n", tmp_path, 60)
    assert found.returncode == 1
    assert "AttributeError" in found.stdout


def test_a_warm_command_that_is_killed_fails_its_script(tmp_path: Path, warm: WarmPython) -> None:
    found = warm.run("python - <<'END'\nimport os\nos.kill(os.getpid(), 9)\nEND\necho never\n", tmp_path, 60)
    assert found.returncode == 137
    assert "\nnever" not in found.stdout


def test_what_a_shell_does_with_an_output_is_done(tmp_path: Path, warm: WarmPython) -> None:
    script = (
        "loopscope models\nloopscope --help > kept\nloopscope --help | cat > piped\nloopscope reports 2> said || true\n"
    )
    found = warm.run(script, tmp_path, 60)
    assert found.returncode == 0, found.stdout
    assert (tmp_path / "kept").read_text() == (tmp_path / "piped").read_text()
    assert found.stdout.count("demo:injected") == 1
    assert "analyze" in (tmp_path / "kept").read_text()
    assert "reports" in (tmp_path / "said").read_text()


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    # With little to import: it is started twice.
    with closing(WarmPython(tmp_path, "loopscope.prompts")) as warm:
        with pytest.raises(subprocess.TimeoutExpired):
            warm.run("python - <<'END'\nimport time\ntime.sleep(60)\nEND\n", tmp_path, 0.5)
        assert warm.run("python - <<'END'\nprint('again')\nEND\n", tmp_path, 60).stdout.endswith("\nagain\n")
