"""`alignvlm ask` and `alignvlm chat` of a real tiny checkpoint: the texts that the model gives when it is asked directly."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.evaluation.answer import answer
from alignvlm.tools import ask, chat
from hub_upload.run_record import RUN_RECORD
from tests.conftest import lose_tokenizer


ROOT = Path(__file__).parents[2]
FEW = ("--use_cpu", "--max_new_tokens", "12")


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def loaded_processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, Path]:
    """Two image files, one with a space in its name."""
    folder = tmp_path_factory.mktemp("images")
    red, blue = folder / "red square.png", folder / "blue.png"
    Image.new("RGB", (20, 12), (200, 30, 60)).save(red)
    Image.linear_gradient("L").convert("RGB").save(blue)
    return red, blue


@pytest.fixture(scope="module")
def tagged(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint as a stage with an evaluation tag leaves it."""
    folder = tmp_path_factory.mktemp("tagged") / "stage1"
    shutil.copytree(checkpoint, folder)
    record = json.loads((folder / RUN_RECORD).read_text())
    record["stages"] = [{"stage": 1, "evaluation_tag": "scenes"}]
    (folder / RUN_RECORD).write_text(json.dumps(record))
    return folder


def of_user(text: str, *paths: Path) -> dict:
    parts = [{"type": "image", "image": Image.open(path)} for path in paths]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def generated(model, processor, messages: list[dict], max_new_tokens: int = 12) -> str:
    """The greedy answer to a conversation, from scratch, as it is decoded."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def talk(monkeypatch, capsys, checkpoint: Path, lines: list[str], *options: str) -> list[str]:
    """What `alignvlm chat` prints behind each prompt for these lines of standard input, its greeting first."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.main([str(checkpoint), *FEW, *options])
    return [part.strip() for part in capsys.readouterr().out.split("\n> ")]


def test_ask_prints_the_answer_of_evaluation(model, loaded_processor, checkpoint, images, capsys):
    red, blue = images
    question = "How many shapes are there?"
    printed = []
    for given, shown, prompt in (
        ([str(red), question], [red], question),
        ([str(blue), question], [blue], question),
        ([str(red)], [red], CAPTION_PROMPT),
        ([str(red), "--image", str(blue), question], [red, blue], question),
    ):
        ask.main([str(checkpoint), *given, *FEW])
        shown = [Image.open(path) for path in shown]
        expected = answer(model, loaded_processor, [shown], [[prompt]], max_new_tokens=12)[0][0]
        printed.append(capsys.readouterr().out)
        assert printed[-1] == expected + "\n"
    assert len(set(printed)) == len(printed)  # image, number of images and question count


def test_the_checkpoint_s_tag_goes_before_the_prompt(model, loaded_processor, tagged, images, monkeypatch, capsys):
    ask.main([str(tagged), str(images[0]), "What is it?", *FEW])
    shown = [[Image.open(images[0])]]
    with_tag, without = (
        answer(model, loaded_processor, shown, [[prompt]], max_new_tokens=12)[0][0]
        for prompt in ("scenes What is it?", "What is it?")
    )
    assert capsys.readouterr().out == with_tag + "\n" != without + "\n"
    _, told, _ = talk(monkeypatch, capsys, tagged, ["What is it?"])
    asked = [of_user("scenes What is it?")]
    assert told == generated(model, loaded_processor, asked).strip()
    # As in training, a later message has none.
    asked += [{"role": "assistant", "content": [{"type": "text", "text": told}]}, of_user("And where?")]
    _, _, told, _ = talk(monkeypatch, capsys, tagged, ["What is it?", "And where?"])
    assert told == generated(model, loaded_processor, asked).strip()
    assert told != generated(model, loaded_processor, [*asked[:2], of_user("scenes And where?")]).strip()


