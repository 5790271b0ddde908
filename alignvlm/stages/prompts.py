"""Makes the examples of stage 5 of records: prompts with the references that reward answers, or with two answers to prefer one of."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from datasets import Dataset

from alignvlm.data.images import read_image
from alignvlm.data.mixture import Part
from alignvlm.data.record import Conversation, Record


def conversations_of(parts: list[Part]) -> Iterator[tuple[dict[str, int], Conversation]]:
    """Yields the place (part, record, conversation) of each conversation of the parts, and the conversation as its source has it.

    Raises:
        ValueError: for plain text, which answers no prompt.
    """
    for part_index, part in enumerate(parts):
        keeps = getattr(part.source.to_record, "keep_duplicates", False)
        for record_index, conversations in enumerate(part.source.conversations(keeps)):
            for index, conversation in enumerate(conversations):
                if not conversation.messages:
                    raise ValueError(
                        f"Source {part.name!r} holds plain text, which is no answer to a prompt: stage 5 trains answers. Leave it out."
                    )
                yield {"part": part_index, "record": record_index, "conversation": index}, conversation


def prompts(parts: list[Part]) -> Dataset:
    """Makes a prompt of each conversation.

    Returns:
        `prompt` (messages), `images` (decoded), `references`, `metric`, `kinds`, `choices` and `id`: what TRL's `GRPOTrainer` gives to
        a model and to rewards.
    """
    return _dataset([place for place, _ in conversations_of(parts)], parts, _prompt)


def preferences(parts: list[Part]) -> Dataset:
    """Makes a preference of each response of each conversation and each of its rejected answers.

    Returns:
        `conversation`, `chosen`, `rejected`, `images` (decoded) and `id`, as `PreferenceCollator` takes them.

    Raises:
        ValueError: for a conversation without a rejected answer.
    """
    places = []
    for place, conversation in conversations_of(parts):
        if not conversation.rejected:
            name = parts[place["part"]].name
            raise ValueError(
                f"Source {name!r} has a response without a rejected answer ({conversation.responses[0][:40]!r}), and DPO learns from both. "
                "Name a source with `chosen` and `rejected`; `alignvlm prefer` makes one."
            )
        pairs = product(range(len(conversation.responses)), range(len(conversation.rejected)))
        places += ({**place, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs)
    return _dataset(places, parts, _preference)


def _dataset(places: list[dict[str, int]], parts: list[Part], make: Callable) -> Dataset:
    """Makes a data set that reads an example where one is asked for."""
    return Dataset.from_list(places).with_transform(partial(_resolved, parts, make))


def _resolved(parts: list[Part], make: Callable, columns: dict[str, list[int]]) -> dict[str, list]:
    examples = []
    for values in zip(*columns.values()):
        place = dict(zip(columns, values))
        part = parts[place["part"]]
        record = Record.from_row(part.source[place["record"]])
        original = record.conversations[place["conversation"]]
        images = [read_image(image) for image in record.images[: original.image_count]]
        name = f"{part.name}[{place['record']}] ({original.prompt[:40]!r})"
        said = original.with_prefix(part.tag)
        examples.append({**make(part, said, place), "images": images, "id": name})
    return {name: [example[name] for example in examples] for name in examples[0]}


def _prompt(part: Part, said: Conversation, place: dict[str, int]) -> dict[str, Any]:
    return {
        "prompt": bare(said.messages),
        "references": said.responses,
        "metric": part.source.metric_of(said),
        "kinds": said.kind,
        "choices": said.choices,
    }


def _preference(part: Part, said: Conversation, place: dict[str, int]) -> dict[str, Any]:
    return {
        "conversation": {"messages": said.messages, "responses": said.responses, "kind": said.kind},
        "chosen": said.responses[place["chosen"]],
        "rejected": said.rejected[place["rejected"]],
    }


def bare(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with parts that hold nothing but what they are: `{"type": "image"}` or `{"type": "text", "text"}`."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                for part in Conversation.parts(message)
            ],
        }
        for message in messages
    ]
