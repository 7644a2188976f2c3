"""What a run needs, checked before its first step: its folder, its models, the data of every stage, on every machine."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cdistill.data import strict_yaml
from cdistill.data.conversations import Encoder
from cdistill.errors import InputError
from cdistill.files import owned, remove_unfinished, write_text
from cdistill.models.hub import pinned
from cdistill.models.load import RECIPE
from cdistill.models.processor import save_chat_template
from cdistill.runtime import checkpoints, launch
from cdistill.runtime.collectives import on_first_process
from cdistill.runtime.machines import on_other_machines, require_common_folder, several_machines
from cdistill.train.alignment import vat_of
from cdistill.train.build import Models, build_models
from cdistill.train.cache import open_cache, teacher_files
from cdistill.train.data import check_kinds, encoder_of, open_stage, open_validation
from cdistill.train.evaluation import check_questions, open_tasks, questioner
from cdistill.train.recipes import Recipe, recipe_to_dict
from cdistill.train.recipes.values import differences
from cdistill.train.replies import ReplyLog
from cdistill.train.reply_server import SERVED, ReplyServer
from cdistill.train.resolve import Run, Stage, resolve
from cdistill.train.rollout import Rollouts
from cdistill.train.run_folder import check_output, check_stages, print_changes, read_recipe
from cdistill.train.run_log import check_trackers


class Data(NamedTuple):
    """What a stage reads."""

    dataset: Any
    collator: Any
    encoder: Encoder | None  # None where the built-in task makes the tokens itself


def open_data(stage: Stage, models: Models) -> Data:
    """What a stage reads. Raises ValueError as `cdistill.train.data.open_stage`."""
    dataset, collator = open_stage(stage, models)
    return Data(dataset, collator, encoder_of(dataset))


def pin_models(recipe: Recipe, output: Path) -> Recipe:
    """A recipe whose models of the hub are of one commit: where a run goes on, of the one that it has begun with.

    Raises ValueError if the hub does not give one.
    """
    recorded = read_recipe(output) if (output / RECIPE).is_file() else None

    def pin(reference: str | None, key: str, before: str | None) -> str | None:
        return None if reference is None else pinned(reference, key, before)

    student, before = recipe.student, None if recorded is None else recorded.student
    base = pin(student.base, "student.base", None if before is None else before.base)
    vision = pin(student.vision, "student.vision", None if before is None else before.vision)
    teacher = pin(recipe.teacher, "teacher", None if recorded is None else recorded.teacher)
    teachers = {}
    for name, of in recipe.teachers.items():
        known = None if recorded is None else recorded.teachers.get(name)
        model = pin(of.model, f"teachers.{name}.model", None if known is None else known.model)
        teachers[name] = replace(of, model=str(model))
    return replace(recipe, teacher=teacher, teachers=teachers, student=replace(student, base=base, vision=vision))


def prepare(recipe: Recipe, output: Path, *, resume: bool, at_end: ExitStack) -> Models:
    """Check everything that a run needs on this machine, then make its folder hold the recipe; it is locked until the end."""
    was_there = output.is_dir()
    if was_there:
        at_end.enter_context(owned(output))
    check_output(recipe, output, resume)
    if was_there:
        remove_unfinished(output)
    run = resolve(recipe, launch.world_size() if launch.launched() else None)
    check_trackers(recipe.report_to)
    models = build_models(recipe)
    check_data(run, models)
    if resume:
        check_stages(output, [stage.folder for stage in run.stages])
    checkpoints.check_room(output, sum(p.numel() * p.element_size() for p in models.student.parameters()))
    text = strict_yaml.dump(recipe_to_dict(recipe))
    with checkpoints.saving(output / RECIPE, len(text)):
        output.mkdir(parents=True, exist_ok=True)
        if not was_there:
            at_end.enter_context(owned(output))
            check_output(recipe, output, resume)  # another run may have made it meanwhile
        if (output / RECIPE).is_file():
            print_changes(recipe, output, read_recipe(output))
        if not (output / RECIPE).is_file() or (output / RECIPE).read_text(encoding="utf-8") != text:
            write_text(output / RECIPE, text)
    return models


def prepare_together(recipe: Recipe, output: Path, *, resume: bool, at_end: ExitStack) -> Models | None:
    """`prepare` on the first process of a launcher's, then on the first of each other machine what that machine must have.

    Returns the models of processes that have built them. Raises ValueError on all processes, also where machines have other
    folders, teachers or data than the first.
    """
    built: list[Models] = []  # stays where it is
    on_first_process(lambda: built.append(prepare(recipe, output, resume=resume, at_end=at_end)))
    require_common_folder(output, "output")
    if not several_machines():
        return built.pop() if built else None
    run = resolve(recipe, launch.world_size())
    facts = on_first_process(lambda: {"recipe": recipe_to_dict(recipe), **_facts(run, built[0])})

    def other() -> None:
        _refuse_difference("recipe", facts["recipe"], recipe_to_dict(recipe))
        built.append(build_models(recipe))
        check_data(run, built[0])
        for key, value in _facts(run, built[0]).items():
            _refuse_difference(key, facts[key], value)

    on_other_machines(other)
    return built.pop() if built else None


def save_processor(folder: Path, models: Models, data: Data) -> None:
    """Write what makes tokens for the student, with the chat template that it is trained on."""
    models.processor.save_pretrained(folder)
    template = None if data.encoder is None else data.encoder.template
    if template is not None and template.replaces_own:
        save_chat_template(folder, template.source)


def check_data(run: Run, models: Models) -> None:
    """Raise ValueError unless everything that the stages read is there."""
    if run.recipe.teachers:
        check_kinds(run, models)
    for stage in run.stages:
        data = open_data(stage, models)
        rollouts_of(stage, models, data)
        if stage.config.validation is not None:
            open_validation(stage, models)
        if stage.config.eval is not None:
            _check_evaluation(stage, models, data)
        if run.recipe.teacher_memory.cache is not None and stage.objective.distils:
            vat = vat_of(stage, models.student, models.teacher) if stage.aligns else None
            open_cache(stage, models, vat, patient=False)


def rollouts_of(stage: Stage, models: Models, data: Data) -> Rollouts | None:
    """What lets the student answer in a stage that distils on its own replies, else None.

    Raises ValueError where nothing ends a reply, or where the teacher reads samples otherwise.
    """
    config, recipe = stage.config.replies, stage.recipe
    if config is None:
        return None
    if models.reads_apart:
        raise InputError(
            f"stage.{stage.name}.generation needs a teacher that reads what the student reads, and this one has an encoding of "
            "its own (other visual tokens, another tokenizer), which no reply has: take objective dft without generation"
        )
    tokenizer: Any = models.tokenizer
    ends: tuple[int, ...] = ()
    if data.encoder is not None:
        tokenizer, ends = data.encoder.tokenizer, data.encoder.contract.end_ids
        if not ends:
            raise InputError(
                f"stage.{stage.name}.data.template must end answers by a token, where replies are generated, and plain does "
                "not: take another"
            )
    log = ReplyLog(stage.folder.parent, stage.name, tokenizer, every=recipe.logging_steps, steps=stage.config.steps)
    key, server = f"stage.{stage.name}.generation", None
    if config.vllm_server is not None:
        folder = stage.folder.with_name(SERVED)
        seconds, name = recipe.max_stuck_seconds, f"{key}.vllm_server"
        server = ReplyServer(config.vllm_server, folder, models.processor, seconds=seconds, key=name)
    return Rollouts(
        models.student,
        tokenizer,
        config,
        seed=stage.seed,
        stops=ends,
        max_length=stage.config.data.max_length,
        key=key,
        log=log,
        server=server,
    )


def _check_evaluation(stage: Stage, models: Models, data: Data) -> None:
    """Raise ValueError unless a stage's benchmarks can be read and put to its student."""
    try:
        check_questions(open_tasks(stage.config, quiet=False), models.student)
        questioner(models.student, lambda folder: save_processor(folder, models, data))
    except ValueError as error:
        raise InputError(f"stage.{stage.name}.{error}") from None


def _facts(run: Run, models: Models) -> dict[str, Any]:
    """What must be the same on all machines, by the key of the recipe: nobody sends a teacher or samples to other processes."""
    facts: dict[str, Any] = {
        f"data.path {json.loads(key)['path']}": {"records": len(source)} for key, source in models.sources.items()
    }
    if run.recipe.needs_teacher:
        facts |= {key: teacher_files(reference, key) for key, reference in run.recipe.every_teacher.items()}
    return facts


def _refuse_difference(key: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    for name, one, other in differences(there, here):
        raise InputError(f"{key} is not what it is on the machine of process 0: {name} ({one} there, {other} here)")
