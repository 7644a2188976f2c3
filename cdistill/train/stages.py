"""Running a recipe: checks first, then one stage after the other, each from the result of the last one."""

import math
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainingArguments

from cdistill.errors import InputError
from cdistill.files import MARK
from cdistill.models.load import Model, load_model
from cdistill.models.pair import shares_encoder
from cdistill.models.processor import add_stop_tokens
from cdistill.runtime import checkpoints, launch, pulse
from cdistill.runtime.bad_samples import BadSamples
from cdistill.runtime.collectives import first_process, naming_lost_peers, on_first_process
from cdistill.runtime.errors import Stopped
from cdistill.runtime.finite import FiniteSteps
from cdistill.runtime.sequence_group import sequence_group
from cdistill.runtime.signals import StopRequest, stop_on_signals
from cdistill.runtime.stop import StopCallback
from cdistill.runtime.zero import deepspeed_config, released, unpickling_data_alone
from cdistill.train.alignment import make_vat, vat_of
from cdistill.train.build import (
    Models,
    build_models,
    checkpoint_activations,
    compile_layers,
    count_parameters,
)
from cdistill.train.cache import CachedCollator, CachedDataset, open_cache
from cdistill.train.data import open_validation, unread, vocabularies_of
from cdistill.train.evaluation import Evaluation, open_tasks, questioner
from cdistill.train.gradients import balanced_weight
from cdistill.train.lora import add_lora
from cdistill.train.measuring import METRIC, VALUE, Measure, Measuring, is_best
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import require_known_everywhere, set_trained
from cdistill.train.prepare import Data, open_data, pin_models, prepare, prepare_together, rollouts_of, save_processor
from cdistill.train.recipes import Recipe
from cdistill.train.resolve import Run, Stage, resolve
from cdistill.train.rollout import CountingCollator
from cdistill.train.rounding import round_weights
from cdistill.train.run_folder import CHECKPOINTS, METRICS, remove_leftovers, stage_folders
from cdistill.train.run_log import TENSORBOARD, RunLog
from cdistill.train.teacher_source import Cached, Several, TeacherSource, place_teacher
from cdistill.train.terms.alignment import Alignment
from cdistill.train.trainer import DistillTrainer, training_arguments
from cdistill.train.validation import Validation
from cdistill.vat import VAT, SequenceShards

METRICS_BYTES = 1_000_000


