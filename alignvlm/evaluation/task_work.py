"""What a task asks of a model, as work in batches: questions about images, or the windows of a text."""

import argparse
import hashlib
from pathlib import Path

from alignvlm.data.files import read_rows
from alignvlm.data.formats import text
from alignvlm.data.record import BadRow, Conversation, shown
from alignvlm.evaluation.batches import Work
from alignvlm.evaluation.choices import in_all_orders_of
from alignvlm.evaluation.judge import check_answers_suffice, check_references_suffice, judge
from alignvlm.evaluation.perplexity import summarise as summarise_text
from alignvlm.evaluation.perplexity import window_loss, windows_of
from alignvlm.evaluation.questions import REMEDY, TASKS, blank, check_task, load_task, shuffled, without_images
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import grids_of


ALL_TASKS = (*TASKS, "text_perplexity")
CONTROLS = ("blank_image", "shuffle_images", "question_only")


def control_of(arguments: argparse.Namespace) -> str | None:
    """Returns the control that the command line asks for."""
    chosen = [name for name in CONTROLS if getattr(arguments, name)]
    if len(chosen) > 1:
        flags, count = " and ".join(f"--{name}" for name in chosen), {2: "two", 3: "three"}[len(chosen)]
        raise ValueError(f"{flags} are {count} controls: run them one after the other, or all of them by --controls.")
    return chosen[0] if chosen else None


def tag_of(arguments: argparse.Namespace, model) -> str:
    """Returns the source tag before every prompt."""
    return model.tag if arguments.tag is None else arguments.tag


def decoding_of(arguments: argparse.Namespace) -> dict:
    """Returns how answers are generated."""
    return {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens, "do_sample": False}


def check_asked(arguments: argparse.Namespace) -> None:
    """Checks what can be checked of a task before its model is loaded: that there is such a task, and that it has data.

    Raises:
        ValueError: naming the tasks there are, how the data are had, or the option that the task cannot have.
    """
    if arguments.task != "text_perplexity":
        return check_task(arguments.task, arguments.data)
    if arguments.data is None:
        raise ValueError("text_perplexity needs --data: a text file, or a data set with a column `text`.")
    if control_of(arguments):
        raise ValueError(
            "text_perplexity has no images: leave out --blank_image, --shuffle_images and --question_only."
        )


def asking_of(arguments: argparse.Namespace, model) -> dict:
    """Returns the settings of a task's work that are known before its data are read.

    Raises:
        ValueError: for a metric that cannot judge answers.
    """
    if arguments.task == "text_perplexity":
        return {"window": arguments.window}
    if arguments.metric is not None:
        check_answers_suffice(arguments.metric)  # now, not after all have been asked for
    where_on = {"metric": arguments.metric, "prompt": arguments.prompt}
    return {
        "tag": tag_of(arguments, model),
        "decoding": decoding_of(arguments),
        **{name: value for name, value in where_on.items() if value is not None},
    }


class Room:
    """Tells of each question what leaves its language model no room for an answer, and counts those with less room than `max_new_tokens`.

    Args:
        model: a `one_task.Checkpoint`.
    """

    def __init__(self, model, tag: str, max_new_tokens: int):
        self.encoder, self.context = Encoder(model.processor), model.context
        self.tag, self.max_new_tokens, self.less = tag, max_new_tokens, 0

    def __call__(self, images: list, conversation: Conversation) -> str | None:
        grids = grids_of(self.encoder.processor, images)
        try:
            length = len(self.encoder.prompt(conversation.with_prefix(self.tag).messages, grids))
        except ValueError as error:  # such as a text with the image placeholder
            return str(error)
        if self.context is None:
            return None
        choices = [
            len(self.encoder.tokenizer(choice, add_special_tokens=False)["input_ids"])
            for choice in conversation.choices or ()
        ]
        least = max(choices, default=0) + 1  # with the token that ends it
        if length + least > self.context:
            what = "its images and its longest choice" if choices else "its images"
            return (
                f"the prompt {shown(conversation.prompt)} has {length + least - 1} tokens with {what}; the language model takes "
                f"{self.context}, the answer among them."
            )
        self.less += length + self.max_new_tokens > self.context
        return None


