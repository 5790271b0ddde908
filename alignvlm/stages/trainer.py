"""The trainers of stages: what every one adds to TRL's (learning rates per module, throughput in the log), and that of stages 1 to 4."""

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from accelerate.utils import gather_object, parse_flag_from_env
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTTrainer

from alignvlm.data.record import shown
from alignvlm.rows.collator import count_images
from alignvlm.rows.packing import IGNORED
from alignvlm.stages.checkpoint import INTERRUPTED, PROGRESS, how_to_go_on, last_complete_checkpoint, write_licence
from alignvlm.stages.embedding_loss import HEAD, with_head
from alignvlm.stages.held_out import LabelWeighted, RepeatedToFill
from alignvlm.stages.log_lines import LIBRARY_CALLBACKS, RATE, LogLines, peak_memory_gb
from alignvlm.stages.lora import LORA_PREFIX, has_lora
from alignvlm.stages.losses import TOKEN_WEIGHTINGS, contrast_weights, length_weights, response_segments
from alignvlm.stages.mask_types import drawn_mask_type
from alignvlm.stages.optimizers import MuonAdamW, hidden_matrices
from alignvlm.stages.schedules import infinite_schedule
from alignvlm.stages.signals import EvaluationStopped, sheltered
from hub_upload.run_record import write_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration


logger = logging.get_logger(__name__)

MODULES = ("vision", "projector", "language")
# Under fp16 the scaler skips a step that overflows and halves its scale. It begins at 2^16, so this many in a row are no overflow.
MAX_SKIPPED_STEPS = 20
# What the trainer of stages 1 to 4 refuses, and what to do instead.
WITHOUT_LOGITS = {
    "compute_metrics": "Measure answers with `alignvlm evaluate`; the held-out loss comes without it.",
    "preprocess_logits_for_metrics": "Leave it out.",
    "compute_loss_func": "Choose a token_weighting, or override `compute_loss` in a subclass.",
    "label_smoothing_factor": "Leave it out.",
}


def module_of(parameter_name: str) -> str:
    """Returns the module, one of `MODULES` or `HEAD`, of a parameter of `AlignVLMForConditionalGeneration`, by its name."""
    if HEAD in parameter_name:
        return HEAD
    if "vision_tower." in parameter_name:
        return "vision"
    return "projector" if "projector." in parameter_name else "language"


