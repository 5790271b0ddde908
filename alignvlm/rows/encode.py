"""Encodes conversations as token ids and trained spans: the one encoder of training and inference.

The chat template writes a conversation. For training, each assistant turn is tokenised apart from what stands before it. So a prompt has
the same tokens as at inference, and an answer has the tokens that the model would generate. For inference, `prompt` returns all tokens
before the answer, as `processor.apply_chat_template` does when it tokenises.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

from alignvlm.data.record import Conversation
from alignvlm.rows.tiles import Grid, cuts_images, has_grids, largest_grids, tokens_of
from modeling_alignvlm import WHOLE, AlignVLMProcessor, number_images


@dataclass(frozen=True)
class Branch:
    """The tokens of a conversation with one of its responses, or at inference without one.

    Args:
        input_ids: the tokens; each image, or tile of one, is `image_seq_length` image tokens.
        trained: which of them are predicted: never the first, and none without a response.
        prompt_length: the tokens before the first trained response.
        image_ids: the index of each token's image, of the marks between its tiles too; -1 at text.
    """

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    prompt_length: int
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        """The number of tokens after the prompt."""
        return len(self) - self.prompt_length

    def image_count(self, length: int | None = None) -> int:
        """Counts the images among the first `length` tokens; one that `length` cuts counts too."""
        return max(self.image_ids[:length], default=-1) + 1


class Encoder:
    """Encodes conversations with a processor's chat template and tokenizer.

    Where the processor cuts images into tiles or takes them in native shape, it takes the grid of each image beside the conversation.

    Raises:
        ValueError: if the processor has no chat template.
    """

    def __init__(self, processor: AlignVLMProcessor):
        if processor.chat_template is None:
            raise ValueError(
                "The processor has no chat template, so prompts and responses cannot be written. Set one."
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._remember()

    def _remember(self) -> None:
        # Questions and short answers repeat often.
        self._encode_again = lru_cache(maxsize=100_000)(self._encode_json)
        self.image_tokens = lru_cache(maxsize=1000)(self._image_tokens)

    def __getstate__(self) -> dict:
        """Leaves out the caches, which cannot be sent to a data worker that is not forked."""
        return {name: value for name, value in vars(self).items() if name not in ("_encode_again", "image_tokens")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._remember()

    def encode(self, conversation: Conversation, grids: Sequence[Grid] | None = None) -> list[Branch]:
        """Returns one branch per response.

        Args:
            grids: of the images that the conversation shows, or of more, in order (`alignvlm.rows.tiles.grids_of`).

        Raises:
            ValueError: if a text holds the image placeholder, which would stand for an image that is not there, or if the chat template
                changes earlier turns when later ones follow.
        """
        messages = json.dumps(conversation.messages)
        grids = self._checked(grids, conversation.image_count)
        train_on = conversation.train_on
        return [self._encode_again(messages, response, train_on, grids) for response in conversation.responses]

    def prompt(self, messages: list[dict[str, Any]], grids: Sequence[Grid] | None = None) -> Branch:
        """Returns the tokens before the answer to `messages`, with the generation prompt: the same as `processor.apply_chat_template`.

        Args:
            messages: as `Conversation.messages`, at least one.
            grids: as in `encode`.

        Raises:
            ValueError: for what `check_prompt` refuses, a text that holds the image placeholder, and a chat template that does not write
                every image part.
        """
        expected = check_prompt(messages)
        text = self.processor.apply_chat_template(self._written(messages), add_generation_prompt=True)
        tokens = self.tokenizer(text, add_special_tokens=self._adds_special_tokens(text))["input_ids"]
        found = tokens.count(self.processor.image_token_id)
        if found != expected:
            raise ValueError(
                f"The messages have {expected} image part(s), and the chat template writes {found} placeholder(s). Put image parts into "
                "user messages, or set a template that writes them."
            )
        grids = self._checked(grids, expected)
        ids = self._expanded(tokens, iter(grids))
        return Branch(tuple(ids), (False,) * len(ids), len(ids), self._image_ids(ids, grids))

    @cached_property
    def up_to_an_image(self) -> int:
        """The number of tokens up to the end of the image in a conversation that begins with one: what any image needs, the largest too."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        return self.prompt(messages, [WHOLE]).image_ids.index(0) + self.most_image_tokens

    @cached_property
    def most_image_tokens(self) -> int:
        """The number of tokens of an image of the most tiles, with their marks; in native shape the most that an image can have."""
        if not cuts_images(self.processor):
            return self.processor.image_seq_length
        return max(len(self.image_tokens(grid)) for grid in largest_grids(self.processor.max_tiles))

    def _checked(self, grids: Sequence[Grid] | None, image_count: int) -> tuple[Grid, ...]:
        """Returns the grids of a conversation's images. Where all images have as many tokens, none need be given."""
        if grids is None and not has_grids(self.processor):
            return (WHOLE,) * image_count
        if image_count and (grids is None or len(grids) < image_count):
            tiles = f"cuts images into up to {self.processor.max_tiles} tiles"
            what = tiles if cuts_images(self.processor) else "takes images in their native shape"
            raise ValueError(
                f"The processor {what}, so {image_count} image(s) need as many `grids`; "
                f"got {grids}. Give `alignvlm.rows.tiles.grids_of(processor, images)`."
            )
        return tuple((grids or ())[:image_count])

    def _image_tokens(self, grid: Grid) -> tuple[int, ...]:
        """Returns the tokens of an image of this grid. Marks stand between image tokens, so nothing before or behind the image changes
        how they are tokenised."""
        if grid == WHOLE or not cuts_images(self.processor):
            return (self.processor.image_token_id,) * tokens_of(self.processor, grid)
        return tuple(self.tokenizer(self.processor.image_text(grid), add_special_tokens=False)["input_ids"])

    def _image_ids(self, ids: list[int], grids: Sequence[Grid]) -> tuple[int, ...]:
        lengths = (tokens_of(self.processor, grid) for grid in grids)
        return tuple(number_images(ids, self.processor.image_token_id, lengths))

    def _adds_special_tokens(self, text: str) -> bool:
        """Returns what the processor says. Older checkpoints' code has no such method and leaves special tokens to the tokenizer."""
        adds = getattr(self.processor, "adds_special_tokens", None)
        return adds is None or adds(text)

    def _written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns messages as the chat template takes them: each content a list of bare parts."""
        return [
            {"role": message["role"], "content": [self._part(part) for part in Conversation.parts(message)]}
            for message in messages
        ]

    def _encode_json(self, messages: str, response: str, train_on: str, grids: tuple[Grid, ...]) -> Branch:
        written = self._written(json.loads(messages))
        answer = self._part({"type": "text", "text": response})
        if not written:
            eos = self.tokenizer.eos_token_id
            ids = [*self.tokenizer(response)["input_ids"], *([] if eos is None else [eos])]
            return Branch(tuple(ids), (False,) + (True,) * (len(ids) - 1), 0, (-1,) * len(ids))
        written.append({"role": "assistant", "content": [answer]})
        ids: list[int] = []
        trained: list[bool] = []
        left = iter(grids)
        for text, is_answer in self._segments(written):
            special = not ids and self._adds_special_tokens(text)
            tokens = self._expanded(self.tokenizer(text, add_special_tokens=special)["input_ids"], left)
            ids += tokens
            trained += [is_answer] * len(tokens)
        if train_on == "last":
            last = len(tokens)
            trained = [False] * (len(ids) - last) + [True] * last
        return Branch(tuple(ids), tuple(trained), trained.index(True), self._image_ids(ids, grids))

    def _part(self, part: dict) -> dict:
        if part["type"] != "text":
            return {"type": "image"}
        if self.processor.image_token in part["text"]:
            raise ValueError(
                f"The text {part['text']!r} holds the placeholder {self.processor.image_token!r}. Remove it."
            )
        return {"type": "text", "text": part["text"]}

    def _segments(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """Splits the conversation as the template writes it: what stands before an answer, the answer with what ends it, and so on."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked_again = [*messages, {"role": "user", "content": [{"type": "text", "text": "?"}]}]
        prompts = [
            self.processor.apply_chat_template(messages[:index], add_generation_prompt=True) for index in answers
        ]
        prompts.append(self.processor.apply_chat_template(asked_again, add_generation_prompt=True))
        wholes = [self.processor.apply_chat_template(messages[: index + 1]) for index in answers]
        segments = []
        written = ""
        for turn, (prompt, whole) in enumerate(zip(prompts, wholes)):
            texts = [part["text"].strip() for part in messages[answers[turn]]["content"]]
            # Leaves out what the template writes only at the end of all messages, as Phi-3's does.
            shared = whole[: self._before_added_token(whole, shared_length([whole, prompts[turn + 1]]))]
            kept = all(text in shared[len(prompt) :] for text in texts)
            is_last = turn + 1 == len(wholes)  # no later turn can rewrite it
            if not (prompt.startswith(written) and whole.startswith(prompt) and (kept or is_last)):
                raise ValueError(
                    f"The chat template writes what stands before message {answers[turn]} otherwise once it is answered, so the answer cannot "
                    "be trained as it would be generated. Set a template that leaves what it has written as it is (one that drops old "
                    "thoughts or moves the system message does not), or train single exchanges (`turns: independent`) without a system message."
                )
            whole = shared if kept else whole
            answer = whole[len(prompt) :].rstrip("\n")
            segments += [(prompt[len(written) :], False), (answer, True)]
            written = prompt + answer
        return segments

    def _before_added_token(self, text: str, length: int) -> int:
        """Returns `length`, or the beginning of an added token that a cut at `length` would divide."""
        for token in self.tokenizer.added_tokens_decoder.values():
            start = text.rfind(token.content, 0, length + len(token.content) - 1)
            if start != -1 and start < length < start + len(token.content):
                length = start
        return length

    def _expanded(self, tokens: list[int], grids: Iterator[Grid]) -> list[int]:
        """Puts the tokens of the next image in place of each image token."""
        image_token = self.processor.image_token_id
        return [t for token in tokens for t in (self.image_tokens(next(grids)) if token == image_token else (token,))]


def check_prompt(messages: list[dict[str, Any]]) -> int:
    """Refuses messages that cannot be answered.

    Returns:
        The number of image parts in them.

    Raises:
        ValueError: without messages, if the last is not the user's, and for an unknown role or type of part.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages[{index}] is {message!r}; expected a mapping with `role` and `content`.")
    if not messages or messages[-1]["role"] != "user":
        found = f"is from the {messages[-1]['role']}" if messages else "is missing"
        raise ValueError(f"The last message {found}; expected one of the user, which is answered.")
    return Conversation(messages, responses=[""]).image_count


def shared_length(sequences: Sequence[Sequence]) -> int:
    """Returns how many first items all sequences share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences)))
