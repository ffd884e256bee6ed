"""The system calls denied to a program in the sandbox, as a filter for the kernel.

A program is exactly one process, so the limits of a process are those of the sandbox: it can create no other process
and no memory outside itself. Without new namespaces it cannot regain rights that the sandbox removed; without keyrings
it cannot read the user's keys, which no namespace hides.
"""

from __future__ import annotations

import errno
import platform
import struct

from experiments.errors import UserError

# By machine: the kernel's id of the architecture, and its call numbers.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {
    "x86_64": {"clone": 56, "fork": 57, "vfork": 58, "clone3": 435, "unshare": 272, "setns": 308}
    | {"add_key": 248, "request_key": 249, "keyctl": 250}
    | {"memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "semget": 64, "io_uring_setup": 425},
    "aarch64": {"clone": 220, "clone3": 435, "unshare": 97, "setns": 268}
    | {"add_key": 217, "request_key": 218, "keyctl": 219}
    | {"memfd_create": 279, "memfd_secret": 447, "shmget": 194, "msgget": 186, "semget": 190, "io_uring_setup": 425},
}
X32 = 0x40000000  # x86_64 has a second set of call numbers from here on
CLONE_THREAD = 0x00010000
CALL, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets of the call, the architecture and the first argument's lower half
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


def call_filter(machine: str | None = None) -> bytes:
    """Return this machine's filter for bubblewrap's --seccomp: denied calls fail with EPERM."""
    machine = machine or platform.machine()
    if machine not in CALLS:
        raise UserError(
            f"evaluation.sandbox=bwrap: the system calls of {machine} are unknown: add them to eval/seccomp.py, or use "
            "evaluation.sandbox=none, which runs the programs without protection"
        )
    calls = dict(CALLS[machine])
    refuse = (RETURN, 0, 0, REFUSE | errno.EPERM)
    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCHITECTURES[machine]), refuse, (LOAD, 0, 0, CALL)]
    if machine == "x86_64":
        lines += [(AT_LEAST, 0, 1, X32), refuse]
    # clone3's flags are in memory, which no filter can read: report that it does not exist, so that clone is called.
    lines += [(EQUAL, 0, 1, calls.pop("clone3")), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    threads_only = [(LOAD, 0, 0, ARGUMENT), (ANY_BIT, 1, 0, CLONE_THREAD), refuse, (RETURN, 0, 0, ALLOW)]
    lines += [(EQUAL, 0, len(threads_only), calls.pop("clone")), *threads_only]
    for number in calls.values():
        lines += [(EQUAL, 0, 1, number), refuse]
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