def run(recipe: Recipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """See `cdistill.train.run`."""
    output = Path(recipe.output)
    with ExitStack() as at_end:
        if launch.launched():
            launch.init_process_group()
            pulse.watch(recipe.max_stuck_seconds)
            recipe = on_first_process(partial(pin_models, recipe, output))
            models = prepare_together(recipe, output, resume=resume, at_end=at_end)
            return run_stages(recipe, resume=resume, callbacks=callbacks, models=models)
        if recipe.processes > 1 and callbacks:
            raise InputError(
                "callbacks need recipe.processes 1: the stages of this recipe run in processes of their own"
            )
        if recipe.processes > 1:
            launch.named_port()
            require_known_everywhere((recipe.stage[name].objective for name in recipe.stages), recipe.processes)
        recipe = pin_models(recipe, output)
        with launch.quiet():
            models = prepare(recipe, output, resume=resume, at_end=at_end)
        if recipe.processes > 1:
            models = None  # the processes load their own
            launch.start_processes(recipe.processes, "train", output, max_stuck_seconds=recipe.max_stuck_seconds)
            return stage_folders(recipe, output)[-1]
        return run_stages(recipe, resume=resume, callbacks=callbacks, models=models)


def run_stages(
    recipe: Recipe, *, resume: bool, callbacks: Sequence[TrainerCallback] = (), models: Models | None = None
) -> Path:
    """Run the unfinished stages of a recipe in its prepared folder; returns the folder of the final model."""
    with (
        naming_lost_peers(),
        stop_on_signals() as request,
        launch.environment(distributed=recipe.deepspeed != "off"),
        launch.quiet(),
        ExitStack() as at_exit,
    ):
        if recipe.deepspeed != "off":
            launch.keep_deepspeed_from_compiling()
            at_exit.enter_context(unpickling_data_alone())
        if launch.launched():
            launch.init_process_group()
        run = resolve(recipe, launch.world_size())
        models = models or build_models(recipe)
        before = None
        for stage in run.stages:
            if stage.folder.is_dir():
                remove_leftovers(run.output, stage.folder)
            else:
                with released(engines=run.zero is not None) as at_end:
                    models.student = models.student if before is None else load_model(before)
                    try:
                        _run_stage(run, stage, models, callbacks, request, at_end)
                    finally:
                        models.student = None
                if not stage.is_last:
                    _stop_if(request.agreed(), f"{stage.label}: done, and stopped")
            before = stage.folder
    return run.stages[-1].folder


def _stop_if(number: int, message: str) -> None:
    """Raise Stopped for a signal, after the first process has reported it."""
    if not number:
        return
    if first_process():
        print(f"{message} by {signal.Signals(number).name}; go on with --resume", flush=True)
    raise Stopped(number)


def _run_stage(
    run: Run,
    stage: Stage,
    models: Models,
    callbacks: Sequence[TrainerCallback],
    request: StopRequest,
    at_end: ExitStack,
) -> None:
    """Make the student ready, build what trains it, train it and publish the result."""
    if not run.distils_from(stage.index):
        models.teacher = models.teacher_source = None
        models.teachers = {}
    arguments = _ready(run, stage, models.student)
    counted = count_parameters(models.student)
    data = open_data(stage, models)
    if data.encoder is not None:
        add_stop_tokens(models.student, data.encoder.contract.end_ids)
    model, data = losses_of(run, stage, models, data, arguments.device)
    stop = StopCallback(request)
    trainer, log = _trainer(run, stage, models, model, arguments, data, callbacks, stop)
    _measure(run, stage, models, trainer, log, data)
    at_end.callback(trainer.destroy_engine)
    checkpoint = on_first_process(lambda: checkpoints.choose(stage.checkpoints, processes=run.world))
    start = 0 if checkpoint is None else checkpoints.checkpoint_step(checkpoint)
    if first_process():
        log.rewind(start)
        if trainer.rollouts is not None and trainer.rollouts.log is not None:
            trainer.rollouts.log.rewind(start)
        _announce(stage, models, model, data, counted, start)
    began = time.perf_counter()
    with checkpoints.saving(run.output / METRICS, METRICS_BYTES):  # checkpoints speak for themselves
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            pulse.end()
            log.close()
    seconds = time.perf_counter() - began
    trainer.bad.report()
    step = trainer.state.global_step
    trainer.refuse_broken_result(stage.name)
    saved = f"{stage.checkpoints}/checkpoint-{step}"
    _stop_if(stop.signal, f"{stage.label}: saved after step {step:,} of {stage.config.steps:,} in {saved} and stopped")
    _publish(stage.folder, stage, models, trainer, data, step=step)
    if first_process():
        shutil.rmtree(run.output / CHECKPOINTS, ignore_errors=True)
        rate = (stage.config.steps - start) * stage.config.global_batch_size / seconds
        skipped = f", {trainer.finite.skipped} steps skipped (not finite)" if trainer.finite.skipped else ""
        loss = "none" if log.last["loss"] is None else f"{log.last['loss']:.4f}"
        print(f"{stage.label}: done in {seconds:.0f} s ({rate:,.0f} samples/s), loss {loss}{skipped} -> {stage.folder}")
    trainer.accelerator.wait_for_everyone()


def prepare_student(stage: Stage, student: Model) -> None:
    """Give a student its additions, and let gradients reach what the stage trains."""
    torch.manual_seed(stage.seed)
    if stage.lora is not None:
        add_lora(student, stage.lora)
    if stage.config.quantization is not None:
        round_weights(student, stage.config.quantization, f"stage.{stage.name}.quantization")
    set_trained(student, stage.objective)


def _ready(run: Run, stage: Stage, student: Model) -> TrainingArguments:
    """Prepare the student, and say how it is trained."""
    recipe = run.recipe
    prepare_student(stage, student)
    if recipe.gradient_checkpointing and stage.objective.trained != ("vision",):
        checkpoint_activations(student, reentrant=recipe.gradient_checkpointing == "reentrant")
    if recipe.compile:
        compile_layers(student)
    zero = None
    if run.zero is not None:
        zero = deepspeed_config(
            run.zero,
            precision=run.precision,
            micro_batch_size=stage.micro_batch_size,
            accumulation=stage.accumulation,
            world_size=run.world,
            max_grad_norm=stage.config.max_grad_norm,
            trained=count_parameters(student)[0],
        )
    return training_arguments(
        stage.checkpoints,
        stage.config,
        micro_batch_size=stage.micro_batch_size,
        accumulation=stage.accumulation,
        precision=run.precision,
        deepspeed=zero,
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        seed=stage.seed,
        workers=recipe.workers,
        on_cpu=not torch.cuda.is_available(),
        name=f"{recipe.name} {stage.label}",
        trackers=recipe.report_to,
    )


def _placed(run: Run, models: Models, device: torch.device) -> TeacherSource:
    """The teacher, or several, held as the recipe wants it."""
    memory, student, lead = run.recipe.teacher_memory, models.student, run.recipe.lead_name
    where = student, run.precision, device
    if not models.teachers:
        sees = models.shares_vision
        return place_teacher(memory, models.teacher, *where, shares_vision=sees, reads_apart=models.reads_apart)
    assert lead is not None
    shared = {name: shares_encoder(student, model) for name, model in models.teachers.items()}
    sources = {
        name: place_teacher(memory, model, *where, shares_vision=shared[name], fetched=name == lead)
        for name, model in models.teachers.items()
    }
    return Several(sources, lead)


def losses_of(
    run: Run, stage: Stage, models: Models, data: Data, device: torch.device
) -> tuple[DistillationModel, Data]:
    """The losses of the stage, with the teacher held as the recipe wants it, or what a cache has kept of it."""
    memory, student = run.recipe.teacher_memory, models.student
    teacher = vat = None
    vats: tuple[VAT, ...] = ()
    if stage.objective.distils:
        assert models.teacher is not None
        if memory.cache is None:
            models.teacher_source = models.teacher_source or _placed(run, models, device)
            teacher = models.teacher_source
            teacher.move(device)
        if stage.aligns and models.teachers:
            vats = tuple(vat_of(stage, student, model) for model in models.teachers.values())
        elif stage.aligns:
            batches = DataLoader(data.dataset, stage.micro_batch_size, collate_fn=data.collator)
            student.to(device)
            vat = make_vat(stage, models, teacher, batches)
        if memory.cache is not None:
            kept = open_cache(stage, models, vat)
            teacher = Cached(kept.vocabulary)
            data = Data(CachedDataset(data.dataset, kept), CachedCollator(data.collator), data.encoder)
    elif models.teacher_source is not None:
        models.teacher_source.move("cpu")  # from the GPU, where an earlier stage has left it
    given = {"vat.weight": run.recipe.vat.weight, "baseline_weight": run.recipe.baseline_weight}
    terms = stage.objective.terms(
        kd=run.recipe.kd,
        vat=vat,
        vocabularies=vocabularies_of(data.dataset),
        vats=vats,
        teachers=tuple(models.teachers),
    )
    measured = dict[str, str]()
    for term in terms:
        key = "baseline_weight" if term.baseline else "vat.weight"
        weight = given[key] if term.baseline or isinstance(term, Alignment) else term.weight
        if weight == "auto":
            measured[term.name] = key
        else:
            term.weight = weight
    ways = run.recipe.sequence_parallel
    shards = SequenceShards(sequence_group(ways)) if ways > 1 else None
    model = DistillationModel(student, terms, teacher=teacher, shards=shards)
    if measured:
        _balance(run, stage, model.to(device), data, measured)
    return model, data


def _balance(run: Run, stage: Stage, model: DistillationModel, data: Data, keys: Mapping[str, str]) -> None:
    """Measure the weights of terms, whose ``keys`` say auto. A resumed stage measures them again and gets the same: it builds
    its student from the result of the stage before."""
    config, size = run.recipe.vat, stage.micro_batch_size
    samples = min(config.measure_samples, stage.samples)
    batches = DataLoader(Subset(data.dataset, range(samples)), size, collate_fn=data.collator)
    how: dict[str, Any] = {"label": stage.label, "precision": run.precision, "seed": stage.seed}
    found = {name: balanced_weight(model, batches, term=name, key=key, **how) for name, key in keys.items()}
    for term in model.terms:
        if term.name in found:
            term.weight = found[term.name]
            line = f"{stage.label}: {keys[term.name]} auto is {term.weight:.4g}"
            if first_process():
                print(
                    f"{line}{f' of {term.name}' if term.baseline else ''}, measured on {samples:,} samples", flush=True
                )


def _trainer(
    run: Run,
    stage: Stage,
    models: Models,
    model: DistillationModel,
    arguments: TrainingArguments,
    data: Data,
    callbacks: Sequence[TrainerCallback],
    stop: StopCallback,
) -> tuple[DistillTrainer, RunLog]:
    recipe, config = run.recipe, stage.config
    rollouts = rollouts_of(stage, models, data)
    log = RunLog(
        run.output,
        stage.label,
        stage.name,
        per_step=config.global_batch_size,
        steps=config.steps,
        tensorboard=TENSORBOARD in recipe.report_to,
    )
    trainer = DistillTrainer(
        model,
        arguments,
        config,
        lora=stage.lora,
        log_layers=recipe.log_layers,
        finite=FiniteSteps(recipe.max_nonfinite_steps, stage.label),
        bad=BadSamples(recipe.max_bad_samples, run.output, stage.label),
        rollouts=rollouts,
        train_dataset=data.dataset,
        data_collator=data.collator if rollouts is None else CountingCollator(data.collator),
        callbacks=[log, *callbacks, stop],
    )
    return trainer, log


def _measure(run: Run, stage: Stage, models: Models, trainer: DistillTrainer, log: RunLog, data: Data) -> None:
    """Let the trainer measure the student as it goes, if the stage says so, and keep the best."""
    config = stage.config
    metric, folder = config.keep_best or "", stage.folder.with_name(f"{stage.label}-best")

    def keep(step: int, values: Mapping[str, float]) -> None:
        value = values.get(metric.partition(".")[2], math.nan)
        if on_first_process(lambda: is_best(folder, metric, value)):
            _publish(folder, stage, models, trainer, data, step=step, **{METRIC: metric, VALUE: value})

    def add(name: str, measure: Measure, every: int) -> None:
        kept = keep if metric.startswith(f"{name}.") else None

        def report(step: int, values: Mapping[str, float]) -> None:
            log.measured(name, step, values)
            trainer.tell({f"eval_{name}/{key}": value for key, value in values.items()})

        trainer.add_callback(Measuring(trainer, measure, every, report, kept))

    if config.validation is not None:
        validation = Validation(trainer, *open_validation(stage, models), batch=stage.micro_batch_size)
        add("validation", validation, config.validation.every)
    if config.eval is not None:
        processor = questioner(models.student, lambda folder: save_processor(folder, models, data))
        arguments, together = trainer.args, run.zero == 3
        add(
            "eval",
            Evaluation(
                models.student,
                processor,
                open_tasks(config, quiet=True),
                stage.label,
                arguments.process_index,
                arguments.world_size,
                together=together,
            ),
            config.eval.every,
        )


def _announce(
    stage: Stage, models: Models, model: DistillationModel, data: Data, counted: tuple[int, int], start: int
) -> None:
    """Print what the stage trains, and what its samples and template leave out."""
    losses = " + ".join(term.title for term in model.terms)
    trained, total = counted
    print(
        f"{stage.label}: {losses} on {stage.samples:,} samples ({stage.config.steps:,} steps of "
        f"{stage.config.global_batch_size}), {trained:,} of {total:,} parameters trained"
        + (f", from step {start}" if start else ""),
        flush=True,
    )
    remarks = [] if data.encoder is None else data.encoder.template.remarks
    for line in (*unread(stage, models), *remarks):
        print(f"{stage.label}: {line}", flush=True)
    if data.encoder is not None and data.encoder.template.end is None and stage.is_last:
        print(
            f"{stage.label}: template plain ends answers with a line break, where generation does not stop", flush=True
        )


def _publish(folder: Path, stage: Stage, models: Models, trainer: DistillTrainer, data: Data, **facts: Any) -> None:
    """Write the student beside its folder, and rename it when all of it is there."""
    part = folder.with_name(f".{folder.name}{MARK}stage")  # all processes must know it; the folder is this run's own
    if first_process() and part.exists():
        shutil.rmtree(part)
    with checkpoints.saving(part, trainer.bytes_to_save(optimizer=False), called=folder):
        trainer.save_student(part)
        if first_process():
            save_processor(part, models, data)
        checkpoints.seal(part, stage=stage.name, **facts)
    if first_process():
        checkpoints.remove(folder)
        checkpoints.publish(part, folder)
