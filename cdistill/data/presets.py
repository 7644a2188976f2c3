"""The paper's data sets: what to download, where it goes, how many records are expected, and a mix file for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from cdistill.errors import InputError

TEXT_ONLY = "text only"
HUGGING_FACE = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class Download:
    """A file to fetch by hand; ``folder``, below the data root, is where it (or what an archive holds) goes."""

    url: str
    folder: str
    remark: str = ""


@dataclass(frozen=True)
class Part:
    """One annotation file of a preset.

    Attributes:
        annotation: path below the data root.
        images: root of its images, below the data root.
        records: how many it holds.
        folders: for every folder below ``images``, how many records have their (first) image in it; empty where the
            publisher does not say.
        text_only: records without an image; None where the publisher does not say.
    """

    annotation: str
    images: str
    records: int
    folders: Mapping[str, int] = field(default_factory=dict)
    text_only: int | None = None


@dataclass(frozen=True)
class Preset:
    """A data set of the paper."""

    title: str
    stages: str
    parts: tuple[Part, ...]
    downloads: tuple[Download, ...]
    remarks: tuple[str, ...]

    @property
    def records(self) -> int:
        """Records of all parts."""
        return sum(part.records for part in self.parts)


_PRETRAIN_IMAGES = Download(
    f"{HUGGING_FACE}/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip", "llava/llava_pretrain/images", "27 GB"
)
_INSTRUCTION_IMAGES = (
    Download("http://images.cocodataset.org/zips/train2017.zip", "coco/train2017"),
    Download("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa/images"),
    Download(
        "https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
        "ocr_vqa/images",
        "a script that downloads covers; save all of them as .jpg, as the annotations call them",
    ),
    Download("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "textvqa/train_images"),
    Download("https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip", "vg/VG_100K"),
    Download("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip", "vg/VG_100K_2"),
)
_SHAREGPT4V_IMAGES = (
    Download(
        "https://drive.google.com/file/d/1dKumdOKSXtV7lIXdrG7jsIK_z2vZv2gs/view", "sam/images", "9K images of SA-1B"
    ),
    Download(
        "https://drive.google.com/drive/folders/1tCUQ-sq6vdshZVkF0ZeF3K4eztkXJgax",
        "web-celebrity/images, web-landmark/images, wikiart/images, share_textvqa/images",
        "academic use only",
    ),
)
_EXTENSION = f"{HUGGING_FACE}/OpenGVLab/InternVL-Chat-V1-2-SFT-Data"
_EXTENDED_PARTS = (
    Part("extended/sharegpt4v_instruct_gpt4-vision_cap100k.jsonl", ".", 102_025),
    Part("extended/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.jsonl", ".", 665_058),
    Part("extended/dvqa_train_200k.jsonl", "dvqa", 200_000),
    Part("extended/chartqa_train_18k.jsonl", "chartqa", 18_317),
    Part("extended/ai2d_train_12k.jsonl", "ai2d", 12_413),
    Part("extended/docvqa_train_10k.jsonl", "docvqa", 10_211),
    Part("extended/geoqa+.jsonl", "geoqa+", 72_318),
    Part("extended/synthdog_en.jsonl", "synthdog-en", 29_765),
)

PRESETS: Mapping[str, Preset] = {
    "llava-558k": Preset(
        "LLaVA-1.5-558K: captions of LAION, CC and SBU images by BLIP",
        "DPT",
        (
            Part(
                "llava/llava_pretrain/blip_laion_cc_sbu_558k.json",
                "llava/llava_pretrain/images",
                558_128,
                text_only=0,
            ),
        ),
        (
            Download(
                f"{HUGGING_FACE}/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
                "llava/llava_pretrain",
            ),
            _PRETRAIN_IMAGES,
        ),
        ("licences: those of CC-3M, and of BLIP for its captions; the images belong to their owners",),
    ),
    "llava-665k": Preset(
        "LLaVA-mix-665K: the instructions of LLaVA-1.5",
        "DFT, SFT",
        (
            Part(
                "llava_v1_5_mix665k.json",
                ".",
                665_298,
                {
                    "coco/train2017": 364_100,
                    "vg": 86_417,
                    "gqa/images": 72_140,
                    "ocr_vqa/images": 80_000,
                    "textvqa/train_images": 21_953,
                },
                text_only=40_688,
            ),
        ),
        (
            Download(f"{HUGGING_FACE}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json", "."),
            *_INSTRUCTION_IMAGES,
        ),
        (
            "licences: annotations CC BY 4.0 and OpenAI's terms (answers of GPT-4); images under the terms of their sets",
            "images of vg lie in vg/VG_100K and vg/VG_100K_2",
            "some covers of ocr_vqa are GIF or PNG under a name in .jpg (these can be used), some can no longer be downloaded",
        ),
    ),
    "extended": Preset(
        "the extended mix of Table 9, for the experiment with twice the data",
        "DFT, SFT",
        _EXTENDED_PARTS,
        (
            Download(
                _EXTENSION, "extended", "the nine .jsonl files but llava_instruct_150k_zh, which the mix leaves out"
            ),
            _PRETRAIN_IMAGES,
            *_INSTRUCTION_IMAGES,
            *_SHAREGPT4V_IMAGES,
            Download("https://drive.google.com/file/d/1iKH2lTi1-QxtNUVRxTUWFvUvRHq6HAsZ/view", "dvqa/images"),
            Download(
                f"{HUGGING_FACE}/ahmed-masry/ChartQA/resolve/main/ChartQA%20Dataset.zip",
                "chartqa",
                "gives chartqa/train, chartqa/val and chartqa/test",
            ),
            Download(
                "https://drive.google.com/file/d/1dqqa3MnrxMXaU_K9JA6C83je32ibwdOY/view",
                "ai2d",
                "gives ai2d/images and ai2d/abc_images",
            ),
            Download("https://datasets.cvc.uab.es/rrc/DocVQA/train.tar.gz", "docvqa/train"),
            Download("https://datasets.cvc.uab.es/rrc/DocVQA/val.tar.gz", "docvqa/val"),
            Download("https://datasets.cvc.uab.es/rrc/DocVQA/test.tar.gz", "docvqa/test"),
            Download("https://huggingface.co/OpenGVLab/InternVL/resolve/main/geoqa%2B_images.zip", "geoqa+/images"),
            Download(
                "https://huggingface.co/OpenGVLab/InternVL/resolve/main/synthdog-en-images.zip", "synthdog-en/images"
            ),
        ),
        (
            "the same images as llava-558k and llava-665k lie at the same places",
            "licences: annotations as published Apache-2.0, the sets they were made of under their own terms",
            "the paper says 1.2M; these published files of its sets hold 1,110,107 records, TextCaps and ScienceQA left out",
        ),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of a name. Raises ValueError that tells the names."""
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def describe(name: str) -> list[str]:
    """Lines that say what a preset needs: downloads, places, counts, remarks."""
    preset = find_preset(name)
    lines = [
        f"{name}: {preset.title}",
        f"stages: {preset.stages}",
        "",
        "download, and unpack so that the files lie in (below the data root):",
    ]
    for download in preset.downloads:
        lines.append(
            f"  {download.url}\n    -> {download.folder}" + (f"  ({download.remark})" if download.remark else "")
        )
    width = max(len(part.annotation) for part in preset.parts)
    lines += ["", "records expected:"]
    for part in preset.parts:
        lines.append(f"  {part.annotation:{width}}  {part.records:>9,}  images below {part.images}")
        lines += [f"    {folder:{width - 2}}  {count:>9,}" for folder, count in part.folders.items()]
        if part.text_only is not None:
            lines.append(f"    {'text only':{width - 2}}  {part.text_only:>9,}")
    if len(preset.parts) > 1:
        lines.append(f"  {'all':{width}}  {preset.records:>9,}")
    return [*lines, "", *preset.remarks]


