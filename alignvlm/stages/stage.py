"""One training stage: load, prepare, train, finish.

What a stage trains, at which learning rates, under which mask and on which sources stands in its YAML file and nowhere else:

    accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml [--any_field value]
"""

import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import logging

from alignvlm.data.mixture import Mixture
from alignvlm.evaluation.load import check_checkpoint
from alignvlm.evaluation.precision import warn_if_emulated
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.filling import TrainingRows
from alignvlm.rows.tiles import describe_tiles
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import (
    INTERRUPTED,
    check_no_other_model,
    check_room,
    check_writable,
    how_to_go_on,
    last_complete_checkpoint,
    only_writer,
    save_checkpoint,
)
from alignvlm.stages.command_line import parse_fields
from alignvlm.stages.features import KeptFeatures
from alignvlm.stages.loading import (
    as_the_stage_merges,
    check_row_length,
    load_model,
    make_collator,
    make_held_out,
    make_mixture,
    make_rows,
)
from alignvlm.stages.log_lines import bars_in_a_terminal_only, say
from alignvlm.stages.mask_types import described, mask_types_record
from alignvlm.stages.metrics import StageMetrics
from alignvlm.stages.options import Nested, StageOption
from alignvlm.stages.projector_start import ProjectorStart, check_new_projector
from alignvlm.stages.resume import check_unfinished, checkpoint_to_resume, earlier_progress, order_of_records
from alignvlm.stages.samples import SampleAnswers
from alignvlm.stages.signals import Interrupted, StopOnSignal
from alignvlm.stages.tiles import cut_images
from alignvlm.stages.trainer import AlignVLMTrainer, StageTrainer
from alignvlm.stages.weights import HELD, WRITTEN, asked_for
from hub_upload.commit import free_tag, is_public
from hub_upload.licences import given_licence, licence_of
from hub_upload.push import push
from hub_upload.repository import commit_of
from hub_upload.run_record import library_versions, read_run_record
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.configuration_alignvlm import OFF


logger = logging.get_logger(__name__)

LOGGED = (
    "step",
    "loss",
    "embedding_loss",
    "learning_rate",
    "images_per_second",
    "tokens_per_second",
    "padding_share",
    "memory_gb",
)
LOGGED += ("reward", "reward_std", "frac_reward_zero_std", "rewards", "entropy", "kl", "completions")  # of stage 5


def make_trainer(
    arguments: StageArguments,
    model: AlignVLMForConditionalGeneration,
    collator: AlignVLMCollator,
    mixture: Mixture,
    rows: TrainingRows,
    held_out: Mixture | None,
    **progress: Any,
) -> tuple[AlignVLMTrainer, list[StageOption]]:
    """Makes the trainer of stages 1 to 4 and the options that only they have; `progress` as for `StageTrainer`."""
    check_row_length(arguments, model)
    trainer = AlignVLMTrainer(
        model,
        learning_rates=arguments.learning_rates,
        sampler=rows.sampler,
        max_bad_images=arguments.max_bad_images,
        max_bad_rows=arguments.max_bad_rows,
        token_weighting=arguments.token_weighting,
        embedding_loss=arguments.embedding_loss,
        mask_types=arguments.mask_type_shares,
        infinite_schedule=arguments.infinite_schedule,
        args=arguments,
        data_collator=collator,
        train_dataset=rows.dataset,
        eval_dataset=None if held_out is None else held_out.dataset,
        processing_class=collator.processor,
        **progress,
    )
    start = ProjectorStart.of(arguments, trainer, collator, mixture)
    return trainer, [*start, *KeptFeatures.of(arguments, trainer, collator)]


