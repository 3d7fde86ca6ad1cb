"""Images: every format and mode becomes upright 8-bit RGB on white, or one clear error; and preprocessing."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, TiffImagePlugin
from transformers import AutoImageProcessor

from runtime import images
from runtime.generation import Generation
from runtime.images import ImageError, load_image, load_pixels
from runtime.recognizer import Recognizer
from runtime.search import SearchRequest
from tests.conftest import BUNDLED_MODEL

SAMPLES = BUNDLED_MODEL.parent.parent / "samples"
LABELLED_LINES = BUNDLED_MODEL.parent.parent / "data" / "lines-val.tar"

EXIF_ORIENTATION = 0x0112
# The stored image that a viewer of this Exif orientation turns into the upright one.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def text_line(mode: str = "RGB") -> Image.Image:
    """Dark blue text on a light yellow background, 120x32."""
    image = Image.new("RGB", (120, 32), (250, 245, 200))
    ImageDraw.Draw(image).text((8, 10), "Total 12.50", fill=(20, 30, 90))
    return image.convert(mode)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def write_png(file: Path, width: int, height: int, bit_depth: int, color_type: int, rows: bytes) -> Path:
    """A PNG file from its parts: Pillow writes no 16-bit colour, and none with a size of 0."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return file


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("line.png", {}, 0),
        ("line.tif", {}, 0),
        ("line.tiff", {"compression": "tiff_lzw"}, 0),
        ("line.webp", {"lossless": True}, 0),
        ("line.jpg", {"quality": 98, "subsampling": 0}, 12),
        ("misnamed.png", {"format": "TIFF"}, 0),
    ],
)
def test_formats(tmp_path: Path, name: str, options: dict, tolerance: int):
    file = tmp_path / name
    text_line().save(file, **options)
    difference = pixels(load_image(file)).astype(int) - pixels(text_line())
    assert np.abs(difference).max() <= tolerance
    np.testing.assert_array_equal(pixels(load_image(str(file))), pixels(load_image(file)))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette(tmp_path: Path, mode: str):
    file = tmp_path / "line.png"
    text_line(mode).save(file)
    np.testing.assert_array_equal(pixels(load_image(file)), pixels(text_line(mode).convert("RGB")))


