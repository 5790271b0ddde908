"""What is trained and asked: a record is images and the conversations about them."""

from dataclasses import dataclass
from typing import Any


ROLES = ("system", "user", "assistant")
TRAIN_ON = ("last", "all")


@dataclass(frozen=True)
class Conversation:
    """Messages, and the answers that are accepted to them.

    Args:
        messages: all before the answer, in transformers' form: `{"role": "system" | "user" | "assistant", "content": [{"type": "image"} or
            {"type": "text", "text": str}, ...]}`; a text in place of the list of parts is one text part. The last is the user's. None at
            all: the answer is plain text, without a chat template.
        responses: the accepted answers. In training each is a branch, in evaluation all are references.
        train_on: `last`: the response alone is trained; `all`: the assistant's earlier turns too.
        kind: what is asked for, as `short_caption` or `question`; it chooses the metric.

    Raises:
        ValueError: for another role, part or `train_on`, a conversation without a response or whose last message is not the user's.
    """

    messages: list[dict[str, Any]]
    responses: list[str]
    train_on: str = "last"
    kind: str = ""

    def __post_init__(self):
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"train_on={self.train_on!r}. Valid values: {', '.join(TRAIN_ON)}.")
        if not self.responses:
            raise ValueError("A conversation has no response; it would train nothing. Remove it from the data.")
        for index, message in enumerate(self.messages):
            if message["role"] not in ROLES:
                raise ValueError(
                    f"messages[{index}] has the role {message['role']!r}. Valid roles: {', '.join(ROLES)}."
                )
            for part in self.parts(message):
                if part["type"] not in ("text", "image"):
                    raise ValueError(
                        f"messages[{index}] has a part of type {part['type']!r}. Valid types: text, image."
                    )
        if self.messages and self.messages[-1]["role"] != "user":
            raise ValueError(
                f"The last message before the response is from the {self.messages[-1]['role']}; expected the user. Put what the "
                "assistant says last into `responses`."
            )

    @staticmethod
    def parts(message: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts of a message's content."""
        content = message["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def image_count(self) -> int:
        """How many images its messages hold."""
        return sum(part["type"] == "image" for message in self.messages for part in self.parts(message))


@dataclass
class Record:
    """Images and the conversations about them: the k-th image part of every conversation is `images[k]`.

    Args:
        images: undecoded, each once.
        conversations: at least one.

    Raises:
        ValueError: for a record without conversations, or a conversation with more image parts than there are images.
    """

    images: list[Any]
    conversations: list[Conversation]

    def __post_init__(self):
        if not self.conversations:
            raise ValueError("A record has no conversations; it would train nothing. Remove it from the data.")
        for conversation in self.conversations:
            if conversation.image_count > len(self.images):
                raise ValueError(
                    f"A conversation has {conversation.image_count} image part(s), its record {len(self.images)} image(s). Give one "
                    "image per part."
                )

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Record":
        """The record of a row that data sets and streams carry: `images`, and `conversations` or `annotations`.

        A conversation is a mapping of the fields of `Conversation`. An annotation is `{"prompt", "response", "kind"}`: one exchange, with
        all images before the prompt; without images and with an empty prompt it is plain text. Annotations of one prompt are one
        conversation.
        """
        images = row["images"]
        if "conversations" in row:
            conversations = [Conversation(**conversation) for conversation in row["conversations"]]
        else:
            grouped: dict[tuple[str, str], list[str]] = {}
            for annotation in row["annotations"]:
                key = (annotation["prompt"], annotation.get("kind") or "")
                grouped.setdefault(key, []).append(annotation["response"])
            conversations = [
                Conversation(_one_turn(prompt, len(images)), responses, kind=kind)
                for (prompt, kind), responses in grouped.items()
            ]
        return cls(images, conversations)


def _one_turn(prompt: str, image_count: int) -> list[dict[str, Any]]:
    if not prompt and not image_count:
        return []
    return [{"role": "user", "content": [{"type": "image"}] * image_count + [{"type": "text", "text": prompt}]}]
