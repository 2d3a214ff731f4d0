"""System calls that code under test has no use for: they answer "not permitted".

A network namespace leaves AF_VSOCK and what the machine itself listens on; rlimits leave memory that belongs to no
process (memfd, System V) and, where there are no namespaces, everything that one user may do to another's processes.
"""

import errno
import platform
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

_DENIED = {
    # name: (x86_64, aarch64)
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NEW_NAMESPACES = 0x7E020000
_OF_OTHERS = {
    # their first argument is the process that they are done to
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261),
}
_PIDFD_SEND_SIGNAL = (424, 424)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _line(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, when_true, when_false, value)


def filter_program(only_process: int | None = None) -> bytes | None:
    """The filter in the form of the kernel; None on a machine whose numbers of calls are not known here.

    With ``only_process`` signals and limits are for that process alone, and its group.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        return None
    column = list(_AUDIT_ARCH).index(machine)
    deny, missing, allow = (
        _line(_RETURN, _ERRNO | errno.EPERM),
        _line(_RETURN, _ERRNO | errno.ENOSYS),
        _line(_RETURN, _ALLOW),
    )
    lines = [
        _line(_LOAD, _ARCH),
        _line(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _line(_RETURN, _KILL_PROCESS),
        _line(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        lines += [_line(_AT_LEAST, _X32_BIT, 0, 1), missing]
    for numbers in _DENIED.values():
        lines += [_line(_EQUAL, numbers[column], 0, 1), deny]
    # clone3 keeps its flags in memory, where no filter sees them; without it the C library takes clone
    lines += [_line(_EQUAL, _CLONE3[column], 0, 1), missing]
    lines += [_line(_EQUAL, _CLONE[column], 0, 4), _line(_LOAD, _FIRST_ARGUMENT)]
    lines += [_line(_ANY_BIT, _NEW_NAMESPACES, 0, 1), deny, allow]
    if only_process is not None:
        lines += [_line(_EQUAL, _PIDFD_SEND_SIGNAL[column], 0, 1), deny]
        for numbers in _OF_OTHERS.values():
            lines += [_line(_EQUAL, numbers[column], 0, 5), _line(_LOAD, _FIRST_ARGUMENT)]
            lines += [_line(_EQUAL, only_process, 1, 0), _line(_EQUAL, 0, 0, 1), allow, deny]
    return b"".join([*lines, allow])