def test_cmyk_jpeg(tmp_path: Path):
    file = tmp_path / "line.jpg"
    text_line("CMYK").save(file, quality=98, subsampling=0)
    difference = pixels(load_image(file)).astype(int) - pixels(text_line())
    assert np.abs(difference).max() <= 16


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str):
    image = text_line(mode)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 40, 32))
    alpha.paste(128, (40, 0, 80, 32))
    image.putalpha(alpha)
    file = tmp_path / "line.png"
    image.save(file)

    loaded, opaque = pixels(load_image(file)).astype(int), pixels(text_line(mode).convert("RGB"))
    assert (loaded[:, :40] == 255).all()
    half = (opaque[:, 40:80].astype(int) * 128 + 255 * 127) / 255
    assert np.abs(loaded[:, 40:80] - half).max() <= 1
    np.testing.assert_array_equal(loaded[:, 80:], opaque[:, 80:])


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_becomes_white(tmp_path: Path, mode: str):
    """Black letters on a background that only the transparency chunk tells from them: black as well."""
    image = Image.new("L", (40, 16), 0)
    image.paste(1, (10, 4, 20, 12))
    image = image.convert(mode)
    if mode == "P":
        image.putpalette([0, 0, 0, 1, 1, 1])
    file = tmp_path / "line.png"
    image.save(file, transparency={"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode])

    loaded = pixels(load_image(file))
    assert (loaded[0] == 255).all()
    assert (loaded[4:12, 10:20] == 1).all()


@pytest.mark.parametrize("name", ["grey.png", "little.tif", "big.tif"])
def test_16_bit_grey_is_scaled(tmp_path: Path, name: str):
    values = np.linspace(0, 65535, 120 * 32).round().reshape(32, 120).astype(np.uint16)
    file = tmp_path / name
    if name == "big.tif":
        Image.frombytes("I;16B", (120, 32), values.astype(">u2").tobytes()).save(file)
    else:
        Image.fromarray(values).save(file)
    expected = np.round(values / 257)
    np.testing.assert_array_equal(pixels(load_image(file)), np.stack([expected] * 3, axis=2))


def test_16_bit_white_is_zero_is_inverted(tmp_path: Path):
    values = np.full((16, 40), 60000, np.uint16)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[images.TIFF_PHOTOMETRIC] = images.TIFF_WHITE_IS_ZERO
    file = tmp_path / "line.tif"
    Image.fromarray(values).save(file, tiffinfo=tags)
    assert (pixels(load_image(file)) == round((65535 - 60000) / 257)).all()


def test_16_bit_colour(tmp_path: Path):
    color = struct.pack(">HHH", 0xFF00, 0x8000, 0x0100)
    file = write_png(tmp_path / "line.png", 40, 16, 16, 2, (b"\0" + color * 40) * 16)
    np.testing.assert_array_equal(pixels(load_image(file))[0, 0], [0xFF, 0x80, 0x01])


@pytest.mark.parametrize(("orientation", "transpose"), STORED.items())
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientation(
    tmp_path: Path, orientation: int, transpose: Image.Transpose, suffix: str, mode: str
):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    file = tmp_path / f"line.{suffix}"
    stored = text_line(mode).transpose(transpose)
    stored.save(file, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(pixels(load_image(file)), pixels(text_line(mode).convert("RGB")))


@pytest.mark.parametrize(("orientation", "transpose"), STORED.items())
def test_exif_orientation_of_a_crop(tmp_path: Path, orientation: int, transpose: Image.Transpose):
    """An image that is no file any more, but was: what it knows of its orientation still counts."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    text_line().transpose(transpose).save(tmp_path / "line.png", exif=exif)
    with Image.open(tmp_path / "line.png") as stored:
        crop = stored.crop((0, 0, *stored.size))
    assert type(crop) is Image.Image and crop.mode == "RGB"
    assert np.array_equal(pixels(load_image(crop)), pixels(text_line()))


def test_a_transparent_colour_of_an_image_that_is_no_file():
    image = text_line()
    image.info["transparency"] = background = (250, 245, 200)
    found = load_pixels(image)
    assert (found == 255).all(axis=2).any() and not (found == background).all(axis=2).any()


def test_pixels():
    """An array of the right kind is not copied; all else is what `load_image` makes of it."""
    array = pixels(text_line())
    assert load_pixels(array) is array
    assert np.array_equal(load_pixels(text_line()), array)
    for other in (text_line("L"), np.asarray(text_line("RGBA")), np.asarray(text_line("L"))[:, :, None]):
        assert np.array_equal(load_pixels(other), pixels(load_image(other)))
    with pytest.raises(ImageError, match="image 3: 0x32 pixels"):
        load_pixels(array[:, :0], "image 3")
    with pytest.raises(ImageError, match="image 3: an array of shape"):
        load_pixels(array.astype(np.float32), "image 3")


def test_first_page_of_a_tiff(tmp_path: Path):
    file = tmp_path / "pages.tif"
    text_line().save(file, save_all=True, append_images=[Image.new("RGB", (50, 50))])
    np.testing.assert_array_equal(pixels(load_image(file)), pixels(text_line()))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_arrays_and_pil_images(mode: str):
    image = text_line(mode)
    expected = pixels(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(load_image(image)), expected)
    np.testing.assert_array_equal(pixels(load_image(np.asarray(image))), expected)
    if mode == "L":
        np.testing.assert_array_equal(pixels(load_image(np.asarray(image)[:, :, None])), expected)


def test_arguments_are_left_as_they_were():
    image = text_line("RGBA")
    before = image.copy()
    load_image(image)
    assert image == before


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((16, 40), np.float32),
        np.zeros((16, 40), np.uint16),
        np.zeros((16, 40, 2), np.uint8),
        np.zeros((3, 16, 40), np.uint8),
        np.zeros(40, np.uint8),
        np.zeros((1, 16, 40, 3), np.uint8),
    ],
)
def test_unsuitable_array(array: np.ndarray):
    with pytest.raises(ImageError, match=r"crop 7: an array of shape .* and type .*; give uint8"):
        load_image(array, "crop 7")


def test_unsuitable_object():
    with pytest.raises(ImageError, match="crop 7: of type bytes; give a path, a PIL image or a numpy array"):
        load_image(b"\x89PNG", "crop 7")


def unusable_file(kind: str, folder: Path) -> Path:
    file = folder / f"{kind}.png"
    match kind:
        case "text":
            file.write_text("This is not an image.\n")
        case "empty":
            file.touch()
        case "folder":
            file.mkdir()
        case "truncated":
            noise = np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file)
            file.write_bytes(file.read_bytes()[:5000])
        case "other format":
            text_line().save(file, format="GIF")
        case "0x0":
            write_png(file, 0, 0, 8, 0, b"")
        case "1x1":
            Image.new("RGB", (1, 1)).save(file)
        case "20000 wide":
            Image.new("L", (20000, 64)).save(file)
        case "too many pixels":
            Image.new("1", (9000, 9000)).save(file)
        case "bomb":
            write_png(file, 200_000, 200_000, 1, 0, b"")
        case "float":
            Image.new("F", (40, 16)).save(file, format="TIFF")
        case "32 bit":
            Image.fromarray(np.full((16, 40), 1 << 20, np.int32)).save(file, format="TIFF")
        case "long name":
            file = folder / f"{'long' * 100}.png"
    return file


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file; check the path"),
        ("text", "not a readable JPEG, PNG, TIFF or WebP image; convert it, or leave it out"),
        ("empty", "an empty file; convert it, or leave it out"),
        ("folder", "a folder; give the images in it"),
        ("truncated", r"cannot be decoded \(.*\); save it again"),
        ("other format", "not a readable JPEG, PNG, TIFF or WebP image"),
        ("0x0", "not a readable JPEG|0x0 pixels"),
        ("1x1", "1x1 pixels; a text line has at least 4 each way"),
        ("20000 wide", "20000x64 pixels; a side may have 16,384; cut it into shorter lines"),
        ("too many pixels", "9000x9000 pixels, more than 67,108,864 in all; cut it into text lines"),
        ("bomb", "more than 67,108,864 pixels; cut it into text lines"),
        ("float", "floating-point pixels; save it with 8 or 16 bits a channel"),
        ("32 bit", "grey values 1048576 to 1048576; save it with 8 or 16 bits a channel"),
        ("long name", r"cannot be read \(.*too long.*\); save it again"),
    ],
)
def test_unusable_file(tmp_path: Path, kind: str, message: str):
    file = unusable_file(kind, tmp_path)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("size", [(0, 0), (0, 10), (1, 1), (3, 100), (100, 3)])
def test_too_small(size: tuple[int, int]):
    with pytest.raises(ImageError, match=f"crop: {size[1]}x{size[0]} pixels; a text line has at least 4"):
        load_image(np.zeros(size, np.uint8), "crop")


@pytest.mark.parametrize("size", [(4, 4), (16384, 32), (4, 16384)])
def test_extreme_sizes_that_work(size: tuple[int, int]):
    assert load_image(Image.new("L", size)).size == size


# Preprocessing: what the recognizer hands to the encoder is what the checkpoint's own processor makes.

SPECIFIC = {
    "published small: DeiT, bicubic": {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "resample": 3,
        "size": 48,
        "do_center_crop": False,
        "crop_size": 224,
    },
    "published base: ViT, bilinear": {
        "feature_extractor_type": "ViTFeatureExtractor",
        "resample": 2,
        "size": 48,
    },
    "transformers 4": {
        "image_processor_type": "ViTImageProcessor",
        "processor_class": "TrOCRProcessor",
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "size": {"height": 48, "width": 48},
    },
    "fast class": {
        "image_processor_type": "ViTImageProcessorFast",
        "resample": 3,
        "size": {"height": 48, "width": 48},
    },
    "cropped": {
        "image_processor_type": "DeiTImageProcessor",
        "resample": 3,
        "size": {"height": 56, "width": 60},
        "do_center_crop": True,
        "crop_size": {"height": 48, "width": 48},
    },
    "other mean and scale": {
        "image_processor_type": "ViTImageProcessor",
        "resample": 0,
        "rescale_factor": 1 / 127.5,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": {"height": 48, "width": 48},
    },
    "not normalised": {
        "image_processor_type": "ViTImageProcessor",
        "resample": 2,
        "do_normalize": False,
        "size": {"height": 48, "width": 48},
    },
}


def with_processor(model: Path, folder: Path, content: dict, nested: bool = False) -> Path:
    """A copy of the checkpoint whose image processor is `content`; nested as transformers 5 writes it."""
    shutil.copytree(model, folder)
    common = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").unlink()
    if nested:
        content = {"image_processor": common | content, "processor_class": "TrOCRProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(content))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(common | content))
    return folder


def record_inputs(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch, encode: bool
) -> list[torch.Tensor]:
    """A list that gets what the torch backend makes of each image: float32, on the CPU, in the images' order.

    encode: whether the encoder runs too; without, its states are None.
    """
    inputs: list[torch.Tensor] = []
    encode_batch, encode_pixels = recognizer._encode, recognizer.backend.encode

    def recording(pixel_values: torch.Tensor, then: SearchRequest | None = None):
        inputs.extend(recognizer.backend.normalization(pixel_values.cpu()))
        return encode_pixels(pixel_values) if encode else None

    def in_order(batch: list, alone: bool):
        first = len(inputs)
        encoded = encode_batch(batch, alone)
        found = dict(zip(encoded.order, inputs[first:], strict=True))  # they come widest first
        inputs[first:] = [found[place] for place in sorted(found)]
        return encoded

    monkeypatch.setattr(recognizer.backend, "encode", recording)
    monkeypatch.setattr(recognizer, "_encode", in_order)
    return inputs


@pytest.mark.parametrize("name", SPECIFIC)
def test_preprocessing_is_the_processors_own(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = with_processor(checkpoint("small"), tmp_path / "model", SPECIFIC[name])
    check_preprocessing(folder, monkeypatch)


@pytest.mark.parametrize("case", ["small", "wide"])
def test_preprocessing_of_a_nested_configuration_and_of_images_that_are_not_square(
    case: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    height, width = {"small": (48, 48), "wide": (32, 96)}[case]
    content = {
        "image_processor_type": "DeiTImageProcessor",
        "do_center_crop": False,
        "resample": 3,
        "size": {"height": height, "width": width},
    }
    folder = with_processor(checkpoint(case), tmp_path / "model", content, nested=True)
    check_preprocessing(folder, monkeypatch)


def check_preprocessing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    recognizer = Recognizer(folder, backend="torch", batch_size=3, max_new_tokens=1)
    lines = sorted(SAMPLES.glob("*.jpg"))[:5]
    inputs = record_inputs(recognizer, monkeypatch, encode=True)
    assert all(result.error is None for result in recognizer.recognize(lines))
    images = [Image.open(file).convert("RGB") for file in lines]
    expected = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    torch.testing.assert_close(torch.stack(inputs), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "resample"), [("ViT", 2), ("DeiT", 3)])
def test_preprocessing_of_the_labelled_lines(
    kind: str, resample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every eighth real line at the published size: within 1/255 of the checkpoint's own processor."""
    content = {"feature_extractor_type": f"{kind}FeatureExtractor", "resample": resample, "size": 384}
    content |= {"do_center_crop": False} if kind == "DeiT" else {}
    folder = with_processor(BUNDLED_MODEL, tmp_path / "model", content)
    processor = AutoImageProcessor.from_pretrained(folder)
    recognizer = Recognizer(folder, backend="torch", max_new_tokens=1)
    inputs = record_inputs(recognizer, monkeypatch, encode=False)
    monkeypatch.setattr(
        recognizer._decoder, "decode", lambda _, images: Generation([[2]] * images, [0.0] * images)
    )
    with tarfile.open(LABELLED_LINES) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".jpg"))[::8]
        images = [Image.open(io.BytesIO(archive.extractfile(name).read())) for name in names]
        for image in images:
            image.load()
    assert len(images) == 242
    recognizer.recognize(images)
    for image, found in zip(images, inputs, strict=True):
        expected = processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        quantised = [torch.round((pixels * 0.5 + 0.5) * 255) for pixels in (found, expected)]
        assert (quantised[0] - quantised[1]).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", SPECIFIC)
def test_preprocessing_on_the_device_is_that_on_the_cpu(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second half, rescaling and normalising, where the backend's tensors are."""
    folder = with_processor(checkpoint("small"), tmp_path / "model", SPECIFIC[name])
    recognizer = Recognizer(folder, backend="torch", max_new_tokens=1)
    assert recognizer.backend.device.type == "cuda"
    check_preprocessing(folder, monkeypatch)
