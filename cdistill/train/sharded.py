"""What can be trained on sequences that lie on several processes (`sequence_parallel`)."""

from cdistill.errors import InputError
from cdistill.models.llava import Llava
from cdistill.models.load import Model
from cdistill.vat import attention_layers
from cdistill.vat.ulysses import check_heads

SHARDED_TERMS = ("ar", "kd", "vat")  # whose sums over the tokens or heads of a process add up


NO_COMMON_VISION = (
    "sequence_parallel needs a LLaVA student and, if it is distilled, a LLaVA teacher with the same vision encoder: images are "
    "embedded before a sequence is divided"
)


def check_shardable(student: Model, teacher: Model | None, processes: int) -> None:
    """Raise ValueError unless the tokens of both models can be dealt to so many processes."""
    if not isinstance(student, Llava) or not (teacher is None or isinstance(teacher, Llava)):
        raise InputError(NO_COMMON_VISION)
    for side, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        if len(attention_layers(model)) != model.config.get_text_config(decoder=True).num_hidden_layers:
            raise InputError(
                f"sequence_parallel needs softmax attention in every layer, which the {side} does not have"
            )
        check_heads(model, processes, side)
