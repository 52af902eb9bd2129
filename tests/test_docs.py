"""The commands of README.md and docs/*.md work, and the tool that runs them sees what it should."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from run_doc_commands import CHECKOUT, Block, DocumentError, default_documents, find_blocks, make_scratch, run_block

SHARED = Path(os.environ.get("LOOPSCOPE_SHARED", CHECKOUT.parent / "shared"))
ALL_BLOCKS = [block for document in default_documents() for block in find_blocks(document)]


@pytest.fixture(scope="session")
def scratch_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The scratch folder of a document: the same for all its blocks."""
    made: dict[Path, Path] = {}

    def scratch(document: Path) -> Path:
        if document not in made:
            folder = tmp_path_factory.mktemp(document.stem)
            made[document] = make_scratch(folder, SHARED if SHARED.is_dir() else None)
        return made[document]

    return scratch


# In order, and in one worker: a later command of a document may use an earlier one's output.
@pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)
def test_commands_of_the_documentation(block: Block, scratch_of: Callable[[Path], Path]) -> None:
    if block.not_run is not None:
        pytest.skip(f"the document says: {block.not_run}")
    if block.needs_shared_data and not SHARED.is_dir():
        pytest.skip(f"no shared data: {SHARED} does not exist (LOOPSCOPE_SHARED may name another folder)")
    result = run_block(block, scratch_of(block.document))
    assert result.returncode == 0, result.stdout


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


def test_a_python_block_is_a_script(tmp_path: Path) -> None:
    (block,) = find_blocks(write(tmp_path, "```python\nwords = 'it''s'\nprint(words, '$HOME')\n```\n"))
    result = run_block(block, make_scratch(tmp_path / "scratch", None))
    assert result.returncode == 0
    assert "its $HOME" in result.stdout


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


def test_a_failing_command_fails_its_block_and_is_named(tmp_path: Path) -> None:
    (block,) = find_blocks(write(tmp_path, "```bash\ntrue\nls missing-file\necho never\n```\n"))
    result = run_block(block, make_scratch(tmp_path / "scratch", None))
    assert result.returncode != 0
    assert "+ ls missing-file" in result.stdout
    assert "never" not in result.stdout


def test_later_blocks_see_earlier_files_and_the_checkout_stays_clean(tmp_path: Path) -> None:
    project, shared = tmp_path / "project", tmp_path / "data"
    (project / "out").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    shared.mkdir()
    page = "```bash\nmkdir -p out && date > out/now\n```\n\n```bash\ncat out/now\nls pyproject.toml ../shared\n```\n"
    scratch = make_scratch(tmp_path / "scratch", shared, checkout=project)
    results = [run_block(block, scratch) for block in find_blocks(write(tmp_path, page))]
    assert [result.returncode for result in results] == [0, 0], results
    assert list((project / "out").iterdir()) == []
