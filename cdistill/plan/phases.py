"""The phases of a step, each a table of components in bytes.

What layers hold is read off them (`cdistill.plan.footprint`); everything else is arithmetic, one function per component
(`cdistill.plan.weights`, `cdistill.plan.activations`).
"""

from __future__ import annotations

from cdistill.plan import activations, weights
from cdistill.plan.blueprint import Blueprint, teachers_of
from cdistill.plan.footprint import patch_footprint
from cdistill.plan.setting import Bytes, Setting, memory_of_terms
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes import Recipe
from cdistill.train.terms import Memory

OVERHEAD = 10**9  # CUDA's context, kernels, workspaces of libraries and NCCL's buffers: assumed, not measured


def phases_of(recipe: Recipe, index: int, student: Blueprint, s: Setting) -> dict[str, Bytes]:
    """The phases of a step of the stage at a place in the recipe's list."""
    objective = OBJECTIVES[recipe.stage[recipe.stages[index]].objective]
    teachers = list(teachers_of(recipe).values())
    resident = _resident(recipe, index, student, s)
    if not objective.distils or recipe.teacher_memory.cache is not None:
        teachers = []
    given: list[Blueprint | None] = [*teachers] or [None]  # None: by a cache, or nothing
    gradients, terms = weights.gradients(student, s), memory_of_terms(recipe, objective, student.model, s)
    if terms.classes:
        return _on_patches(resident, gradients, terms, student, s)
    images = activations.images(student, s)
    targets = sum(activations.targets(recipe, terms, student, teacher, s) for teacher in given)
    acts = activations.activations(recipe, terms, student, s)
    logits = activations.vocabulary(recipe, terms, student, teachers, s)
    gathered = [weights.gathered_weights(recipe, teacher, s) for teacher in teachers]
    waiting = resident | {"gradients": gradients["between"]}
    inputs = {"images": images["kept"], "targets": targets}
    phases = {"images": waiting | {"images": images["peak"]}}
    if recipe.stage[recipe.stages[index]].replies is not None:
        phases["generation"] = waiting | {"images": images["peak"]} | activations.generation(student, s)
    if teachers:  # one after the other; what the others have given is counted, too
        passes = (activations.teacher_pass(recipe, terms, teacher, s) for teacher in teachers)
        taken = max(of + whole["pass"] for of, whole in zip(passes, gathered, strict=True))
        others = sum(sorted(activations.teacher_hidden(recipe, teacher, s) for teacher in teachers)[1:])
        phases["teacher"] = waiting | inputs | {"teacher's pass": taken + others}
    if objective.distils:
        inputs["images"] += sum(activations.teacher_hidden(recipe, teacher, s) for teacher in given)
    forward = waiting | inputs
    phases["forward"] = forward | {"activations": acts["forward"]}
    kept = {"terms": terms.kept} if terms.kept else {}
    computed = {"activations": acts["cached"], "logits": logits.forward + sum(whole["losses"] for whole in gathered)}
    phases["losses"] = forward | computed | kept
    after = resident | {"images": acts["images"], "targets": targets}
    phases["backward of the losses"] = after | {
        "gradients": gradients["between"],
        "activations": acts["kept"],
        "logits": logits.backward,
        **kept,
    }
    if s.zero != "off":
        phases["gradient of the head"] = after | {
            "gradients": gradients["begin"],
            "activations": acts["kept"],
            "logits": weights.first_gradient(terms, student, s),
        }
    phases |= _backward(after, gradients, acts, student, s)
    phases["optimizer step"] = resident | {"gradients": gradients["step"]}
    return phases


def _resident(recipe: Recipe, index: int, student: Blueprint, s: Setting) -> Bytes:
    """What is there in every phase."""
    resident = {
        "CUDA and NCCL": 0 if s.device == "cpu" else OVERHEAD,
        "student weights": weights.student_weights(student, s),
        "optimizer": weights.optimizer_states(student, s),
    }
    stages = [OBJECTIVES[recipe.stage[other].objective].distils for other in recipe.stages]
    begun = s.device == "cpu" or any(stages[: index + 1])  # in CPU memory until a stage distils
    teachers = teachers_of(recipe)
    if teachers and begun and any(stages[index:]):
        resident["teacher weights"] = sum(
            weights.teacher_weights(recipe, student, teacher, s, fetched=key == recipe.lead_key)
            for key, teacher in teachers.items()
        )
    return resident


def _on_patches(resident: Bytes, gradients: Bytes, terms: Memory, student: Blueprint, s: Setting) -> dict[str, Bytes]:
    """The phases of a step that trains the vision encoder alone."""
    patches = patch_footprint(student.model, s.batch, terms.classes, dtype=s.student, autocast=s.autocast)
    return {
        "forward": resident | {"gradients": gradients["between"], "activations": patches.cached},
        "backward": resident | {"gradients": gradients["begin"], "activations": patches.backward},
        "optimizer step": resident | {"gradients": gradients["step"]},
    }


def _backward(after: Bytes, gradients: Bytes, acts: Bytes, student: Blueprint, s: Setting) -> dict[str, Bytes]:
    """The backward pass of the layers, from its begin to the embeddings."""
    begin = gradients["begin"] + weights.head_gradient(student, s)
    last = weights.embedding_gradients(student, s)
    end = gradients["end"] - last["missing"] - weights.layer_gradients(student, s)
    return {
        "backward begins": after | {"gradients": max(gradients["between"], begin), "activations": acts["begin"]},
        "backward ends": after | {"gradients": max(gradients["between"], end), "activations": acts["end"]},
        "backward of the embeddings": after
        | {"gradients": gradients["end"] + last["extra"], "activations": acts["embeddings"]},
    }
