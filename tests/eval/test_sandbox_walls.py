"""The sandbox isolates a program from the machine's files, its network and privileges. Real bubblewrap."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eval.sandbox import START_LIMIT, Outcome, check_sandbox, run_programs
from eval.seccomp import CALLS, call_filter
from tests.eval.test_sandbox import BWRAP, RIGHT, run

Fails = Callable[[Callable[[], object]], str]
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that every user may read and write, so that only the sandbox can block access."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


# Files, network, privileges. Without the sandbox the same programs succeed, so the tests can fail.


@BWRAP
def test_nothing_is_written_outside_the_scratch_folder(folder: Path) -> None:
    target = folder / "written"
    program = f"open({str(target)!r}, 'w').write('x')"
    assert run(program).message == f"FileNotFoundError: [Errno 2] No such file or directory: '{target}'"
    assert not target.exists()
    assert run(program, sandbox="none") == Outcome("passed")
    assert target.read_text(encoding="utf-8") == "x"
    # The same name in the scratch folder is another file.
    target = Path(f"/tmp/written{os.getpid()}")
    assert run(f"open({str(target)!r}, 'w').write('x')") == Outcome("passed")
    assert not target.exists()


@BWRAP
@pytest.mark.parametrize("place", ["/x", "/usr/x", "/etc/x", "/dev/x", "/dev/shm/x", "/proc/x", f"{sys.prefix}/x"])
def test_every_other_folder_is_read_only(place: str) -> None:
    outcome = run(f"open({place!r}, 'w')")
    assert outcome.status == "failed"
    assert outcome.message.startswith(("OSError: [Errno 30]", "PermissionError: ", "FileNotFoundError: "))
    assert not Path(place).exists()


@BWRAP
def test_the_scratch_folder_is_small() -> None:
    program = "for i in range(10):\n    open(f'/tmp/{i}', 'wb').write(bytes(15 * 2**20))"
    assert run(program) == Outcome("failed", "OSError: [Errno 28] No space left on device")


@BWRAP
def test_nothing_of_the_machine_is_read(folder: Path) -> None:
    secret = folder / "secret"
    secret.write_text("secret", encoding="utf-8")
    secret.chmod(0o644)
    program = f"assert open({str(secret)!r}).read() == 'secret'"
    assert run(program).message.startswith("FileNotFoundError")
    assert run(program, sandbox="none") == Outcome("passed")
    for path in (secret, Path(__file__), ROOT / "eval" / "sandbox.py", Path("/etc/passwd"), Path("/sys/kernel")):
        assert path.exists()
        assert run(f"import os\nos.stat({str(path)!r})").message.startswith("FileNotFoundError"), path


@BWRAP
def test_the_home_directory_holds_at_most_the_python_installation() -> None:
    home = Path.home()
    installation = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve()]
    parts = {path.relative_to(home).parts[0] for path in installation if path.is_relative_to(home)}
    program = f"import os\nhome = {str(home)!r}\nassert not os.path.exists(home) or set(os.listdir(home)) <= {parts!r}"
    assert run(program) == Outcome("passed")


@BWRAP
def test_no_connection_leaves_the_sandbox() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert run(program).message == "ConnectionRefusedError: [Errno 111] Connection refused"
        with pytest.raises(TimeoutError):
            server.accept()
        assert run(program, sandbox="none") == Outcome("passed")
        server.accept()[0].close()
    outside = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert run(outside).message == "OSError: [Errno 101] Network is unreachable"


@BWRAP
def test_a_program_has_no_privileges() -> None:
    program = (
        "import os\nassert os.getuid() > 0 and os.geteuid() > 0 and os.getgid() > 0\n"
        "status = dict(line.rstrip('\\n').split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)\n"
        "assert {int(status[c], 16) for c in ('CapPrm', 'CapEff', 'CapAmb')} == {0} and status['NoNewPrivs'] == '1'\n"
        "import posix\ntry:\n    posix.setuid(0)\nexcept OSError:\n    pass\nelse:\n    raise Exception('root')\n"
        "assert set(os.getgroups()) <= {os.getgid(), 65534}, os.getgroups()\n"
    )
    assert run(program) == Outcome("passed")


@BWRAP
def test_no_key_of_the_user_is_read() -> None:
    """Namespaces do not hide the session keyring. The key is in a separate keyring, made and removed by this test."""
    calls = CALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    session = -3
    key = libc.syscall(calls["add_key"], b"user", b"diablo-test", b"secret", 6, session)
    if key == -1:
        pytest.skip("no keyrings here")
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"found = libc.syscall({calls['keyctl']}, 10, {session}, b'user', b'diablo-test', 0)\n"
        "text = ctypes.create_string_buffer(6)\n"
        f"libc.syscall({calls['keyctl']}, 11, found, text, 6)\nassert text.raw != b'secret'"
    )
    try:
        assert run(program, sandbox="none").status == "failed"
        assert run(program) == Outcome("passed")
    finally:
        libc.syscall(calls["keyctl"], 9, key, session)  # unlink


@BWRAP
def test_no_namespace_is_made() -> None:
    """In a new user namespace a program has all privileges and could mount in-memory file systems of any size."""
    calls = CALLS[platform.machine()]
    for call in (
        f"{calls['unshare']}, 0x10000000",
        f"{calls['clone']}, 0x10000011, 0, 0, 0, 0",
        f"{calls['setns']}, 0, 0",
    ):
        program = (
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            f"assert (libc.syscall({call}), ctypes.get_errno()) == (-1, 1)"
        )
        assert run(program) == Outcome("passed"), call


@BWRAP
def test_a_python_in_the_home_directory_opens_no_more_of_it(folder: Path) -> None:
    """After `pip install --prefix ~`, or with Python built into it, the prefix is the home directory."""
    home = folder / "home"
    (home / "bin").mkdir(parents=True)
    python = home / "bin" / "python"
    shutil.copy(os.path.realpath(sys.executable), python)
    (home / "lib").symlink_to(Path(sys.base_prefix) / "lib")
    (home / ".ssh").mkdir()
    (home / ".ssh" / "id_ed25519").write_text("secret", encoding="utf-8")
    for path in (folder, home, home / ".ssh", home / "bin"):
        path.chmod(0o755)
    program = (
        f"import os, sys\nassert sys.prefix == {str(home)!r}\nassert sorted(os.listdir(sys.prefix)) == ['bin', 'lib']"
    )
    script = f"from eval.sandbox import run_programs; print(run_programs([{program!r}], sandbox='bwrap'))"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [python, "-c", script], env=environment, capture_output=True, encoding="utf-8", cwd=folder
    )
    assert finished.stdout == f"{[Outcome('passed')]}\n", finished


# Other users, other machines


@pytest.fixture
def copy(folder: Path) -> Path:
    """Return a copy of the sandbox's own files that every user can read."""
    for name in (
        "eval/__init__.py",
        "eval/sandbox.py",
        "eval/sandbox_runner.py",
        "eval/seccomp.py",
        "experiments/errors.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    return folder


@BWRAP
def test_it_works_for_an_ordinary_user(copy: Path) -> None:
    """In a user namespace, as for every user but root. The other tests run as the current user."""
    if os.geteuid() != 0:
        pytest.skip("the other tests already run as an ordinary user")

    def as_nobody(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *arguments],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd=copy,
            capture_output=True,
            encoding="utf-8",
        )

    suitable = "import sys; sys.exit(sys.version_info < (3, 11))"
    pythons = []
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if as_nobody(python, "-c", suitable).returncode == 0:
                pythons.append(python)
    if not pythons:
        pytest.skip("no Python >= 3.11 that an ordinary user may run")
    programs = [  # the fork bomb is far from the loop, since it would use the loop's time
        "while True: pass",
        RIGHT,
        "import os\nos._exit(0)",
        "x = bytearray(10 * 2**30)",
        f"open({str(copy / 'eval' / 'sandbox.py')!r})",
        "open('/x', 'w')",
        "open('/dev/x', 'w')",
        "import socket\nsocket.create_connection(('192.0.2.1', 80))",
        "import os, posix\nassert os.getuid() == 65534\nfor p in (os.getppid(), -1):\n    try: posix.kill(p, 9)\n"
        "    except OSError: pass\nassert [l for l in open('/proc/self/status') if l.split() == ['CapEff:', '0' * 16]]",
        "open('scratch', 'w').write('x')",
        "for i in range(10):\n    open(f'/tmp/{i}', 'wb').write(bytes(15 * 2**20))",
        "import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass",
    ]
    script = (
        "import json, sys; from eval.sandbox import run_programs; print(json.dumps([[outcome.status, outcome.message] "
        "for outcome in run_programs(json.loads(sys.argv[1]), sandbox='bwrap', timeout=0.5)]))"
    )
    finished = as_nobody(pythons[0], "-c", script, json.dumps(programs))
    assert finished.returncode == 0, finished.stderr
    assert [f"{status} {message}"[:35].strip() for status, message in json.loads(finished.stdout)] == [
        "timed_out over 0.5 s of CPU time",
        "passed",
        "killed exit status 0 before its tes",
        "failed MemoryError",
        "failed FileNotFoundError: [Errno 2]",
        "failed OSError: [Errno 30] Read-onl",
        "failed OSError: [Errno 30] Read-onl",
        "failed OSError: [Errno 101] Network",
        "passed",
        "passed",
        "failed OSError: [Errno 28] No space",
        "timed_out over 0.5 s of CPU time",
    ]


