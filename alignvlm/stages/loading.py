"""Loads what a stage starts from: its model, the collator of its rows, and its data."""

import copy

import torch
from transformers import PreTrainedConfig

from alignvlm.data.mixture import Mixture, load_mixture
from alignvlm.evaluation.load import load_weights
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.filling import TrainingRows, fill_rows, fill_stream
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.language_trial import last_position
from alignvlm.stages.lora import merge_saved_lora
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


def load_model(arguments: StageArguments) -> AlignVLMForConditionalGeneration:
    """Loads the model a stage starts from, in float32, and merges the LoRA weights of an earlier stage.

    Raises:
        ValueError: before any weights are read, if its language model cannot keep a mask type of the stage; and if the checkpoint lacks weights.
    """
    for name in arguments.mask_type_shares:
        AlignVLMConfig.from_pretrained(
            arguments.model, revision=arguments.model_revision, attention_mask_type=name
        ).check_mask_type()
    given = arguments.merge_image_tokens
    model = load_weights(
        AlignVLMForConditionalGeneration,
        arguments.model,
        revision=arguments.model_revision,
        attention_mask_type=arguments.attention_mask_type,
        attn_implementation=arguments.attn_implementation,
        dtype=torch.float32,  # master weights; fp16 and bf16 run under autocast
        **({} if given is None else {"merge_image_tokens": given or None}),
    )
    merge_saved_lora(model, arguments.model, arguments.model_revision)
    return model


def as_the_stage_merges(
    arguments: StageArguments, config: AlignVLMConfig, processor: AlignVLMProcessor
) -> tuple[AlignVLMConfig, AlignVLMProcessor]:
    """Copies configuration and processor of the checkpoint a stage starts from, with as many image tokens as the stage has.

    Raises:
        ValueError: if `merge_image_tokens` is no number of tokens that can be left.
    """
    config, processor = copy.deepcopy(config), copy.copy(processor)
    if arguments.merge_image_tokens is not None:
        config.merge_image_tokens = arguments.merge_image_tokens or None
        config.check_merging()
        processor.image_seq_length = config.image_seq_length
    return config, processor


def check_row_length(arguments: StageArguments, model: AlignVLMForConditionalGeneration) -> None:
    """Raises a `ValueError` if rows may be longer than the language model has positions; RoPE and ALiBi have no last one."""
    positions = last_position(model.model.language_model)
    if positions is not None and (arguments.max_length is None or arguments.max_length > positions):
        raise ValueError(
            f"max_length={arguments.max_length} allows rows of more tokens than the language model "
            f"{model.config.text_config.model_type!r} has positions, {positions}. Set max_length: {positions} or less."
        )


def make_collator(
    arguments: StageArguments, processor: AlignVLMProcessor, config: PreTrainedConfig
) -> AlignVLMCollator:
    """Makes the collator of a stage that starts from a model of this config.

    Raises:
        ValueError: if the language model cannot pack rows and `row_length` asks for it.
    """
    if arguments.row_length is not None and not config.packing:
        raise ValueError(
            f"row_length={arguments.row_length} packs rows, which the language model {config.text_config.model_type!r} cannot keep "
            "apart (packing is false in its config.json). Leave it out."
        )
    return AlignVLMCollator(
        processor,
        mask_type=list(arguments.mask_type_shares),
        max_length=arguments.max_length,
        shared_image=config.packing,
        pad_to_multiple_of=arguments.pad_to_multiple_of if isinstance(arguments.pad_to_multiple_of, int) else None,
        on_bad_image=arguments.on_bad_image,
        name_records=True,
    )


def make_mixture(
    arguments: StageArguments, collator: AlignVLMCollator, earlier_stages: list[dict], processes: int | None = None
) -> Mixture:
    """Mixes what a stage trains on; `earlier_stages` are those of the run record of its model."""
    return load_mixture(
        arguments.sources,
        collator.token_counts,
        arguments.data_dir,
        seed=arguments.order_seed,
        epochs=arguments.num_train_epochs,
        image_token_share=arguments.image_token_share,
        image_start_fraction=arguments.image_start_fraction,
        streaming=arguments.streaming,
        records=arguments.max_steps * arguments.records_per_step(processes) if arguments.max_steps > 0 else None,
        readers=(processes or arguments.world_size) * max(arguments.dataloader_num_workers, 1),
        earlier_stages=earlier_stages,
        max_bad_rows=arguments.bad_rows_allowed,
    )


def make_rows(arguments: StageArguments, mixture: Mixture, collator: AlignVLMCollator) -> TrainingRows:
    """Makes what the trainer reads of a mixture: its records, or with `row_length` rows that hold several. All processes must call this."""
    if arguments.row_length is None:
        return TrainingRows(mixture.dataset, mixture.sampler)
    if mixture.sampler is None:
        return fill_stream(mixture, collator, arguments.row_length, arguments.order_seed)
    return fill_rows(
        mixture,
        collator,
        arguments.row_length,
        arguments.per_device_train_batch_size,
        arguments.records_per_step(),
        epochs=arguments.num_train_epochs,
        steps=arguments.max_steps if arguments.max_steps > 0 else None,
        workers=arguments.dataloader_num_workers,
        context=arguments.dataloader_multiprocessing_context,
    )


def make_held_out(arguments: StageArguments, collator: AlignVLMCollator) -> Mixture | None:
    """Reads `eval_sources`; None without any."""
    if not arguments.eval_sources:
        return None
    return load_mixture(
        arguments.eval_sources, collator.token_counts, arguments.data_dir, max_bad_rows=arguments.bad_rows_allowed
    )
