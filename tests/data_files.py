"""Small files for the tests of the readers: images, records in every form of JSON, tars."""

import io
import json
import tarfile

import numpy as np
from hypothesis import strategies as st
from PIL import Image


def pixels(width=24, height=16, seed=0):
    """(height, width, 3) uint8: smooth, so that lossy formats keep it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(kind="JPEG", picture=None, **options):
    """The bytes of a picture in a format of PIL's."""
    buffer = io.BytesIO()
    (Image.fromarray(pixels()) if picture is None else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def turns(*texts, says=("human", "gpt")):
    return [{"from": says[i % 2], "value": text} for i, text in enumerate(texts)]


def record(i, images=1):
    """A record of LLaVA's schema with so many images."""
    names = [f"{i}-{n}.jpg" for n in range(images)]
    image = {} if not images else {"image": names[0] if images == 1 else names}
    return {"id": i, **image, "conversations": turns("<image>\n" * images + f"what is {i}?", f"it is {i}")}


texts = st.text(st.sampled_from(list('ab {}[],:"\\\n\r\téŁ漢😀\x00\u2028')), max_size=12)


@st.composite
def records(draw):
    """Good records with odd texts, and marks in some places."""
    conversation, names = [], []
    for _ in range(draw(st.integers(1, 3))):
        pieces = draw(st.lists(texts, min_size=1, max_size=3))
        new = draw(st.integers(0, 3)) == 0
        question = "<image>".join(pieces) if new else "".join(pieces)
        names += [f"{len(names) + n}.png" for n in range(len(pieces) - 1)] if new else []
        conversation += turns(question, "answer" + draw(texts))
    if draw(st.booleans()):
        conversation.insert(0, {"from": "gpt", "value": "dropped"})
    image = {} if not names else {"image": names[0] if len(names) == 1 else names}
    identity = draw(st.one_of(st.integers(-5, 10**30), texts))
    return {"id": identity, **image, "conversations": conversation, **draw(st.sampled_from([{}, {"model": "x"}]))}


def as_json(records, *, lines, ascii=False, indent=None, newline="\n", bom=False, space=""):
    """The bytes of a file of records."""
    if lines:
        text = "".join(space + json.dumps(r, ensure_ascii=ascii) + newline for r in records)
    else:
        text = space + json.dumps(records, ensure_ascii=ascii, indent=indent).replace("\n", newline) + space
    return (b"\xef\xbb\xbf" if bom else b"") + text.encode()


def write_tar(path, members, *, kind="w", **options):
    """A tar of names and bytes, or of ready TarInfo objects in the place of bytes."""
    with tarfile.open(path, kind, **options) as tar:
        for name, data in members:
            member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            else:
                tar.addfile(member)
    return path
