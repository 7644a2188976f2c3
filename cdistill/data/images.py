"""Images of samples: which paths are allowed, and decoding that survives any bytes.

An EXIF orientation is applied, as transformers does where a model is used; LLaVA's own pipeline leaves pixels as they are
stored. What is transparent becomes white.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from cdistill.data.fetching import fetch
from cdistill.data.files import is_odd, leaves_folder
from cdistill.data.samples import BadSampleError, ImageBytes, ImageFile, blamed_on_sample
from cdistill.errors import InputError

MAX_PIXELS = 1 << 26  # 67 million: 8192 x 8192
MAX_BYTES = 1 << 28
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_RESIZED = 1 << 25  # pixels on the way through a processor: 4 s and 0.5 GB
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
_FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_BYTES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
}

_MODES_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")

_URL = re.compile(r"[a-zA-Z][\w+.-]*://|data:")

_FLAGS = os.O_NONBLOCK | os.O_NOFOLLOW  # a pipe would let us wait; a link came after the path was resolved

Roots = Path | Mapping[str, Path]


def find_image(roots: Roots | None, value: object, *, allow_urls: bool, place: str = "") -> ImageFile | ImageBytes:
    """The image that a value of a record stands for.

    Args:
        roots: where paths start from (`resolve_image`); None where nobody has said it.
        value: a path, a URL (which is fetched where that is allowed), a ``data:`` URI, the encoded bytes, these as
            ``{"bytes", "path"}`` as ``datasets`` keeps them, or an image of PIL's.
        place: what bytes are called.

    Raises:
        BadSampleError: it is none of these, a path that is refused, or a URL that is not fetched.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, bytes):
        return ImageBytes(place, value)
    if isinstance(value, Image.Image):
        return ImageBytes(place, _encoded(value))
    if isinstance(value, str) and value.startswith("data:"):
        return ImageBytes(place, _decode_uri(value))
    if allow_urls and isinstance(value, str) and _URL.match(value):
        return fetch_image(value)
    if roots is None and isinstance(value, str):
        raise BadSampleError("bad image path", f"images must say where paths start from, got the path {value!r}")
    return resolve_image(Path() if roots is None else roots, value)


def _encoded(picture: Image.Image) -> bytes:
    """A PNG of a picture, whose EXIF data stays beside the pixels."""
    buffer = io.BytesIO()
    with blamed_on_sample("unreadable image"):
        kept = picture if picture.mode in _MODES_OF_PNG else _to_rgb(picture)
        kept.save(buffer, "PNG", exif=picture.getexif())
    return buffer.getvalue()


def _decode_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise BadSampleError("unreadable image", f"a data: URI holds an image in base64, got {uri[:60]!r}")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise BadSampleError("unreadable image", f"the base64 of {head[:60]!r} cannot be read: {error}") from error


def resolve_image(roots: Roots, name: object) -> ImageFile:
    """The file of an image that a data set names; whether it exists is seen when it is opened.

    Args:
        roots: the folder that names start from; or one folder for each first part of the names (with
            ``{"coco": Path("/data/coco")}``, ``coco/x.jpg`` is ``/data/coco/x.jpg``), that of "" for all others.
        name: a relative path with ``/``.

    Raises:
        BadSampleError: the name is no path, or leaves its root by being absolute, by ``..`` or by a link; or it is a URL.
    """
    if not isinstance(name, str) or not name:
        raise BadSampleError("bad image path", f"an image is named by its path, got {name!r}")
    if _URL.match(name):
        raise BadSampleError("image by URL", f"URLs are not fetched unless allow_urls is set: {name[:200]!r}")
    if is_odd(name):
        raise BadSampleError("bad image path", f"backslashes and control characters are refused: {name!r}")
    if leaves_folder(name):
        raise BadSampleError("image outside its root", f"absolute paths and '..' are refused: {name!r}")
    root, inner = _root_of(roots, name)
    path = os.path.realpath(_as_stored(root, inner))
    if not os.path.join(path, "").startswith(os.path.join(os.path.realpath(root), "")):
        raise BadSampleError("image outside its root", f"{name!r} is a link to {path}: name a folder there as its root")
    return ImageFile(Path(path))


def _root_of(roots: Roots, name: str) -> tuple[Path, str]:
    if isinstance(roots, Path):
        return roots, name
    first, _, rest = name.partition("/")
    named = next((key for key in _forms(first) if key in roots), None) if rest and first else None
    if named is not None:
        return roots[named], rest
    if "" in roots:
        return roots[""], name
    raise BadSampleError("bad image path", f"no root for {name!r}, only for {', '.join(sorted(roots))}")


def _forms(name: str) -> Iterator[str]:
    """A name, and how the forms of Unicode write it: macOS stores names in NFD, most else is in NFC."""
    yield name
    if not name.isascii():
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, name)


def _as_stored(root: Path, inner: str) -> str:
    """A path below a root, each part in the form in which the disk has it; as it is given where it has none."""
    path = os.path.join(root, inner)
    if inner.isascii() or os.path.lexists(path):
        return path
    path = str(root)
    for part in inner.split("/"):
        path = next(
            (each for form in _forms(part) if os.path.lexists(each := os.path.join(path, form))),
            os.path.join(path, part),
        )
    return path


