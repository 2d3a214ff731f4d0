"""Namespaces of one program's own: nobody else's processes, network, files or users are there.

The root is read-only and holds the interpreter, its libraries and a few devices: no /proc, no /home, no sockets.
"""

import os
import sys
from pathlib import Path

from pipeline.sandbox import kernel

WORK = "/tmp"
"""The only folder that can be written, in memory, gone with its namespace."""

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_UID = 1000
"""Of the program, as seen from inside."""
_NOBODY = 65534
"""Of the program, as seen from outside, where root starts it: the limit of processes does not hold for root."""
_NUM_FILES = 8192
_FLAGS = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
)  # fmt: skip


def enter() -> None:
    """Leave all namespaces for new ones; the next child is the first process of its own."""
    if os.geteuid():
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(_FLAGS)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_UID} {uid} 1")
        _write("/proc/self/gid_map", f"{_UID} {gid} 1")
        return
    os.setgroups([])
    has_left, left = os.pipe()
    pid, helper = os.getpid(), os.fork()
    if not helper:  # the map of two users must be written from outside
        try:
            os.close(left)
            os.read(has_left, 1)
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{pid}/{name}", f"0 0 1\n{_UID} {_NOBODY} 1")
            os._exit(0)
        except OSError as error:
            os.write(2, f"{error}\n".encode())
        finally:
            os._exit(1)
    os.close(has_left)
    kernel.unshare(_FLAGS)
    os.write(left, b".")
    os.close(left)
    if os.waitpid(helper, 0)[1]:
        raise OSError("the users of the namespace could not be set")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def build_root(python: str, disk_bytes: int) -> None:
    """Make a small read-only root the only file system there is."""
    # what is to be seen is held by descriptors: the new root may lie over it
    links, places = _what_is_seen(python)
    held = {place: os.open(place, os.O_PATH | os.O_CLOEXEC) for place in places}
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    root = "/tmp"
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=1024,mode=0755")
    for place, descriptor in held.items():
        target = Path(root + place)
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        kernel.mount(f"/proc/self/fd/{descriptor}", str(target), None, kernel.MS_BIND | kernel.MS_REC)
        kernel.set_read_only(str(target), recursive=True)
        os.close(descriptor)
    for place, aim in links.items():
        os.symlink(aim, root + place)
    work = Path(root + WORK)
    work.mkdir(exist_ok=True)
    options = f"size={disk_bytes},nr_inodes={_NUM_FILES},mode=0700"
    kernel.mount("tmpfs", str(work), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    os.chown(work, _UID, _UID)
    kernel.set_read_only(root, recursive=False)
    kernel.pivot_root(root)


def become_program() -> None:
    """The user that the program runs as; its privileges go with the next exec."""
    os.setresgid(_UID, _UID, _UID)
    os.setresuid(_UID, _UID, _UID)


def _what_is_seen(python: str) -> tuple[dict[str, str], list[str]]:
    """Links of the root, and files and folders to be seen in it: none lies in another."""
    links = {place: os.readlink(place) for place in _SYSTEM if os.path.islink(place)}
    wanted = [place for place in (*_SYSTEM, *_DEVICES) if place not in links]
    wanted += [sys.base_prefix, sys.base_exec_prefix, str(Path(python).parent), *_libraries()]
    places: list[str] = []
    for place in sorted({os.path.realpath(place) for place in wanted if os.path.exists(place)}, key=len):
        if place == "/":
            raise OSError("the interpreter is installed in /, so that all files would be seen")
        if not any(place.startswith(other + "/") for other in places):
            places.append(place)
    return links, places


def _libraries() -> set[str]:
    """Folders of the shared libraries that this interpreter has loaded."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {str(Path(path).parent) for path in paths if path.startswith("/") and ".so" in Path(path).name}
