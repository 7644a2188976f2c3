"""Running a recipe: checks first, then one stage after the other, each from the result of the last one."""

import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from cdistill.data import strict_yaml
from cdistill.data.conversations import Encoder
from cdistill.models.load import RECIPE, load_model
from cdistill.models.processor import save_chat_template, stop_at
from cdistill.runtime import checkpoints, launch
from cdistill.runtime.bad_samples import BadSamples
from cdistill.runtime.collectives import first_process, naming_lost_peers, on_first_process
from cdistill.runtime.errors import Stopped
from cdistill.runtime.finite import FiniteSteps
from cdistill.runtime.signals import StopRequest, stop_on_signals
from cdistill.runtime.stop import StopCallback
from cdistill.runtime.zero import deepspeed_config, released
from cdistill.train.alignment import make_vat, vat_of
from cdistill.train.build import (
    Models,
    build_models,
    check_batches,
    checkpoint_activations,
    compile_layers,
    count_parameters,
    precision_of,
)
from cdistill.train.cache import CachedCollator, CachedDataset, StageCache, fingerprint, stage_cache
from cdistill.train.config import Recipe, recipe_from_dict, recipe_to_dict
from cdistill.train.data import encoder_of, stage_dataset, unread
from cdistill.train.lora import add_lora
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES, require_shipped, set_trained
from cdistill.train.run_folder import (
    CHECKPOINTS,
    METRICS,
    begun_stages,
    locked,
    refuse_other_run,
    stage_folders,
    tell_changes,
)
from cdistill.train.teacher_source import Cached, hold_teacher
from cdistill.train.trainer import DistillTrainer, RunLog, training_arguments
from cdistill.vat import attention_layers

METRICS_BYTES = 1_000_000


def run(recipe: Recipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """See `cdistill.train.run`."""
    output = Path(recipe.output)
    with ExitStack() as at_end:
        if launch.launched():
            launch.init_process_group()
            prepared: list[Models] = []  # stays where it is
            on_first_process(lambda: prepared.append(_prepare(recipe, output, resume, at_end)))
            return run_stages(
                recipe, output, resume=resume, callbacks=callbacks, models=prepared.pop() if prepared else None
            )
        if recipe.processes > 1 and callbacks:
            raise ValueError(
                "callbacks need recipe.processes 1: the stages of this recipe run in processes of their own"
            )
        if recipe.processes > 1:
            require_shipped((recipe.stage[name].objective for name in recipe.stages), recipe.processes)
        with launch.quiet():
            models: Models | None = _prepare(recipe, output, resume, at_end)
        if recipe.processes > 1:
            models = None  # the processes load their own
            launch.start_processes(recipe.processes, "train", output)
            return stage_folders(recipe, output)[-1]
        return run_stages(recipe, output, resume=resume, callbacks=callbacks, models=models)


def run_stages(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool,
    callbacks: Sequence[TrainerCallback] = (),
    models: Models | None = None,
) -> Path:
    """Run the unfinished stages of a recipe in a prepared output folder; returns the folder of the final model."""
    folders = stage_folders(recipe, output)
    with (
        naming_lost_peers(),
        stop_on_signals() as request,
        launch.environment(distributed=recipe.deepspeed != "off"),
        launch.quiet(),
    ):
        if recipe.deepspeed != "off":
            launch.keep_deepspeed_from_compiling()
        if launch.launched():
            launch.init_process_group()
        models = models or build_models(recipe)
        for index, folder in enumerate(folders):
            if folder.is_dir():
                _remove_leftovers(output, folder)
                continue
            with released(engines=recipe.deepspeed != "off") as at_end:
                if index:
                    models.student = load_model(folders[index - 1])
                try:
                    _run_stage(recipe, index, models, output, folder, callbacks, request, at_end)
                finally:
                    models.student = None
            if folder != folders[-1]:
                _stop_if(request.agreed(), f"{folder.name}: done, and stopped")
    return folders[-1]


def _stop_if(number: int, message: str) -> None:
    """Raise Stopped for a signal, once the first process has told it."""
    if not number:
        return
    if first_process():
        print(f"{message} by {signal.Signals(number).name}; go on with --resume", flush=True)
    raise Stopped(number)


def _remove_leftovers(output: Path, folder: Path) -> None:
    """Remove what a run that was killed after a stage's last rename has left of it."""
    if first_process():
        shutil.rmtree(output / CHECKPOINTS / folder.name, ignore_errors=True)
        with suppress(OSError):  # it holds those of another stage, or has never been
            (output / CHECKPOINTS).rmdir()


def read_recipe(output: Path) -> Recipe:
    """The recipe of the run in an output folder. Raises ValueError if the file is not one."""
    path = output / RECIPE
    try:
        content = strict_yaml.load(path.read_text(encoding="utf-8"), str(path))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"output: {path} is not a recipe")
    return recipe_from_dict(content)


