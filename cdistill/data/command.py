"""The ``cdistill data`` command: check a data set, look at samples of it, and what the paper's sets are."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from cdistill.choices import require_count
from cdistill.data import presets
from cdistill.errors import InputError
from cdistill.files import write_text, writing

if TYPE_CHECKING:
    from cdistill.data.check import Bad, Totals
    from cdistill.data.samples import Source

_LINE = b'{"source": '  # starts each line of a list of bad records
LoadProcessor = Callable[[str], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command's three parts take."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text, declare in (
        ("check", "look at every record and image of a data set before a run does", _check_arguments),
        ("show", "show samples, and what of them a model learns", _show_arguments),
        ("presets", "tell what the paper's data sets are made of", _presets_arguments),
    ):
        declare(actions.add_parser(name, help=text, description=text))


def main(options: argparse.Namespace, load_processor: LoadProcessor) -> int:
    """Do one of the parts; gives the exit code. ``load_processor`` gives the processor (or tokenizer) of a model."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if options.action == "show":
            return _show(options, load_processor)
        return _check(options, load_processor) if options.action == "check" else _presets(options)
    except BrokenPipeError:  # an OSError that the command line tells
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"cdistill: error: {error}", file=sys.stderr)
        return 1


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", help="annotations (.json, .jsonl), a mix file (.yaml), a folder, shards or a set's name"
    )
    parser.add_argument("--images", metavar="ROOT", help="folder that image paths start from (default: the file's)")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME=COLUMN", help="columns of a Hugging Face set, as in image=picture"
    )
    parser.add_argument("--config", help="configuration of a set on the hub")
    parser.add_argument("--split", help="split of a Hugging Face set")
    parser.add_argument(
        "--streaming", action="store_true", help="read a Hugging Face set as a stream, --size rows of it"
    )
    parser.add_argument("--size", type=int, metavar="N", help="read so many rows of a Hugging Face set")
    parser.add_argument("--allow-urls", action="store_true", help="fetch images that are named by URLs")


def column_names(pairs: Sequence[str]) -> dict[str, str]:
    """What ``--columns`` says: which column of a Hugging Face set holds what. Raises ValueError for what is no pair."""
    wrong = [pair for pair in pairs if not all(pair.partition("="))]
    if wrong:
        raise InputError(f"columns must be pairs such as image=picture, got {wrong[0]!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _open(options: argparse.Namespace) -> Source:
    from cdistill.data.mix import open_source

    columns = None if options.columns is None else column_names(options.columns)
    names = ("images", "config", "split", "streaming", "size", "allow_urls")
    return open_source(options.path, columns=columns, **{name: getattr(options, name) for name in names})


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write the good records to a new file")
    parser.add_argument(
        "--bad", type=Path, metavar="FILE", help="where bad records are listed (default: PATH.bad.jsonl)"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="compare the counts with those of a set of the paper, or a benchmark"
    )
    _processor_arguments(parser, "also make tokens and pixels of every record, as this model does")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a sample at most, as in a recipe (default: any number)"
    )


def _processor_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument("--processor", metavar="MODEL", help=f"{purpose}: its folder or a run's, or builtin:NAME")
    parser.add_argument(
        "--template", metavar="NAME", help="auto (the model's own), plain, qwen2_base, vicuna_v1, chatml or FILE.jinja"
    )