def test_a_machine_whose_system_calls_are_not_known_is_told(fails_with: Fails) -> None:
    message = fails_with(lambda: call_filter("riscv64"))
    assert message.startswith("evaluation.sandbox=bwrap: the system calls of riscv64 are unknown")
    assert all(len(call_filter(machine)) % 8 == 0 for machine in CALLS)


@pytest.mark.parametrize("sandbox", ["bwarp", "docker"])
def test_an_unknown_sandbox_is_refused(fails_with: Fails, sandbox: str) -> None:
    message = fails_with(lambda: check_sandbox(sandbox))
    assert message.startswith(f"evaluation.sandbox={sandbox}: ")
    assert "bwrap" in message


def test_a_missing_bubblewrap_is_told_and_nothing_runs(
    fails_with: Fails, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    target = folder / "ran"
    monkeypatch.setenv("PATH", str(folder))
    message = fails_with(lambda: run_programs([f"open({str(target)!r}, 'w')"], sandbox="bwrap"))
    assert message == (
        "evaluation.sandbox=bwrap: bwrap is not installed: apt-get install bubblewrap, or evaluation.sandbox=none, "
        "which runs the programs without protection"
    )
    assert not target.exists()


@BWRAP
def test_a_machine_without_namespaces_is_told_and_nothing_runs(folder: Path) -> None:
    """A process that may not make namespaces, as in many containers; here bubblewrap itself sets that up."""
    target = folder / "ran"
    program = f"open({str(target)!r}, 'w')"
    script = (
        "from eval.sandbox import run_programs\nfrom experiments.errors import UserError\n"
        f"try:\n    run_programs([{program!r}], sandbox='bwrap')\nexcept UserError as error:\n    print(error)"
    )
    without = ["bwrap", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--dev-bind", "/", "/"]
    started = time.monotonic()
    finished = subprocess.run([*without, sys.executable, "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert finished.stdout.startswith("evaluation.sandbox: a program could not be started here: bwrap: "), finished
    assert "evaluation.sandbox=none, which runs the programs without protection" in finished.stdout
    assert finished.stdout.count("\n") == 1
    assert not target.exists()
    assert time.monotonic() - started < START_LIMIT / 2