def freeze_all_but(
    model: AlignVLMForConditionalGeneration, learning_rates: dict[str, float]
) -> dict[str, tuple[int, int]]:
    """Lets the named modules train and freezes the others; returns each module's (trainable, total) parameter counts.

    Of a language model with LoRA layers only these train.
    """
    counts = dict.fromkeys(MODULES, (0, 0))
    lora = has_lora(model)
    for name, parameter in model.named_parameters():
        module = module_of(name)
        parameter.requires_grad_(
            module in learning_rates and (module != "language" or not lora or LORA_PREFIX in name)
        )
        trainable, total = counts.get(module, (0, 0))
        counts[module] = (trainable + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return counts


def refuse_split_sequences(parallelism_config: ParallelismConfig | None) -> None:
    """Raises a `ValueError` if rows would be split among processes (context or sequence parallelism).

    The attention of split rows knows only the plain causal mask and drops any other without a word: images would be causal again,
    and the branches of a row would see each other.
    """
    if parallelism_config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        parallelism_config = ParallelismConfig()  # as `accelerate launch` has put it into the environment
    if parallelism_config is not None and (parallelism_config.cp_enabled or parallelism_config.sp_enabled):
        raise ValueError(
            f"cp_size={parallelism_config.cp_size}, sp_size={parallelism_config.sp_size}: context and sequence parallelism drop attention "
            "masks. Use DDP, FSDP or ZeRO, and activation checkpointing or smaller batches where memory is short."
        )


class StageTrainer:
    """What a stage adds to a trainer of TRL, the next of a class's bases.

    Args:
        learning_rates (`dict[str, float]`): the peak learning rate of each module that trains; a module not named is frozen.
        infinite_schedule (`dict`, *optional*): phases of `alignvlm.stages.schedules.infinite_factor`, instead of `lr_scheduler_type`.
        order (`dict`, *optional*): what decides which record is read when; goes into every checkpoint.
        earlier (`dict`, *optional*): the `progress` at the checkpoint the run will go on from.
        **kwargs: as for the trainer of TRL.

    A step whose gradients are not finite changes nothing: without a loss scaler it stops the run, with one it does after
    `MAX_SKIPPED_STEPS` in a row. A checkpoint that cannot be written is removed and stops the run.

    The log gains `images_per_second`, `annotations_per_second` and `tokens_per_second` (of all processes, padding not
    counted), each over the time since the last log that steps took; `padding_share`, the share of the rows' positions that hold no token;
    `learning_rate/MODULE` of each module that trains; `memory_gb`, the most that a process has held so far; and `seconds_left`. One line
    tells the most important of them, in place of transformers' dictionaries.
    """

    def __init__(
        self,
        model,
        learning_rates: dict[str, float],
        infinite_schedule: dict[str, float] | None = None,
        order: dict | None = None,
        earlier: dict | None = None,
        **kwargs,
    ):
        refuse_split_sequences(kwargs["args"].parallelism_config)
        self.order, self.earlier = order, earlier or {}
        self.infinite_schedule = infinite_schedule
        self.learning_rates = learning_rates
        self.parameter_counts = freeze_all_but(model, learning_rates)
        try:
            super().__init__(model=model, **kwargs)
        except (ValueError, ImportError) as error:  # of TRL's and transformers' checks of arguments
            raise ValueError(str(error)) from error
        self._keep_losses_exact()
        self._check_optimizer()
        # A checkpoint holds tied weights once. On resuming, the trainer ties them again where they are named here, else it warns.
        self.model._keys_to_ignore_on_save = sorted(self.model.all_tied_weights_keys) or None
        if getattr(self.args, "muon", False):
            self.check_complete_weights("muon")
        self._counts = torch.zeros(4, dtype=torch.float64)  # images, annotations, tokens, positions since the last log
        self._counted_since = time.perf_counter()
        self._group_modules: list[str] = []  # of each group of the optimizer
        self.run_record: Callable[[dict], dict] | None = None  # of a checkpoint-N, from `progress`
        self.saves_aside = False  # whether the next checkpoint is one that no save_steps asks for
        self.may_leave_evaluation = False  # by EvaluationStopped; not that of eval_on_start, before the first step
        for callback in LIBRARY_CALLBACKS:
            self.remove_callback(callback)
        self.add_callback(LogLines(getattr(self.args, "stage", 0)))
        self._keep_trackers_in_one_run()

        self._losses_of_data = Counter()
        self._bad: dict[str, list[str]] = {"bad_image": [], "bad_row": []}
        self._loss_sum, self._steps = 0.0, 0
        self._computed = Counter()
        self._train_started = time.perf_counter()
        self._train_seconds: float | None = None  # None: still training
        self._step_records: list[tuple[torch.Tensor, list[str]]] = []  # loss and records of the step's micro-batches
        self._record_names: list[str] = []
        self._skipped_steps = 0
        self._compared = False  # whether the gradients of the processes are known to be the same

    def _keep_losses_exact(self) -> None:
        """Under FSDP 2 in 16 bit, adds up gradients over processes and losses over tokens in fp32; accelerate asks for 16 bit there, too."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def _keep_trackers_in_one_run(self) -> None:
        """Lets trackers put what is measured before and after training where training goes; by themselves they begin other runs."""
        folder = Path(self.args.output_dir)
        if self.args.run_name is None:
            self.args.run_name = f"{folder.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / default_logdir())

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        workers = getattr(loader, "base_dataloader", loader)  # accelerate's holds torch's
        workers.worker_init_fn = sheltered(workers.worker_init_fn)
        # Of its own, for the seeds of workers: from torch's it would draw one each epoch or, where workers stay, one each start of a run.
        workers.generator = torch.Generator()
        return loader

    def progress(self) -> dict:
        """Reports what training has taken and dropped so far, in all processes and in all pieces of a run that was resumed.

        Returns:
            `seconds`; `steps` and the sum of their losses, `loss_sum`; `resumed_at`, the steps at which the run was resumed;
            `computed`: the `rows` with a label, their `tokens`, and the `positions` computed for them; `losses_of_data`, the dropped data: how many of each
            kind, and at most a thousand bad images and bad rows by name; and `order`.
        """
        found = gather_object([(self._loss_sum, dict(self._losses_of_data), self._bad, self._computed)])
        earlier = self.earlier.get("losses_of_data", {})
        lists = {
            f"{kind}_list": [
                *earlier.get(f"{kind}_list", []),
                *(name for _, _, bad, _ in found for name in bad[kind]),
            ][:1000]
            for kind in self._bad
        }
        counts = Counter({kind: count for kind, count in earlier.items() if kind not in lists})
        computed = Counter(self.earlier.get("computed", {}))
        for _, more, _, own in found:
            counts.update(more)
            computed.update(own)
        seconds = time.perf_counter() - self._train_started if self._train_seconds is None else self._train_seconds
        return {
            "seconds": self.earlier.get("seconds", 0.0) + seconds,
            "steps": self.earlier.get("steps", 0) + self._steps,
            "loss_sum": self.earlier.get("loss_sum", 0.0) + sum(loss for loss, *_ in found) / len(found),
            "resumed_at": self.earlier.get("resumed_at", []),
            "computed": dict(computed),
            "losses_of_data": {**counts, **lists},
            "order": self.order,
        }

    def check_trained(self) -> None:
        """Raises a `RuntimeError` if no step had anything to learn from. All processes must call this."""

    def _check_optimizer(self) -> None:
        """Raises a `ValueError` for an `optim` whose library is missing, before anything is measured or trained."""
        try:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, ValueError) as error:
            raise ValueError(f"optim={OptimizerNames(self.args.optim).value!r}: {error}") from error

    @property
    def is_sharded(self) -> bool:
        """Whether a process may hold only its share of the weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def check_complete_weights(self, option: str) -> None:
        """Raises a `ValueError` for an option that cannot be had where the weights are sharded."""
        if self.is_sharded:
            raise ValueError(f"{option} needs complete weights on every process: use one process or DDP.")

    def gathered_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Gathers sharded weights from all processes, which must all call this; None where the model holds all of them."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_sharded else None

    def note_losses(self, losses: list[dict[str, str]]) -> None:
        """Counts data that a collator dropped or cut, as `AlignVLMCollator` lists them; the first of a kind is told."""
        for loss in losses:
            kind, what = loss["kind"], f"{loss['source']}: {loss['what']}"
            self._losses_of_data[kind] += 1
            if kind in self._bad:
                self._bad[kind].append(what)
            elif self._losses_of_data[kind] == 1:
                logger.warning(f"{loss['source']}: {kind}: {loss['what']}. More of the kind are only counted.")

    def total_steps(self) -> int:
        """Counts the steps the run will have in the end.

        Raises:
            ValueError: if there are too few records for a step.
        """
        loader = self.get_train_dataloader()
        if has_length(loader) and not len(loader):
            raise ValueError(
                f"dataloader_drop_last drops all {len(self.train_dataset)} records: they do not fill a batch of "
                f"{self.args.per_device_train_batch_size} on each of {self.args.world_size} processes. Leave it out, or take a smaller batch."
            )
        return self.set_initial_training_values(self.args, loader)[-1]

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        """Leaves no epoch to a run that has taken all its steps; transformers' own would take one step more."""
        resumed = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else resumed

    def create_optimizer(self, model=None):
        """Makes one group per module, weight decay and (with `muon`) optimizer, each with its module's learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            use_muon = getattr(self.args, "muon", False)
            hidden = {id(parameter) for parameter in hidden_matrices([model])} if use_muon else set()
            groups: dict[tuple[str, bool, bool], list] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    kind = module_of(name), name in decayed, id(parameter) in hidden
                    groups.setdefault(kind, []).append(parameter)
            if use_muon:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                optimizer_class, options = MuonAdamW, {"betas": betas, "eps": self.args.adam_epsilon}
            else:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
                options.pop("lr", None)
            self._group_modules = [module for module, *_ in groups]
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.learning_rates[module],
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        **({"muon": muon} if use_muon else {}),
                    }
                    for (module, decay, muon), parameters in groups.items()
                ],
                lr=max(self.learning_rates.values()),
                **options,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.infinite_schedule is not None and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = infinite_schedule(
                self.optimizer if optimizer is None else optimizer,
                num_training_steps,
                warmup,
                **self.infinite_schedule,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _run_epoch(self, *args, **kwargs):
        """Tells the sampler which epoch it is. Where several processes resume within an epoch, it lies deeper in batch samplers than accelerate
        and transformers look, and would begin with the first epoch's order again."""
        batches = getattr(kwargs["train_dataloader"], "batch_sampler", None)
        while batches is not None:
            if hasattr(sampler := getattr(batches, "sampler", None), "set_epoch"):
                sampler.set_epoch(kwargs["epoch"])
            batches = getattr(batches, "batch_sampler", None)
        return super()._run_epoch(*args, **kwargs)

    def _forget_preparation(self) -> None:
        """Lets training prepare a model that was evaluated before. accelerate would take it for prepared and not put it into DDP, and every
        process would train apart."""
        if not self.is_sharded:  # a sharded model is evaluated as it is trained
            self.accelerator._models.clear()
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            if (forward := self.model.__dict__.pop("_original_forward", None)) is not None:  # without autocast
                self.model.forward = forward
            self.model_wrapped = self.model

    def train(self, *args, **kwargs):
        self._forget_preparation()
        self._counted_since = self._train_started = time.perf_counter()
        result = super().train(*args, **kwargs)
        self._train_seconds = time.perf_counter() - self._train_started
        return result

    def count(self, images: int, annotations: int, attention_mask: torch.Tensor) -> None:
        """Counts a batch for the log: its images, its annotations, and the tokens and positions of its rows `(rows, length)`."""
        self._counts += torch.tensor([images, annotations, int(attention_mask.sum()), attention_mask.numel()])

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_records.append((loss, self._record_names))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Stops before a step that would make weights not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        step_records, self._step_records = self._step_records, []
        self._loss_sum += sum(loss.item() for loss, _ in step_records if torch.isfinite(loss))
        self._steps += 1
        if not self._compared:
            self._check_processes_train_together(float(norm))
        if torch.isfinite(torch.as_tensor(norm)):
            self._skipped_steps = 0
            return norm
        self._skipped_steps += 1
        if self.accelerator.scaler is not None and self._skipped_steps < MAX_SKIPPED_STEPS:
            return norm
        # The norm is that of all processes, so all come here.
        bad = [name for loss, names in step_records if not torch.isfinite(loss) for name in names]
        every = [name for _, names in step_records for name in names]
        bad, every = gather_object([bad]), gather_object([every])
        bad_names = [name for names in bad for name in names] or [name for names in every for name in names]
        what = "the loss" if any(bad) else "the gradient"
        raise FloatingPointError(
            f"In step {self.state.global_step + 1} {what} is not finite"
            + (
                f", nor was any gradient of the {self._skipped_steps} steps up to it"
                if self._skipped_steps > 1
                else ""
            )
            + f". Its records: {', '.join(bad_names) or 'unknown'}. The weights are as before the step, and the last complete "
            f"checkpoint is {last_complete_checkpoint(self.args.output_dir)}. Look at these records, lower the learning rate, or train "
            "in bf16 or fp32."
        )

    def _check_processes_train_together(self, norm: float) -> None:
        norms = self.accelerator.gather(torch.tensor([norm], device=self.accelerator.device))
        if not norms.isfinite().all():  # nothing can be said before a step that is taken
            return
        norms = norms.tolist()
        if max(norms) - min(norms) > 1e-3 * max(norms):
            raise RuntimeError(
                f"The norms of the gradients are {', '.join(f'{each:g}' for each in norms)} on the {len(norms)} processes, which must be the same: they "
                "do not train together. Please report it, with what `alignvlm env` prints."
            )
        self._compared = True

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        self.may_leave_evaluation = True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        finally:
            self.may_leave_evaluation = False

    def _get_output_dir(self, trial):
        """Returns where the next checkpoint goes: one that no `save_steps` asked for neither pushes another out nor is averaged."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / INTERRUPTED) if self.saves_aside else folder

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeError(
                f"{folder} could not be written: {error}. {how_to_go_on(self.args.output_dir)}"
            ) from error
        if self.args.should_save:  # what an earlier interruption left is not needed any more
            for path in (Path(self.args.output_dir) / INTERRUPTED).glob("*"):
                if path != folder:
                    shutil.rmtree(path)
        self.saves_aside = False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        progress = self.progress()
        if self.is_world_process_zero():
            (Path(output_dir) / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
            if self.run_record is not None:
                write_run_record(output_dir, self.run_record(progress))
                if not has_lora(self.model):  # as a stage's own folder it can be packaged
                    write_licence(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which comes next, tells that a checkpoint is complete

    def evaluate(self, *args, **kwargs):
        with self.uncounted():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leaves the time of the block out of what the log says of a second."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._counted_since += time.perf_counter() - began

    def _get_learning_rate(self) -> float:
        self._rates = dict(zip(self._group_modules, (float(group["lr"]) for group in self.optimizer.param_groups)))
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            device = self.accelerator.device
            seconds = time.perf_counter() - self._counted_since
            counts = self.accelerator.reduce(self._counts.float().to(device), "sum").tolist()
            for name, count in zip(("images", "annotations", "tokens"), counts):
                logs[f"{name}_per_second"] = round(count / seconds, 2)
            logs["padding_share"] = round(1 - counts[2] / max(counts[3], 1), 4)
            logs |= {f"{RATE}{module}": rate for module, rate in self._rates.items()}
            memory = self.accelerator.gather(torch.tensor([peak_memory_gb(device)], device=device))
            logs["memory_gb"] = round(memory.max().item(), 3)
            done = self.state.global_step - self._initial_global_step
            elapsed = time.perf_counter() - self._train_started
            logs["seconds_left"] = round(elapsed / done * (self.state.max_steps - self.state.global_step))
            self._counts.zero_()
            self._counted_since = time.perf_counter()
        if "train_runtime" in logs and self.earlier:  # of the pieces before, too, as `progress` counts them
            steps, loss_sum = self.earlier.get("steps", 0), self.earlier.get("loss_sum", 0.0)
            logs["train_loss"] = (loss_sum + logs["train_loss"] * self._steps) / max(steps + self._steps, 1)
            logs["train_runtime"] += self.earlier.get("seconds", 0.0)
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Leaves the card to the stage, which writes it from its run record."""


class AlignVLMTrainer(StageTrainer, SFTTrainer):
    """Trains stages 1 to 4.

    Args:
        sampler (`MixtureSampler`, *optional*): the order of the training records; by default the trainer's own.
        max_bad_images (`float`): stop when more than this share of the records read had an unreadable image.
        token_weighting (`str`): `none`, `length` or `contrast`: see `alignvlm/stages/losses.py`.
        embedding_loss (`float`): the weight of this loss, where the model has a head for it; see `alignvlm/stages/embedding_loss.py`.
            The head trains at the highest of the learning rates.
        mask_types (`dict[str, float]`, *optional*): shares of mask types, of which every step draws one; None: the model's own.
        max_bad_rows (`float`): the same for rows of a stream that cannot be used.
        **kwargs: as for `StageTrainer` and `SFTTrainer`, but for `WITHOUT_LOGITS`; `data_collator` must be an `AlignVLMCollator`.
    """

    def __init__(
        self,
        model,
        learning_rates: dict[str, float],
        sampler: torch.utils.data.Sampler | None = None,
        max_bad_images: float = 0.0,
        token_weighting: str = "none",
        embedding_loss: float = 0.0,
        mask_types: dict[str, float] | None = None,
        max_bad_rows: float = 0.0,
        **kwargs,
    ):
        if token_weighting not in TOKEN_WEIGHTINGS:
            raise ValueError(
                f"Unknown token_weighting {token_weighting!r}. Valid values: {', '.join(TOKEN_WEIGHTINGS)}."
            )
        given = {**kwargs, "label_smoothing_factor": kwargs["args"].label_smoothing_factor}
        for name, remedy in WITHOUT_LOGITS.items():
            if given.get(name):
                raise ValueError(
                    f"{name} needs the logits of whole rows, and the head is applied only where there is a label. {remedy}"
                )
        self.sampler = sampler
        self.max_bad = {"bad_image": max_bad_images, "bad_row": max_bad_rows}
        self.token_weighting, self.mask_types, self.embedding_loss = token_weighting, mask_types, embedding_loss
        self._embedding_losses: list[torch.Tensor] = []  # of the micro-batches since the last log
        self._embedding_steps = 0  # since the last log
        self._image_tokens = 0  # of the step, all its micro-batches and processes
        if embedding_loss:
            learning_rates = {**learning_rates, HEAD: max(learning_rates.values())}
        super().__init__(model, learning_rates, **kwargs)
        self._records_read = 0
        self._held_out = LabelWeighted()

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def _prepare_inputs(self, inputs):
        """Takes the dropped data out of the batch, and stops the run when too many images or rows are bad."""
        losses = inputs.pop("losses_of_data", [])
        self._record_names = inputs.pop("record_names", [])
        records = inputs.pop("records_read", self.args.per_device_train_batch_size)
        if self.model.training:
            self.note_losses(losses)
            self._records_read += records
            for kind, bad in self._bad.items():
                # Below a thousand records the share says little: a few bad ones may come early.
                if len(bad) > self.max_bad[kind] * max(self._records_read, 1000):
                    what = (
                        "had an image that cannot be read"
                        if kind == "bad_image"
                        else "came of rows that cannot be used"
                    )
                    raise RuntimeError(
                        f"{len(bad)} of {self._records_read} records {what}, more than max_{kind}s={self.max_bad[kind]:g}. "
                        f"The last: {bad[-1]}"
                    )
        return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"]
        starts = (labels[:, 1:] != IGNORED) & (labels[:, :-1] == IGNORED)
        self.count(count_images(inputs), int(starts.sum()), inputs["attention_mask"])
        tokens, trained = inputs["attention_mask"].sum(-1), (labels != IGNORED).any(-1)
        self._computed += {
            "tokens": int(tokens[trained].sum()),
            "positions": labels.numel(),
            "rows": int(trained.sum()),
        }
        with self._drawn_mask_type():
            return super().training_step(model, inputs, *args, **kwargs)

    def check_trained(self) -> None:
        progress = self.progress()
        if self._steps and not progress["computed"].get("rows"):
            dropped = {kind: count for kind, count in progress["losses_of_data"].items() if isinstance(count, int)}
            raise RuntimeError(
                f"No record was trained on, so no checkpoint is written: all were dropped ({shown(dropped)}). Raise max_length, or look at "
                "the data with `alignvlm data`."
            )

    @contextmanager
    def _drawn_mask_type(self) -> Iterator[None]:
        """Puts the model under the mask type that is drawn for this step, where the stage mixes several."""
        if self.mask_types is None:
            yield
            return
        config, own = self.model.config, self.model.config.attention_mask_type
        config.attention_mask_type = drawn_mask_type(self.mask_types, self.args.seed, self.state.global_step)
        try:
            yield
        finally:
            config.attention_mask_type = own

    def _get_dataloader(self, dataset, *args, is_training=False, **kwargs):
        """Drops no held-out record, and counts none twice: see `RepeatedToFill`."""
        if not is_training and (self.args.world_size > 1 or self.args.dataloader_drop_last):
            dataset = RepeatedToFill(dataset, self.args.eval_batch_size * self.args.world_size)
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Measures the held-out loss and TRL's metrics over all labels of all processes; by itself the trainer averages batches."""
        self._held_out = LabelWeighted()
        self._metrics["eval"].clear()  # of an evaluation that was left on its way
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, metrics = self._held_out.average(self.accelerator, self._metrics["eval"])
        self._metrics["eval"].update(metrics)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        records = getattr(dataloader.dataset, "records", dataloader.dataset)
        return output._replace(num_samples=len(records))

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Measures the loss alone, for `predict` too: no logits belong to the labels of whole rows."""
        loss = super().prediction_step(model, inputs, prediction_loss_only=True)[0]
        self._held_out.add(loss, (inputs["labels"][:, 1:] != IGNORED).sum().to(loss.device))
        return loss, None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes the loss of the labels, and in training adds that of `embedding_loss`, averaged over the image tokens of the step."""
        if not self.embedding_loss or not self.model.training:
            return self._loss_of_labels(model, inputs, return_outputs, num_items_in_batch)
        sums = []

        def noting(**kwargs):
            outputs = model(**kwargs)
            sums.append(outputs.loss)
            return outputs

        with with_head(self.model):
            loss = self._loss_of_labels(
                noting, {**inputs, "output_hidden_states": True}, num_items_in_batch=num_items_in_batch
            )
        found = sums[0] / max(self._image_tokens, 1)
        if self.args.average_tokens_across_devices:
            found = found * self.accelerator.num_processes  # whose gradients are averaged
        self._embedding_losses.append(found.detach())
        return loss + self.embedding_loss * found

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collects the micro-batches of a step, and counts their image tokens for `embedding_loss`, as transformers counts labels."""
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.embedding_loss and batches:
            tokens = sum((batch["input_ids"] == self.model.config.image_token_id).sum() for batch in batches).to(
                device
            )
            if self.args.average_tokens_across_devices:
                tokens = self.accelerator.reduce(tokens, "sum")
            self._image_tokens = int(tokens)
            self._embedding_steps += 1
        return batches, labels

    def _loss_of_labels(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes TRL's loss, with the head applied only where there is a label, on every device (by itself TRL does so on CUDA).

        With a `token_weighting`, the sum of the weighted losses of all labels, divided by their number.
        """
        inputs = dict(inputs)
        # At each position, the token that comes next.
        labels = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        keep = labels != IGNORED
        keep[0, 0] |= ~keep.any()  # a batch without labels still needs a graph to go backward through
        inputs |= {"shift_labels": labels[keep].unsqueeze(0), "positions_to_keep": keep}
        if self.token_weighting == "none" or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        found = []

        def remembering(**kwargs):
            found.append(model(**kwargs))
            return found[0]

        super().compute_loss(remembering, dict(inputs), num_items_in_batch=num_items_in_batch)  # for TRL's metrics
        (outputs,) = found
        # A label and the position it is predicted at belong to the same response: a branch's first token has no label.
        segments = response_segments(inputs["record_ids"], inputs["branch_ids"])[keep]
        if self.token_weighting == "length":
            weights = length_weights(segments)
        else:
            with torch.no_grad():
                blind = model(**self._without_image(inputs), fused_lm_head=True)
            weights = contrast_weights(outputs.log_probs.detach()[0], blind.log_probs[0], segments)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(weights * outputs.log_probs[0]).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return loss

    def _without_image(self, inputs: dict) -> dict:
        """Hides the image tokens of the rows from all others."""
        is_image = inputs["input_ids"] == self.model.config.image_token_id
        return {**inputs, "attention_mask": inputs["attention_mask"].masked_fill(is_image, 0), "use_cache": False}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._embedding_losses and self.model.training and "loss" in logs:
            total = self.accelerator.reduce(torch.stack(self._embedding_losses).sum(), "mean")
            logs["embedding_loss"] = total.item() / self._embedding_steps
            self._embedding_losses.clear()
            self._embedding_steps = 0
        super().log(logs, start_time)
