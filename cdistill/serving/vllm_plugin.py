"""Tells vLLM of TAF students, by its entry point ``vllm.general_plugins``: every process of vLLM calls `register`."""


def register() -> None:
    """Let vLLM load folders of TAF students, exported or as they were trained, where cdistill is installed beside it."""
    from vllm import ModelRegistry

    import cdistill.models  # noqa: F401  registers the configuration with transformers

    ModelRegistry.register_model("TAFLlavaForConditionalGeneration", "cdistill.serving.vllm_llava:TAFLlava")
