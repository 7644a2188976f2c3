"""Hidden states: the student's last ones point where the teacher's do, a baseline that compares no attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.models.load import Model
    from cdistill.train.step import Step

MODULE = "hidden_map"


class HiddenStates(Term):
    """1 - cosine of student's and teacher's last hidden states at labelled tokens (Sanh et al., 2019, DistilBERT).

    Where the widths differ, a linear map without bias, trained in the stage alone, brings the student's to the teacher's (as in
    Romero et al., 2015, FitNets).
    """

    name = "hidden"
    title = "hidden states"
    teacher = ("hidden",)
    baseline = True

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """The map, if there is one."""
        from torch import nn

        assert teacher is not None
        ours, theirs = (model.config.get_text_config(decoder=True).hidden_size for model in (student, teacher))
        return {} if ours == theirs else {MODULE: nn.Linear(ours, theirs, bias=False)}

    def forward(self, step: Step) -> Tensor:
        """Sum over labels, in fp32."""
        from torch.nn.functional import cosine_similarity

        assert step.teacher is not None and step.teacher.hidden is not None
        ours = step.modules[MODULE](step.hidden) if MODULE in step.modules else step.hidden
        return (1.0 - cosine_similarity(ours.float(), step.teacher.hidden.float(), dim=-1)).sum()

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """Both states in fp32, the mapped ones as wide as the student's at least."""
        width = student.config.get_text_config(decoder=True).hidden_size
        return Memory(kept=2 * 4 * sizes.batch * sizes.answers * width)
