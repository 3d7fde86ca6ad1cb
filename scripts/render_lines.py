#!/usr/bin/env python3
"""Renders the texts of a labels file as line images, for scripts that no labelled lines are at hand for.

    python scripts/render_lines.py --font NotoSansCJKsc-Regular.otf --labels samples/chinese/labels.tsv

Every row, an image's name, a tab and a text, becomes a PNG file beside the labels: black on white, 40 pixels
a character. Exit codes: 0 rendered; 2 wrong use or input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 40  # pixels of a full-width character
MARGIN = 10


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A grey image of one line of text."""
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (right - left + 2 * MARGIN, bottom - top + 2 * MARGIN), "white")
    ImageDraw.Draw(image).text((MARGIN - left, MARGIN - top), text, fill="black", font=font)
    return image


def missing_characters(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The characters that the font draws as it draws one that no font has."""
    absent = font.getmask("\U0010ffff")
    return [
        character
        for character in dict.fromkeys(text)
        if not character.isspace() and bytes(font.getmask(character)) == bytes(absent)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render the texts of a labels file as line images.")
    parser.add_argument("--font", type=Path, required=True, help="TrueType or OpenType font")
    parser.add_argument("--labels", type=Path, required=True, metavar="TSV", help="image, tab, text")
    arguments = parser.parse_args(argv)
    try:
        font = ImageFont.truetype(arguments.font, SIZE)
        rows = arguments.labels.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {arguments.font}, {arguments.labels}: {error}; give a font and a TSV", file=sys.stderr)
        return 2
    for row in rows:
        name, _, text = row.partition("\t")
        if missing := missing_characters(text, font):
            print(f"error: {arguments.font} has no {''.join(missing)}; give another font", file=sys.stderr)
            return 2
        render(text, font).save(arguments.labels.parent / name, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
