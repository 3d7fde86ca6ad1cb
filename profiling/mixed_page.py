"""A page of lines of very different lengths: how near its search comes to one whose rows are never idle.

    python -m profiling.mixed_page [--lines 100] [--json FILE]

Labelled lines, as evenly spread over the lengths of their texts as there are lines of each, are decoded by
the device decoder in one search, whose finished rows take the next line (bundled checkpoint, fused
engines): in random order, and widest crop first, as `Recognizer` has them. Beside the time stands that of as
many tokens with no row idle: what a step of full rows takes, whose texts nothing ends, times the steps that
all tokens fill. Medians, on the GPU.

Exit codes: 0 measured; 2 no GPU, engines or device decoder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import AutoImageProcessor

from build import default_folder
from graph_surgery.checkpoint import CheckpointError
from profiling.accuracy import line_images, read_reference
from profiling.models import BUNDLED
from profiling.records import environment
from runtime.backends.base import BackendError
from runtime.backends.tensorrt_backend import DEVICE_SLOTS, TensorRTBackend
from runtime.bench import measure
from runtime.images import load_image
from runtime.search import SearchRequest

MOST_TOKENS = 64


def spread(lengths: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """Indices of `count` lines, of every length as many as there are, in random order."""
    generator = np.random.default_rng(seed)
    of_length: dict[int, list[int]] = defaultdict(list)
    for index in generator.permutation(len(lengths)):
        of_length[lengths[index]].append(int(index))
    chosen: list[int] = []
    while len(chosen) < min(count, len(lengths)):
        chosen += [lines.pop() for lines in of_length.values() if lines]
    return generator.permutation(chosen)[:count].tolist()


@torch.inference_mode()
def compare(backend: TensorRTBackend, pixels: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of the search of all of `pixels`, and of as many tokens without idle rows.

    Raises BackendError where the backend does not search so many lines at once.
    """
    encoding = backend.encode(pixels)
    found = backend.search(encoding, SearchRequest(MOST_TOKENS))
    if found is None:
        raise BackendError(f"the device decoder does not take {len(pixels)} lines here")
    lengths = found.lengths.tolist()
    times = measure(lambda: backend.search(encoding, SearchRequest(MOST_TOKENS)))
    steps = round(statistics.mean(lengths))
    full = backend.encode(pixels[:DEVICE_SLOTS])
    full_times = measure(lambda: backend.search(full, SearchRequest(steps, stops=False)))
    rows = min(DEVICE_SLOTS, len(pixels))
    search, without_idle = (statistics.median(t) for t in (times, full_times))
    without_idle *= sum(lengths) / (rows * steps)
    return {
        "lines": len(lengths),
        "rows": rows,
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "search_ms": round(search, 4),
        "without_idle_rows_ms": round(without_idle, 4),
        "ratio": round(search / without_idle, 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A page of lines of very different lengths.")
    parser.add_argument("--lines", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    try:
        backend = TensorRTBackend(Path(default_folder(str(BUNDLED), "fused", "fp16")))
        reference = read_reference()
        processor = AutoImageProcessor.from_pretrained(BUNDLED)
        with line_images() as images:
            chosen = spread([len(reference[image.name][1]) for image in images], options.lines)
            loaded = [load_image(images[index], images[index].name) for index in chosen]
        raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        widest_first = sorted(loaded, key=lambda image: -image.width / image.height)
        rows = [
            {"order": order} | compare(backend, processor(lines, **raw).pixel_values)
            for order, lines in (("random", loaded), ("widest first", widest_first))
        ]
    except (RuntimeError, CheckpointError) as error:  # engines, lines and the backend say what is missing
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "profiling.mixed_page", *(arguments or sys.argv[1:])])
    print(tabulate(rows, headers="keys", tablefmt="github"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(environment(command)) | {"searches": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
