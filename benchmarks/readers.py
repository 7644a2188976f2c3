"""Whether exported students are the same models to transformers of other ages: small ones of every family, read back.

`make readers-env && python -m benchmarks.readers` exports a small random model of each family and the built-in teacher, lets
a process with each transformers in .readers/ load the folders and answer the same prompts (an image, two images, words
alone), and compares loading, logits, greedy replies and what the processors make of questions and images with the model that
was exported. It writes benchmarks/results/serve/readers.json and ends with 1 if anything differs but what is known of the
reader. With names of cases only these are run, and nothing is written.
"""

import contextlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaTokenizer

import cdistill
from benchmarks._results import ROOT, cpu_environment, results_folder, version
from cdistill.models.export import export
from cdistill.models.export_check import QUESTION, TOLERANCE, ask, compare, expected_replies, make_prompts, picture
from cdistill.models.load import ASSETS, load_model
from cdistill.models.processor import load_processor
from cdistill.models.published import publish

ENVIRONMENTS = ROOT / ".readers"
TOKENS = 8
MOST = 8_000_000  # weights of a family made small
SHOWN = ([picture(0)], [picture(1), picture(2)])
_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What readers do otherwise with any checkpoint of a family, theirs included: looked up in their sources.
_IDEFICS = "takes other rows of the position embeddings of few patches (h_indices / nb_patches_h * (1 - 1e-6))"
KNOWN = {
    ("4.57.6", "idefics3"): _IDEFICS,
    ("4.57.6", "smolvlm"): _IDEFICS,
    ("4.57.6", "llava_lfm2"): "gives generate() a cache that LFM2 inside a LLaVA cannot take",
    ("5.24.0", "qwen3_5"): "makes a Qwen3_5Tokenizer of any tokenizer.json beside such a model",
}
# torchvision is served for CUDA alone: its operators are declared, so that its transforms, which need none, can be imported.
_TORCHVISION = """
import torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class Case:
    """An exported folder and what is expected of it."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        prompts: list[dict[str, Any]],
        *,
        code: bool = False,
        video: bool = False,
        tokens: int = TOKENS,
    ):
        self.folder, self.prompts, self.video = folder, prompts, video
        self.wanted = expected_replies(model, prompts, tokens)
        self.request = {
            "folder": str(folder),
            "code": code,
            "cdistill": False,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "prompts": prompts,
        }


def _eager(folder: Path, dtype: str = "auto") -> Any:
    return load_model(folder, "model", dtype=dtype, attention="eager").eval()


def _save_parts(processor: Any, template: str, folder: Path) -> None:
    """A processor as transformers 5 saves it, also one whose video processor cannot be made here."""
    processor.chat_template = processor.tokenizer.chat_template = template
    kind = type(processor)
    if "video_processor" not in inspect.signature(kind.__init__).parameters:
        processor.save_pretrained(folder)
        return
    name = kind.__mro__[1].__name__  # that of the family: the class here does without videos
    taken = set(inspect.signature(kind.__init__).parameters) - {"chat_template"}
    own = {
        key: value for key, value in vars(processor).items() if key in taken and isinstance(value, str | int | float)
    }
    images = json.loads(processor.image_processor.to_json_string())
    videos = {key: images[key] for key in ("patch_size", "temporal_patch_size", "merge_size", "size") if key in images}
    videos["video_processor_type"] = name.removesuffix("Processor").replace("2_5_VL", "2VL") + "VideoProcessor"
    settings = own | {"processor_class": name, "image_processor": images, "video_processor": videos}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    processor.tokenizer.save_pretrained(folder)


def _families(root: Path) -> Iterator[tuple[str, Any]]:
    """Names of cases and what makes them."""
    sys.path.insert(0, str(ROOT / "tests"))
    import family_models
    from export_cases import save, taf_student
    from family_table import FAMILIES, ID

    def family(name: str, of_llama: bool = False, **options: Any) -> Case:
        source, processor = root / "made" / name, family_models.FAMILIES[name].processor()
        if options or of_llama:
            source = source.with_name(f"{name}_{'words' if of_llama else 'rope'}")
        if of_llama:
            letters = {letter: ID[f"w{i}"] for i, letter in enumerate(sorted({"▁", *QUESTION} - {" "}))}
            words = letters | {token: i for token, i in ID.items() if token.startswith("<")}
            processor.tokenizer = LlamaTokenizer(vocab=words, merges=[], pad_token="<pad>")
            processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
        family_models.build(name, 0, **options).save_pretrained(source)
        placeholder = FAMILIES[name].placeholder
        template = (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
            "{{ '" + placeholder + "' if c.type == 'image' else c.text }}{% endfor %}{% endif %}{% endfor %}"
        )
        _save_parts(processor, template, source)
        folder = export(source, root / "out" / source.name).folder
        video = "video_processor" in inspect.signature(type(processor).__init__).parameters
        return Case(folder, _eager(source), make_prompts(processor, SHOWN), video=video)

    for name in FAMILIES:
        yield name, lambda name=name: family(name)
    yield "llava_llama, Llama's tokenizer", lambda: family("llava_llama", of_llama=True)
    yield "llava_llama, llama3 rope", lambda: family("llava_llama", rope_parameters=_ROPE, max_position_embeddings=8192)

    def builtin(name: str, source: Path, **options: Any) -> Case:
        folder = export(source, root / "out" / name, **options).folder
        model = _eager(source, {"bf16": torch.bfloat16}.get(options.get("dtype", ""), "auto"))
        return Case(
            folder, model, make_prompts(load_processor(folder, "model"), SHOWN), code=options.get("code", False)
        )

    yield "built-in teacher, tied, in shards", lambda: builtin("shards", ASSETS / "teacher", max_shard_size="1MB")
    yield "built-in teacher, bf16", lambda: builtin("bf16", ASSETS / "teacher", dtype="bf16")
    yield "TAF, as wide as its teacher", lambda: builtin("same", save(taf_student(width=32), root / "made" / "same"))
    yield "TAF, narrower, --code", lambda: builtin("code", save(taf_student(), root / "made" / "code"), code=True)
    yield (
        "TAF, --keep-taf --code",
        lambda: builtin("kept", save(taf_student(), root / "made" / "kept"), code=True, merge_taf=False),
    )


