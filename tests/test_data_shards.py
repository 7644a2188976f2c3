"""Tar shards as samples; tars that are refused are in test_data_safety.py."""

import json
import tarfile

import pytest
from data_files import reason, record, refused, spoken, write_tar

from cdistill.data.mix import open_source
from cdistill.data.samples import ImageBytes
from cdistill.data.shards import TarShards, find_shards


def test_tars_group_members_by_key(tmp_path):
    said = json.dumps(record(1, 2)).encode()
    members = [
        ("./a/1.jpg", b"one"),
        ("a/2.txt", "\ufeffa birdŁs eye\n".encode()),
        ("a/1.json", said),
        ("a/2.b.PNG", b"two"),
        ("x/1.cls", b"5"),
        ("x/1.json", b'\xef\xbb\xbf{"caption": "meta", "url": "http://x"}'),
        ("x/1.webp", b"three"),
        ("x/2.json", json.dumps(record(0, 0)).encode()),
        ("x/3.jpg", b"alone"),
        ("x/4.json", b'{"id": '),
    ]
    members += [(f"many.{n}.jpg", str(n).encode()) for n in (10, 9, 0)]
    members += [("many.jpg", b"first"), ("many.txt", b"caption")]
    write_tar(tmp_path / "set.tar", members)
    source = TarShards(tmp_path / "set.tar")
    assert source.name == "set" and len(source) == 7
    assert reason(source, 0) == "image count"  # two marks, one image
    assert spoken(source[1]) == [("user", "<image>"), ("assistant", "a birdŁs eye")]
    assert source[1].images == (ImageBytes(f"{tmp_path}/set.tar:a/2.b.PNG", b"two"),)
    assert source[1].id == "a/2" and source[1].place == f"{tmp_path}/set.tar:a/2"
    assert spoken(source[2])[1] == ("assistant", "meta")
    assert (source[3].id, source[3].images) == ("0", ())
    assert [reason(source, i) for i in (4, 5)] == ["not a record", "unreadable JSON"]
    assert [image.data for image in source[6].images] == [b"first", b"0", b"9", b"10"]
    assert source.sizes().images.tolist() == [1, 1, 1, 0, 1, 0, 4]
    assert source.sizes().characters[0] == len(said)
    with pytest.raises(IndexError):
        source[7]
    assert source.record(0) == json.loads(said) and source.record(3)["id"] == 0
    assert source.record(1) == {"id": "a/2", "caption": "a birdŁs eye\n"} and source.place(1) == source[1].place
    assert reason(source, 4) == refused(source.record, 4)


def test_several_tars_by_pattern(tmp_path):
    for i in (8, 9, 10, 11):
        write_tar(tmp_path / f"s-{i:03d}.tar", [("k.txt", b"text"), ("k.jpg", str(i).encode())])
    wanted = [f"s-{i:03d}.tar" for i in (8, 9, 10, 11)]
    for pattern in ("s-{008..011}.tar", "s-*.tar", "", "s-0{0..1}{0..9}.tar"):
        if pattern.startswith("s-0{"):
            assert len(find_shards(str(tmp_path / pattern))) == 20
            continue
        source = open_source(str(tmp_path / pattern))
        assert [source[i].images[0].data for i in range(4)] == [b"8", b"9", b"10", b"11"]
        assert [path.name for path in find_shards(str(tmp_path / pattern))] == wanted
    with pytest.raises(ValueError, match=r"no such file: .*s-012.tar"):
        TarShards(tmp_path / "s-{011..012}.tar")
    with pytest.raises(ValueError, match="names more than"):
        TarShards(tmp_path / "s-{000..999}-{0..99999999999}.tar")
    with pytest.raises(ValueError, match="no tar at"):
        TarShards(tmp_path / "t-*.tar")


def test_long_names_in_every_form_of_tar(tmp_path):
    key = "d/" * 60 + "é" * 40
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "x.tar", [(key + ".txt", b"text"), (key + ".jpg", b"data")], format=form)
        source = TarShards(tmp_path / "x.tar")
        assert (source[0].id, source[0].images[0].data) == (key, b"data")