def _prepare(recipe: Recipe, output: Path, resume: bool, at_end: ExitStack) -> Models:
    """Check everything a run needs, then make its folder, which is locked until the end, hold the recipe."""
    was_there = output.is_dir()
    if was_there:
        at_end.enter_context(locked(output))
    _check_output(recipe, output, resume)
    check_batches(recipe, _world_size(recipe))
    precision_of(recipe)
    models = build_models(recipe)
    for index in range(len(recipe.stages)):
        stage_dataset(recipe, index, models)
        objective = recipe.stage[recipe.stages[index]].objective
        if recipe.teacher_memory.cache is not None and OBJECTIVES[objective].distils:
            vat = vat_of(recipe, objective, models)
            StageCache(stage_cache(recipe, index), fingerprint(recipe, index, models, vat))
    if resume:
        _check_stages(output, stage_folders(recipe, output))
    text = strict_yaml.dump(recipe_to_dict(recipe))
    with checkpoints.saving(output / RECIPE, len(text)):
        output.mkdir(parents=True, exist_ok=True)
        if not was_there:
            at_end.enter_context(locked(output))
            _check_output(recipe, output, resume)  # another run may have made it meanwhile
        if (output / RECIPE).is_file():
            tell_changes(recipe, output, read_recipe(output))
        if not (output / RECIPE).is_file() or (output / RECIPE).read_text(encoding="utf-8") != text:
            checkpoints.write_atomically(output / RECIPE, text)
    return models


def _check_stages(output: Path, folders: Sequence[Path]) -> None:
    """Raise ValueError unless every stage that a later one went on from is there, and whole."""
    for i, folder in enumerate(folders):
        begun = [f for f in folders[i + 1 :] if f.is_dir() or (output / CHECKPOINTS / f.name).is_dir()]
        if not folder.is_dir():
            if begun:
                raise ValueError(
                    f"output: {folder} is missing, but {begun[0].name}, which went on from it, has begun: put it back, "
                    f"or delete {' and '.join(f.name for f in begun)} in {output} and {output / CHECKPOINTS}, too"
                )
            continue
        if (folder / checkpoints.COMPLETE).is_file():
            reason = checkpoints.damage(folder)
            if reason is not None:
                raise ValueError(f"output: {folder} is damaged ({reason}): put it back, or delete it and later stages")
        load_model(folder, "output")


