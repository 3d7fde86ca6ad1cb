#!/usr/bin/env python3
"""Makes sure that TensorRT is there: headers to build plugins, libraries and a Python module to run engines.

    .venv/bin/python scripts/get_tensorrt.py [--dest .deps/tensorrt]

Each of the three is looked for first (the Python package `tensorrt`, TENSORRT_ROOT, system packages, --dest).
Only what is missing is fetched, from public registries: the libraries of TensorRT 10.6.0 with Maven (1.1 GB),
the headers with cargo, the Python module with pip. Nothing is left half done: --dest changes only when a part
is complete. Exit code 2, with what was looked for where, when a part cannot be had.
"""

import argparse
import contextlib
import ctypes.util
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-tensorrt.txt"

ARTIFACT = ("org.bytedeco", "tensorrt", "10.6-1.5.11", "linux-x86_64-redist")
ARTIFACT_BYTES = 1_087_000_000
LIBRARIES = (
    "libnvinfer.so.10",
    "libnvinfer_builder_resource.so.10.6.0",
    "libnvinfer_plugin.so.10",
    "libnvonnxparser.so.10",
)
LIBRARIES_BYTES = 1_701_000_000

CRATE = ("trtx-sys", "0.4.0")
CRATE_HEADERS = "TensorRT-Headers/TRT-Enterprise-10.16"

SYSTEM_INCLUDES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
SYSTEM_LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/local/tensorrt/lib", "/opt/tensorrt/lib")


class FetchError(Exception):
    """A part of TensorRT can be neither found nor fetched; the message says what to do."""


def installed_libraries(dest: Path) -> str | None:
    """Where libnvinfer is, in words; None where there is none."""
    if importlib.util.find_spec("tensorrt"):
        return "the Python package tensorrt"
    folders = [Path(root) / "lib" for root in [os.environ.get("TENSORRT_ROOT")] if root]
    folders += [Path(folder) for folder in SYSTEM_LIBRARIES]
    for folder in folders:
        if any(folder.glob("libnvinfer.so*")):
            return str(folder)
    if name := ctypes.util.find_library("nvinfer"):
        return f"{name}, on the loader's path"
    if all((dest / "lib" / name).is_file() for name in LIBRARIES):
        return str(dest / "lib")
    return None


def installed_headers(dest: Path) -> Path | None:
    """The folder of NvInfer.h; None where there is none."""
    folders = [Path(root) / "include" for root in [os.environ.get("TENSORRT_ROOT")] if root]
    folders += [dest / "include", *map(Path, SYSTEM_INCLUDES)]
    return next((folder for folder in folders if (folder / "NvInfer.h").is_file()), None)


def find_tool(name: str, fetches: str, package: str) -> str:
    """A program's path. Raises FetchError with the remedies where it is not there."""
    if path := shutil.which(name) or shutil.which(Path.home() / ".cargo" / "bin" / name):
        return path
    raise FetchError(
        f"TensorRT's {fetches} are not installed: looked for the Python package tensorrt, TENSORRT_ROOT "
        f"({os.environ.get('TENSORRT_ROOT', 'not set')}) and system packages. Fetching them needs `{name}`, "
        f"which is neither on the PATH nor in ~/.cargo/bin.\n"
        f"Remedies: install {package}, or install TensorRT itself (NVIDIA's tar file or system packages hold "
        "everything, `pip install tensorrt` libraries and Python module) and set TENSORRT_ROOT to the folder "
        "that holds `lib` and `include`"
    )


def folder_bytes(folder: Path) -> int:
    """Size of all files; those that vanish while we look count as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def show(what: str, done: int, total: int) -> None:
    """One line of progress: redrawn on a terminal, else printed once, when complete."""
    text = f"{what}: {min(done, total) / 1e6:,.0f} of {total / 1e6:,.0f} MB"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
    elif done >= total:
        print(text, file=sys.stderr, flush=True)


def run_tool(command: list[str], cwd: Path, what: str, total: int) -> None:
    """Runs a download quietly, showing how `cwd` grows. Raises FetchError with the tool's last words."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            time.sleep(0.5)
            show(what, min(folder_bytes(cwd), total - 1), total)
        if process.returncode != 0:
            log.seek(0)
            raise FetchError(f"`{' '.join(command)}` failed:\n{log.read()[-2000:].strip()}")
    show(what, total, total)


