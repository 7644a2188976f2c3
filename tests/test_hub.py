"""Models by their names on the hub, against a stand-in of it: what is fetched, of which commit, and what is told."""

import shutil
from dataclasses import replace

import huggingface_hub
import pytest
from builtin_models import make_recipe, save_base, save_teacher
from hub_server import Hub

from cdistill import cli
from cdistill.models.export import export
from cdistill.models.hub import pinned
from cdistill.models.load import load_model, resolve_folder
from cdistill.plan.memory import plan
from cdistill.train import load_recipe, run


def place(monkeypatch, url):
    """Let the hub be at an address."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this test's own, and an empty cache."""
    hub = Hub()
    place(monkeypatch, hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.close()


def test_a_model_is_fetched_once_without_pickles_or_code(hub, tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    (teacher / "evil.py").write_text("raise SystemExit")
    (teacher / "pytorch_model.bin").write_bytes(b"pickle")
    commit = hub.put_folder("me/teacher", teacher)
    folder = resolve_folder("me/teacher", "teacher")
    assert folder.name == commit and not (folder / "evil.py").exists() and not (folder / "pytorch_model.bin").exists()
    for name, weight in load_model(folder).state_dict().items():
        assert weight.equal(load_model(teacher).state_dict()[name])
    fetched = [line for line in hub.asked if line.startswith("GET") and "resolve" in line]
    assert resolve_folder("me/teacher", "teacher") == folder
    assert [line for line in hub.asked if line.startswith("GET") and "resolve" in line] == fetched


def test_a_plan_needs_no_weights(hub, tmp_path):
    hub.put_folder("me/teacher", save_teacher(tmp_path / "teacher"))
    hub.put_folder("me/base", save_base(tmp_path / "base"))
    recipe = make_recipe(tmp_path / "run", tmp_path, teacher="me/teacher", student__base="me/base")
    assert plan(recipe, gpus=1, device="cpu", precision="fp32")
    assert hub.asked and not [line for line in hub.asked if line.endswith(".safetensors")]


def test_a_run_stays_with_the_commit_it_has_begun_with(hub, tmp_path):
    first = hub.put_folder("me/teacher", save_teacher(tmp_path / "teacher", seed=1))
    save_base(tmp_path / "base")
    recipe = make_recipe(tmp_path / "run", tmp_path, teacher="me/teacher", stages=["dpt", "dft"])
    run(replace(recipe, stages=("dpt",)))
    assert load_recipe(tmp_path / "run" / "recipe.yaml").teacher == f"me/teacher@{first}"
    second = hub.put_folder("me/teacher", save_teacher(tmp_path / "teacher", seed=2))
    assert pinned("me/teacher", "teacher") == f"me/teacher@{second}"
    run(recipe, resume=True)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").teacher == f"me/teacher@{first}"
    with pytest.raises(ValueError, match=f"teacher differs .*{first}.*{second}"):
        run(replace(recipe, teacher=f"me/teacher@{second}"), resume=True)


def test_what_the_hub_does_not_give_is_told_in_one_line(hub, tmp_path, monkeypatch):
    hub.put("me/gated", {"config.json": b"{}"})
    hub.gated.add("me/gated")
    hub.put("me/there", {"config.json": b"{}"})

    def said(reference):
        with pytest.raises(ValueError) as caught:
            resolve_folder(reference, "teacher")
        text = str(caught.value)
        assert text.startswith(f"teacher: there is no folder {reference!r}, and the hub ") and "\n" not in text
        return text

    assert "accepted its terms" in said("me/gated")
    assert "knows no model me/missing" in said("me/missing")
    assert "no revision 'v2'" in said("me/there@v2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "its cache lacks it" in said("me/elsewhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    place(monkeypatch, "http://127.0.0.1:1")
    assert "out of reach" in said("me/elsewhere") or "cannot be asked" in said("me/elsewhere")


def test_a_folder_comes_before_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(save_teacher(tmp_path / "teacher"), tmp_path / "me" / "teacher")
    assert str(resolve_folder("me/teacher", "teacher")) == "me/teacher" and not hub.asked
    assert pinned("me/teacher", "teacher") == "me/teacher"


def pushed_run(tmp_path, monkeypatch):
    """A run whose teacher was named by a folder that is not there any more where it is pushed."""
    save_teacher(tmp_path / "parts" / "teacher")
    save_base(tmp_path / "base")
    options = {"stage__dft__validation": {"samples": 4, "every": 2}, "stages": ["dft"], "teacher": "parts/teacher"}
    monkeypatch.chdir(tmp_path)
    return run(make_recipe(tmp_path / "run", tmp_path, **options)).parent


def test_a_result_is_pushed_with_its_card(hub, tmp_path, capsys, monkeypatch):
    folder = pushed_run(tmp_path, monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert cli.main(["push", str(folder), "me/student", "--private"]) == 0
    said = capsys.readouterr()
    assert "pushed: " in said.out and "names no licence" in said.out
    files = hub.models["me/student"]
    assert hub.private["me/student"] and {"config.json", "model.safetensors", "README.md", "training.png"} <= set(files)
    assert not [name for name in files if name in ("complete", "recipe.yaml")]
    text = files["README.md"].decode()
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.license is None and card.data.base_model is None
    assert (
        str(tmp_path) not in text
        and "parts/" not in text
        and "distilled from teacher, its visual attention aligned" in text
    )
    assert "| 1-dft | dft | built-in | 12 | 3 | 0.001 |" in text and "| validation.kd |" in text
    assert files["training.png"].startswith(b"\x89PNG")
    export(folder, tmp_path / "exported")
    assert files["model.safetensors"] == (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert load_model(resolve_folder("me/student", "model"))


def test_pushing_again_and_what_the_hub_refuses(hub, tmp_path, capsys, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher")
    assert cli.main(["push", str(teacher), "me/teacher"]) == 2
    assert "no card can be written: put a README.md" in capsys.readouterr().err
    (teacher / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert cli.main(["push", str(teacher), "me/teacher", "--license", "mit"]) == 0
    assert cli.main(["push", str(teacher), "me/teacher", "--license", "mit"]) == 0, "into one that is there"
    assert hub.models["me/teacher"]["README.md"].endswith(b"mine\n")
    capsys.readouterr()
    hub.refuses = True
    assert cli.main(["push", str(teacher), "me/teacher"]) == 1
    assert "does not let you write to me/teacher: `hf auth login`" in capsys.readouterr().err
    assert cli.main(["push", str(teacher), "nobody"]) == 2
    assert "OWNER/NAME must name a model on the hub" in capsys.readouterr().err
    assert cli.main(["push", str(teacher), "me/teacher", "--dry-run", str(tmp_path / "dry")]) == 0
    assert (tmp_path / "dry" / "model.safetensors").is_file()