def _check_output(recipe: Recipe, output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is not a folder")
    if output.is_dir() and [p.name for p in output.iterdir()] == [f"{RECIPE}.part"]:
        return  # killed before anything else was written
    if not output.is_dir() or not any(output.iterdir()):
        if resume:
            raise ValueError(f"output {output} holds no run to resume")
        return
    if not (output / RECIPE).is_file():
        raise ValueError(f"output {output} is not empty and holds no run: choose another folder")
    held = read_recipe(output)
    refuse_other_run(recipe, held, output)
    if not resume and begun_stages(held, output):
        raise ValueError(f"output {output} already holds a run of this recipe: continue it with --resume")


def _world_size(recipe: Recipe) -> int:
    return dist.get_world_size() if dist.is_initialized() and launch.launched() else recipe.processes


def _run_stage(
    recipe: Recipe,
    index: int,
    models: Models,
    output: Path,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
    request: StopRequest,
    at_end: ExitStack,
) -> None:
    name = recipe.stages[index]
    stage, objective = recipe.stage[name], OBJECTIVES[recipe.stage[name].objective]
    if not any(OBJECTIVES[recipe.stage[later].objective].distils for later in recipe.stages[index:]):
        models.teacher = models.held = None
    student, precision = models.student, precision_of(recipe)
    on_cpu = not torch.cuda.is_available()
    world = dist.get_world_size() if launch.launched() else 1
    micro = stage.micro_batch_size or stage.global_batch_size // world
    torch.manual_seed(recipe.seed + index)
    lora = recipe.student.lora if "language" in objective.trained else None
    if lora is not None:
        add_lora(student, lora)
    set_trained(student, objective)
    if recipe.gradient_checkpointing and objective.trained != ("vision",):
        checkpoint_activations(student, reentrant=recipe.gradient_checkpointing == "reentrant")
    if recipe.compile:
        compile_layers(student)
    trained, total = count_parameters(student)
    zero = None
    if recipe.deepspeed != "off":
        zero = deepspeed_config(
            int(recipe.deepspeed),
            precision=precision,
            micro_batch_size=micro,
            accumulation=stage.global_batch_size // (world * micro),
            world_size=world,
            max_grad_norm=stage.max_grad_norm,
            trained=trained,
        )
    saved = output / CHECKPOINTS / folder.name
    arguments = training_arguments(
        saved,
        stage,
        micro_batch_size=micro,
        accumulation=stage.global_batch_size // (world * micro),
        precision=precision,
        deepspeed=zero,
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        seed=recipe.seed + index,
        workers=recipe.workers,
        on_cpu=on_cpu,
    )
    dataset, collator = stage_dataset(recipe, index, models)
    encoder = encoder_of(dataset)
    if encoder is not None:
        stop_at(student, encoder.contract.end_ids)
    teacher = vat = None
    if objective.distils:
        assert models.teacher is not None
        layers = attention_layers(student), attention_layers(models.teacher)
        if recipe.teacher_memory.cache is None:
            models.held = models.held or hold_teacher(
                recipe.teacher_memory,
                models.teacher,
                student,
                precision,
                arguments.device,
                shares_vision=models.shares_vision,
            )
            teacher = models.held
            teacher.move(arguments.device)
        if recipe.aligns(stage.objective):
            batches = DataLoader(dataset, micro, collate_fn=collator)
            vat = make_vat(recipe, layers, student.to(arguments.device), teacher, batches)
        if recipe.teacher_memory.cache is not None:
            kept = StageCache(stage_cache(recipe, index), fingerprint(recipe, index, models, vat))
            dataset, collator, teacher = CachedDataset(dataset, kept), CachedCollator(collator), Cached(kept.vocabulary)
    elif models.held is not None:
        models.held.move("cpu")  # from the GPU, where an earlier stage has left it
    model = DistillationModel(
        student,
        objective.terms(kd=recipe.kd, vat=vat, vat_weight=recipe.vat.weight),
        teacher=teacher,
    )
    first = arguments.process_index == 0
    log = RunLog(
        output, folder.name, name, per_step=stage.global_batch_size, steps=stage.steps, layers=recipe.log_layers
    )
    finite, stop = FiniteSteps(recipe.max_nonfinite_steps, folder.name), StopCallback(request)
    bad = BadSamples(recipe.max_bad_samples, output, folder.name)
    trainer = DistillTrainer(
        model,
        arguments,
        stage,
        lora=lora,
        finite=finite,
        bad=bad,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[log, *callbacks, stop],
    )
    at_end.callback(trainer.destroy_engine)
    checkpoint = on_first_process(lambda: checkpoints.choose(saved, processes=world))
    start = 0 if checkpoint is None else checkpoints.checkpoint_step(checkpoint)
    if first:
        log.rewind(start)
        losses = " + ".join(term.title for term in model.terms)
        print(
            f"{folder.name}: {losses} on {stage.steps * stage.global_batch_size:,} samples "
            f"({stage.steps:,} steps of {stage.global_batch_size}), {trained:,} of {total:,} parameters trained"
            + (f", from step {start}" if start else ""),
            flush=True,
        )
        remarks = [] if encoder is None else encoder.template.remarks
        for line in (*unread(stage, models), *remarks):
            print(f"{folder.name}: {line}", flush=True)
        if encoder is not None and encoder.template.end is None and index + 1 == len(recipe.stages):
            print(
                f"{folder.name}: template plain ends answers with a line break, where generation does not stop",
                flush=True,
            )
    began = time.perf_counter()
    with checkpoints.saving(output / METRICS, METRICS_BYTES):  # checkpoints speak for themselves
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            log.close()
    seconds = time.perf_counter() - began
    bad.report()
    step = trainer.state.global_step
    _stop_if(
        stop.signal,
        f"{folder.name}: saved after step {step:,} of {stage.steps:,} in {saved}/checkpoint-{step} and stopped",
    )
    part = folder.with_name(f"{folder.name}.part")
    if first and part.exists():
        shutil.rmtree(part)
    with checkpoints.saving(part, trainer.bytes_to_save(optimizer=False)):
        trainer.save_student(part)
        if first:
            _save_processor(encoder, models, part)
        checkpoints.seal(part, stage=name, step=step)
    if first:
        checkpoints.publish(part, folder)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        rate = (stage.steps - start) * stage.global_batch_size / seconds
        skipped = f", {finite.skipped} steps skipped (not finite)" if finite.skipped else ""
        loss = "none" if log.last["loss"] is None else f"{log.last['loss']:.4f}"
        print(f"{folder.name}: done in {seconds:.0f} s ({rate:,.0f} samples/s), loss {loss}{skipped} -> {folder}")
    trainer.accelerator.wait_for_everyone()


def _save_processor(encoder: Encoder | None, models: Models, folder: Path) -> None:
    """What stands beside the weights; its chat template is the one that conversations were written by."""
    models.processor.save_pretrained(folder)
    if encoder is not None and encoder.template.name not in ("auto", "plain"):
        save_chat_template(folder, encoder.template.source)
