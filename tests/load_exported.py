"""``python load_exported.py ORDER CASES RESULTS``: loads exported folders in a fresh process, by auto classes alone.

ORDER says what is imported: ``without`` (any import of cdistill fails), ``before`` (cdistill, then LLaVA: transformers' auto
classes then are imported in the middle of it), ``after`` (cdistill last). CASES and RESULTS are files of torch.save: a
dictionary of cases by name, and of what became of each.
"""

import sys
from importlib.abc import MetaPathFinder

ORDER, CASES, RESULTS = sys.argv[1:]


class Refusal(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "cdistill":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


if ORDER == "without":
    sys.meta_path.insert(0, Refusal())
elif ORDER == "before":
    import cdistill

    assert not {"torch", "transformers"} & sys.modules.keys()
    from transformers import LlavaForConditionalGeneration  # noqa: F401
elif ORDER == "after":
    from transformers import AutoModelForImageTextToText  # noqa: F401

    import cdistill  # noqa: F401

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast  # noqa: E402


def load(case):
    options = {"trust_remote_code": True} if case["code"] else {}
    config = AutoConfig.from_pretrained(case["folder"], **options)
    kind = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, info = kind.from_pretrained(case["folder"], output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def outcome(case):
    """Class, number formats, logits of the given inputs; what the folder's processor makes of the messages, and the answer."""
    model = load(case)
    result = {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "dtypes": {p.dtype for p in model.parameters()},
    }
    result["logits"] = model(**case["inputs"]).logits
    if case["messages"] is not None:
        # AutoTokenizer takes Qwen2Tokenizer for whatever stands beside a Qwen2 model.
        auto = AutoProcessor if hasattr(model.config, "vision_config") else PreTrainedTokenizerFast
        processor = auto.from_pretrained(case["folder"])
        result["processed"] = processor.apply_chat_template(
            case["messages"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **({"processor_kwargs": {"padding": True}} if auto is AutoProcessor else {"padding": True}),
        ).data
    inputs = result.get("processed", case["inputs"])
    result["answer"] = model.generate(**inputs, max_new_tokens=case["tokens"], do_sample=False)
    return result


cases = torch.load(CASES, weights_only=False)  # PIL images
torch.set_num_threads(cases.pop("threads"))
torch.save({name: outcome(case) for name, case in cases.items()}, RESULTS)
