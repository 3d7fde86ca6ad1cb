"""nsys up to 2023.4 records no range of Python's nvtx 0.2.12 and later, only its domains.

Needs nsys with its importer on PATH (Debian: nsight-systems and nsight-systems-target), and no GPU. Takes the
installed nvtx; give another with: pip install nvtx==0.2.11
"""

import importlib.metadata
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import time, nvtx
for i in range(1000):
    with nvtx.annotate("range", domain="example", payload=i):
        time.sleep(0.001)
time.sleep(1)
"""

version = subprocess.run(["nsys", "--version"], capture_output=True, text=True, check=True).stdout.strip()
print(version, "nvtx", importlib.metadata.version("nvtx"))
with tempfile.TemporaryDirectory() as folder:
    report, database = Path(folder) / "report", Path(folder) / "report.sqlite"
    profile = ["nsys", "profile", "-t", "nvtx", "--sample=none", "--cpuctxsw=none", "-o", str(report)]
    subprocess.run([*profile, sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    export = ["nsys", "export", "--type", "sqlite", "-o", str(database), f"{report}.nsys-rep"]
    subprocess.run(export, capture_output=True, check=True)
    kinds = dict(
        sqlite3.connect(database).execute("SELECT eventType, count(*) FROM NVTX_EVENTS GROUP BY eventType")
    )
print("domains created:", kinds.get(75, 0), "ranges:", kinds.get(59, 0))
