"""What data sets must not do: leave their folders, fetch, unpickle, fill the memory, or end a run with a broken image."""

import gzip
import http.server
import os
import pickle
import re
import tarfile
import threading
import unicodedata

import pytest
from data_files import as_json, encoded, record, refused, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from cdistill.data import images
from cdistill.data.images import find_image, open_image, resolve_image
from cdistill.data.llava import LlavaJson
from cdistill.data.mix import open_source
from cdistill.data.samples import BadSampleError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "in" / "a b.jpg").write_bytes(encoded())
    (tmp_path / "secret.jpg").write_bytes(encoded())
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x.jpg").write_bytes(encoded())
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "image outside its root"),
        ("..", "image outside its root"),
        ("in/../in/a b.jpg", "image outside its root"),
        ("in/../../secret.jpg", "image outside its root"),
        ("/etc/passwd", "image outside its root"),
        ("//etc/passwd", "image outside its root"),
        ("C:/x.jpg", "image outside its root"),
        ("link.jpg", "image outside its root"),
        ("folder/secret.jpg", "image outside its root"),
        ("neighbour/x.jpg", "image outside its root"),
        ("..\\secret.jpg", "bad image path"),
        ("in\\a.jpg", "bad image path"),
        ("a.jpg\0.png", "bad image path"),
        ("a\nb.jpg", "bad image path"),
        ("\ud800.jpg", "bad image path"),
        ("", "bad image path"),
        (None, "bad image path"),
        (5, "bad image path"),
        (["a.jpg"], "bad image path"),
        ("http://127.0.0.1/x.jpg", "image by URL"),
        ("HTTPS://example.com/x.jpg", "image by URL"),
        ("file:///etc/passwd", "image by URL"),
        ("data:image/png;base64,AAAA", "image by URL"),
    ],
)
def test_names_that_leave_the_root_are_refused(root, name, reason):
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "folder").symlink_to(root.parent)
    (root / "neighbour").symlink_to(root.parent / "root2")
    assert refused(resolve_image, root, name) == reason
    assert refused(resolve_image, {"": root}, name) == reason


def test_names_within_the_root(root, monkeypatch):
    picture = (root / "in" / "a b.jpg").resolve()
    (root / "inner.jpg").symlink_to(picture)
    (root.parent / "other-root").symlink_to(root)
    assert resolve_image(root, "in/a b.jpg").path == picture
    assert resolve_image(root, "./in//a b.jpg").path == picture
    assert resolve_image(root, "inner.jpg").path == picture
    assert resolve_image(root.parent / "other-root", "in/a b.jpg").path == picture
    assert resolve_image({"x": root / "in", "": root}, "x/a b.jpg").path == picture
    assert resolve_image({"x": root / "in", "": root}, "in/a b.jpg").path == picture
    assert refused(resolve_image, {"x": root / "in"}, "y/a b.jpg") == "bad image path"
    assert refused(resolve_image, {"x": root / "in"}, "x/../../secret.jpg") == "image outside its root"
    monkeypatch.chdir(root)
    assert open_image(resolve_image(type(root)(), "in/a b.jpg")).size == (24, 16)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD"])
def test_names_are_found_in_whichever_form_of_unicode_the_disk_has_them(tmp_path, stored, named):
    """macOS writes names in NFD, most else in NFC; a folder may come from one and its file from the other."""
    on_disk, said = (lambda text, form=form: unicodedata.normalize(form, text) for form in (stored, named))
    folder, name = on_disk("Fotos für später"), "Straßencafé 가.jpg"
    (tmp_path / folder).mkdir()
    picture = tmp_path / folder / said(name)  # the folder in one form, the file in the other
    picture.write_bytes(encoded())
    roots = {on_disk("é"): tmp_path / folder}
    for found in (
        resolve_image(tmp_path, said(f"Fotos für später/{name}")),
        resolve_image(tmp_path / folder, on_disk(name)),
        resolve_image(roots, said(f"é/{name}")),
    ):
        assert found.path == picture
    other = (
        tmp_path
        / folder
        / unicodedata.normalize("NFD" if said(name) != unicodedata.normalize("NFD", name) else "NFC", name)
    )
    other.write_bytes(b"another file, which has exactly this name")
    assert resolve_image(tmp_path / folder, other.name).path == other
    assert resolve_image(tmp_path / folder, picture.name).path == picture
    assert refused(open_image, resolve_image(tmp_path, "schön.jpg")) == "missing image"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from(list("./ab~")), max_size=9))
