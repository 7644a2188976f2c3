"""vLLM's LLaVA with the adapter of a TAF student."""

from typing import Any

from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from cdistill.errors import InputError
from cdistill.models.taf import MERGED, MergedAdapter, TAFAdapter


@MULTIMODAL_REGISTRY.register_processor(
    llava._build_llava_or_pixtral_hf_processor,
    info=llava._build_llava_or_pixtral_hf_info,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class TAFLlava(llava.LlavaForConditionalGeneration):  # type: ignore[misc]
    """A LLaVA of vLLM that sees through M and its teacher's adapter; all else, weights and prompts, is the stock model's.

    The adapter is whole on every rank of tensor parallelism, as it is light.

    Raises:
        ValueError: the features are of several layers of the encoder: vLLM's LLaVA would take those of the deepest alone.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if not isinstance(config.vision_feature_layer, int):
            raise InputError(
                f"vision_feature_layer must be one layer for vLLM, got {config.vision_feature_layer}: vLLM's LLaVA takes one"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.multi_modal_projector = MergedAdapter(config) if config.taf_activation == MERGED else TAFAdapter(config)
