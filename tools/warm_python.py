"""Python processes that start in milliseconds, for bash scripts: forks of one that has imported loopscope.

Each is a process of its own, with its own working folder, environment, modules, random numbers and exit status. Only
the import of torch and the like, which is most of what a short command takes, is done once for all of them.
"""

from __future__ import annotations

import atexit
import gc
import os
import pkgutil
import runpy
import select
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import loopscope.cli
from loopscope.cli.commands import COMMANDS
from loopscope.cli.parsing import parse

# Functions that stand before the real commands. What a shell does with a command's output, such as a pipe, needs the
# real one. A function's body is a subshell, so that the script's `set -x` shows the command and none of this.
FUNCTIONS = """
loopscope() (
    { set +x; } 2>/dev/null
    ask_warm_python loopscope "$@"
)
python() (
    { set +x; } 2>/dev/null
    [ "$*" = - ] || exec python "$@"
    cat > "$WARM_PYTHON/script.py"
    ask_warm_python python < /dev/null
)
ask_warm_python() {
    printed="$WARM_PYTHON/output"
    if [ /dev/stdin -ef /dev/null ] && [ /dev/stdout -ef "$printed" ] && [ /dev/stderr -ef "$printed" ]
    then
        pwd > "$WARM_PYTHON/folder"
        env -0 > "$WARM_PYTHON/environment"
        printf '%s\\0' "$@" > "$WARM_PYTHON/arguments"
        echo > "$WARM_PYTHON/ask"
        read -r status < "$WARM_PYTHON/answer"
        exit "$status"
    elif [ "$1" = python ]
    then exec python - < "$WARM_PYTHON/script.py"
    else exec "$@"
    fi
}
"""


class WarmPython:
    """Runs bash scripts in which `loopscope ...` and `python - <<END` are forks of one process, made in `folder`."""

    def __init__(self, folder: Path, package: str = "loopscope") -> None:
        """`package` is that whose modules are imported beforehand, a part of loopscope or all of it."""
        self.folder, self.package = folder, package
        self._server: subprocess.Popen[bytes] | None = None
        for name in ("ask", "answer"):
            os.mkfifo(folder / name)

    def run(self, script: str, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a script in `cwd`, which ends with its first command that fails; `stdout` is all that was printed.

        Raises `subprocess.TimeoutExpired` after that many seconds.
        """
        self._start()
        # The environment that runs this is the one whose `loopscope` and `python` the commands mean.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = os.environ | {"PATH": path, "WARM_PYTHON": str(self.folder)}
        output = self.folder / "output"
        output.unlink(missing_ok=True)
        with output.open("a") as stream:
            try:
                status = subprocess.run(
                    ["bash", "-c", f"{FUNCTIONS}\nset -euxo pipefail\n{script}"],
                    cwd=cwd,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    check=False,
                    timeout=timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                self.close()
                raise
        return subprocess.CompletedProcess(script, status, output.read_text(encoding="utf-8", errors="replace"))

    def _start(self) -> None:
        if self._server is None:
            # It ends when its standard input does, which is when this process ends, whatever way.
            self._server = subprocess.Popen(
                [sys.executable, __file__, self.folder, self.package],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert self._server.stdout is not None
            if not self._server.stdout.readline():
                raise RuntimeError("loopscope cannot be imported; the reason is printed above.")

    def close(self) -> None:
        """End the process, with all that it may still be running; `run` starts another."""
        if self._server is not None:
            os.killpg(self._server.pid, 9)
            self._server.communicate()
            self._server = None


def _serve(folder: Path, package: str) -> None:
    """Fork for everyone who asks. Each fork returns from here, and then is a Python process like any other."""
    status: int | None = None

    def leave() -> None:
        # To take all modules apart, as a process does at its end, a fork copies each page of memory that they lie on:
        # 0.35 s of processor time.
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)  # the first, and so done after all others
    for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
        # The last two of these need packages of extras that may not be there.
        if not module.name.endswith(("__main__", ".worker", ".fused", ".harness")):
            import_module(module.name)
    parse(COMMANDS, ["analyze", "MODEL"])  # the first time takes four times as long as others
    # Forks look for no garbage in what they share, not even when they end, which would be most of a short one's time.
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    # Opened for reading and for writing, so that neither ever ends: who asks next may open the answers before those to
    # the last one would have been closed.
    with (
        (folder / "ask").open("r+b", buffering=0) as questions,
        (folder / "answer").open("r+b", buffering=0) as answers,
    ):
        while sys.stdin not in select.select([sys.stdin, questions], [], [])[0]:
            questions.read(1)
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    _become(folder)
                    status = 0
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else int(end.code is not None)
                    raise
                return
            ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            answers.write(f"{ended if ended >= 0 else 128 - ended}\n".encode())


def _become(folder: Path) -> None:
    """Run what was asked for, as if this process had been started for it."""
    command, *arguments = (folder / "arguments").read_text(encoding="utf-8").split("\0")[:-1]
    os.chdir((folder / "folder").read_text(encoding="utf-8").removesuffix("\n"))
    entries = (folder / "environment").read_text(encoding="utf-8").split("\0")[:-1]
    os.environ.clear()
    os.environ.update({name: value for name, _, value in (entry.partition("=") for entry in entries)})
    with (folder / "output").open("ab") as output, Path(os.devnull).open("rb") as nothing:
        for standard, stream in enumerate((nothing, output, output)):
            os.dup2(stream.fileno(), standard)
    if command == "loopscope":
        sys.argv = [command, *arguments]
        loopscope.cli.main()
    else:
        # A module that a script does not import itself it must not find.
        for name in [name for name in sys.modules if name.partition(".")[0] == "loopscope"]:
            del sys.modules[name]
        sys.path[0], sys.argv = "", ["-"]
        runpy.run_path(str(folder / "script.py"), run_name="__main__")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