def test_two_turns_give_the_text_of_generating_from_scratch(
    model, loaded_processor, checkpoint, images, monkeypatch, capsys
):
    """A text-only turn, then an image in the second, then the image's path as an argument."""
    red, _ = images
    messages = [of_user("What is it?")]
    first = generated(model, loaded_processor, messages)
    reply = {"role": "assistant", "content": [{"type": "text", "text": first.strip()}]}
    messages += [reply, of_user("How many shapes?", red)]
    second = generated(model, loaded_processor, messages)
    alone = generated(model, loaded_processor, messages[2:])
    assert first != second != alone

    lines = ["What is it?", f"/image {red}", "How many shapes?", "/reset", "How many shapes?", "/quit", "never read"]
    told = talk(monkeypatch, capsys, checkpoint, lines)
    assert told[1] == first.strip() and red.name in told[2] and told[3] == second.strip()
    without = generated(model, loaded_processor, [of_user("How many shapes?")])
    assert told[5] == without.strip() and len(told) == 7  # the reset forgets the image too

    greeting, told, end = talk(monkeypatch, capsys, checkpoint, ["How many shapes?"], str(red))
    assert red.name in greeting and told == alone.strip() and end == ""


def test_the_conversation_is_kept_as_messages(model, loaded_processor, images):
    talked = chat.Chat(model, loaded_processor, max_new_tokens=12)
    talked.add_image(str(images[0]))
    replies = [talked.reply("What is it?"), talked.reply("Why?")]
    kinds = [(m["role"], [part["type"] for part in m["content"]]) for m in talked.messages]
    user, assistant = ("user", ["image", "text"]), ("assistant", ["text"])
    assert kinds == [user, assistant, ("user", ["text"]), assistant]
    assert [m["content"][0]["text"] for m in talked.messages[1::2]] == replies
    again = generated(model, loaded_processor, talked.messages[:3])
    assert again.strip() == replies[1]


def test_the_answer_arrives_in_pieces_while_it_is_generated(model, loaded_processor, monkeypatch):
    """Each piece is noted with the steps of the model before it; the pieces are the answer."""
    text = generated(model, loaded_processor, [of_user("Where is the red circle?")], 64)
    assert " " in text.strip()
    steps, pieces = [], []

    class Noted(io.StringIO):
        def write(self, piece: str) -> int:
            pieces.append((len(steps), piece))
            return len(piece)

    monkeypatch.setattr(sys, "stdout", Noted())
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    chat.Chat(model, loaded_processor, max_new_tokens=64).reply("Where is the red circle?")
    hook.remove()
    spoken = [(step, piece) for step, piece in pieces if piece.strip()]
    assert "".join(piece for _, piece in pieces) == text.lstrip() + "\n"
    assert len({step for step, _ in spoken}) > 1 and spoken[0][0] < len(steps)


