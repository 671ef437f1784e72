"""The allow-list of system calls of a program, assembled into a seccomp filter (classic BPF, seccomp(2)).

Allowed: memory, time, threads, and files that are open or lie on the mounts. Everything else fails with an
error number, so that a program sees an exception and is not killed: no new process or program, no socket but
a pair, no signal to others, no mount, no namespace, no ptrace, no keyring, no bpf, no io_uring, no memory
that only a descriptor holds. Assembled here and not by libseccomp because sixty lines suffice, and a wheel of
libseccomp would need more trust.

Leaves out installing the filter (`worker_main`), and machines other than x86-64 and arm64.
"""

from __future__ import annotations

import errno
import struct

from viaticum.errors import SandboxError

# Number of each call on x86-64 and arm64 (asm/unistd.h); None if the machine has no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    # files and descriptors
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "dup": (32, 23),
    "dup2": (33, None),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "getdents": (78, None),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "creat": (85, None),
    "link": (86, None),
    "unlink": (87, None),
    "symlink": (88, None),
    "readlink": (89, None),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "umask": (95, 166),
    "utime": (132, None),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "getdents64": (217, 61),
    "fadvise64": (221, 223),
    "utimes": (235, None),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "readlinkat": (267, 78),
    "fchmodat": (268, 53),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "utimensat": (280, 88),
    "fallocate": (285, 47),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "renameat2": (316, 276),
    "statx": (332, 291),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
    "fchmodat2": (452, 452),
    # event loops: asyncio uses a socket pair to wake itself
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "getsockopt": (55, 209),
    "epoll_create": (213, None),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    # its own signals and timers
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "tgkill": (234, 131),
    "pause": (34, None),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "restart_syscall": (219, 128),
    # threads
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "gettid": (186, 178),
    "set_tid_address": (218, 96),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "getcpu": (309, 168),
    # time
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "times": (100, 153),
    # its identity, the system; its own limits, which it can only lower
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "prlimit64": (302, 261),
    "getrandom": (318, 278),
    # the end
    "exit": (60, 93),
    "exit_group": (231, 94),
}

# Calls with an answer of their own. `clone` makes threads, never processes. Python asks every file it opens
# whether it is a terminal, with an ioctl, and makes descriptors non-blocking with another. A lease on a file
# that the machine shares would hold up who writes it outside. A C library that finds no clone3 uses clone,
# whose flags can be read.
CLONE = (56, 220)
IOCTL = (16, 29)
FIONBIO = 0x5421
FCNTL = (72, 25)
F_SETLEASE, F_NOTIFY = 1024, 1026
SOCKET = (41, 198)
FIRST_RECENT_CALL = 435  # clone3; later calls than this exist only where a C library can do without them

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
X32_BIT = 0x40000000
CLONE_THREAD = 0x00010000
CLONE_NEW_NAMESPACES = 0x7E020080

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
AT_NUMBER, AT_MACHINE, AT_FIRST_ARGUMENT, AT_SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data


def assemble(machine: str) -> bytes:
    """Return the filter for a machine, named as by `platform.machine()`: consecutive struct sock_filter.

    Raises:
        SandboxError: the calls of this machine are not listed.
    """
    if machine not in MACHINES:
        raise SandboxError(
            f"no list of system calls for {machine!r} machines; there is one for {', '.join(MACHINES)}"
        )
    column, audit_arch = MACHINES[machine]
    code: list[bytes] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append(struct.pack("=HBBI", operation, if_true, if_false, value))

    def answer(number: int, verdict: int) -> None:
        add(JUMP_EQUAL, number, 0, 1)
        add(RETURN, verdict)

    add(LOAD, AT_MACHINE)
    add(JUMP_EQUAL, audit_arch, 1, 0)
    add(RETURN, KILL_PROCESS)
    add(LOAD, AT_NUMBER)
    if machine == "x86_64":
        add(JUMP_AT_LEAST, X32_BIT, 0, 1)
        add(RETURN, KILL_PROCESS)
    for numbers in CALLS.values():
        number = numbers[column]
        if number is not None:
            answer(number, ALLOW)
    add(JUMP_EQUAL, IOCTL[column], 0, 4)
    add(LOAD, AT_SECOND_ARGUMENT)
    add(JUMP_EQUAL, FIONBIO, 0, 1)
    add(RETURN, ALLOW)
    add(RETURN, ERRNO | errno.ENOTTY)
    add(JUMP_EQUAL, FCNTL[column], 0, 5)
    add(LOAD, AT_SECOND_ARGUMENT)
    add(JUMP_EQUAL, F_SETLEASE, 1, 0)
    add(JUMP_EQUAL, F_NOTIFY, 0, 1)
    add(RETURN, ERRNO | errno.EPERM)
    add(RETURN, ALLOW)
    answer(SOCKET[column], ERRNO | errno.EACCES)
    add(JUMP_EQUAL, CLONE[column], 0, 5)
    add(LOAD, AT_FIRST_ARGUMENT)
    add(AND, CLONE_THREAD | CLONE_NEW_NAMESPACES)
    add(JUMP_EQUAL, CLONE_THREAD, 0, 1)
    add(RETURN, ALLOW)
    add(RETURN, ERRNO | errno.EPERM)
    add(JUMP_AT_LEAST, FIRST_RECENT_CALL, 0, 1)
    add(RETURN, ERRNO | errno.ENOSYS)
    add(RETURN, ERRNO | errno.EPERM)
    return b"".join(code)