def question_work(arguments: argparse.Namespace, model) -> Work:
    """Returns work that asks a model (`one_task.Checkpoint` or `server.Server`) about images and judges its answers by each question's metric."""
    tag = tag_of(arguments, model)
    room = Room(model, tag, arguments.max_new_tokens) if model.processor is not None else None
    evaluation_set = load_task(
        arguments.task,
        arguments.split,
        arguments.data,
        arguments.limit,
        revision=arguments.data_revision,
        image_dir=arguments.image_dir,
        prompt=arguments.prompt,
        keep_duplicates=arguments.keep_duplicates,
        on_bad_row=arguments.on_bad_row,
        check=room,
    )
    control = control_of(arguments)
    asked = evaluation_set.asked
    references: dict[str, list[list[str]]] = {}
    for conversation in (conversation for one in asked for conversation in one.conversations):
        by = arguments.metric or evaluation_set.source.metric_of(conversation)
        references.setdefault(by, []).append(conversation.responses)
    for name, given in references.items():
        check_references_suffice(name, given)
    seen = shuffled(asked, arguments.seed) if control == "shuffle_images" else asked
    in_all_orders = in_all_orders_of([one.conversations for one in asked])
    decoding = decoding_of(arguments)

    def run(units: range) -> list[list[dict]]:
        images = evaluation_set.images([seen[unit] for unit in units])
        groups = [[c.with_prefix(tag) for c in asked[unit].conversations] for unit in units]
        if control == "blank_image":
            images = blank(images)
        elif control == "question_only":
            images, groups = [[] for _ in images], [[without_images(c) for c in group] for group in groups]
        prompts = [[c.messages for c in group] for group in groups]
        written = model.answer(images, prompts, **decoding)
        outputs = [[{"prediction": text} for text in texts] for texts in written]
        for unit, own, group, found in zip(units, images, groups, outputs):
            if model.measure_choices is not None and any(c.choices for c in group):
                for output, measured in zip(
                    found, model.measure_choices(own, group, in_all_orders[unit]), strict=True
                ):
                    output |= measured
        return outputs

    def summarise(outputs: list[list[dict]]) -> dict:
        predictions = [
            {
                "id": one.id,
                "prompt": conversation.prompt,
                **({"messages": conversation.messages} if len(conversation.messages) > 1 else {}),
                **({"choices": conversation.choices} if conversation.choices else {}),
                **output,
                "references": conversation.responses,
                "kind": conversation.kind,
                "metric": arguments.metric or evaluation_set.source.metric_of(conversation),
            }
            for one, group in zip(asked, outputs, strict=True)
            for conversation, output in zip(one.conversations, group, strict=True)
        ]
        return judge(predictions, arguments.bootstrap_samples, arguments.seed)

    data = {**evaluation_set.source.identity, **evaluation_set.notes}
    if room is not None and room.less:
        data["answers_with_less_room"] = room.less
    settings = {"data": data, **asking_of(arguments, model)}
    return Work(len(asked), settings, run, summarise, at_once=model.at_once)


def text_work(arguments: argparse.Namespace, model) -> Work:
    """Returns work that measures the perplexity of a text for a `one_task.Checkpoint`, in windows that do not overlap; a window's first token is context only."""
    content, source = _read_text(arguments)
    tokens = model.processor.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
    if model.context is not None and min(arguments.window, len(ids)) > model.context:
        raise ValueError(
            f"--window {arguments.window}: the language model takes {model.context} tokens. Give {model.context} or less."
        )
    windows = windows_of(len(ids), arguments.window, arguments.limit, name=arguments.data)

    def run(units: range) -> list[dict]:
        outputs = []
        for window in windows[units.start : units.stop]:
            first, last = offsets[window][1][0], offsets[window][-1][1]
            size = len(content[first:last].encode())
            loss = window_loss(model.model, ids[window])
            outputs.append({"loss": loss, "tokens": len(ids[window]) - 1, "bytes": size})
        return outputs

    def summarise(outputs: list[dict]) -> dict:
        return summarise_text(outputs, arguments.bootstrap_samples, arguments.seed)

    return Work(len(windows), {"data": source, **asking_of(arguments, model)}, run, summarise)


def _read_text(arguments: argparse.Namespace) -> tuple[str, dict]:
    path = Path(arguments.data)
    if path.suffix == ".txt":
        content = path.read_bytes()
        try:
            return content.decode("utf-8-sig"), {"data": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    found = read_rows(arguments.data, arguments.split or "test", revision=arguments.data_revision)
    if "text" not in found.columns:
        raise ValueError(f"{arguments.data} has no column `text`; its columns: {found.columns}.")
    texts, bad = [], []
    for index, value in enumerate(found.rows["text"]):
        try:
            text(value, "text", may_be_empty=True)
        except BadRow as error:
            if arguments.on_bad_row == "raise":
                raise BadRow(f"{error.at(found.place(index))} {REMEDY}") from error
            bad.append(str(error.at(found.place(index))))
        else:
            texts.append(value)  # unchanged, with surrounding white space
    notes = {"bad_rows": len(bad), "bad_row_list": bad[:1000]} if bad else {}
    return "\n\n".join(texts), {**found.identity, **notes}
