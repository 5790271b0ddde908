"""Stage 5, rewards and preferences: what it has of its own; all else is a stage like others (`alignvlm/stages/stage.py`)."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import mean
from typing import Any

from accelerate.utils import gather_object

from alignvlm.data.mixture import Mixture, Part
from alignvlm.data.record import Conversation
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.rewards import CIDER, Reward, make_rewards
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.filling import TrainingRows
from alignvlm.rows.preferences import PreferenceCollator
from alignvlm.stages.language_trial import last_position
from alignvlm.stages.loading import check_row_length
from alignvlm.stages.options import Measurement, StageOption
from alignvlm.stages.prompts import conversations_of, preferences, prompts
from alignvlm.stages.reward_arguments import WHOLE_IMAGES, GRPOArguments, RewardArguments, parse_rewards
from alignvlm.stages.reward_trainers import DPOStageTrainer, GRPOStageTrainer
from alignvlm.stages.samples import undisturbed
from alignvlm.stages.stage import launch, run_stage
from alignvlm.stages.tiles import check_not_cut
from alignvlm.stages.trainer import StageTrainer
from modeling_alignvlm import AlignVLMForConditionalGeneration


def make_trainer(
    arguments: RewardArguments,
    model: AlignVLMForConditionalGeneration,
    collator: AlignVLMCollator,
    mixture: Mixture,
    rows: TrainingRows,
    held_out: Mixture | None,
    **progress: Any,
) -> tuple[StageTrainer, list[StageOption]]:
    """Makes the trainer of the stage's method, and the option that measures rewards; `progress` as for `StageTrainer`.

    Both methods read prompts of their own from the mixture, not the `rows` of the other stages.

    Raises:
        ValueError: for data that the method cannot learn from.
    """
    check_not_cut(collator.processor, WHOLE_IMAGES)
    asked = list(conversations_of(mixture.parts))
    said = [(mixture.parts[place["part"]], conversation) for place, conversation in asked]
    captions = [conversation.responses for part, conversation in said if part.source.metric_of(conversation) == CIDER]
    rewards = make_rewards(arguments.rewards, captions)
    common = {
        "learning_rates": arguments.learning_rates,
        "infinite_schedule": arguments.infinite_schedule,
        "args": arguments,
        "processing_class": collator.processor,
        **progress,
    }
    if isinstance(arguments, GRPOArguments):
        _check_judged(said, rewards)
        _check_room(arguments, model, _prompt_lengths(collator, said))
        needed = arguments.generation_batch_size // arguments.num_generations
        if len(said) < needed:
            raise ValueError(
                f"The sources hold {len(said)} prompts, and a step takes {needed}. Name more, or lower per_device_train_batch_size."
            )
        reference = _reference(model) if arguments.beta else None
        trainer = GRPOStageTrainer(
            model, reference=reference, reward_funcs=list(rewards), train_dataset=prompts(mixture.parts), **common
        )
    else:
        check_row_length(arguments, model)
        pairs = preferences(mixture.parts)
        if arguments.max_length is not None:
            names = [f"{part.name}[{place['record']}]" for (place, _), (part, _) in zip(asked, said)]
            _check_prompts(arguments.max_length, names, _prompt_lengths(collator, said))
        trainer = DPOStageTrainer(
            model,
            ref_model=_reference(model),
            train_dataset=pairs,
            data_collator=PreferenceCollator(collator, arguments.max_length),
            **common,
        )
    trainer.check_complete_weights("stage 5")
    measured = held_out is not None and bool(rewards)
    return trainer, [HeldOutRewards(trainer, collator, held_out, rewards, arguments)] if measured else []


def _reference(model: AlignVLMForConditionalGeneration) -> AlignVLMForConditionalGeneration:
    """Returns a copy of the model that stays as it is."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _check_judged(said: list[tuple[Part, Conversation]], rewards: list[Reward]) -> None:
    """Raises a `ValueError` if no reward judges any answer of the sources: they would teach nothing."""
    metrics = {part.source.metric_of(conversation) for part, conversation in said}
    if not any(reward.judges(metric) for reward in rewards for metric in metrics):
        names = ", ".join(reward.name for reward in rewards)
        raise ValueError(f"The rewards ({names}) judge no answer of these sources. Name others, or another reward.")


