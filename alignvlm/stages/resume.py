"""Resumes a stage: finds its checkpoint, and compares its settings and the data it has read with those of now."""

import json
import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers.utils import logging

from alignvlm.data.mixture import Mixture
from alignvlm.data.record import shown
from alignvlm.rows.filling import TrainingRows
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import is_complete, last_complete_checkpoint, read_progress
from hub_upload.package import RUN_RECORD


logger = logging.get_logger(__name__)

# What a run cannot change on the way: the optimizer's state keeps its own, or one checkpoint would be of two recipes.
SETTINGS = (
    *("stage", "method", "rewards", "reward_weights", "beta", "num_generations", "temperature"),
    *("learning_rates", "optim", "optim_args", "muon", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("mask_type_shares", "merge_image_tokens", "max_tiles", "tile_marks", "image_block"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "frozen_16_bit"),
    *("projector_start", "projector_start_records", "projector_start_ridge"),
    *("loss_type", "token_weighting", "embedding_loss", "embedding_loss_layer"),
)
# What of TRL's configs also decides what stage 5 samples and its loss, by method; a release of TRL need not have all of it.
SETTINGS_OF_METHOD = {
    "grpo": (
        *("max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
        *("chat_template_kwargs", "disable_dropout", "router_aux_loss_coef"),
        *("epsilon", "epsilon_high", "delta", "importance_sampling_level", "use_bias_correction_kl"),
        *("scale_rewards", "multi_objective_aggregation", "mask_truncated_completions", "off_policy_mask_threshold"),
        *("sapo_temperature_neg", "sapo_temperature_pos"),
        *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
        *("entropy_coef_delta", "entropy_target"),
    ),
    "dpo": (
        *("loss_weights", "label_smoothing", "ld_alpha", "use_weighting", "discopop_tau"),
        *("f_divergence_type", "f_alpha_divergence_coef", "disable_dropout", "router_aux_loss_coef"),
    ),
}
# What else decides which records, or how much of them, a step reads: the batches of prompts are those of GRPO.
READING = ("max_length", "dataloader_drop_last", "generation_batch_size", "num_iterations", "shuffle_dataset")


def checkpoint_to_resume(arguments: StageArguments) -> str | None:
    """Finds the checkpoint to go on from; None for a new run.

    Raises:
        ValueError: if there is none, if the one named was not written to its end, or if a run that starts anew would mix its
            checkpoints with those of another.
    """
    given, last = arguments.resume_from_checkpoint, last_complete_checkpoint(arguments.output_dir)
    if given in (None, False):
        if _is_finished(arguments):
            longer = (
                ""
                if last is None
                else "To train longer, go on with --resume_from_checkpoint and a larger max_steps or num_train_epochs. "
            )
            raise ValueError(
                f"The run in {arguments.output_dir!r} is finished. {longer}To train anew, name another output_dir, or remove this one."
            )
        if last is not None:
            raise ValueError(
                f"{arguments.output_dir!r} holds {last.name} of an earlier run. Go on from it with --resume_from_checkpoint, or name "
                "another output_dir."
            )
        return None
    if given in ("last", True):
        if last is None and _is_finished(arguments):
            raise ValueError(
                f"The run in {arguments.output_dir!r} is finished and kept no checkpoint-* folder to go on from. Its weights are the model "
                "that the next stage starts from; to train anew, name another output_dir."
            )
        if last is None:
            raise ValueError(
                f"Nothing to resume: {arguments.output_dir!r} holds no complete checkpoint-* folder. Start without the flag."
            )
        return str(last)
    if not is_complete(Path(given)):
        raise ValueError(f"Nothing to resume: {given!r} is no checkpoint-* folder that was written to its end.")
    return given


def check_unfinished(arguments: StageArguments, checkpoint: str | None, total_steps: int) -> None:
    """Refuses to go on with a run that has taken all its steps and written its checkpoint, or more steps than it is now to have.

    Raises:
        ValueError: for such a run.
    """
    if checkpoint is None:
        return
    steps = _step_of(checkpoint)
    if steps > total_steps and not _is_finished(arguments):
        raise ValueError(
            f"{checkpoint} has taken {steps} steps, and the run is now to have {total_steps} (max_steps, num_train_epochs and the data say how "
            f"many): give what it had, or more. To end with this checkpoint, name it as the model of the next stage."
        )
    if steps >= total_steps and _is_finished(arguments):
        raise ValueError(
            f"The run in {arguments.output_dir!r} is finished: {steps} of {total_steps} steps are taken, and its checkpoint is complete. "
            "To train longer, raise max_steps or num_train_epochs; to train anew, name another output_dir."
        )


def _is_finished(arguments: StageArguments) -> bool:
    """Tells whether a run in `output_dir` wrote its folder to the end, which the run record says last."""
    return (Path(arguments.output_dir) / RUN_RECORD).is_file()


def order_of_records(
    arguments: StageArguments, mixture: Mixture, rows: TrainingRows, record: dict[str, Any]
) -> dict[str, Any]:
    """Collects what decides which record is read when, and `settings`, as JSON decodes it: the contents of files count, not their paths.

    Args:
        record: the run record of the model that the stage starts from.
    """
    order = {
        "global_batch_size": arguments.records_per_step(),
        "sources": [{k: v for k, v in entry.items() if k not in ("data", "image_dir")} for entry in arguments.sources],
        "data": mixture.record(),
        "seed": arguments.order_seed,
        "streaming": arguments.streaming,
        "image_token_share": arguments.image_token_share,
        "texts_first": None if mixture.sampler is None else mixture.sampler.texts_first,
        "stream": _order_of_stream(arguments, rows) if arguments.streaming else None,
        **{name: getattr(arguments, name) for name in READING if hasattr(arguments, name)},
    }
    order |= {"rows": rows.description} if rows.description else {}
    names = (*SETTINGS, *SETTINGS_OF_METHOD.get(getattr(arguments, "method", None), ()))
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if len(given.get("mask_type_shares", {})) > 1:
        given["seed_of_mask_types"] = arguments.seed  # `data_seed` may be that of the records
    model = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]  # which it is, wherever it lies
    order["settings"] = {**given, "run_record_of_model": model}
    return json.loads(json.dumps(order))


def _order_of_stream(arguments: StageArguments, rows: TrainingRows) -> dict[str, int]:
    """Says what decides the order of a stream's records: how its readers are divided among processes, and those of one among its data workers.

    Of a stream with one reader every process reads all. A worker without a reader does nothing; others shuffle in another order than
    a process without workers.
    """
    readers, world_size = rows.dataset.num_shards, arguments.world_size
    processes = world_size if readers >= world_size else 1  # as accelerate does
    workers = min(arguments.dataloader_num_workers, math.ceil(readers / processes))
    order = {"processes": processes, "busy_workers": workers}
    if workers > 1:  # which take turns, a batch each
        order["records_per_turn"] = arguments.per_device_train_batch_size * world_size // processes
    if arguments.image_start_fraction:
        records = arguments.max_steps * arguments.records_per_step()
        order["texts_first"] = round(arguments.image_start_fraction * records)
    return order


def earlier_progress(arguments: StageArguments, checkpoint: str | None, order: dict[str, Any]) -> dict[str, Any]:
    """Reads how far the run had come at its checkpoint, as `AlignVLMTrainer.progress` tells it; {} for a new run.

    Raises:
        ValueError: if the run had other settings, or read other data, or in another order or batch size; the message says what differs.
    """
    if checkpoint is None:
        return {}
    progress, step = read_progress(checkpoint), _step_of(checkpoint)
    if progress is None:
        logger.warning(
            f"{checkpoint} does not say what its run read (it was written by an earlier version): that the data are the same is not "
            "checked, and seconds, train_loss and losses_of_data in the run record are those from here on."
        )
        return {"resumed_at": [step]}
    before, now = dict(progress["order"]), dict(order)
    settings, given = before.pop("settings", {}), now.pop("settings")  # earlier versions did not write all of them
    if others := list(differences(settings, {name: given.get(name) for name in settings})):
        raise ValueError(
            f"{checkpoint} was written by a run with other settings: {'; '.join(others[:5])}. Its weights and its optimizer go with what they "
            "were. Give the stage what it had, or begin anew in another output_dir."
        )
    # Earlier versions did not write all of it, and `rows` stands there only where rows are filled.
    others = list(differences(before, {name: value for name, value in now.items() if name in (*before, "rows")}))
    if others and not arguments.allow_other_data:
        raise ValueError(
            f"{checkpoint} was written by a run that read other data: {'; '.join(others[:5])}. To go on from step {step} would skip "
            "some records and read others twice. Give the stage what it had (for the same global batch size: "
            "per_device_train_batch_size x gradient_accumulation_steps x processes; of a stream as many processes and "
            "dataloader_num_workers), or go on all the same with --allow_other_data true."
        )
    return {**progress, "resumed_at": [*progress["resumed_at"], step]}


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Says where two values that JSON can hold differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now)):
            yield from differences(*pair, f"{name}[{index}]")
    elif before != now:
        yield f"{name} was {shown(before)} and is {shown(now)}"


def _step_of(checkpoint: str) -> int:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
