"""Images of any bytes become RGB, or bad samples that say why."""

import os
import struct
import time
import zlib

import numpy as np
import pytest
from data_files import encoded, pixels, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cdistill.data import images
from cdistill.data.images import named_format, open_image, true_format
from cdistill.data.samples import BadSampleError, ImageBytes, ImageFile


def test_files_that_are_no_images(tmp_path):
    def on_file(name, data=None):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        return ImageFile(path)

    assert refused(open_image, on_file("none.jpg")) == "missing image"
    assert refused(true_format, on_file("none.jpg")) == "missing image"
    assert refused(open_image, on_file("empty.jpg", b"")) == "unreadable image"
    assert refused(open_image, on_file("empty.jpg/x.jpg")) == "missing image"
    assert refused(open_image, on_file("page.jpg", b"<html>404</html>")) == "unreadable image"
    assert refused(open_image, on_file("x" * 300)) == "unreadable image"
    assert refused(open_image, ImageFile(tmp_path)) == "unreadable image"
    (tmp_path / "good.jpg").write_bytes(encoded())
    (tmp_path / "swapped.jpg").symlink_to(tmp_path / "good.jpg")  # after the reader resolved it
    assert refused(open_image, on_file("swapped.jpg")) == "unreadable image"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refused(open_image, on_file("pipe.jpg")) == "unreadable image"
    for kind in ("PPM", "ICO", "PDF", "EPS"):  # what else PIL would open, or start another program for
        picture = Image.fromarray(pixels()).resize((32, 32))
        assert refused(open_image, ImageBytes(f"x.{kind}", encoded(kind, picture))) == "unreadable image"


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats_are_told_by_their_bytes(tmp_path, kind):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(kind))
    assert true_format(ImageFile(path)) == true_format(ImageBytes("x", encoded(kind))) == kind
    assert {named_format("a" + suffix.upper()) for suffix in images.FORMATS[kind]} == {kind}
    assert open_image(ImageFile(path)).mode == "RGB"
    assert named_format("a.json") is None and true_format(ImageBytes("x", b"RIFF1234WAVE")) is None


