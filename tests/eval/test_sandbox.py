"""Programs in the sandbox: hostile ones do no harm and fail, correct ones pass. Real bubblewrap and processes."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.code import human_eval_program
from eval.sandbox import Outcome, run_programs
from eval.seccomp import CALLS

Fails = Callable[[Callable[[], object]], str]
RIGHT = "def f():\n    return 1\nassert f() == 1\n"
WRONG = "def f():\n    {}\ndef check(candidate):\n    assert candidate() == 1\ncheck(f)\n"
BWRAP = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed")
BOTH = pytest.mark.parametrize("sandbox", [pytest.param("bwrap", marks=BWRAP), "none"])


def run(program: str, sandbox: str = "bwrap", timeout: float = 3.0) -> Outcome:
    (outcome,) = run_programs([program], sandbox=sandbox, timeout=timeout)
    return outcome


def named(name: str) -> str:
    """Return program text that names its process and later children, for `alive` to find."""
    return f"import ctypes, os, time\nassert ctypes.CDLL(None).prctl(15, b'{name}') == 0\n"


def alive(name: str) -> list[int]:
    """Return the ids of the machine's running processes with this name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text(encoding="utf-8")
            if f"({name})" in state and state.rsplit(")", 1)[1].split()[0] not in "ZX":
                found.append(int(folder.name))
    return found


def ends(name: str, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while alive(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(name)


# Outcomes


@BOTH
def test_outcomes_come_in_order_and_say_why(sandbox: str) -> None:
    programs = [
        RIGHT,
        "assert 1 == 2, 'no'",
        "def (",
        "x",
        RIGHT,
        "import signal; signal.raise_signal(11)",
        "",
        "\ud800",
    ]
    outcomes = run_programs(programs, sandbox=sandbox, workers=2)
    assert [outcome.passed for outcome in outcomes] == [True, False, False, False, True, False, True, False]
    assert outcomes[:7] == [
        Outcome("passed"),
        Outcome("failed", "AssertionError: no"),
        Outcome("failed", "SyntaxError: invalid syntax (<program>, line 1)"),
        Outcome("failed", "NameError: name 'x' is not defined"),
        Outcome("passed"),
        Outcome("killed", "signal 11 before its tests were through"),
        Outcome("passed"),
    ]
    assert outcomes[7].message.startswith("UnicodeEncodeError: ")


@BOTH
def test_messages_are_one_short_line(sandbox: str) -> None:
    assert run("raise ValueError('one\\ntwo  three')", sandbox) == Outcome("failed", "ValueError: one two three")
    assert len(run("raise ValueError('x' * 10**7)", sandbox).message) == 200
    silent = "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E"
    assert run(silent, sandbox) == Outcome("failed", "an error that cannot be shown")


@BOTH
def test_a_program_is_on_its_own(sandbox: str) -> None:
    """No `__main__`, none of the runner's future imports, no environment variables, reproducible hashes."""
    program = (
        "import os, sys\nassert __name__ != '__main__'\ndef f(x: 1 + 1): pass\nassert f.__annotations__ == {'x': 2}\n"
        f"assert 'DIABLO_SECRET' not in os.environ and hash('a') == {_hash_of_a()}\n"
        "try:\n    import eval.sandbox\nexcept ImportError:\n    pass\nelse:\n    raise Exception('the project')\n"
        "open('scratch.txt', 'w').write('free to use')\nassert open('scratch.txt').read() == 'free to use'\n"
    )
    os.environ["DIABLO_SECRET"] = "1"
    try:
        assert run(program, sandbox) == Outcome("passed")
    finally:
        del os.environ["DIABLO_SECRET"]


def _hash_of_a() -> str:
    command = [sys.executable, "-c", "print(hash('a'))"]
    return subprocess.run(
        command, env={"PYTHONHASHSEED": "0"}, capture_output=True, encoding="utf-8", check=True
    ).stdout


@BOTH
@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        (WRONG.format("raise SystemExit(0)"), "failed", "SystemExit: 0"),
        ("import sys\nsys.exit()\n" + RIGHT, "failed", "SystemExit"),
        ("import os\nos._exit(0)\n" + RIGHT, "killed", "exit status 0 before its tests were through"),
        ("print('passed')\n" + WRONG.format("return 2"), "failed", "AssertionError"),
        (
            # The runner's own output without the token, written to every open file
            "import os\nfor fd in range(64):\n    for line in (b'passed', b'0' * 32 + b' passed'):\n"
            "        try: os.write(fd, b'\\n' + line + b'\\n')\n        except OSError: pass\nos._exit(0)",
            "killed",
            "exit status 0 before its tests were through",
        ),
        ("check = lambda candidate: None\n" + WRONG.format("return 2"), "failed", "AssertionError"),
        ("def check(candidate): pass\ncheck.__code__ = None\n" + RIGHT, "failed", "TypeError: __code__ must be set"),
        (
            "import builtins\nbuiltins.AssertionError = builtins.Exception = None\n" + WRONG.format("return 2"),
            "failed",
            "AssertionError",
        ),
        ("import os\nos.write = os._exit = os.getpid = None\n" + WRONG.format("return 2"), "failed", "AssertionError"),
        ("import os\nos.write = os._exit = os.getpid = None\n" + RIGHT, "passed", ""),
        ("import os\nos.closerange(0, 64)\n" + RIGHT, "killed", "exit status 120 before its tests were through"),
        ("input()", "failed", "OSError"),
        ("import sys\nsys.stdin.read()", "failed", "OSError"),
        # The child of a fork, refused in the sandbox, does not report
        ("import os, posix\nif posix.fork() != 0:\n    os.wait()\n    raise Exception", "failed", ""),
        ("def f(): return f()\nf()", "failed", "RecursionError"),
        ("x = bytearray(10 * 2**30)", "failed", "MemoryError"),
        ("x = []\nwhile True: x.append(bytes(2**26))", "failed", "MemoryError"),
        ("for _ in range(200): print('x' * 10**6)\nraise Exception('printed')", "failed", "Exception: printed"),
        ("import sys\nsys.stderr.write('x' * 10**8)", "passed", ""),
        ("open('big', 'wb').write(bytes(10**8))", "failed", "OSError: [Errno 27] File too large"),
        ("files = [open('/dev/null') for _ in range(1000)]", "failed", "OSError: [Errno 24] Too many open files"),
    ],
)
def test_only_a_program_that_ran_to_its_end_passes(sandbox: str, program: str, status: str, message: str) -> None:
    outcome = run(program, sandbox)
    assert outcome.status == status
    assert outcome.message.startswith(message)


