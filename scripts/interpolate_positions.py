#!/usr/bin/env python3
"""Makes a checkpoint that was fine-tuned with `interpolate_pos_encoding=True` one of its own image size.

    python scripts/interpolate_positions.py --model DIR --out DIR

Such a checkpoint has the position embeddings of the size it began with, say 384x384, in config.json and in
its weights, and makes images of another, say 64x640, by preprocessor_config.json; Hugging Face interpolates
the embeddings anew for every image. Here that is done once, by the same function, and written down.

Exit codes: 0 written; 2 wrong use or input, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from graph_surgery.checkpoint import (  # noqa: E402
    CheckpointError,
    copy_processor_files,
    load_model,
    load_spec,
)


def interpolate(model: str, out: Path) -> Path:
    """Writes the checkpoint folder `out`, whole or not at all; returns it.

    Raises CheckpointError for a checkpoint that cannot be used, or that has its own size already.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it, or give another --out")
    spec = load_spec(model)
    processor = AutoImageProcessor.from_pretrained(spec.source)
    height, width = processor(Image.new("RGB", (64, 16)), return_tensors="pt").pixel_values.shape[2:]
    if (height, width) == (spec.encoder.image_height, spec.encoder.image_width):
        raise CheckpointError(f"{spec.source}: made for {height}x{width} already; use it as it is")
    if height % spec.encoder.patch_height or width % spec.encoder.patch_width:
        raise CheckpointError(
            f"{spec.source / 'preprocessor_config.json'}: makes images of {height}x{width}, which patches of "
            f"{spec.encoder.patch_height}x{spec.encoder.patch_width} do not fill; correct its size"
        )
    network = load_model(spec)
    embeddings = network.encoder.embeddings
    patches = height // spec.encoder.patch_height * (width // spec.encoder.patch_width)
    tokens = torch.empty(1, spec.encoder.num_special_tokens + patches, spec.encoder.hidden_size)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(tokens, height, width)
    embeddings.position_embeddings = torch.nn.Parameter(positions.contiguous())
    network.config.encoder.image_size = [height, width]

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        copy_processor_files(spec, folder)
        network.save_pretrained(folder)  # with config.json anew
        load_model(load_spec(folder))
        folder.rename(out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write interpolated position embeddings into a checkpoint.")
    parser.add_argument("--model", required=True, help="folder of the checkpoint, or its Hugging Face hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        print(interpolate(arguments.model, arguments.out))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