def _check(options: argparse.Namespace, load_processor: LoadProcessor) -> int:
    """1 if a record is bad or a part of the preset is missing, else 0."""
    from tqdm import tqdm

    from cdistill.data.check import CheckError, check, write_good
    from cdistill.data.samples import printable

    folders = presets.folders(options.preset) if options.preset is not None else ()
    source = _open(options)
    sources = [part.source for part in getattr(source, "parts", [])] or [source]
    path = Path(options.path)
    if options.fix is not None:
        _refuse_to_fix(sources, path, options.fix)
    beside = os.path.abspath(path) if path.is_dir() else options.path if path.exists() else path.name
    listed = options.bad or Path(f"{beside}.bad.jsonl")
    if listed == options.fix:
        raise InputError(f"bad and fix must be two files, got {str(listed)!r} twice")
    encoder = _encoder(options, load_processor)
    bar = tqdm(total=sum(map(len, sources)), unit=" records", disable=None)
    try:
        with bar, _bad_list(listed) as write, _ending_in_order():
            found = check(
                sources,
                workers=options.workers,
                folders=folders,
                encoder=encoder,
                on_bad=write,
                progress=bar.update,
            )
    except CheckError as error:
        print(f"cdistill: error: {error}", file=sys.stderr)
        return 1
    for line in table(sources, found):
        print(printable(line, 10_000))
    bad = sum(totals.bad for totals in found)
    if bad:
        print(f"\nbad records are listed in {listed}")
    if any(t.images and t.faults["missing image"] == t.samples - t.text_only for t in found):
        print("not one image is where its path says: is --images the folder that these start from?")
    if options.fix is not None:
        write_good(sources[0], found[0].good, path, options.fix)
        print(f"{found[0].samples - bad:,} good records -> {options.fix}")
    complete = options.preset is None or _compare(options, sources, found)
    return 0 if complete and not bad else 1


def _encoder(options: argparse.Namespace, load_processor: LoadProcessor) -> Any:
    if options.processor is None:
        given = next((name for name in ("template", "max_length") if getattr(options, name) is not None), None)
        if given is not None:
            raise InputError(f"{given} needs a model: name it by --processor")
        return None

    from cdistill.data.conversations import Encoder

    if options.max_length is not None and options.max_length < 2:
        raise InputError(f"max_length must be at least 2, got {options.max_length}")
    return Encoder(load_processor(options.processor), options.template or "auto", options.max_length)


def _refuse_to_fix(sources: list[Source], path: Path, output: Path) -> None:
    if not path.is_file() or len(sources) != 1 or not hasattr(sources[0], "raw"):
        raise InputError("fix works on one file of annotations (.json, .jsonl): fix those of a mix one by one")
    _try_new(output, "fix")


def _try_new(path: Path, option: str) -> None:
    """Raise ValueError unless a file can be made, before long work is done for it."""
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        raise InputError(
            f"{option} must be a new file where it can be written, got {str(path)!r}: {error.strerror}"
        ) from None


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: without leaving processes and files behind."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _bad_list(path: Path) -> Iterator[Callable[[Source, Bad], None]]:
    """A function that writes bad records to a file, of which nothing is seen before the end; no file where none is bad."""
    _refuse_to_replace(path)
    with ExitStack() as at_end:
        try:
            file = at_end.enter_context(writing(path))
        except OSError as error:
            raise InputError(f"bad must be a file that can be written, got {str(path)!r}: {error.strerror}") from None
        count = 0

        def write(source: Source, bad: Bad) -> None:
            nonlocal count
            count += 1
            file.write((json.dumps({"source": source.name, **asdict(bad)}) + "\n").encode())

        yield write
    if not count:
        path.unlink(missing_ok=True)


def _refuse_to_replace(path: Path) -> None:
    """Raise ValueError for anything but the list of an earlier check."""
    if path.is_dir() or (path.exists() and path.open("rb").read(len(_LINE)) not in (_LINE, b"")):
        raise InputError(f"bad replaces no other file: {str(path)!r} is no list of bad records, name another")