def run_stage(arguments: StageArguments, make_trainer: Callable = make_trainer) -> dict[str, Any]:
    """Runs one stage and writes its checkpoint to `output_dir`; returns the stage's entry in the run record.

    Args:
        make_trainer: makes the stage's trainer and options, as the function of this name does.
    """
    check_checkpoint(arguments.model, arguments.model_revision)
    check_no_other_model(arguments.output_dir)
    check_writable(arguments.output_dir)
    warn_if_emulated(arguments.chosen_precision, arguments.device)
    with only_writer(arguments.output_dir):
        return _run_stage(arguments, make_trainer)


def _run_stage(arguments: StageArguments, make_trainer: Callable) -> dict[str, Any]:
    # Load
    set_seed(arguments.seed)
    resume_from = checkpoint_to_resume(arguments)
    record = read_run_record(arguments.model, arguments.model_revision)
    commit = commit_of(arguments.model, arguments.model_revision)
    _check_push(arguments, record)
    check_new_projector(arguments, record)
    held, written = asked_for(arguments, HELD), asked_for(arguments, WRITTEN)
    processor = AlignVLMProcessor.from_pretrained(arguments.model, revision=arguments.model_revision)
    model = load_model(arguments)
    if PartialState().is_main_process:
        check_room(arguments.output_dir, model)
    _tell_of_another_mask_type(arguments, record)
    _, processor = as_the_stage_merges(arguments, model.config, processor)
    cut_images(arguments, model.config, processor)

    # Prepare
    nested = Nested(model)
    nested.enter(*held)
    collator = make_collator(arguments, processor, model.config)
    with PartialState().main_process_first():  # datasets writes its cache once
        mixture = make_mixture(arguments, collator, record["stages"])
        held_out = make_held_out(arguments, collator)
    rows = make_rows(arguments, mixture, collator)
    order = order_of_records(arguments, mixture, rows, record)
    earlier = earlier_progress(arguments, resume_from, order)
    trainer, own = make_trainer(arguments, model, collator, mixture, rows, held_out, order=order, earlier=earlier)
    samples = SampleAnswers.of(arguments, trainer, collator, mixture, held_out)
    for option in (*held, *own, *samples, *written):
        option.check(trainer)
    check_unfinished(arguments, resume_from, trainer.total_steps())
    entry = partial(_entry, arguments, commit, trainer, mixture, rows, held_out)
    trainer.run_record = lambda progress: {
        **record,
        "stages": [*record["stages"], entry(progress) | {"unfinished": True, "of_steps": trainer.state.max_steps}],
    }
    if trainer.is_world_process_zero():
        print(_describe(arguments, trainer.parameter_counts, trainer.learning_rates, mixture, rows), flush=True)

    # Train
    nested.enter(*own, StageMetrics(arguments, trainer, collator), *samples, *written)
    _train(arguments, trainer, resume_from)
    trainer.check_trained()

    # Finish
    options = nested.leave()
    finished = entry(trainer.progress()) | options
    record["stages"].append(finished)
    state_dict = trainer.gathered_state_dict()
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        try:
            save_checkpoint(model, processor, arguments.output_dir, record, state_dict)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"The stage is trained, but {arguments.output_dir} could not be written: {error}. {how_to_go_on(arguments.output_dir)}"
            ) from error
        shutil.rmtree(Path(arguments.output_dir) / INTERRUPTED, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():  # nobody has to wait for it
        _push(arguments)
    return finished


def _tell_of_another_mask_type(arguments: StageArguments, record: dict[str, Any]) -> None:
    """Warns of a stage that gives a trained checkpoint another mask type, which a recipe without the line may not mean."""
    if not record["stages"] or not PartialState().is_main_process:
        return
    before = AlignVLMConfig.from_pretrained(arguments.model, revision=arguments.model_revision).attention_mask_type
    if before not in arguments.mask_type_shares:
        logger.warning(
            f"{arguments.model} was trained under the mask type {before!r}, and this stage trains under {described(arguments.mask_type_shares)}. "
            f"To go on under it: attention_mask_type: {before}"
        )


def _train(arguments: StageArguments, trainer: StageTrainer, resume_from: str | None) -> None:
    """Trains to the end.

    Raises:
        Interrupted: if a signal came before; the checkpoint to go on from is then written, and the output says how.
    """
    if not arguments.save_on_signal:
        trainer.train(resume_from_checkpoint=resume_from)
        return
    with StopOnSignal(trainer).listening() as stop:
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.accelerator.wait_for_everyone()
        if stop.stopped is not None:
            if trainer.is_world_process_zero():
                say(_how_to_go_on(stop.stopped, trainer, arguments.resume_from_checkpoint))
            raise Interrupted(stop.stopped)


def _how_to_go_on(number: int, trainer: StageTrainer, given: str | None) -> str:
    """Says where a signal stopped the run, and what to do to go on."""
    how = "the same command" if given in ("last", True) else "the same command and --resume_from_checkpoint"
    return (
        f"Stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of {trainer.state.max_steps}. "
        f"{last_complete_checkpoint(trainer.args.output_dir)} is complete. Go on with {how}."
    )


def _entry(
    arguments: StageArguments,
    commit: str | None,
    trainer: StageTrainer,
    mixture: Mixture,
    rows: TrainingRows,
    held_out: Mixture | None,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """Collects what the run record says of the stage, but for its options and metrics.

    Args:
        commit: of the model the stage began with, if it came from the Hub.
        progress: `trainer.progress()`.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    layers = {"vision_feature_layer": config.feature_layers} if len(config.feature_layers) > 1 else {}
    return {
        "stage": arguments.stage,
        "model": arguments.model,
        "model_revision": commit,
        "learning_rates": arguments.learning_rates,
        "attention_mask_type": arguments.attention_mask_type,
        **mask_types_record(arguments.mask_type_shares, arguments.seed, trainer.state.global_step),
        **layers,
        **{name: getattr(config, name) for name, off in OFF.items() if getattr(config, name) != off},
        **describe_tiles(config, trainer.processing_class),
        "sources": arguments.sources,
        "data": mixture.record(),
        "records": None if mixture.draws is None else sum(mixture.draws),
        "losses_of_data": _with_bad_rows(progress["losses_of_data"], mixture, held_out),
        "evaluation_tag": arguments.evaluation_tag,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "seed": arguments.seed,
        "precision": arguments.chosen_precision.name,
        "precision_reason": arguments.chosen_precision.reason,
        **arguments.optimization_record(),
        "settings": arguments.settings(),
        **_filled(rows, progress["computed"]),
        "processes": arguments.world_size,
        "seconds": round(progress["seconds"], 1),
        "resumed_at": progress["resumed_at"],
        "train_loss": progress["loss_sum"] / progress["steps"] if progress["steps"] else None,
        "logged_losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "log": [_logged(entry) for entry in trainer.state.log_history if "loss" in entry],
        "versions": library_versions(),
    }


def _filled(rows: TrainingRows, computed: dict[str, int]) -> dict[str, Any]:
    """Says of rows that hold several records how full those were that have been trained."""
    if not rows.description:
        return {}
    full, padded = (computed["rows"] * rows.description["row_length"], computed["positions"])
    shares = {
        name: round(computed["tokens"] / max(count, 1), 4) for name, count in (("fill", full), ("padded", padded))
    }
    return {"rows": {**rows.description, "fill": shares["fill"], "padding_share": round(1 - shares["padded"], 4)}}


def _logged(entry: dict[str, Any]) -> dict[str, Any]:
    """Picks of a line of the log what the run record keeps; `learning_rate/MODULE` comes with `learning_rate`."""
    return {name: value for name, value in entry.items() if name.split("/")[0] in LOGGED}


def _with_bad_rows(dropped: dict[str, Any], mixture: Mixture, held_out: Mixture | None) -> dict[str, Any]:
    """Adds to the dropped data of training the rows that were left out when the sources were read."""
    bad = [*mixture.bad_rows, *(f"eval_sources: {row}" for row in (held_out.bad_rows if held_out else []))]
    counts = {"bad_row": dropped.get("bad_row", 0) + len(bad)} if bad else {}
    return {**dropped, **counts, "bad_row_list": [*bad, *dropped["bad_row_list"]][:1000]}


def _describe(
    arguments: StageArguments,
    counts: dict[str, tuple[int, int]],
    rates: dict[str, float],
    mixture: Mixture,
    rows: TrainingRows,
) -> str:
    """Says for the log what is frozen and what trains."""
    records = "a stream of" if mixture.draws is None else f"{sum(mixture.draws):,}"
    lines = [f"Stage {arguments.stage}: {records} records, {described(arguments.mask_type_shares)}"]
    lines += [f"  {rows}"] if rows.description else []
    lines.append(f"  {_step_of(arguments)}")
    lines.append(f"  precision {arguments.chosen_precision}")
    for module, (trainable, total) in counts.items():
        rate = rates.get(module)
        state = "frozen" if rate is None else f"trains at {rate:g}"
        lines.append(f"  {module:<10} {total:>13,} parameters, {trainable:>13,} trainable: {state}")
    return "\n".join(lines)


def _step_of(arguments: StageArguments) -> str:
    """Says how a step's records are divided; that fewer processes run than were meant is seen nowhere else."""
    unit = "records" if arguments.row_length is None else "rows"
    processes, accumulated = arguments.world_size, arguments.gradient_accumulation_steps
    batch = f"{arguments.per_device_train_batch_size} in {'one process' if processes == 1 else f'each of {processes} processes'}"
    times = f", {accumulated} times" if accumulated > 1 else ""
    return f"{arguments.records_per_step():,} {unit} a step: {batch}{times}"


def _check_push(arguments: StageArguments, record: dict[str, Any]) -> None:
    """Asks for the licence that a push needs before anything is trained, if it is not known or not one that the Hub knows."""
    if arguments.push_to and not given_licence(arguments.push_license):
        licence_of(record)


def _push(arguments: StageArguments) -> None:
    """Pushes the finished stage where `push_to` asks for it; a failure is logged and does not stop the run."""
    if not arguments.push_to:
        return
    tag = f"stage{arguments.stage}"
    try:
        tag = free_tag(arguments.push_to, tag)
        pushed = push(arguments.output_dir, arguments.push_to, private=None, tag=tag, license=arguments.push_license)
    except Exception as error:  # whatever it is
        again = ["python", "hub_upload/push.py", str(arguments.output_dir), arguments.push_to, "--tag", tag]
        again += ["--license", arguments.push_license] if arguments.push_license else []
        again += ["--public"] if is_public(arguments.push_to) else []
        logger.error(
            f"The push did not succeed: {error}\nThe checkpoint is complete in {arguments.output_dir}. Try again: {shlex.join(again)}"
        )
    else:
        print("\n".join([*pushed.notes(), f"Pushed, tag {tag}. To load it:", pushed.how_to_load()]), flush=True)


def main(argv: list[str] | None = None, report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Parses command line and YAML into `StageArguments` and runs the stage; a field nobody knows is an error.

    Args:
        report: called with the output folder of the finished stage, on the main process, unless the recipe says `report: false`.
    """
    (arguments,) = parse_fields(sys.argv[1:] if argv is None else argv, StageArguments)
    return launch(partial(run_stage, arguments), arguments, report)


def launch(
    run: Callable[[], dict[str, Any]], arguments: StageArguments, report: Callable[[str], None] | None
) -> dict[str, Any]:
    """Runs a stage as a script does, with the report after it and the processes' group closed; returns what `run` returns."""
    bars_in_a_terminal_only()
    try:
        entry = run()
    except Interrupted:
        PartialState().destroy_process_group()
        raise
    if report is not None and arguments.report and PartialState().is_main_process:
        report(arguments.output_dir)
    PartialState().destroy_process_group()  # its threads can abort the process if they outlive the interpreter
    return entry
