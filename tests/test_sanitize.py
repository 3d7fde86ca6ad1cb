"""compute-sanitizer's verdicts: what its output means, and a tool that fails or hangs."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from profiling import sanitize
from profiling.sanitize import (
    DONE,
    FOUND,
    KERNELS,
    TOOLS,
    Finding,
    check,
    judge,
    main,
    sanitizer_command,
    table,
)
from runtime.gpu import Gpu

CLEAN = f"========= COMPUTE-SANITIZER\n{DONE}\n========= ERROR SUMMARY: 0 errors\n"
RACES = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void trocr::kernel(float*)+0x640
=========     and Read access at void trocr::kernel(float*)+0x650 [16 hazards]
=========
{DONE}
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
ABORTED = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at void trocr::kernel(float*)+0x10
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cudaLaunchKernel
Traceback (most recent call last):
torch.AcceleratorError: CUDA error: unspecified launch failure
========= ERROR SUMMARY: 6 errors
"""
CRASHED = """========= COMPUTE-SANITIZER
========= Error: process didn't terminate successfully
Segmentation fault
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "status", "verdict", "count"),
    [
        (CLEAN, 0, "clean", 0),
        (RACES, FOUND, "found", 1),
        (ABORTED, 1, "found", 6),
        (CRASHED, 255, "failed", 0),
        ("ImportError: no trocr_kernels\n", 1, "failed", 0),
        (CRASHED.replace("RACECHECK SUMMARY: 0 hazards", "ERROR SUMMARY: 1 error"), 255, "failed", 0),
        (CLEAN.replace(DONE, ""), 0, "failed", 0),  # the calls were not made: nothing was checked
        ("========= COMPUTE-SANITIZER\n", None, "timed out", 0),
    ],
)
def test_judge(output: str, status: int | None, verdict: str, count: int):
    finding = judge("linear", "memcheck", status, output, 1.0)
    assert (finding.status, finding.count) == (verdict, count)


def test_the_report_is_the_tools_own_words():
    found = judge("linear", "synccheck", 1, ABORTED, 1.0).report
    assert found[1] == "Barrier error detected. Divergent thread(s) in block."
    assert not [line for line in found if "Host Frame" in line or "Traceback" in line]
    assert "Segmentation fault" in judge("linear", "racecheck", 255, CRASHED, 1.0).report
    traceback = f'File "{sanitize.ROOT}/profiling/sanitize.py", line 1'
    assert 'File "profiling/sanitize.py", line 1' in judge("linear", "memcheck", 1, traceback, 1.0).report


@dataclass
class Where:
    command: str


def fake(folder: Path, body: str) -> None:
    """A compute-sanitizer that does what `body` says."""
    file = folder / "compute-sanitizer"
    file.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    file.chmod(0o755)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_tools_are_processes_of_their_own(on_path: Path):
    fake(on_path, f"sys.stdout.write({CLEAN!r}); print(sys.argv)")
    assert check("linear", "memcheck", 30).status == "clean"
    fake(on_path, "time.sleep(60)")
    hung = check("linear", "racecheck", 0.5)
    assert hung.status == "timed out" and hung.seconds < 30


def test_only_our_kernels_are_checked():
    command = sanitizer_command("linear", "racecheck")
    assert command[-2:] == ["--call", "linear"] and "kernel_substring=trocr" in command
    assert "kernel_substring=trocr" not in sanitizer_command("linear", "initcheck")  # who wrote the memory?


def test_every_finding_is_written(on_path: Path, tmp_path: Path, monkeypatch, capsys):
    fake(on_path, f"sys.stdout.write({CLEAN!r} if 'memcheck' in sys.argv else {RACES!r})")
    monkeypatch.setattr("runtime.gpu.current_gpu", lambda: Gpu("NVIDIA H200", "9.0", "13.0"))
    monkeypatch.setattr("runtime.kernels.load_kernels", lambda: None)
    monkeypatch.setattr(sanitize, "environment", Where)
    out = tmp_path / "out" / "sanitizer.json"
    options = ["--kernels", "linear,layernorm", "--tools", "memcheck,racecheck", "--out", str(out)]
    assert main(options) == 1

    def found() -> list[tuple[str, str, str]]:
        return [(entry["kernel"], entry["tool"], entry["status"]) for entry in json.loads(out.read_text())]

    of_layernorm = [("layernorm", "memcheck", "clean"), ("layernorm", "racecheck", "found")]
    assert found() == [*of_layernorm, ("linear", "memcheck", "clean"), ("linear", "racecheck", "found")]
    assert "Race reported" in capsys.readouterr().out
    fake(on_path, f"sys.stdout.write({CLEAN!r})")
    assert main(["--kernels", "linear", "--tools", "racecheck", "--out", str(out)]) == 0
    assert found() == [*of_layernorm, ("linear", "memcheck", "clean"), ("linear", "racecheck", "clean")]
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    assert main([*options[:2], "--tools", "memcheck"]) == 0
    assert (tmp_path / "results" / "nvidia-h200" / "sanitizer.json").is_file()


def test_table():
    text = table([Finding("linear", tool, "clean", 0, 1.0, []) for tool in TOOLS[:2]] + [
        Finding("layernorm", "memcheck", "found", 3, 1.0, [])
    ])  # fmt: skip
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[0] == ["kernel", "memcheck", "racecheck"]
    assert cells[2:] == [["linear", "clean", "clean"], ["layernorm", "found 3", "-"]]


def test_every_kernel_of_the_module_is_called():
    """A kernel that is added to the bindings is added here."""
    bindings = (Path(sanitize.ROOT) / "plugins" / "bindings.cpp").read_text()
    source = Path(sanitize.__file__).read_text()
    names = set(re.findall(r'module\.def\(\s*"(\w+)", bind', bindings))
    assert len(names) >= 11
    missing = {name for name in names if f".{name}(" not in source and name != "image_resize"}
    assert not missing and {"image_resize", "device_decoder", "device_decoder_wide"} <= KERNELS.keys()


def test_errors(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 2
    assert "no compute-sanitizer on PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--tools", "leakcheck"])