def table(sources: Sequence[Source], found: Sequence[Totals]) -> list[str]:
    """Lines with the counts of every source, and of every fault and oddity with its first place."""
    rows: list[tuple[str, ...]] = [("source", "records", "good", "bad", "images", "text only")]
    for source, t in zip(sources, found, strict=True):
        rows.append((source.name, *(f"{n:,}" for n in (t.samples, t.samples - t.bad, t.bad, t.images, t.text_only))))
    if len(found) > 1:
        sums = zip(*((t.samples, t.samples - t.bad, t.bad, t.images, t.text_only) for t in found), strict=True)
        rows.append(("all", *(f"{sum(column):,}" for column in sums)))
    lines = presets.aligned(rows)
    for title, kind in (("bad", "faults"), ("odd, but good", "warnings")):
        reasons: list[tuple[str, ...]] = [
            (reason, f"{count:,}", source.name, t.examples[reason])
            for source, t in zip(sources, found, strict=True)
            for reason, count in getattr(t, kind).most_common()
        ]
        if reasons:
            lines += ["", *_with_examples((title, "records", "source", "the first of them"), reasons, len(found) > 1)]
    for source, t in zip(sources, found, strict=True):
        if t.unread.keys:
            of = f" of {source.name}" if len(found) > 1 else ""
            some = f", of the first {t.unread.records:,} records" if t.unread.records < t.samples else ""
            lines += ["", f"not read{of}{some}: {t.unread}"]
    return lines


def _with_examples(head: tuple[str, ...], rows: list[tuple[str, ...]], sources: bool) -> list[str]:
    columns = (0, 1, 2, 3) if sources else (0, 1, 3)
    widths = [max(len(row[c]) for row in [head, *rows]) for c in columns[:-1]]
    return [
        "  ".join(
            [f"{row[c]:{'>' if c == 1 else '<'}{w}}" for c, w in zip(columns[:-1], widths, strict=True)] + [row[3]]
        )
        for row in [head, *rows]
    ]


def _compare(options: argparse.Namespace, sources: list[Source], found: list[Totals]) -> bool:
    """Print what a preset misses; whether it misses nothing."""
    names = [source.name for source in sources]
    if len(sources) == 1 == len(presets.find_preset(options.preset).parts):
        names = [PurePath(presets.find_preset(options.preset).parts[0].annotation).stem]
    counts = {name: (t.samples - t.bad, t.folders) for name, t in zip(names, found, strict=True)}
    lines, complete = presets.compare(options.preset, counts)
    print("\n" + "\n".join(lines))
    return complete


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("-n", type=int, default=4, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="show random ones instead of the first")
    _processor_arguments(parser, "count tokens as this model does")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the images instead")


def _show(options: argparse.Namespace, load_processor: LoadProcessor) -> int:
    require_count("n", options.n)
    if options.html is not None and not options.html.parent.is_dir():
        raise InputError(f"html: there is no folder {str(options.html.parent)!r}")
    source = _open(options)

    from cdistill.data.conversations import Encoder
    from cdistill.data.show import as_html, as_text, choose, show, without_tokenizer

    renderer: Any = None
    if options.processor is not None:
        renderer = Encoder(load_processor(options.processor), options.template or "auto")
    elif options.template is not None:
        if options.template == "auto":
            raise InputError("template auto is a model's own: name the model by --processor")
        renderer = without_tokenizer(options.template)
    shown = [show(source, index, renderer) for index in choose(len(source), options.n, options.seed)]
    if options.html is None:
        print(as_text(shown, coloured=sys.stdout.isatty()), end="")
    else:
        page = as_html(shown, f"{len(shown)} samples of {options.path}")
        with writing(options.html) as file:
            file.write(page.encode("utf-8", errors="backslashreplace"))
        print(f"written: {options.html}")
    return 0


def _presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="tell all about this one (default: list them)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write its mix file, to be put into the data root")


def _presets(options: argparse.Namespace) -> int:
    if options.name is None:
        if options.write is not None:
            raise InputError("write needs the name of a preset")
        width = max(map(len, presets.PRESETS))
        for name, preset in presets.PRESETS.items():
            print(f"{name:{width}}  {preset.records:>9,}  {preset.title}")
        return 0
    lines = presets.describe(options.name)
    if options.write is not None:
        _try_new(options.write, "write")
    print("\n".join(lines))
    if options.write is not None:
        write_text(options.write, presets.mix(options.name))
        print(f"\nwritten: {options.write}")
    return 0