# Time


@BOTH
def test_endless_programs_are_timed_out(sandbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ["while True: pass", "10**10**9", "while True:\n    try:\n        while True: pass\n    except: pass"]
    started = time.monotonic()
    assert run("import time; time.sleep(600)", sandbox, timeout=0.2) == Outcome("timed_out", "over 0.8 s on the clock")
    monkeypatch.setattr("eval.sandbox.WALL_FACTOR", 100)  # so that a loaded machine reaches the CPU limit first
    for outcome in run_programs(programs, sandbox=sandbox, timeout=0.4):
        assert outcome == Outcome("timed_out", "over 0.4 s of CPU time")
    assert time.monotonic() - started < 60


@BOTH
def test_a_program_cannot_lift_its_time_limits(sandbox: str) -> None:
    program = (
        "import sys\nsys.modules.pop('resource')\nimport resource, signal\n"
        "for number in (signal.SIGPROF, signal.SIGXCPU, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)\n"
        "signal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass"
    )
    assert run(program, sandbox, timeout=0.3) == Outcome("timed_out", "over 1.2 s on the clock")
    flood = program.replace("while True: pass", "import os\nwhile True:\n    for fd in range(3, 9):\n        try: ")
    flood += "os.write(fd, b'x' * 4096)\n        except OSError: pass"
    assert run(flood, sandbox, timeout=0.3) == Outcome("timed_out", "over 1.2 s on the clock")
    if sandbox == "bwrap":
        resource = "import sys\nsys.modules.pop('resource')\nimport resource\n"
        raised = resource + "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))"
        assert run(raised) == Outcome("failed", "ValueError: not allowed to raise maximum limit")
        above = resource + "assert resource.getrlimit(resource.RLIMIT_CPU) == (5, 5)"
        assert run(above, timeout=3.0) == Outcome("passed")


@BOTH
def test_a_loaded_machine_fails_no_right_program(sandbox: str) -> None:
    """1 s of work with a limit of 2 s, while two busy processes per CPU use most of the wall time."""
    work = "import time\nwhile time.process_time() < 1: pass\n"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert run_programs([work] * 2, sandbox=sandbox, timeout=2.0, workers=2) == [Outcome("passed")] * 2
    finally:
        for process in busy:
            process.kill()
            process.wait()


# Processes


REFUSED = "except OSError as error:\n    assert error.errno == 1\nelse:\n    raise Exception('another process')\n"


@BWRAP
@pytest.mark.parametrize(
    "fork",
    [
        "import posix; posix.fork()",
        "import posix; posix.posix_spawn('/bin/true', ['true'], dict())",
        "libc.fork() == -1 and fail()",
        "libc.vfork() == -1 and fail()",
        "libc.syscall({clone}, 17, 0, 0, 0, 0) == -1 and fail()",
    ],
)
def test_a_program_is_one_process(fork: str) -> None:
    """So memory limits of a process apply to the whole sandbox. Outside it the same calls do make processes."""
    calls = CALLS[platform.machine()]
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def fail(): raise OSError(ctypes.get_errno(), 'refused')\n"
        f"try:\n    {fork.format(clone=calls['clone'])}\n" + REFUSED
    )
    assert run(program) == Outcome("passed")
    if "vfork" not in fork:  # a vfork's child shares the parent's stack
        assert run(program, sandbox="none") != Outcome("passed")


