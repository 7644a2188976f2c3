"""``cdistill eval MODEL``: accuracy of a saved model on the built-in task."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", help="folder of a model or a run (its last finished stage), or builtin:NAME")
    parser.add_argument("--n", type=int, default=500, help="questions per sub-type (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and questions (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, too")


def main(options: argparse.Namespace) -> int:
    """Evaluate a LLaVA on images, a language model on scenes written out, and print the table."""
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {str(options.json.parent)!r}")
    from transformers import PreTrainedTokenizerFast

    from cdistill.builtin.scorer import FAMILIES, evaluate
    from cdistill.models.load import load_for_evaluation, resolve_folder

    folder = resolve_folder(options.model, "model")
    model = load_for_evaluation(options.model, "model")
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    modality = "image" if hasattr(model.config, "vision_config") else "text"
    result = evaluate(model, n=options.n, seed=options.seed, modality=modality, tokenizer=tokenizer)
    for family in FAMILIES:
        print(family)
        for subtype, accuracy in result[family].items():
            error, constant = result["standard_error"][family][subtype], result["constant_answer"][family][subtype]
            print(
                f"  {subtype:<14}{100 * accuracy:6.1f} ± {100 * error:3.1f}   one answer always: {100 * constant:5.1f}"
            )
    print(f"accuracy in % on held-out scenes ({modality}), {options.n} questions per sub-type, ± standard error")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
