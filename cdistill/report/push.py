"""``cdistill push MODEL NAME``: publish a run's result, or a folder of a model, on the Hugging Face hub, with a model card."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from cdistill.errors import InputError

CARD = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run, of one of its stages, or one that `export` has written"
    )
    parser.add_argument("name", metavar="OWNER/NAME", help="of the model on the hub; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="show a new one to its owner alone")
    parser.add_argument(
        "--license", metavar="ID", help="identifier of the hub's, as apache-2.0; by default left to you"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format (default: that of the files)")
    parser.add_argument("--message", default="Trained with cdistill", help="of the commit (default: %(default)s)")
    parser.add_argument(
        "--dry-run", type=Path, metavar="FOLDER", help="write what would be pushed to a new folder instead"
    )


def main(options: argparse.Namespace) -> int:
    """Export the model with its card, and push it."""
    if options.dry_run is not None:
        _fill(options, options.dry_run)
        print(f"written: {options.dry_run}, and nothing pushed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        _fill(options, Path(folder) / "model")
        print(f"pushed: {_push(options, Path(folder) / 'model')}")
    if options.license is None:
        print(f"its card names no licence: give one with --license, or edit {CARD} on the hub")
    return 0


def _fill(options: argparse.Namespace, folder: Path) -> None:
    from cdistill.files import write_text
    from cdistill.models.export import export
    from cdistill.report.card import PICTURE, card, draw
    from cdistill.report.history import read_run

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.name):
        raise InputError(f"OWNER/NAME must name a model on the hub, got {options.name!r}")
    source = Path(options.model)
    run = next((place for place in (source, source.parent) if (place / "recipe.yaml").is_file()), None)
    done = export(options.model, folder, dtype=options.dtype)
    if (folder / CARD).is_file():
        return
    if run is None:
        if (source / CARD).is_file():
            write_text(folder / CARD, (source / CARD).read_text(encoding="utf-8"))
            return
        raise InputError(f"{source} is of no run, so no card can be written: put a {CARD} beside its weights")
    history = read_run(run)
    text = card(
        history,
        options.name,
        license=options.license,
        needs_cdistill=done.model_class.startswith("TAF"),
        picture=draw(history, folder / PICTURE),
    )
    write_text(folder / CARD, text)


def _push(options: argparse.Namespace, folder: Path) -> str:
    from huggingface_hub import HfApi, errors

    from cdistill.models.folder import one_line
    from cdistill.runtime.errors import RunError

    api = HfApi()
    try:
        api.create_repo(options.name, private=options.private or None, exist_ok=True)
        return str(api.upload_folder(repo_id=options.name, folder_path=folder, commit_message=options.message))
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            reason = f"the hub does not let you write to {options.name}: `hf auth login` with a token that may"
        else:
            reason = f"the hub refuses {options.name}: {one_line(error)[:200]}"
    except Exception as error:  # of httpx, of the disk, of the hub's own checks
        reason = f"{options.name} cannot be pushed: {one_line(error)[:200]}"
    raise RunError(reason)