@BWRAP
def test_a_fork_bomb_stays_alone() -> None:
    name = f"bomb{os.getpid()}"
    bomb = named(name) + "import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass\n"
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(run_programs([bomb], sandbox="bwrap", timeout=0.5)))
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, len(alive(name)))
        time.sleep(0.02)
    assert [outcome.status for outcome in outcomes] == ["timed_out"]
    assert most == 1
    assert ends(name)


@BWRAP
def test_a_bomb_of_threads_takes_none_from_its_neighbours() -> None:
    start = (
        "import threading, time\nwait = lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    bomb = start + "while True:\n    try: wait()\n    except RuntimeError: pass\n"
    threads = start + "for _ in range(5):\n    wait()\n    time.sleep(0.1)\n"
    outcomes = run_programs([bomb, threads], sandbox="bwrap", timeout=1.0, workers=2)
    assert [outcome.status for outcome in outcomes] == ["timed_out", "passed"]


@BWRAP
@pytest.mark.parametrize("call", ["memfd_create", "shmget", "msgget", "semget"])
def test_no_memory_is_kept_outside_the_process(call: str) -> None:
    """Address space is limited, but these objects use none until they are mapped."""
    arguments = "b'x', 0" if call == "memfd_create" else "0, 1024, 0o666"
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"assert (libc.syscall({CALLS[platform.machine()][call]}, {arguments}), ctypes.get_errno()) == (-1, 1)"
    )
    assert run(program) == Outcome("passed")
    if call == "memfd_create":
        assert run(program, sandbox="none").status == "failed"


def test_a_background_child_ends_with_its_program() -> None:
    """Without the sandbox, where children are possible."""
    name = f"child{os.getpid()}"
    started = time.monotonic()
    program = named(name) + "import posix\nif posix.fork() == 0:\n    time.sleep(60)\n"
    assert run(program, sandbox="none") == Outcome("passed")
    assert ends(name)
    assert time.monotonic() - started < 20


@BWRAP
def test_no_other_process_can_be_killed() -> None:
    kill = (
        "import contextlib, os, posix, signal\n"
        f"for process in (os.getppid(), {os.getpid()}, {os.getppid()}, -1):\n"
        "    with contextlib.suppress(OSError): posix.kill(process, signal.SIGKILL)\n"
        "assert os.getppid() == 1\n"
    )
    neighbour = "import time; time.sleep(1)"
    assert run_programs([neighbour, kill], sandbox="bwrap", workers=2) == [Outcome("passed")] * 2
    seen = "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) <= 3, os.listdir('/proc')"
    assert run(seen) == Outcome("passed")


# Programs that the source's harness passes or fails: bigcode_eval/tasks/custom_metrics/execute.py of juzhengz/LoRI


@BOTH
@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("class E:\n    def __eq__(self, other): return True\n" + WRONG.format("return E()"), True),  # there too
        ("import numpy as np\nassert np.ones(3).sum() == 3", True),
        ("import multiprocessing, subprocess, shutil, tempfile", True),
        ("import os\nos.remove('x')", False),
        ("import os\nos.getcwd()", False),
        ("import os\nos.environ['x'] = '1'", False),
        ("import shutil\nshutil.move('a', 'b')", False),
        ("import subprocess\nsubprocess.run(['true'])", False),
        ("import resource", False),
        ("help", False),
    ],
)
def test_functions_that_the_source_takes_away(sandbox: str, program: str, passes: bool) -> None:
    assert run(program if program != "help" else "help(1)", sandbox).passed is passes


# HumanEval


@BWRAP
@pytest.mark.slow
def test_canonical_solutions_pass_and_empty_ones_fail(data_root: Path) -> None:
    with gzip.open(data_root / "human_eval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    assert len(problems) == 164

    def programs(completions: list[str]) -> list[str]:
        return [
            human_eval_program(problem["prompt"], completion, problem["test"], problem["entry_point"])
            for problem, completion in zip(problems, completions, strict=True)
        ]

    canonical = run_programs(programs(["\n" + problem["canonical_solution"] for problem in problems]), sandbox="bwrap")
    names = [problem["task_id"] for problem in problems]
    assert [pair for pair in zip(names, canonical, strict=True) if not pair[1].passed] == []
    empty = run_programs(programs([""] * 164), sandbox="bwrap")
    assert [name for name, outcome in zip(names, empty, strict=True) if outcome.status != "failed"] == []
