"""A filter of system calls (seccomp(2), BPF) over the process that asks for it, for programs that tests start.

    python sandbox.py ACTION CALL... -- CODE

runs CODE where each system call named here has become impossible: ACTION is an errno ("EPERM") or "KILL".
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

CALLS = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K


def forbid(action: str, *calls: str) -> None:
    """From now on, for this process and its children; there is no way back."""
    verdict = SECCOMP_RET_KILL_PROCESS if action == "KILL" else SECCOMP_RET_ERRNO | getattr(errno, action)
    code = [(LOAD_WORD, 0, 0, 0)]  # seccomp_data.nr
    for left, call in zip(range(len(calls), 0, -1), calls, strict=True):
        code.append((JUMP_IF_EQUAL, left, 0, CALLS[call]))
    code += [(RETURN, 0, 0, SECCOMP_RET_ALLOW), (RETURN, 0, 0, verdict)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header))):
        if libc.prctl(*arguments, 0, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run_without(action: str, calls: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in an interpreter where ``calls`` end by ``action``."""
    command = [sys.executable, __file__, action, *calls, "--", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def main(action: str, *rest: str) -> None:
    calls, code = rest[: rest.index("--")], rest[-1]
    forbid(action, *calls)
    sys.path.insert(0, str(Path(__file__).parent))
    exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