def _every_family(root: Path) -> dict[str, Case]:
    """Every family of transformers that can be made small, on words alone and with a rotary base that is nobody's default."""
    import family_sweep

    cases = {}
    for name in family_sweep.FAMILIES:
        for heads in (1, 2):
            with contextlib.suppress(Exception):  # of the family's own code: docs/families.md says which are not run
                config = family_sweep.small_config(name, heads)
                for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
                    if "rope_theta" in (getattr(part, "rope_parameters", None) or {}):
                        part.rope_parameters["rope_theta"] = 500.0
                kind = getattr(transformers, family_sweep.class_of(name))
                with torch.device("meta"):
                    if sum(weight.numel() for weight in kind(config).parameters()) > MOST:
                        break
                torch.manual_seed(0)
                model = kind(config).eval()
                model.set_attn_implementation("eager")
                inputs = family_sweep.draw(model)
                inputs["attention_mask"].fill_(1)
                prompt = {"question": "", "images": [], "inputs": inputs}
                case = Case(root / "every" / name, model, [prompt], tokens=0)
                model.save_pretrained(case.folder)
                publish(case.folder, name)
                cases[name] = case
                break
    return cases


def _summary(verdicts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Families that are the same, younger than the reader, refused by it, and another model in its hands."""
    other = {name: verdict for name, verdict in verdicts.items() if verdict["same"] is False}
    return {
        "same": [name for name, verdict in verdicts.items() if verdict["same"]],
        "younger_than_the_reader": [name for name, verdict in verdicts.items() if verdict["same"] is None],
        "refused": {name: verdict["error"] for name, verdict in other.items() if "error" in verdict},
        "another_model": {
            name: f"logits differ by {verdict['largest_difference_of_logits']:.2g} of {verdict['largest_logit']:.2g}; "
            f"weights: {verdict['weights']}"
            for name, verdict in other.items()
            if "error" not in verdict
        },
    }


def _verdict(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        return {"same": None if _unknown(result["error"]) else False, "error": result["error"][:160]}
    found = compare(case.wanted, case.prompts, result)
    eps = torch.finfo(torch.bfloat16 if "bfloat16" in result["dtype"] else torch.float32).eps
    close = found.logits <= TOLERANCE * eps * max(1.0, found.largest)
    processor = {} if found.inputs is not None else {"processor": result["replies"][0]["why"][:160]}
    return {
        "same": close and found.replies and not found.fit and found.inputs is not False,
        "class": result["class"],
        "dtype": result["dtype"],
        "weights": found.fit or "all, and no others",
        "largest_difference_of_logits": found.logits,
        "largest_logit": found.largest,
        "same_replies": found.replies,
        "same_prompts": found.inputs,
        "largest_difference_of_pixels": found.pixels,
        **processor,
    }


def _unknown(error: str) -> bool:
    """Whether a family is younger than the reader."""
    return "does not recognize this architecture" in error or error.startswith("KeyError: ")


def read(cases: dict[str, Case], environment: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """What one transformers makes of all cases, in a process for those with video processors and one for the others."""
    shim, pictures = scratch / "torchvision", scratch / "still"
    shim.mkdir(exist_ok=True)
    (shim / "sitecustomize.py").write_text(_TORCHVISION)
    pictures.mkdir(exist_ok=True)
    for name in os.listdir(environment):  # all but torchvision, whose image processors differ by roundings
        if not name.startswith("torchvision") and not (pictures / name).exists():
            (pictures / name).symlink_to(environment / name)
    found = {}
    for video, paths in ((False, [pictures]), (True, [environment, shim])):
        some = {name: case for name, case in cases.items() if case.video == video}
        if some:
            where = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
            for (name, case), result in zip(
                some.items(), ask([case.request for case in some.values()], where), strict=True
            ):
                found[name] = _verdict(case, result)
                if found[name]["same"] is False and (environment.name, name) in KNOWN:
                    found[name] |= {"same": None, "known": KNOWN[environment.name, name]}
    return {name: found[name] for name in cases}


def main() -> int:
    versions = sorted(path for path in ENVIRONMENTS.glob("*") if path.is_dir())
    if not versions:
        print("no transformers in .readers: make readers-env", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cases = {case: make() for case, make in _families(root) if not sys.argv[1:] or case in sys.argv[1:]}
        readers = {}
        for path in versions:
            (root / path.name).mkdir()
            readers[path.name] = read(cases, path, root / path.name)
            for case, verdict in readers[path.name].items():
                print(f"{path.name}  {case}: {verdict}", flush=True)
        some = {} if sys.argv[1:] else _every_family(root)
        every = {path.name: _summary(read(some, path, root / path.name)) for path in versions}
    if not sys.argv[1:]:
        data = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **cpu_environment(),
            "exported_with": {"transformers": version("transformers"), "cdistill": cdistill.__version__},
            "prompts": "one image, two images, words alone; 8 tokens, greedy, eager attention",
            "readers": readers,
            "every_family_on_words": every,
        }
        path = results_folder() / "serve" / "readers.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
    return int(any(verdict["same"] is False for found in readers.values() for verdict in found.values()))


if __name__ == "__main__":
    sys.exit(main())
