"""AlignVLM checkpoints for VLMEvalKit, which has no plug-ins: this registers them and starts its `run.py`.

    python -m alignvlm.evaluation.vlmeval_adapter --model mine=out/stage4 --data MMStar POPE --mode infer

All words but `NAME=CHECKPOINT` behind `--model` are VLMEvalKit's own. From its `vlmeval/config.py` the same is
`supported_VLM["mine"] = partial(AlignVLM, "out/stage4")`.
"""

import runpy
import string
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas
import vlmeval
from PIL import Image
from vlmeval.dataset import ImageMCQDataset, ImageVQADataset
from vlmeval.vlm.base import BaseModel

from alignvlm.data.formats import letters_of, multiple_choice
from alignvlm.data.images import read_image
from alignvlm.data.record import Conversation
from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import device_for, evaluation_tag, load_checkpoint


class AlignVLM(BaseModel):
    """Answers VLMEvalKit's questions and dialogues with a checkpoint: with the prompts of `alignvlm evaluate`, greedily.

    Args:
        checkpoint: a checkpoint's folder or Hub repository.
        revision, trust_remote_code, dtype, attn_implementation: as for `load.load_checkpoint`.
        use_cpu: compute on the CPU even where there is a GPU.
        tag: a source tag before prompts; None: the `evaluation_tag` of the checkpoint's last stage.
        max_new_tokens: of an answer.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        checkpoint: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        use_cpu: bool = False,
        tag: str | None = None,
        max_new_tokens: int = 40,
    ) -> None:
        super().__init__()
        self.model, self.processor, _ = load_checkpoint(
            checkpoint, device_for(use_cpu), revision, trust_remote_code, dtype, attn_implementation
        )
        self.tag = evaluation_tag(checkpoint, revision) if tag is None else tag
        self.max_new_tokens = max_new_tokens
        self.asks: Callable | None = None

    def set_dump_image(self, dump_image_func: Callable) -> None:
        """Gets, before any question, the data set's method that writes its images; so this is where the data set is known."""
        super().set_dump_image(dump_image_func)
        self.asks = type(dump_image_func.__self__).build_prompt

    def use_custom_prompt(self, dataset: str) -> bool:
        """Tells whether to replace the prompt: VLMEvalKit's common ones only, not that of a data set which asks in a way of its own."""
        return self.asks in (ImageMCQDataset.build_prompt, ImageVQADataset.build_prompt)

    def build_prompt(self, line: pandas.Series, dataset: str | None = None) -> list[dict[str, str]]:
        """Returns the images of a row and its question: with choices as `formats.multiple_choice` writes them, else the question alone.

        Raises:
            ValueError: for choices that leave out a letter.
        """
        question = line["question"]
        if self.asks is ImageMCQDataset.build_prompt:
            given = {name: line[name] for name in (*string.ascii_uppercase, "hint") if name in line}
            given = {name: str(value) for name, value in given.items() if not pandas.isna(value)}
            hint = given.pop("hint", None)
            if list(given) != letters_of(len(given)):
                raise ValueError(
                    f"{dataset}, index {line['index']}: the choices are {', '.join(given)}; a letter is left out."
                )
            if given:
                row = {"question": question, "hint": hint, "choices": list(given.values()), "answer": 0}
                question = multiple_choice(row).conversations[0].prompt
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": question}]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answers one message of texts and images in any order."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, messages: list[dict], dataset: str | None = None) -> str:
        """Answers the last message of a dialogue, each with texts and images in any order."""
        images: list[Image.Image] = []
        turns = []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(read_image(part["value"]))
                    parts.append({"type": "image"})
                else:
                    parts.append({"type": "text", "text": part["value"]})
            turns.append({"role": message["role"], "content": parts})
        asked = Conversation(turns, [""]).with_prefix(self.tag).messages
        ((text,),) = answer(
            self.model,
            self.processor,
            [images],
            [[asked]],
            max_new_tokens=self.max_new_tokens,
            refuse_long_prompts=False,
        )
        return text


def register(words: list[str]) -> list[str]:
    """Registers each `NAME=CHECKPOINT` behind `--model`; returns the words with the names alone."""
    from vlmeval.config import supported_VLM

    found, option = [], None
    for word in words:
        option = word if word.startswith("--") else option
        name, equals, checkpoint = word.partition("=")
        if option == "--model" and equals:
            supported_VLM[name] = partial(AlignVLM, checkpoint)
        found.append(name if option == "--model" else word)
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs VLMEvalKit's `run.py`, which stands in its package or, in a clone, beside it."""
    words = register(sys.argv[1:] if argv is None else argv)
    package = Path(vlmeval.__file__).parent
    script = next(file for file in (package / "run.py", package.parent / "run.py") if file.is_file())
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