@pytest.mark.parametrize("kind", images.FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_images(kind, share):
    rng = np.random.default_rng(0)
    data = encoded(kind, Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    assert refused(open_image, ImageBytes("x", data[: int(share * len(data))])) == "truncated image"


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(images.FORMATS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_made_up_bytes_give_an_image_or_a_bad_sample(kind, changes, kept):
    data = bytearray(encoded(kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        picture = open_image(ImageBytes("x", bytes(data[: int(kept * len(data)) + 1])), about=4)
    except BadSampleError as error:
        assert error.reason in ("unreadable image", "truncated image", "image too large") and "\n" not in str(error)
    else:
        assert picture.mode == "RGB" and picture.getpixel((0, 0))


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    zeros = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (100_000, 100_000)])
def test_bombs_are_not_decoded(size, monkeypatch):
    assert refused(open_image, ImageBytes("x", bomb(*size))) == "image too large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries set it
    assert refused(open_image, ImageBytes("x", bomb(*size))) == "image too large"


def test_the_limit_itself_is_no_bomb(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 16)
    assert open_image(ImageBytes("x", encoded())).size == (24, 16)
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 16 - 1)
    assert refused(open_image, ImageBytes("x", encoded())) == "image too large"


def test_modes_become_rgb():
    rgb = pixels()
    picture = Image.fromarray(rgb)

    def found(kind, other, **options):
        return np.asarray(open_image(ImageBytes("x", encoded(kind, other, **options)))).astype(int)

    grey = picture.convert("L")
    assert np.array_equal(found("PNG", picture), rgb)
    assert np.array_equal(found("PNG", grey), np.asarray(grey.convert("RGB")))
    assert np.array_equal(found("PNG", picture.quantize(8)), np.asarray(picture.quantize(8).convert("RGB")))
    assert np.abs(found("JPEG", picture.convert("CMYK"), quality=100) - rgb).max() < 16
    assert np.array_equal(found("PNG", grey.point(lambda v: 255 * (v > 128)).convert("1")).max(), 255)

    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(found("PNG", deep), np.asarray(grey.convert("RGB")))
    assert np.array_equal(found("TIFF", deep), np.asarray(grey.convert("RGB")))
    for kind in (np.int32, np.float32):
        assert refused(open_image, ImageBytes("x", encoded("TIFF", Image.fromarray(np.asarray(grey).astype(kind)))))

    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(16, 0)))
    for kind in ("PNG", "WEBP"):
        white = found(kind, clear, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(white[:, :12], rgb[:, :12]) and (white[:, 12:] == 255).all()
    holes = Image.new("P", (4, 4))
    holes.putpalette([0, 0, 0, 9, 9, 9])
    holes.putpixel((0, 0), 1)
    assert found("GIF", holes, transparency=0)[0, :2].tolist() == [[9, 9, 9], [255, 255, 255]]
    assert found("PNG", picture, transparency=tuple(rgb[0, 0].tolist()))[0, 0].tolist() == [255, 255, 255]


def grey_tiff(stored, bits, photometric):
    """Rows of a multiple of two values, by hand: Pillow writes no such file."""
    data = stored.astype("<u2").tobytes()
    if bits == 12:
        packed = "".join(format(value, "012b") for value in stored.flatten().tolist())
        data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    short, long = (3, "<HHIHxx"), (4, "<HHII")
    height, width = stored.shape
    fields = {256: (short, width), 257: (short, height), 258: (short, bits), 259: (short, 1), 262: (short, photometric)}
    fields |= {273: (long, 8 + 2 + 12 * 9 + 4), 277: (short, 1), 278: (short, height), 279: (long, len(data))}
    entries = [struct.pack(form, tag, kind, 1, value) for tag, ((kind, form), value) in fields.items()]
    return b"II*\x00" + struct.pack("<IH", 8, 9) + b"".join(entries) + bytes(4) + data


def test_grey_of_more_than_8_bits_keeps_its_range():
    grey = np.arange(0, 256, 16, dtype=np.uint16).reshape(4, 4)
    for bits, photometric, stored in ((12, 1, grey), (16, 1, grey), (16, 0, 255 - grey)):
        data = grey_tiff(stored << (bits - 8), bits, photometric)
        assert np.array_equal(np.asarray(open_image(ImageBytes("x", data)))[:, :, 0], grey), (bits, photometric)
    clear = encoded("PNG", Image.fromarray(grey * 257), transparency=257 * 32)
    assert np.array_equal(np.asarray(open_image(ImageBytes("x", clear)))[:, :, 0], np.where(grey == 32, 255, grey))


def test_animations_give_their_first_image():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(kind, frames[0], save_all=True, append_images=frames[1:], **options)
        assert open_image(ImageBytes("x", data)).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_transformers_turns_them(kind, tmp_path):
    for orientation in range(10):  # 1 to 8 mean something
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(kind, Image.fromarray(pixels(24, 16, seed=orientation)), exif=exif, **options)
        (tmp_path / "x").write_bytes(data)
        expected = load_image(str(tmp_path / "x"))
        assert np.array_equal(open_image(ImageBytes("x", data)), expected), orientation
        stored = open_image(ImageBytes("x", data), exif=False)
        if kind != "TIFF":  # PIL turns these when it reads them
            assert np.array_equal(stored, Image.open(tmp_path / "x").convert("RGB"))
            assert np.array_equal(stored, expected) == (orientation not in range(2, 9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.sampled_from([b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08"]))
def test_exif_data_that_cannot_be_read_does_not_spoil_an_image(noise, start):
    data = encoded("JPEG", exif=start + noise)
    assert open_image(ImageBytes("x", data)).size in ((24, 16), (16, 24))


@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_too_much_text_is_too_large(behind):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    data = encoded("PNG", pnginfo=text)
    if behind:  # the pixels
        at, end = data.index(b"zTXt") - 4, data.index(b"IEND") - 4
        stop = at + 12 + int.from_bytes(data[at : at + 4], "big")
        data = data[:at] + data[stop:end] + data[at:stop] + data[end:]
    assert refused(open_image, ImageBytes("x", data)) == "image too large"


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (30_000, 8)])
def test_images_that_a_processor_would_make_huge_are_refused_before_it_does(size):
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336})
    started = time.process_time()
    assert refused(images.check_resizing, clip, *size) == "image too large"
    padding = LlavaImageProcessorPil(do_pad=True, size={"height": 16, "width": 16})
    if max(size) > 10_000:
        assert refused(images.check_resizing, padding, *size) == "image too large"
    assert time.process_time() - started < 1
    fixed = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.check_resizing(fixed, *size)
    assert fixed(images=[Image.new("RGB", size)])["pixel_values"][0].shape == (3, 16, 16)
    images.check_resizing(None, *size)


def test_usual_images_are_let_through_by_every_processor():
    for size in ((640, 480), (8192, 8192), (4000, 400), (1, 1), (100, 1)):
        for made in (CLIPImageProcessorPil(), LlavaImageProcessorPil(), SiglipImageProcessorPil()):
            images.check_resizing(made, *size)


def test_large_jpegs_are_decoded_smaller_but_never_below_twice_the_side():
    for width, height in ((640, 480), (480, 640), (1601, 1200), (333, 1000)):
        data = encoded("JPEG", Image.fromarray(pixels(width, height)), quality=95)
        whole = open_image(ImageBytes("x", data))
        assert whole.size == (width, height)
        for about in (30, 64, 100, 300):
            smaller = open_image(ImageBytes("x", data), about=about)
            shrunk = round(width / smaller.width)
            assert shrunk in (1, 2, 4, 8)
            assert shrunk == 1 or min(smaller.size) >= 2 * about
            assert shrunk == 8 or min(width, height) < 2 * about * 2 * shrunk
            side = Image.Resampling.BICUBIC
            a, b = (np.asarray(x.resize((about, about), side)).astype(float) for x in (whole, smaller))
            assert np.abs(a - b).mean() < 2
    assert open_image(ImageBytes("x", encoded("PNG")), about=1).size == (24, 16)


def test_an_image_file_is_not_read_beyond_the_limit(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(encoded())
    os.truncate(tmp_path / "x.jpg", 1 << 40)  # a hole: no disk
    monkeypatch.setattr(images, "MAX_BYTES", 3000)
    assert refused(open_image, ImageFile(tmp_path / "x.jpg")) == "image too large"