def test_what_cannot_be_asked_is_one_sentence(checkpoint, images, tmp_path):
    image, damaged = str(images[0]), tmp_path / "damaged.png"
    damaged.write_bytes(images[1].read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    folders = {name: tmp_path / name for name in ("cut", "wordless", "processorless")}
    for folder in folders.values():
        shutil.copytree(checkpoint, folder)
    (folders["cut"] / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-1000])
    lose_tokenizer(folders["wordless"])
    (folders["processorless"] / "processor_config.json").unlink()
    for given, message in (
        ([str(folders["cut"]), image], "The weights of '.*cut' cannot be read: .*copy the checkpoint again"),
        ([str(folders["wordless"]), image], "The tokenizer of '.*wordless' does not have '<image>' as its token"),
        ([str(folders["processorless"]), image], "processorless' lacks its processor_config.json"),
        ([str(checkpoint), image, "--revision", "v1"], "The revision 'v1' would be of a model of the Hub"),
        ([str(checkpoint), str(tmp_path / "nothing.png")], r"Cannot read the image .*nothing\.png"),
        ([str(checkpoint), str(damaged)], r"Cannot read the image .*damaged\.png"),
        ([str(checkpoint), image, "--image", str(damaged)], r"damaged\.png"),
        ([str(checkpoint), image, "What is <image>?"], "holds the placeholder"),
        ([str(checkpoint), image, "--dtype", "fp8"], "Unknown precision 'fp8'"),
        ([str(tmp_path / "no_such_folder"), image], "No such folder: .*no_such_folder"),
        ([str(tmp_path / "empty"), image], "empty' holds no model"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
            ask.main([*given, "--use_cpu"])
        assert "\n" not in caught.value.code  # a text as the code exits with 1
    for missing in ("no_such_folder", "empty"):
        with pytest.raises(SystemExit, match=f"^error: .*{missing}"):
            chat.main([str(tmp_path / missing), "--use_cpu"])


def test_a_chat_goes_on_after_what_it_cannot_do(model, loaded_processor, checkpoint, images, monkeypatch, capsys):
    lines = [
        "/image nothing.png",
        "/image",
        "/imagine",
        "",
        "/help",
        "a <image>?",
        f"/image '{images[0]}'",
        "What is it?",
    ]
    told = talk(monkeypatch, capsys, checkpoint, lines, "missing.png")
    assert "error: Cannot read the image missing.png" in told[0]
    assert told[1].startswith("error: Cannot read the image nothing.png")
    assert told[2] == "error: /image needs the path of an image."
    assert (
        told[3].startswith("error: There is no command /imagine.") and told[4] == f"> {chat.HELP}"
    )  # nothing is said to an empty line
    assert told[5].startswith("error: Found 1 '<image>' placeholder(s)")
    assert told[7] == generated(model, loaded_processor, [of_user("What is it?", images[0])]).strip()


def test_an_answer_is_as_long_as_the_context_has_room_for(model, loaded_processor, monkeypatch, capsys):
    question = of_user("How many shapes?")
    whole = generated(model, loaded_processor, [question], 64)
    prompt = loaded_processor.apply_chat_template([question], add_generation_prompt=True, tokenize=True)
    length = len(prompt[0])
    talked = chat.Chat(model, loaded_processor, max_new_tokens=600)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + 5)
    cut = talked.reply("How many shapes?")
    assert cut == generated(model, loaded_processor, [question], 5).strip() and len(cut) < len(whole.strip())
    with pytest.raises(ValueError, match=r"leave no room for an answer.*/reset"):
        talked.reply("Why?")
    assert len(talked.messages) == 2
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length)
    talked.reset()
    with pytest.raises(
        ValueError, match=rf"has {length} tokens, which leave no room for an answer within {length}\. Write less"
    ):
        talked.reply("How many shapes?")
    assert talked.messages == []


def test_an_interrupt_ends_the_answer_and_not_the_chat(model, loaded_processor, monkeypatch, capsys):
    talked = chat.Chat(model, loaded_processor, max_new_tokens=4)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.register_forward_hook(interrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n/help\n"))
    talked.run()
    hook.remove()
    told = capsys.readouterr().out
    assert "Interrupted" in told and chat.HELP in told and talked.messages == []


@pytest.mark.slow
def test_chat_in_a_process_of_its_own(model, loaded_processor, checkpoint, images, tmp_path):
    command = [sys.executable, "-m", "alignvlm.cli", "chat", str(checkpoint), str(images[0]), *FEW]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=b"What is it?\n", cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    expected = generated(model, loaded_processor, [of_user("What is it?", images[0])])
    assert done.stdout.decode().endswith(f"\n> {expected.lstrip()}\n> \n")


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_utf8_does_not_end_the_chat(model, loaded_processor, checkpoint, tmp_path, errors):
    """Whether Python decodes standard input strictly or, as in its UTF-8 mode, leaves half surrogates."""
    command = [sys.executable, "-m", "alignvlm.cli", "chat", str(checkpoint), *FEW]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTHONIOENCODING"] = f"utf-8:{errors}"
    lines = [b"What is it?", b"caf\xe9", b"/caf\xe9", b"/image caf\xe9.png", b"Why?\n"]
    done = subprocess.run(command, input=b"\n".join(lines), cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    _, first, refused, unknown, unread, second, _ = done.stdout.decode().split("\n> ")
    assert refused.startswith("error: The message is no UTF-8: it holds the byte 0xe9 behind 'caf'"), refused
    assert "no command /caf" in unknown and "Cannot read the image caf" in unread
    messages = [of_user("What is it?")]
    assert first == generated(model, loaded_processor, messages).lstrip()
    reply = {"role": "assistant", "content": [{"type": "text", "text": first.strip()}]}
    assert second == generated(model, loaded_processor, [*messages, reply, of_user("Why?")]).lstrip()