def _prompt_lengths(collator: AlignVLMCollator, said: list[tuple[Part, Conversation]]) -> Iterator[int]:
    """Counts the tokens of each prompt, with the tag of its source."""
    for part, conversation in said:
        yield len(collator.encoder.prompt(conversation.with_prefix(part.tag).messages))


def _check_prompts(max_length: int, names: list[str], lengths: Iterable[int]) -> None:
    """Raises a `ValueError` if prompts leave no room for an answer."""
    long = [(name, length) for name, length in zip(names, lengths) if length >= max_length]
    if long:
        records = list(dict.fromkeys(name for name, _ in long))
        more = ", ..." if len(records) > 5 else ""
        raise ValueError(
            f"max_length={max_length} leaves no room for an answer after the prompts of {len(records)} record(s): {', '.join(records[:5])}{more}. "
            f"Set max_length: {max(length for _, length in long) + 1} or more, or leave them out."
        )


def _check_room(
    arguments: GRPOArguments, model: AlignVLMForConditionalGeneration, prompt_lengths: Iterable[int]
) -> None:
    """Raises a `ValueError` if a prompt and its answer may have more tokens than the language model has positions."""
    positions = last_position(model.model.language_model)
    if positions is None:
        return
    longest = max(prompt_lengths)
    if longest + arguments.max_completion_length > positions:
        raise ValueError(
            f"The longest prompt has {longest} tokens, which with max_completion_length={arguments.max_completion_length} is more than the "
            f"language model {model.config.text_config.model_type!r} has positions, {positions}. Set max_completion_length: "
            f"{max(positions - longest, 1)} or less, or leave out longer prompts."
        )


class HeldOutRewards(Measurement):
    """Measures the mean rewards of greedy answers to `eval_sources`, before and after: `eval_REWARD_before`, `eval_REWARD_after`."""

    def __init__(
        self,
        trainer: StageTrainer,
        collator: AlignVLMCollator,
        held_out: Mixture,
        rewards: list[Reward],
        arguments: RewardArguments,
    ):
        super().__init__()
        self.trainer, self.collator, self.rewards, self.arguments = trainer, collator, rewards, arguments
        self.prompts = prompts(held_out.parts)

    def measure(self) -> dict[str, float | None]:
        """Lets every process answer its part of the prompts."""
        accelerator = self.trainer.accelerator
        own = [self.prompts[k] for k in range(accelerator.process_index, len(self.prompts), accelerator.num_processes)]
        found = gather_object(list(zip(self._answers(own), own)))
        columns = {
            name: [example[name] for _, example in found] for name in ("references", "metric", "kinds", "choices")
        }
        means: dict[str, float | None] = {}
        for reward in self.rewards:
            values = reward([None] * len(found), [text for text, _ in found], **columns)
            judged = [value for value in values if value is not None]
            means[f"eval_{reward.name}"] = mean(judged) if judged else None
        self.trainer.log({name: value for name, value in means.items() if value is not None})
        return means

    def _answers(self, examples: list[dict[str, Any]]) -> list[str]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.trainer.uncounted(), undisturbed(model), self.trainer.accelerator.autocast():
            groups = answer(
                model,
                self.collator.processor,
                [example["images"] for example in examples],
                [[example["prompt"]] for example in examples],
                max_new_tokens=self.arguments.max_completion_length,
            )
        return [text for (text,) in groups]


def main(argv: list[str] | None = None, report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Runs stage 5 from a command line and YAML; a field nobody knows is an error. `report` as for the `main` of other stages."""
    arguments = parse_rewards(sys.argv[1:] if argv is None else argv)
    return launch(partial(run_stage, arguments, make_trainer), arguments, report)
