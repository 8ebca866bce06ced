"""Python programs that are forked from a process which has imported their modules."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from shutil import which
from types import ModuleType, TracebackType
from typing import NoReturn, Self

from rft.rewards.load import SpecError
from rft.rewards.worker import open_streams
from rft.utils.stack import WHERE


class Forked:
    """A program in a fork of this process, with the part of `subprocess.Popen` that kind `command` uses.

    command: the Python file and its arguments. The program leads a process group.
    """

    def __init__(self, command: Sequence[str], folder: str, variables: Mapping[str, str]) -> None:
        output, to_output = os.pipe()
        errors, to_errors = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run(command, folder, variables, to_output, to_errors)
        with suppress(PermissionError):  # the child does it too; it may lead a separate session by now
            os.setpgid(self.pid, self.pid)
        os.close(to_output)
        os.close(to_errors)
        self.stdout, self.stderr = open(output, "rb", 0), open(errors, "rb", 0)  # noqa: SIM115
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()


def preload(names: Sequence[str], command: Sequence[str], path: str) -> None:
    """Import the modules that programs use. path: where programs are looked for. Raises SpecError."""
    program = which(command[0], path=path)
    same = program is not None and Path(program).parent == Path(sys.executable).parent
    if not same or Path(str(program)).resolve() != Path(sys.executable).resolve():
        raise SpecError(
            f"environment.options.preload: {command[0]} is not the Python of rft, {sys.executable}, whose "
            "modules it imports; leave it out, or install the program's packages there and write `python`"
        )
    if len(command) < 2 or not Path(command[1]).is_file():
        raise SpecError("environment.options.preload: the command must be `python FILE` with arguments")
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise SpecError(f"environment.options.preload: {name} cannot be imported: {error}") from error
        if len(os.listdir("/proc/self/task")) > 1:
            raise SpecError(
                f"environment.options.preload: the import of {name} starts threads, which a fork does not "
                "have; leave it out"
            )


def _run(
    command: Sequence[str], folder: str, variables: Mapping[str, str], output: int, errors: int
) -> NoReturn:
    """Run the program in this new process, as `python FILE ARGUMENTS` would, and end the process."""
    status = 1
    try:
        os.setpgid(0, 0)
        faulthandler.disable()
        faulthandler.unregister(WHERE)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.closerange(3, 1 << 16)
        open_streams()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()  # of this process
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        status = _main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _main(command: Sequence[str]) -> int:
    """Execute the file as the module `__main__`; return its exit status."""
    file = command[0]
    module = ModuleType("__main__")
    module.__file__, sys.modules["__main__"] = file, module
    sys.argv[:] = command
    sys.path.insert(0, os.path.dirname(file))
    status = 0
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), module.__dict__)
    except SystemExit as end:
        status = _status(end.code)
    except BaseException as error:
        status = 1
        trace = _below(error.__traceback__, file)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


def _status(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _below(trace: TracebackType | None, file: str) -> TracebackType | None:
    """Return a traceback from the first line of the program on; whole if it has none."""
    below = trace
    while below is not None and below.tb_frame.f_code.co_filename != file:
        below = below.tb_next
    return below or trace
