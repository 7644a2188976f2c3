"""What a newcomer sees of the command line: its help, what a wrong command meant, recipes as files, completion, the doctor."""

import builtins
import dataclasses
import http.server
import json
import subprocess
import threading

import pytest
import torch
import yaml
from huggingface_hub import constants

from cdistill import cli, doctor
from cdistill.cli import main
from cdistill.train.recipes import load_recipe, recipe_to_dict, shipped_recipes
from cdistill.train.recipes.files import RECIPES


def test_the_help_has_every_command_in_one_line_and_says_where_to_begin(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    page = capsys.readouterr().out
    assert ended.value.code == 0 and all(len(line) <= 100 for line in page.splitlines())
    for name, command in cli.COMMANDS.items():
        assert sum(line.split("  ")[1:2] == [name] and line.endswith(command.help) for line in page.splitlines()) == 1
    assert page.index("cdistill doctor") < page.index("cdistill init") < page.index("begin:")
    assert main([]) == 2 and capsys.readouterr().err == page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "demo-sft"], "there is no command 'trian'; did you mean train? (`cdistill --help` lists all)"),
        (["zzz"], "there is no command 'zzz' (`cdistill --help` lists all)"),
        (
            ["analyze", "mapps"],
            "analyze needs one of similarity, confidence, intervene, maps, page behind it, got 'mapps'",
        ),
        (["builtin"], "builtin needs one of write behind it"),
        (
            ["train", "demo-sfd"],
            "recipe 'demo-sfd' is neither a file nor shipped: `cdistill recipes` lists those that are",
        ),
        (["recipes", "show", "demo-sft", "seed=1"], "'seed=1' changes a resolved recipe: add --resolved"),
    ],
)
def test_what_is_not_known_is_one_line_with_the_nearest(words, said, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cdistill: error: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init", "~/new", "--teacher", "t", "--student", "s", "--data", "d"], "'~/new' must be written out"),
        (["init", "a\nb", "--teacher", "t", "--student", "s", "--data", "d"], "holds characters that cannot be shown"),
        (["report", "run", "--output=~/page.html"], "'~/page.html' must be written out"),
    ],
)
def test_paths_that_would_surprise_are_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("blank", ["", " ", "\u00a0", "\t\n"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["analyze", "similarity", "builtin:teacher", "--teacher", "builtin:teacher", "--output"], "--output"),
        (["init", "--teacher", "builtin:teacher", "--data", "d.json", "--student"], "--student"),
        (["builtin", "write", "--task", "vqa"], "an argument"),
        (["demo", "--n=1", "--output="], "--output"),
        (["train", "demo-sft", "output="], "output must name a folder"),
    ],
)
def test_words_of_nothing_but_space_are_refused(words, said, blank, capsys, tmp_path, monkeypatch):
    """As a variable of a shell gives them that nobody has set."""
    monkeypatch.chdir(tmp_path)
    last = [words[-1] + blank] if words[-1].endswith("=") else [words[-1], blank]
    if words[0] == "train":
        last = [f"output={json.dumps(blank)}"]
    assert main([*words[:-1], *last]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


HUGE = str(10**30)


@pytest.mark.parametrize(
    "words",
    [
        ["builtin", "write", "--task", "vqa", "F", "--n"],
        ["eval", "builtin:teacher", "--n"],
        ["eval", "builtin:teacher", "--seed"],
        ["analyze", "similarity", "builtin:teacher", "--teacher", "builtin:teacher", "--output", "F", "--limit"],
        ["reproduce", "table2", "--output", "F", "--seeds"],
        ["demo", "--n"],
        ["gradients", "demo-compodistill", "--samples"],
        ["plan", "demo-sft", "--length"],
        ["data", "check", "F", "--max-length"],
    ],
)
def test_numbers_that_would_take_for_ever_are_one_line_and_begin_nothing(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"--n": ["1000001"], "--seeds": ["1001"]}.get(words[-1], [])
    for number in (HUGE, f"-{HUGE}", *more):
        assert main([*words[:-1], f"{words[-1]}={number}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{words[-1].strip('-').replace('-', '_')} must be at " in line and len(line) < 200
    assert not list(tmp_path.iterdir())


def test_recipes_are_shown_as_they_are_and_resolved(capsys, tmp_path):
    """What is printed loads again to the same recipe."""
    for name in ("official", "demo-sft"):
        assert main(["recipes", "show", name]) == 0
        shown, text = capsys.readouterr().out, (RECIPES / f"{name}.yaml").read_text()
        above = yaml.safe_load(text).get("extends")
        assert shown.startswith(text) and (shown == text) == (above is None)
        assert above is None or f"{above}.yaml" in shown[len(text) :]
        assert main(["recipes", "show", name, "--resolved"]) == 0
        (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
        assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(name)
    assert set(yaml.safe_load((tmp_path / "resolved.yaml").read_text())) == set(recipe_to_dict(load_recipe(name)))
    assert main(["recipes", "show", "demo-sft", "--resolved", "seed=7"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ev"], ["eval"]),
        (["eval", "sc"], ["score"]),
        (["recipes", ""], ["keys", "list", "schema", "show"]),
        (["plan", "demo-"], ["demo-compodistill", "demo-sft"]),
        (["train", "min"], ["mine.yaml"]),
        (["export", "m", "--dtype", "f"], ["fp16", "fp32"]),
    ],
)
def test_bash_completes(words, wanted, bash_completion):
    folder, script = bash_completion
    line = " ".join(repr(word) for word in ["cdistill", *words])
    ask = f"source {script}; f=$(complete -p cdistill | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); COMP_WORDS=({line}); "
    ask += f'COMP_CWORD={len(words)}; $f; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=folder, check=True)
    assert sorted(done.stdout.split()) == wanted


@pytest.fixture(scope="module")
def bash_completion(tmp_path_factory):
    """A folder with a recipe in it, and the script."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "mine.yaml").touch()
    script = cli.menu.completion(cli.COMMANDS, "bash", shipped_recipes())
    (folder / "script").write_text(script)
    return folder, folder / "script"


def test_every_shell_has_a_script(capsys):
    for shell in cli.menu.SHELLS:
        assert main(["completion", shell]) == 0
        assert "demo-compodistill" in capsys.readouterr().out


class Hub(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server in the place of the hub."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_SECONDS", 60.0)
    yield server
    server.shutdown()
    server.server_close()


def diagnosis(capsys, code=0):
    assert main(["doctor", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] == (code == 0)
    return {row["name"]: row for row in told["rows"]}


def test_the_doctor_tells_what_is_there(hub, capsys):
    import cdistill._C as module

    rows = diagnosis(capsys)
    assert rows["module _C"]["found"].endswith(module.isa())
    assert rows["hub"]["state"] == "ok" and {"torch", "transformers", "memory", "disk here", "CUDA"} <= rows.keys()
    assert rows["engine torch_flash"]["state"] == "ok" and "pip install" in rows["engine flash_attn_2"]["do"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, row in rows.items():
        assert any(line.startswith(name) and f" {row['state']} " in line for line in lines)


def test_the_doctor_tells_what_is_broken(hub, capsys, monkeypatch):
    """A module that is not built, a package that is too old, one that is not there, a hub that does not answer."""
    load, known = builtins.__import__, doctor.version

    def without(name, *arguments, **options):
        if name == "cdistill._C":
            raise ImportError("No module named 'cdistill._C'")
        return load(name, *arguments, **options)

    def versions(name):
        if name == "peft":
            raise doctor.PackageNotFoundError(name)
        return "1.0" if name == "transformers" else known(name)

    hub.server_close()
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(doctor, "version", versions)
    monkeypatch.setattr(doctor, "_said", lambda *command: None)
    rows = diagnosis(capsys, code=1)
    states = {name: rows[name]["state"] for name in ("module _C", "transformers", "peft", "hub", "C++ compiler")}
    assert states == {
        "module _C": "broken",
        "transformers": "broken",
        "peft": "missing",
        "hub": "missing",
        "C++ compiler": "missing",
    }
    assert "build_ext" in rows["module _C"]["do"] and "cdistill[lora]" in rows["peft"]["do"]
    assert all(rows[name]["do"] for name in states)


def test_the_doctor_asks_no_hub_when_offline(capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "not even a URL")
    assert "HF_HUB_OFFLINE" in diagnosis(capsys)["hub"]["found"]


def test_a_lack_of_memory_is_told_in_one_line(monkeypatch, capsys):
    def hungry(options):
        torch.empty(1 << 60)

    monkeypatch.setitem(cli.COMMANDS, "plan", dataclasses.replace(cli.COMMANDS["plan"], run=hungry))
    assert main(["plan", "demo-sft"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cdistill: error: out of memory: ") and "can't allocate memory" in line
