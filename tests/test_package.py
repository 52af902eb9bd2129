"""The package as its users find it: public names, a command line that answers at once, pins."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import loopscope

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).with_name("loopscope")
HEAVY = {"matplotlib", "netCDF4", "numpy", "pandas", "plotly", "torch", "xarray"}


def imported_by(*command: str | Path) -> set[str]:
    """Top-level packages that a Python command imports."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    lines = (line for line in process.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("name", loopscope.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(loopscope, name) is not None
    assert name in dir(loopscope)


def test_the_package_lists_its_public_names_alone() -> None:
    assert dir(loopscope) == sorted(loopscope.__all__)


def test_no_module_takes_the_place_of_a_public_name() -> None:
    # Importing a submodule sets it as an attribute of the package, whatever else has that name.
    modules = {module.name for module in pkgutil.iter_modules(loopscope.__path__)}
    assert not modules & set(loopscope.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loopscope.no_such_name


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {metadata.version('loopscope')}\n" in (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["analyze", "--help"],
        ["train", "--help"],
        ["report", "--help"],
        ["compare", "--help"],
        ["figures", "--help"],
        ["inspect", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    imported = imported_by(COMMAND, *arguments)
    assert "loopscope" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    "module", ["loopscope", "loopscope.analysis.settings", "loopscope.experiments.training.config"]
)
def test_importing_what_help_needs_imports_nothing_heavy(module: str) -> None:
    imported = imported_by("-c", f"import {module}")
    assert "loopscope" in imported
    assert not imported & HEAVY


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = {requirement_name(line) for group in (project["dependencies"], *extras) for line in group}
    pins = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {requirement_name(line) for line in pins if "==" in line}
    # Builds of torch for GPUs ask for one version of Triton, and the tests do without.
    assert wanted - {"triton"} <= pinned, "run `make pins`"


def requirement_name(requirement: str) -> str:
    """`huggingface_hub>=0.34` is `huggingface-hub`, the normalised form of the name."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()
