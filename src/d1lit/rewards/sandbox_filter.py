"""System calls that a sandboxed program is refused, by a filter that the kernel applies (seccomp-bpf, by hand).

Sockets, other programs, other processes' memory and the large corners of the kernel that no exercise needs. The filter
is the wall against the network where namespaces are not to be had, and a second one where they are.
"""

import ctypes
import os
import platform

PR_SET_SECCOMP, MODE_FILTER = 22, 2
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, AT_LEAST, ANSWER = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000

# Number on x86_64, on aarch64 (asm/unistd.h of the kernel).
REFUSED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "bind": (49, 200),
    "listen": (50, 201),
    "execve": (59, 221),
    "execveat": (322, 281),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
}
CLONE3 = 435
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000
"""System calls of x86_64 under their second numbers."""


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def install(libc):
    """Refuse the calls from now on, in this process and all it starts; needs no_new_privs.

    Raises OSError where the kernel or the machine has no such filters.
    """
    column, machine = MACHINES.get(platform.machine(), (0, None))
    if machine is None:
        raise OSError(ENOSYS, f"no filter for {platform.machine()}")
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (ANSWER, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:
        lines += [(AT_LEAST, 0, 1, X32), (ANSWER, 0, 0, REFUSE | EPERM)]
    lines += [
        (EQUAL, 0, 1, CLONE3),
        (ANSWER, 0, 0, REFUSE | ENOSYS),
    ]  # its flags lie in memory; libc falls back to clone
    for numbers in REFUSED.values():
        lines += [(EQUAL, 0, 1, numbers[column]), (ANSWER, 0, 0, REFUSE | EPERM)]
    lines.append((ANSWER, 0, 0, ALLOW))
    program = _Program(len(lines), (_Instruction * len(lines))(*lines))
    if libc.prctl(
        PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), ctypes.byref(program), ctypes.c_ulong(0), ctypes.c_ulong(0)
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def works(libc, no_new_privileges):
    """Whether the filter can be installed, tried in a child."""
    child = os.fork()
    if child == 0:
        try:
            no_new_privileges()
            install(libc)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