def test_no_name_leads_out(name):
    root = images.Path("/nowhere/root")
    try:
        found = resolve_image(root, name)
    except BadSampleError:
        return
    assert os.path.commonpath([os.path.abspath(found.path), root]) == str(root)


def test_a_set_that_leaves_its_root(root):
    bad = record(0) | {"image": "../secret.jpg"}
    (root / "set.json").write_bytes(as_json([bad], lines=False))
    assert refused(LlavaJson(root / "set.json").__getitem__, 0) == "image outside its root"


@pytest.fixture
def server():
    """A server on this machine: its address, and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/away.jpg":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200 if self.path == "/x.jpg" else 404)
            self.end_headers()
            self.wfile.write(encoded())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_urls_are_fetched_only_where_a_flag_allows_it(tmp_path, server, monkeypatch):
    address, asked = server
    names = ["x.jpg", "none.jpg", "away.jpg"]
    made = [record(i) | {"image": f"{address}/{name}"} for i, name in enumerate(names)]
    (tmp_path / "set.json").write_bytes(as_json(made, lines=False))
    plain = open_source(str(tmp_path / "set.json"))
    assert [refused(plain.__getitem__, i) for i in range(3)] == ["image by URL"] * 3
    assert not asked
    source = open_source(str(tmp_path / "set.json"), allow_urls=True)
    assert open_image(source[0].images[0]).size == (24, 16)
    assert [refused(source.__getitem__, i) for i in (1, 2)] == ["missing image"] * 2
    assert refused(find_image, tmp_path, "file:///etc/passwd", allow_urls=True) == "image by URL"
    assert refused(find_image, tmp_path, "../x.jpg", allow_urls=True) == "image outside its root"
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert refused(open_image, source[0].images[0]) == "image too large"


@pytest.mark.parametrize(
    "path",
    [
        "http://127.0.0.1:9/x.parquet",
        "https://127.0.0.1:9/x.csv",
        "zip://x.csv::http://127.0.0.1:9/x.zip",
        "s3://x/x.arrow",
    ],
)
def test_sets_are_never_read_from_urls(path):
    with pytest.raises(ValueError, match="never from URLs"):
        open_source(path, columns={"caption": "text"})


def odd(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return (name, member)


EVIL = [
    ([("/etc/x.jpg", b"1")], "leaves its folder"),
    ([("../x.jpg", b"1")], "leaves its folder"),
    ([("a/../../x.jpg", b"1")], "leaves its folder"),
    ([("./../x.jpg", b"1")], "leaves its folder"),
    ([("C:/x.jpg", b"1")], "leaves its folder"),
    ([("a\\x.jpg", b"1")], "backslash or control characters"),
    ([("a\nx.jpg", b"1")], "backslash or control characters"),
    ([("a\udcffx.jpg", b"1")], "backslash or control characters"),
    ([odd("x.jpg", tarfile.SYMTYPE, "/etc/passwd")], "is a link"),
    ([("x.jpg", b"1"), odd("y.jpg", tarfile.LNKTYPE, "x.jpg")], "is a link"),
    ([odd("x.jpg", tarfile.CHRTYPE)], "is no plain file"),
    ([odd("x.jpg", tarfile.FIFOTYPE)], "is no plain file"),
    ([("x.jpg", b"1"), ("x.jpg", b"2")], "is there twice"),
    ([("x.jpg", b"1"), ("./x.jpg", b"2")], "is there twice"),
    ([odd("../folder", tarfile.DIRTYPE)], "leaves its folder"),
    *(([(f"x.{suffix}", b"1")], "is a pickle") for suffix in ("pyd", "pkl", "pickle", "pth", "data.PKL")),
]


@pytest.mark.parametrize(("members", "message"), EVIL)
def test_tars_with_odd_members_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", [("good.txt", b"caption"), ("good.jpg", b"1"), *members])
    with pytest.raises(ValueError) as raised:
        open_source(str(tmp_path / "x.tar"))
    assert message in str(raised.value) and "x.tar: member '" in str(raised.value) and "\n" not in str(raised.value)


def test_a_name_with_a_nul_is_refused(tmp_path):
    member = tarfile.TarInfo("short.jpg")
    member.pax_headers = {"path": "a\0b.jpg"}
    write_tar(tmp_path / "x.tar", [("", member)], format=tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=r"control characters"):
        open_source(str(tmp_path / "x.tar"))


def header(name, kind, size):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def block(data):
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "data",
    [
        (header("long", tarfile.GNUTYPE_LONGNAME, 2) + block(b"a\0")) * 2000,
        (header("pax", tarfile.XHDTYPE, 12) + block(b"12 comment=\n")) * 2000,
        header("pax", tarfile.XHDTYPE, 46) + block(b"22 GNU.sparse.map=a,b\n24 GNU.sparse.size=12345\n"),
        header("pax", tarfile.XHDTYPE, 44) + block(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
    ],
    ids=["long names of long names", "headers of headers", "sparse by no numbers", "sparse without a map"],
)
def test_tars_whose_headers_mislead_are_refused(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data + header("a.txt", tarfile.REGTYPE, 5) + block(b"hello") + bytes(1024))
    with pytest.raises(ValueError, match=r"x.tar is no whole tar: [^\n]*$"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path, kind):
    for name in ("x.tar", f"x.tar.{kind}"):
        write_tar(tmp_path / name, [("x.jpg", b"1")], kind=f"w:{kind}")
        with pytest.raises(ValueError, match=r"is compressed \(.*\), which allows no random access"):
            open_source(str(tmp_path / name))


def test_damaged_tars_are_refused_wherever_they_end(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [(f"{i}.txt", b"x" * 600) for i in range(3)]).read_bytes()
    for cut in (0, 100, 512, 513, 1000, 1111, 1112, 1536, 1600, 2048, 3000):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        try:
            assert len(open_source(str(tmp_path / "cut.tar"))) == cut / 1536  # cut between two members
        except ValueError as error:
            assert "\n" not in str(error) and "cut.tar" in str(error)
            assert cut % 1536 or not cut
    (tmp_path / "odd.tar").write_bytes(whole[:1536] + b"\x01" * 512 + whole[2048:])
    with pytest.raises(ValueError, match="what stands at byte 1536 is no header"):
        open_source(str(tmp_path / "odd.tar"))
    (tmp_path / "text.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="is no whole tar"):
        open_source(str(tmp_path / "text.tar"))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["x.pkl", "x.pickle", "x.pth", "x.pt", "x.json", "x.tar", "x.parquet", "x.jsonl"])
def test_pickles_are_never_loaded(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = pickle.dumps(Evil(tmp_path / "loaded"))
    (tmp_path / name).write_bytes(data)
    with pytest.raises((ValueError, datasets.exceptions.DatasetGenerationError)):
        open_source(str(tmp_path / name))
    (tmp_path / name).write_bytes(gzip.compress(data))
    with pytest.raises((ValueError, datasets.exceptions.DatasetGenerationError)):
        open_source(str(tmp_path / name))
    assert not (tmp_path / "loaded").exists()
    assert pickle.loads(data) is None and (tmp_path / "loaded").exists()  # it would have shown


def test_nothing_of_ours_can_unpickle_or_run_a_sets_code():
    folder = images.Path(images.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        for word in (
            "import pickle",
            "torch.load",
            "trust_remote_code",
            "allow_pickle",
            "eval(",
            "exec(",
        ):
            assert word not in text, path
        assert not re.search(r"(?<!strict_)yaml\.load\(", text), path


def test_large_members_are_not_read(tmp_path, monkeypatch):
    from cdistill.data import shards

    write_tar(tmp_path / "x.tar", [("a.txt", b"x" * 50), ("a.jpg", b"y" * 50), ("b.txt", b"x"), ("b.jpg", b"y" * 50)])
    source = open_source(str(tmp_path / "x.tar"))
    monkeypatch.setattr(shards, "LONGEST_RECORD", 10)
    monkeypatch.setattr(shards, "MAX_BYTES", 10)
    assert [refused(source.__getitem__, i) for i in (0, 1)] == ["not a record", "image too large"]


def test_long_lines_and_records_do_not_fill_the_memory(tmp_path, monkeypatch):
    from cdistill.data import scan

    monkeypatch.setattr(scan, "CHUNK", 64)
    monkeypatch.setattr(scan, "LONGEST_RECORD", 1000)
    (tmp_path / "lines.jsonl").write_text('{"a": "' + "x" * 2000 + '"}\n')
    with pytest.raises(ValueError, match="line 1 is longer than 1000 bytes"):
        open_source(str(tmp_path / "lines.jsonl"))
    (tmp_path / "list.json").write_text('[{"a": "' + "x" * 100_000)
    read = []
    monkeypatch.setattr(scan._Window, "_more", lambda self, more=scan._Window._more: read.append(1) or more(self))
    with pytest.raises(ValueError, match="line 1 column 8: unterminated string"):
        open_source(str(tmp_path / "list.json"))
    assert len(read) < 30
