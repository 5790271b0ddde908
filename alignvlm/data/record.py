"""Records, for training and evaluation alike: images and the conversations about them."""

from dataclasses import asdict, dataclass, replace
from typing import Any


ROLES = ("system", "user", "assistant")
TRAIN_ON = ("last", "all")
ON_BAD_ROW = ("raise", "skip")


class BadRow(ValueError):
    """A row that makes no record. The message names the column and its value; the reader of the rows adds file and row."""

    def at(self, place: str) -> "BadRow":
        """Returns the same error with the row's place before its message."""
        return BadRow(f"{place}: {self}")


def shown(value: Any, length: int = 80) -> str:
    """Returns a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class Conversation:
    """Messages and the accepted answers to them.

    Args:
        messages: all messages before the answer, in transformers' form: `{"role": "system" | "user" | "assistant", "content": [{"type": "image"} or
            {"type": "text", "text": str}, ...]}`. A text in place of the list of parts is one text part. The last message is the user's. Without
            messages the answer is plain text, without a chat template.
        responses: the accepted answers. In training each is a branch, in evaluation all are references.
        train_on: `last` trains the response alone; `all` trains the assistant's earlier turns too.
        kind: what is asked for, such as `short_caption` or `question`; it chooses the metric.
        choices: of a multiple-choice question, in the order of their letters; None: no such question.
        rejected: answers that are worse than every response, for training from preferences; other training does not read them.

    Raises:
        ValueError: for another role, part or `train_on`; without a response; and if the last message is not the user's.
    """

    messages: list[dict[str, Any]]
    responses: list[str]
    train_on: str = "last"
    kind: str = ""
    choices: list[str] | None = None
    rejected: list[str] | None = None

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
        """Returns the parts of a message's content."""
        content = message["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def image_count(self) -> int:
        """How many images its messages hold."""
        return sum(part["type"] == "image" for message in self.messages for part in self.parts(message))

    @property
    def prompt(self) -> str:
        """The text of the last message, which the responses answer; empty for plain text."""
        return _text_of(self.messages[-1]) if self.messages else ""

    def with_prefix(self, prefix: str) -> "Conversation":
        """Returns the conversation with a text before the user's first; plain text stays as it is."""
        first = next((index for index, message in enumerate(self.messages) if message["role"] == "user"), None)
        if not prefix or first is None:
            return self
        parts = [dict(part) for part in self.parts(self.messages[first])]
        text = next((part for part in parts if part["type"] == "text"), None)
        if text is None:
            parts.append({"type": "text", "text": prefix})
        else:
            text["text"] = f"{prefix} {text['text']}".strip()
        messages = [*self.messages]
        messages[first] = {"role": "user", "content": parts}
        return replace(self, messages=messages)

    def exchanges(self) -> list["Conversation"]:
        """Returns each trained turn of the assistant as a conversation of its own, without the exchanges before it: where `train_on` is `last`,
        the last alone.

        System messages stay. Images of earlier turns move before the prompt, so that the k-th image part is still the record's k-th image.
        An earlier turn has the answer that was given as its only response.
        """
        found, system, images = [], [], []
        for index, message in enumerate(self.messages):
            if message["role"] == "system":
                system.append(message)
            elif message["role"] == "user":
                is_last = index + 1 == len(self.messages)
                responses = self.responses if is_last else [_text_of(self.messages[index + 1])]
                content = [*images, *self.parts(message)]
                images += [part for part in self.parts(message) if part["type"] == "image"]
                messages = [*system, {"role": "user", "content": content}]
                rejected = self.rejected if is_last else None
                found.append(replace(self, messages=messages, responses=responses, train_on="last", rejected=rejected))
        return (found if self.train_on == "all" else found[-1:]) or [self]


def _text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in Conversation.parts(message) if part["type"] == "text")


@dataclass
class Record:
    """Images and the conversations about them: the k-th image part of every conversation is `images[k]`.

    Args:
        images: undecoded, each once.
        conversations: at least one.
        id: the record's name in results and messages.

    Raises:
        ValueError: for a record without conversations, or a conversation with more image parts than there are images.
    """

    images: list[Any]
    conversations: list[Conversation]
    id: str = ""

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
        """Reads a record from a row of a data set or stream: `images`, and `conversations` as mappings of the fields of `Conversation`.
        Ignores columns other than these and `id`."""
        return cls(row["images"], [Conversation(**fields) for fields in row["conversations"]], row.get("id") or "")

    def to_row(self) -> dict[str, Any]:
        """Returns what `from_row` reads. Every content is a list of parts, and every part has `type` and `text`, as one Arrow schema needs."""
        conversations = []
        for conversation in self.conversations:
            messages = [
                {
                    "role": message["role"],
                    "content": [
                        {"type": part["type"], "text": part.get("text")} for part in Conversation.parts(message)
                    ],
                }
                for message in conversation.messages
            ]
            conversations.append({**asdict(replace(conversation, messages=[])), "messages": messages})
        return {"images": self.images, "conversations": conversations, "id": self.id}


def one_turn(prompt: str, responses: list[str], image_count: int = 0, kind: str = "") -> Conversation:
    """Makes a conversation of one exchange, its images before the prompt; plain text without images and prompt."""
    if not prompt and not image_count:
        return Conversation([], responses, kind=kind)
    content = [*({"type": "image", "text": None} for _ in range(image_count)), {"type": "text", "text": prompt}]
    return Conversation([{"role": "user", "content": content}], responses, kind=kind)
