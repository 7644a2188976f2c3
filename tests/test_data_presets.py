"""`cdistill data presets` and `data check --preset`: what of the paper's sets should be there."""

import pytest
from data_check_cases import Maker, write
from PIL import Image

from cdistill.cli import main
from cdistill.data import presets


@pytest.fixture
def preset(monkeypatch):
    parts = (presets.Part("a/set.json", ".", 5, {"pictures/one": 3, "two": 1}, text_only=1),)
    made_up = presets.Preset("made up", "DFT", parts, (presets.Download("http://example.org/x", "a"),), ())
    monkeypatch.setattr(presets, "PRESETS", {"made-up": made_up})
    return made_up


def test_a_preset_tells_what_is_missing(tmp_path, capsys, preset):
    maker = Maker(tmp_path)
    records = [maker.record(f"{folder}/{i}.png") for folder, n in (("pictures/one", 3), ("two", 1)) for i in range(n)]
    for record in records[1:]:
        (tmp_path / record["image"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / record["image"])
    records.append(maker.record(None))
    path = tmp_path / "renamed.json"
    write(path, records, lines=False)
    assert main(["data", "check", str(path), "--preset", "made-up"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a/set.json", "5", "4", "1"] in rows
    assert ["pictures/one", "3", "2", "1"] in rows
    assert ["two", "1", "1", "0"] in rows
    assert ["text", "only", "1", "1", "0"] in rows

    write(path, records[1:], lines=False)  # nothing is bad, one record is not there
    assert main(["data", "check", str(path), "--preset", "made-up"]) == 1
    Image.new("RGB", (9, 9)).save(tmp_path / records[0]["image"])
    write(path, records, lines=False)
    assert main(["data", "check", str(path), "--preset", "made-up"]) == 0


def test_presets_are_listed_and_described(capsys):
    assert main(["data", "presets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in presets.PRESETS)
    for name, preset in presets.PRESETS.items():
        assert main(["data", "presets", name]) == 0
        out = capsys.readouterr().out
        assert all(f"{part.annotation}" in out and f"{part.records:,}" in out for part in preset.parts)
        assert all(download.url in out for download in preset.downloads)
    assert main(["data", "presets", "none"]) == 2
    assert main(["data", "presets", "--write", "x.yaml"]) == 2


def test_counts_of_presets_add_up():
    for preset in presets.PRESETS.values():
        for part in preset.parts:
            if part.folders:
                assert sum(part.folders.values()) + part.text_only == part.records
    assert presets.PRESETS["llava-665k"].records == 665_298
    assert presets.PRESETS["extended"].records == 1_110_107


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_mix_file_of_a_preset_opens(tmp_path, capsys, name):
    mix = tmp_path / "mix.yaml"
    assert main(["data", "presets", name, "--write", str(mix)]) == 0
    maker = Maker(tmp_path)
    for part in presets.PRESETS[name].parts:
        path = tmp_path / part.annotation
        path.parent.mkdir(parents=True, exist_ok=True)
        record = maker.record()
        inside = tmp_path / part.images / record["image"]
        inside.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / record["image"]).replace(inside)
        write(path, [record], lines=path.suffix == ".jsonl")
    capsys.readouterr()
    assert main(["data", "check", str(mix), "--preset", name]) == 1
    lines = capsys.readouterr().out.splitlines()
    for part in presets.PRESETS[name].parts:
        assert [part.annotation, f"{part.records:,}", "1", f"{part.records - 1:,}"] in [line.split() for line in lines]
    assert main(["data", "presets", name, "--write", str(mix)]) == 2