def replace(new: Path, target: Path) -> None:
    """Moves a complete folder to its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)


def fetch_libraries(dest: Path) -> None:
    maven = find_tool("mvn", "libraries", "Maven (Debian and Ubuntu: `apt-get install maven`)")
    needed = ARTIFACT_BYTES + LIBRARIES_BYTES + 200_000_000
    free = shutil.disk_usage(dest).free
    if free < needed:
        raise FetchError(
            f"TensorRT's libraries need {needed / 1e9:.1f} GB under {dest} (1.1 GB of it while unpacking), "
            f"{free / 1e9:.1f} GB are free: free some, or give --dest on another disk"
        )
    group, name, version, classifier = ARTIFACT
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=dest) as scratch:
        repository = Path(scratch) / "repository"
        repository.mkdir()
        coordinates = f"{group}:{name}:{version}:jar:{classifier}"
        command = [
            maven,
            "--batch-mode",
            "--quiet",
            "dependency:get",
            f"-Dartifact={coordinates}",
            "-Dtransitive=false",
        ]
        # A repository of its own: the jar is of no use once it is unpacked, and the user's would keep it.
        run_tool(
            [*command, f"-Dmaven.repo.local={repository}"], repository, "TensorRT libraries", ARTIFACT_BYTES
        )
        jar = repository / group.replace(".", "/") / name / version / f"{name}-{version}-{classifier}.jar"
        unpacked = Path(scratch) / "lib"
        unpack(jar, unpacked)
        replace(unpacked, dest / "lib")


def unpack(jar: Path, folder: Path) -> None:
    """Extracts the four libraries. Raises FetchError where one is missing."""
    folder.mkdir()
    done = 0
    with zipfile.ZipFile(jar) as archive:
        members = {Path(member).name: member for member in archive.namelist()}
        if missing := [name for name in LIBRARIES if name not in members]:
            raise FetchError(f"{jar.name} does not hold {', '.join(missing)}")
        total = sum(archive.getinfo(members[name]).file_size for name in LIBRARIES)
        for name in LIBRARIES:
            with archive.open(members[name]) as source, (folder / name).open("wb") as target:
                while block := source.read(16 << 20):
                    target.write(block)
                    done += len(block)
                    show("unpacking", done, total)


def fetch_headers(dest: Path) -> None:
    cargo = find_tool("cargo", "headers", "Rust (Debian and Ubuntu: `apt-get install cargo`)")
    crate, version = CRATE
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=dest) as scratch:
        package = Path(scratch)
        manifest = (
            f'[package]\nname = "headers"\nversion = "0.0.0"\n\n[dependencies]\n{crate} = "={version}"\n'
        )
        (package / "Cargo.toml").write_text(manifest)
        (package / "src").mkdir()
        (package / "src" / "lib.rs").touch()
        run_tool([cargo, "vendor", "--quiet", "vendor"], package, "TensorRT headers", 10_000_000)
        headers = package / "vendor" / crate / CRATE_HEADERS
        if not (headers / "NvInfer.h").is_file():
            raise FetchError(f"the crate {crate} {version} does not hold {CRATE_HEADERS}/NvInfer.h")
        replace(headers, dest / "include")


def fetch_module() -> None:
    print(f"installing TensorRT's Python module from {REQUIREMENTS.name} ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command).returncode != 0:
        raise FetchError(f"pip could not install {REQUIREMENTS.name} (its message is above)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dest", type=Path, default=ROOT / ".deps" / "tensorrt", help="where to put what is missing"
    )
    parser.add_argument(
        "--headers-only", action="store_true", help="what building needs, without what running needs"
    )
    arguments = parser.parse_args()
    dest = arguments.dest.resolve()
    try:
        dest.mkdir(parents=True, exist_ok=True)
        if installed_headers(dest) is None:
            fetch_headers(dest)
        print(f"TensorRT headers: {installed_headers(dest)}")
        if arguments.headers_only:
            return 0
        if installed_libraries(dest) is None:
            fetch_libraries(dest)
        print(f"TensorRT libraries: {installed_libraries(dest)}")
        if not (importlib.util.find_spec("tensorrt") or importlib.util.find_spec("tensorrt_bindings")):
            fetch_module()
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
