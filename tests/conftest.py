"""What every test has: steady settings, checks of shapes on request, and data that may lie beside the checkout."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

CHECKOUT = Path(__file__).resolve().parent.parent

# Two workers that both use every core are slower than two with one core each. Torch and the processes that tests start
# read this when they are first imported, which is why it stands here and not in a fixture.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Images of containers often forbid bytecode. Hundreds of modules are then compiled again by each of the processes that
# tests start, and those of `--shapes` and the tests themselves by every worker.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What a shell starts in the background, or nohup, is told to ignore these, and so is all that it starts in turn. Some
# tests send them.
for name, answer in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), answer)

# What modules make when they are imported stays, and looking for garbage in it was a tenth of all time.
gc.disable()

# How long an example takes depends on the machine's other load, and says nothing about loopscope. `make test` tries the
# same examples everywhere, so that a failure is the change's own; `pytest --hypothesis-profile=explore` tries others.
settings.register_profile("loopscope", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("loopscope")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", action="store_true", help="check every annotation of loopscope, shapes included")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("shapes"):
        install_import_hook("loopscope", "beartype.beartype")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_a_module_leaves_is_no_garbage() -> Iterator[None]:
    """What its tests have imported and remembered stays, and would be looked through in every analysis after it."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference tensors and data sets: the folder that LOOPSCOPE_SHARED names, else `shared` beside the checkout."""
    folder = Path(os.environ.get("LOOPSCOPE_SHARED", CHECKOUT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} does not exist (LOOPSCOPE_SHARED may name another folder)")
    return folder


@pytest.fixture(scope="session")
def reference_case(shared_dir: Path) -> Callable[[str], Path]:
    """`reference_case("ouro-tiny")` is the folder of that recorded case."""

    def folder_of(name: str) -> Path:
        folder = shared_dir / "reference" / name
        if not folder.is_dir():
            pytest.skip(f"no reference case {name}: {folder} does not exist")
        return folder

    return folder_of