def mix(name: str) -> str:
    """A mix file (YAML) of a preset, to be put into the data root."""
    preset = find_preset(name)
    lines = [f"# {preset.title}; paths start at this file's folder", "sources:"]
    for part in preset.parts:
        lines += [f"  - path: {part.annotation}", f"    images: {part.images}"]
    return "\n".join(lines) + "\n"


def compare(name: str, found: Mapping[str, tuple[int, Mapping[str, int]]]) -> tuple[list[str], bool]:
    """Lines that compare what a check found with what a preset holds, and whether nothing is missing.

    Args:
        found: by the annotations' file name without its suffix, how many records are good, and how many of these lie in
            each folder (or are "text only").
    """
    preset = find_preset(name)
    rows = [("", "expected", "good", "missing")]
    complete = True
    for part in preset.parts:
        good, folders = found.get(PurePath(part.annotation).stem, (0, {}))
        counts = {part.annotation: (part.records, good)}
        counts |= {f"  {folder}": (records, folders.get(folder, 0)) for folder, records in part.folders.items()}
        if part.text_only is not None:
            counts["  " + TEXT_ONLY] = (part.text_only, folders.get(TEXT_ONLY, 0))
        for what, (expected, here) in counts.items():
            complete &= here >= expected
            rows.append((what, f"{expected:,}", f"{here:,}", f"{max(0, expected - here):,}"))
    return aligned(rows), complete


def folders(name: str) -> list[str]:
    """The folders whose records a preset counts."""
    return [folder for part in find_preset(name).parts for folder in part.folders]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