def fetch_image(url: str) -> ImageBytes:
    """An image from the web, by http or https; only for sources whose ``allow_urls`` is set.

    Raises:
        BadSampleError: it is another kind of URL, or cannot be had.
    """
    if not url.startswith(("http://", "https://")):
        raise BadSampleError("image by URL", f"only http and https are fetched: {url[:200]!r}")
    try:
        return ImageBytes(url, fetch(url, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise BadSampleError("missing image", f"{url}: {error}") from error


def open_image(image: ImageFile | ImageBytes, *, about: int | None = None, exif: bool = True) -> Image.Image:
    """Decode an image, the first one of an animation, to RGB of 8 bits.

    Args:
        image: what a reader found.
        about: the side in pixels that it will be resized to. Then a JPEG of which both sides are at least four times as
            long is decoded at a half, a quarter or an eighth of its size, never below twice ``about``.
        exif: turn it as its EXIF orientation says, which `transformers.image_utils.load_image` does, too.

    Raises:
        BadSampleError: the image is missing, unreadable, truncated or too large (`MAX_PIXELS`, `MAX_BYTES`).
    """
    if isinstance(image, ImageFile):
        name, data = str(image.path), _read(image.path, MAX_BYTES + 1)
    else:
        name, data = image.name, image.data
    if len(data) > MAX_BYTES:
        raise BadSampleError("image too large", f"{name}: more than {MAX_BYTES} bytes")
    kind = _format_of(data)
    if kind is None:
        raise BadSampleError("unreadable image", f"{name}: " + (f"starts with {data[:8]!r}" if data else "empty file"))
    if kind == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:  # each of them takes a pass over all pixels
        raise BadSampleError("image too large", f"{name}: {scans} scans, at most {MAX_SCANS}")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS}")
            if about is not None:
                picture.draft(None, (2 * about, 2 * about))
            return _to_rgb(_upright(picture) if exif else picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError("image too large", f"{name}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything at bytes that somebody made up
        message = str(error).split("<_io")[0].split("\n")[0]
        if "MAX_TEXT" in message:  # PIL's limits of what is written beside the pixels of a PNG
            raise BadSampleError("image too large", f"{name}: its text: {message}") from error
        raise BadSampleError("truncated image", f"{name}: {kind}, {type(error).__name__}: {message}") from error


def check_resizing(processor: Any, width: int, height: int) -> None:
    """Raise BadSampleError for an image that an image processor would first make huge, however small its file.

    The shorter side is enlarged to a length and the longer one with it (CLIP's), or the image is padded to a square (LLaVA's).
    """
    most = max(MAX_RESIZED, width * height)
    size: Any = getattr(processor, "size", None)
    sizes: dict[str, Any] = {} if size is None or isinstance(size, int) else dict(size)
    if getattr(processor, "do_pad", False) and type(processor).__name__.startswith("LlavaImageProcessor"):
        width = height = max(width, height)
    shortest: int | None = None if sizes.get("longest_edge") else sizes.get("shortest_edge")
    if shortest and getattr(processor, "do_resize", False) and width * height <= most:
        scale = shortest / min(width, height)
        width, height = round(scale * width), round(scale * height)
    if width * height > most:
        message = f"its processor would make {width:,} x {height:,} pixels of it, at most {MAX_RESIZED:,} are allowed"
        raise BadSampleError("image too large", message)


def true_format(image: ImageFile | ImageBytes) -> str | None:
    """The format that an image's first bytes tell, one of `FORMATS` or None; raises BadSampleError where it is missing."""
    return _format_of(image.data if isinstance(image, ImageBytes) else _read(image.path, 16))


def named_format(name: str) -> str | None:
    """The format that the suffix of a name stands for, one of `FORMATS` or None."""
    return _FORMAT_OF_SUFFIX.get(os.path.splitext(name)[1].lower())


def _format_of(data: bytes) -> str | None:
    return next((name for name, first in _FIRST_BYTES.items() if re.match(first, data, re.DOTALL)), None)


def _read(path: Path, most: int) -> bytes:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _FLAGS)) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                return file.read(min(most, status.st_size))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSampleError("missing image", str(path)) from error
    except OSError as error:
        raise BadSampleError("unreadable image", f"{path}: {error.strerror}") from error
    raise BadSampleError("unreadable image", f"{path}: not a file")


def seen(picture: Image.Image, *, exif: bool = True) -> Image.Image:
    """A picture of PIL as `open_image` gives that of a file. Raises BadSampleError for one of which no RGB can be made."""
    with blamed_on_sample("unreadable image"):
        return _to_rgb(_upright(picture) if exif else picture)


def _upright(picture: Image.Image) -> Image.Image:
    """As its EXIF orientation says; one that cannot be read says nothing."""
    picture.load()  # its faults are not those of the EXIF data, for which some formats load it
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of bytes that somebody made up: what stands beside the pixels does not spoil them
        return picture
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    turned.info = {name: value for name, value in picture.info.items() if name == "transparency"}  # it is upright now
    return turned


def _eight_bits(picture: Image.Image) -> np.ndarray:
    """(H, W) uint8 of grey in 16 bits, of which a TIFF may use 12 or call white 0: Pillow gives both as they are stored."""
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    bits = max(tags.get(ExifTags.Base.BitsPerSample, (16,)))
    values = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        return np.asarray(255 - values)
    values[np.asarray(picture) == picture.info.get("transparency", -1)] = 255
    return values


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(picture)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"32-bit values (mode {picture.mode}) have no known range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
