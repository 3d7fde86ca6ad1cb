"""Tables of a timeline: from a real recording of nsys, and from one of torch.profiler."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from profiling.nsys import (
    GpuWork,
    Range,
    Recording,
    RecordingError,
    kernels,
    main,
    markdown,
    read_nsys,
    read_trace,
    rows,
)
from runtime.ranges import COLOURS, stage, staged

# nsys 2023.4.4, nvtx 0.2.11: `runtime.recognize --backend onnxruntime --batch-size 2` on three sample lines.
# Of the export only the ranges, their names and the versions.
RECORDED = Path(__file__).parent / "data" / "nsys-onnxruntime.db"


def test_a_real_recording():
    recording = read_nsys(RECORDED)
    assert recording.source == "nsys 2023.4.4.54"
    found = {(row.name, row.batch): row for row in rows(recording, "trocr")}
    # The others are the CUDA decoder's.
    assert {name.partition(" [")[0] for name, _ in found} == set(COLOURS) - {"search", "encode and search"}
    assert found["preprocess [1]", 1].count == 3
    assert found["encoder [2, 3, 384, 384]", 2].count == 1
    # start, encoder and cross_kv of the same batch: one within the other
    inner = found["encoder [2, 3, 384, 384]", 2].host_total + found["cross_kv [2, 578, 192]", 2].host_total
    assert 0.9 * found["encode [2, 3, 384, 384]", 2].host_total < inner
    assert inner < found["encode [2, 3, 384, 384]", 2].host_total
    steps = found["decode step [2, 1]", 2]
    assert steps.count == 16
    assert 0 < steps.host_median <= steps.host_p99 <= steps.host_total
    assert steps.gpu_total is None and steps.launches == 0
    assert "Nothing of a GPU was recorded" in markdown(recording)


def test_gpu_work_of_nsys(tmp_path: Path):
    """Kernels, copies and graphs go to the ranges in which they were launched, on the same thread."""
    file = tmp_path / "recording.sqlite"
    shutil.copy(RECORDED, file)
    steps = [entry for entry in read_nsys(file).ranges if entry.name == "decode step [2, 1]"]
    thread, process = steps[0].thread, steps[0].thread >> 24 << 24
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO StringIds VALUES (1000000, 'attention')")
        database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start, globalTid, correlationId)")
        database.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (shortName, start, end, correlationId, globalPid)"
        )
        database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start, end, correlationId, globalPid)")
        launched = [
            (steps[0].begin + 10, thread, 1),
            (steps[1].begin + 10, thread, 2),
            (steps[0].begin, thread + 1, 3),
        ]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?)", launched)
        work = [
            (1000000, 0, 5000, 1, process),
            (1000000, 5000, 8000, 2, process),
            (1000000, 0, 70000, 3, process),
        ]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?)", work)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (9000, 10000, 2, ?)", (process,))
    recording = read_nsys(file)
    (row,) = (row for row in rows(recording) if row.name == "decode step [2, 1]")
    assert (row.gpu_total, row.launches) == (pytest.approx(0.009), 3)
    assert [(entry["name"], entry["count"]) for entry in kernels(recording)] == [
        ("attention", 3),
        ("copy", 1),
    ]


def test_nested_ranges_both_count_what_was_launched():
    ranges = [
        Range("trocr", "outer", 1, 0, 100),
        Range("trocr", "inner", 1, 40, 60),
        Range("x", "other", 2, 0, 100),
    ]
    work = [
        GpuWork("k", 1_000_000, 1, 50),
        GpuWork("k", 2_000_000, 1, 60),
        GpuWork("k", 4_000_000, None, None),
    ]
    found = {row.name: (row.gpu_total, row.launches) for row in rows(Recording("test", ranges, work))}
    assert found == {"outer": (3.0, 2), "inner": (1.0, 1), "other": (0, 0)}


def test_torch_profiler_takes_the_same_ranges(tmp_path: Path):
    double = staged("encoder")(lambda tensor: 2 * tensor)
    step = staged("decode step", (4, 1))(lambda: torch.ones(3).sum())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with stage("encode", (4, 3)):
            assert double(torch.ones(4, 2)).sum() == 16
        for _ in range(3):
            assert step() == 3
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    recording = read_trace(tmp_path / "trace.json")
    assert [(row.name, row.batch, row.count) for row in rows(recording)] == [
        ("encode [4, 3]", 4, 1),
        ("encoder [4, 2]", 4, 1),
        ("decode step [4, 1]", 4, 3),
    ]
    assert "torch.profiler" in markdown(recording)


def test_command_line(tmp_path: Path, capsys):
    assert main([str(RECORDED), "--json", str(tmp_path / "tables.json")]) == 0
    assert "decode step [2, 1]" in capsys.readouterr().out
    content = json.loads((tmp_path / "tables.json").read_text())
    assert content["source"].startswith("nsys") and len(content["ranges"]) == 13


def test_errors(tmp_path: Path, capsys):
    with pytest.raises(RecordingError, match=r"none\.sqlite: not found"):
        read_nsys(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(RecordingError, match=r"text\.sqlite: .*not a database"):
        read_nsys(tmp_path / "text.sqlite")
    with sqlite3.connect(tmp_path / "empty.sqlite") as database:
        database.execute("CREATE TABLE StringIds (id, value)")
    with pytest.raises(RecordingError, match="no NVTX ranges; record with"):
        read_nsys(tmp_path / "empty.sqlite")
    shutil.copy(RECORDED, tmp_path / "old.sqlite")
    with sqlite3.connect(tmp_path / "old.sqlite") as database:
        database.execute("DELETE FROM NVTX_EVENTS WHERE eventType != 75")
    with pytest.raises(RecordingError, match="too old for the installed nvtx"):
        read_nsys(tmp_path / "old.sqlite")
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(RecordingError, match=r"no trace of torch\.profiler"):
        read_trace(tmp_path / "trace.json")
    assert main([str(tmp_path / "none.sqlite")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
