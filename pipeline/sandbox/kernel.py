"""Calls of Linux that Python does not offer, through ctypes."""

import ctypes
import os
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18

_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_SYS_MOUNT_SETATTR = 442
"""The same number on every architecture that has one table."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP = 1, 4, 8, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_SECCOMP_MODE_FILTER, _PR_CAP_AMBIENT_RAISE = 2, 2
_CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION_3 = 2, 0x20080522

IS_LINUX = sys.platform == "linux"


def _checked(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, *arguments: object) -> None:
    given = [argument if not isinstance(argument, int) else ctypes.c_ulong(argument) for argument in arguments]
    _checked("prctl", option, *given, *[ctypes.c_ulong(0)] * (4 - len(given)))


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name for new ones."""
    _checked("unshare", flags)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    kind_bytes = kind.encode() if kind else None
    _checked("mount", source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode())


def set_read_only(target: str, *, recursive: bool) -> None:
    """Nothing under a mount can be written, nor run with another's rights (mount_setattr, Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags, size = _AT_RECURSIVE if recursive else 0, ctypes.c_size_t(ctypes.sizeof(attributes))
    number, at = ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD)
    _checked("syscall", number, at, target.encode(), ctypes.c_uint(flags), ctypes.byref(attributes), size)


def pivot_root(target: str) -> None:
    """Make a mount the root and let go of the old one."""
    os.chdir(target)
    _checked("pivot_root", b".", b".")
    _checked("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def die_with_parent() -> None:
    """SIGKILL once the parent has died."""
    if IS_LINUX:
        _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own has died."""
    if IS_LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def refuse_tracers() -> None:
    """No process of the same user may look into this one."""
    _prctl(_PR_SET_DUMPABLE, 0)


def refuse_privileges() -> None:
    """No program that is run from here on gains rights that this process has not."""
    if IS_LINUX:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter."""

    class SockFprog(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    fprog = SockFprog(len(program) // 8, program)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(fprog))


def become(uid: int, *, keeps_reading: bool) -> None:
    """From root to another user, who may be left reading all that root reads, though not writing it."""
    if keeps_reading:
        _prctl(_PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise OSError(error.errno, "root may not become another user here, and limits do not hold for root") from error
    if keeps_reading:
        bit = 1 << _CAP_DAC_READ_SEARCH
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        _checked("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)))
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH)
