"""The manifest of an engine folder: what it was built from, for which GPU and TensorRT, every file's hash.

`build.py` compares it to tell whether a folder is up to date, and it is checked before an engine's bytes are
given to TensorRT, whose messages about a plan of another GPU or version name neither, and a graph's to ONNX
Runtime, which does not notice damaged weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.gpu import FP8_COMPUTE_CAPABILITY

FORMAT = 1
FILE_NAME = "manifest.json"


class ManifestError(RuntimeError):
    """An engine folder that cannot be used; the message names the file, the value and the remedy."""


@dataclass(frozen=True)
class FusedOp:
    """One kind of fused op in the folder's graphs: how many nodes of it over all graphs."""

    op: str
    version: str
    count: int


@dataclass
class Manifest:
    """The content of manifest.json.

    Attributes:
        model: folder or hub id that was built.
        weights_sha256: of the checkpoint's weight file(s).
        precision: "fp32", "fp16", "bf16" or "fp8".
        plugins: the passes that were switched on; empty for a stock folder.
        fused_ops: what they put into the graphs.
        cache: "fixed" or "growing" (docs/design.md).
        cache_capacity: rows of a fixed cache; None for a growing one.
        batch: (min, opt, max) of the optimisation profile, in images.
        num_beams: the decoder's profile has so many rows an image at the optimum and the maximum.
        max_length: the most tokens of a line, the start token included.
        engines: graph name -> seconds that TensorRT took; empty where only ONNX was written.
        tensorrt, gpu, compute_capability, cuda: what the engines are for; None where there are none.
        plugin_library_sha256: of the library the engines were built with; None without plugins.
        inputs: everything the folder depends on, by name; equal inputs make a build a no-op.
        command: the command line that builds the folder again.
        files: name -> sha256 of every other file of the folder.
        date: of the build, ISO 8601, UTC.
    """

    model: str
    weights_sha256: str
    precision: str
    plugins: list[str]
    fused_ops: list[FusedOp]
    cache: str
    cache_capacity: int | None
    batch: tuple[int, int, int]
    max_length: int
    inputs: dict[str, Any]
    command: str
    date: str
    num_beams: int = 1
    engines: dict[str, float] = field(default_factory=dict)
    tensorrt: str | None = None
    gpu: str | None = None
    compute_capability: str | None = None
    cuda: str | None = None
    plugin_library_sha256: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path | str) -> Manifest:
        """Read `folder`/manifest.json.

        Raises:
            ManifestError: no such file, not JSON, another format, or a field missing or of another kind.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise ManifestError(
                f"{path}: not found: {folder} is not an engine folder; build one: python build.py"
            ) from None
        except (OSError, ValueError) as error:
            raise ManifestError(
                f"{path}: unreadable ({error}); build the folder again: python build.py"
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ManifestError(
                f"{path}: format {found!r}, not {FORMAT}; build the folder again: python build.py"
            )
        names = {f.name for f in fields(cls)}
        if names != content.keys():
            wrong = ", ".join(sorted(names ^ content.keys()))
            raise ManifestError(
                f"{path}: fields missing or unknown: {wrong}; build the folder again: python build.py"
            )
        try:
            content["fused_ops"] = [FusedOp(**op) for op in content["fused_ops"]]
            content["batch"] = tuple(content["batch"])
        except TypeError as error:
            raise ManifestError(
                f"{path}: damaged fused_ops or batch ({error}); build the folder again: python build.py"
            ) from None
        for name in ("inputs", "engines", "files"):
            if not isinstance(content[name], dict):
                raise ManifestError(
                    f"{path}: {name} is {content[name]!r:.40}, not an object; build the folder again: "
                    "python build.py"
                )
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Hash the folder's files and write its manifest, the last file of a build."""
        self.files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != FILE_NAME}
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @property
    def inputs_hash(self) -> str:
        return inputs_hash(self.inputs)

    def check_file(self, folder: Path, name: str) -> None:
        """Hold one file of the folder against its hash.

        Raises:
            ManifestError: the file is missing, was not part of the build, or has other bytes.
        """
        path = folder / name
        if name not in self.files:
            raise ManifestError(
                f"{path}: not in the manifest, which lists {', '.join(self.files)}; build it: {self.command}"
            )
        if not path.is_file():
            raise ManifestError(f"{path}: missing; build it again: {self.command}")
        found = sha256(path)
        if found != self.files[name]:
            raise ManifestError(
                f"{path}: damaged or replaced: sha256 is {found[:12]}..., in the manifest "
                f"{self.files[name][:12]}...; build it again: {self.command} --force"
            )

    def check_machine(self, folder: Path, tensorrt: str, gpu: str, compute_capability: str) -> None:
        """Hold this machine against the one that the engines are for.

        Raises:
            ManifestError: another TensorRT or GPU, a GPU that does not run fp8, or a folder without engines.
        """
        path = folder / FILE_NAME
        if self.precision == "fp8" and compute_capability != FP8_COMPUTE_CAPABILITY:
            raise ManifestError(
                f"{path}: fp8 runs on GPUs of compute capability {FP8_COMPUTE_CAPABILITY} alone, this GPU is "
                f"{gpu} ({compute_capability}); build and choose --precision fp16 here"
            )
        if not self.engines:
            raise ManifestError(
                f"{path}: the folder holds ONNX graphs but no engines; build them here: {self.command}"
            )
        if self.tensorrt != tensorrt:
            raise ManifestError(
                f"{path}: engines built with TensorRT {self.tensorrt}, found TensorRT {tensorrt} here; "
                f"build them again: {self.command}"
            )
        if (self.gpu, self.compute_capability) != (gpu, compute_capability):
            raise ManifestError(
                f"{path}: engines built for {self.gpu} (compute capability {self.compute_capability}), "
                f"this GPU is {gpu} ({compute_capability}); build them again: {self.command}"
            )


def inputs_hash(inputs: dict[str, Any]) -> str:
    """One hash over everything a build depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
