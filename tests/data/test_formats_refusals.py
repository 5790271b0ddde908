"""Rows that once were trained as something else than they say, or ended in an error of Python's: read rightly, or refused with a sentence."""

import pytest

from alignvlm.data.formats import FORMATS, images_of, prompt_completion, question, record_of, text_only
from alignvlm.data.reader import STAND_IN
from alignvlm.data.record import BadRow
from tests.data.test_formats import said


def words_of(row: dict, read=record_of) -> list[str]:
    """All texts of a row's conversation, the answer last."""
    (found,) = read(row).conversations
    return [
        part["text"] for message in found.messages for part in message["content"] if part["text"]
    ] + found.responses


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "completion": "a"}, {"prompt": said("q"), "completion": said("a", first="assistant")}],
    ids=["texts", "messages"],
)
def test_a_bad_answer_of_an_unpaired_preference_is_not_trained(row):
    for label in (False, "False"):
        with pytest.raises(
            BadRow, match=r"`label` is .*False.*: a bad answer.* Keep only rows whose label is true, or make pairs"
        ):
            record_of({**row, "label": label})
    for label in (True, None, "True", 0, 1):
        assert words_of({**row, "label": label}) == ["q", "a"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_that_must_not_be_trained_is_refused(mark):
    turns = said("1?", "one", "2?", "two")
    turns[1] |= mark
    (name,) = mark
    with pytest.raises(
        BadRow, match=rf"`messages\[1\].{name}` is .*must not be trained.* the answer to learn as `completion`"
    ):
        record_of({"messages": turns})
    with pytest.raises(BadRow, match=rf"`completion\[1\].{name}`"):
        record_of({"prompt": "0?", "completion": [{"role": "assistant", "content": "zero"}, turns[1]]})
    turned = [{"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"], **mark} for t in turns]
    with pytest.raises(BadRow, match=rf"`conversations\[1\].{name}`"):
        record_of({"conversations": turned})
    row = {
        "prompt": turns[:3],
        "completion": [{**turns[3], "weight": 1, "train": True}],
    }  # an earlier answer is not trained
    assert words_of(row) == ["1?", "one", "2?", "two"]
    turns = said("1?", "one")
    assert words_of({"messages": [{**turn, "weight": None, "train": True} for turn in turns]}) == ["1?", "one"]


@pytest.mark.parametrize(
    "row, column",
    [
        ({"prompt": None, "completion": "x"}, "prompt"),
        ({"instruction": None, "output": "x", "input": "y"}, "instruction"),
    ],
)
def test_a_prompt_that_is_null_is_a_bad_row(row, column):
    with pytest.raises(BadRow, match=f"`{column}` is None, no prompt. Write what is asked"):
        record_of(row)


@pytest.mark.parametrize("answer, letter", [("B", "B"), ("dog", "B"), (2, "C")])
def test_choices_in_columns_are_asked(answer, letter):
    row = {
        "image": "0.png",
        "question": "Which?",
        "A": "cat",
        "B": "dog",
        "C": "cow",
        "D": "",
        "hint": "Barks.",
        "answer": answer,
    }
    (found,) = record_of(row).conversations
    assert found.prompt.startswith("Context: Barks.\nWhich?\nA. cat\nB. dog\nC. cow\nAnswer") and found.responses == [
        letter
    ]
    assert found.choices == ["cat", "dog", "cow"]
    with pytest.raises(BadRow, match="Choices stand in `A`, `C`; expected at least `A` and `B`, and none left out"):
        record_of({**row, "B": None})


@pytest.mark.parametrize("row", [{"A": None, "B": ""}, {"A": None, "option": "x"}])
def test_empty_columns_of_choices_are_no_choices(row):
    assert words_of({"question": "What?", "answer": "A cat.", **row}) == ["What?", "A cat."]


@pytest.mark.parametrize("names", [("option_a", "option_b"), ("a", "b"), ("Option1", "Option2")])
def test_choices_in_columns_of_other_names_are_not_left_out_in_silence(names):
    row = {"question": "Which?", **dict.fromkeys(names, "x"), "answer": "B"}
    with pytest.raises(BadRow, match=f"`{names[0]}` is 'x', which `question` does not ask: name the choices `A`, `B`"):
        record_of(row)
    assert words_of(row, FORMATS["question"].read) == ["Which?", "B"]


@pytest.mark.parametrize("asked", ["prompt", "instruction", "question"])
@pytest.mark.parametrize("caption", ["text", "caption"])
def test_a_prompt_beside_a_caption_is_not_left_out_in_silence(asked, caption):
    row = {"image": "0.png", asked: "Which colour?", caption: "red"}
    with pytest.raises(
        BadRow, match=f"`{asked}` is 'Which colour.', which `captions` does not ask: name the caption `completion`"
    ):
        record_of(row)
    assert (
        words_of({**row, asked: None}) == words_of(row, FORMATS["captions"].read) == ["Write a short caption.", "red"]
    )


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"context": "It is red.", "question": "Which?", "answer": "red"}, ["Context: It is red.\nWhich?", "red"]),
        ({"context": "", "question": "Which?", "answer": "red"}, ["Which?", "red"]),
        ({"instruction": "Which?", "context": "It is red.", "response": "red"}, ["Which?\nIt is red.", "red"]),  # Dolly
        ({"prompt": "It is red. Which?", "context": "It is red.", "completion": "red"}, ["It is red. Which?", "red"]),
    ],
)  # fmt: skip
def test_the_context_of_a_question_is_said(row, expected):
    assert words_of(row) == expected


@pytest.mark.parametrize("rest", [{"completion": "red"}, {"chosen": "red", "rejected": "blue"}])
def test_a_context_beside_a_prompt_is_not_left_out_in_silence(rest):
    with pytest.raises(BadRow, match=r"`context` is 'It is red\.', which `.*` does not ask: put it into the prompt"):
        record_of({"prompt": "Which?", "context": "It is red.", **rest})


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "caption": "a \ud83d cat"},
        {"text": "a \ud83d cat"},
        {"prompt": "a \ud83d cat", "completion": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a \ud83d cat"}]}, *said("x", first="assistant")]},
        {"image": "0.png", "question": "q", "answers": ["a \ud83d cat"]},
        {"images": [], "conversations": [{"messages": said("a \ud83d cat"), "responses": ["x"], "train_on": "last", "kind": ""}]},
    ],
)  # fmt: skip
def test_half_of_a_character_is_a_bad_row(row):
    with pytest.raises(BadRow, match=r"holds '\\ud83d', half of a character .* 'a \\ud83d cat'") as error:
        record_of(row)
    str(error.value).encode()
    assert words_of({"text": "a \U0001f600 cat"}) == ["a \U0001f600 cat"]


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("webdataset",)])
def test_a_schema_that_is_named_and_does_not_fit_is_told_in_a_sentence(name):
    for row in (
        {"image": "0.png"},
        {"image": "0.png", "title": "x"},
        {"image": "0.png", "messages": None, "text": None},
    ):
        with pytest.raises(BadRow):
            FORMATS[name].read(row)
    if name not in ("captions", "preference", "multiple_choice", "question"):  # these show the value, None
        with pytest.raises(
            BadRow, match=r"The row has no `\w+`, which this schema needs: it has \['image', 'title'\]"
        ):
            FORMATS[name].read({"image": "0.png", "title": "x"})


@pytest.mark.parametrize(
    "image",
    [
        {"src": "0.jpg"},
        {"url": "0.jpg"},
        {},
        {"path": None},
        {"path": ""},
        {"bytes": "abc"},
        {"path": 5},
    ],
)
def test_a_mapping_that_holds_no_image_is_refused(image):
    with pytest.raises(BadRow, match="a mapping without the bytes or the path of an image"):
        images_of({"image": image})


def test_mappings_that_hold_or_stand_for_an_image_are_taken():
    for image in (
        {"bytes": b"x"},
        {"bytes": b"x", "path": "0.jpg"},
        {"bytes": None, "path": "0.jpg"},
        {"path": "0.jpg"},
        STAND_IN,
        {
            "bytes": None,
            "path": None,
        },  # a damaged table of images; `read_image` says so, and `on_bad_image` leaves it out
    ):
        assert images_of({"image": image}) == [image]


@pytest.mark.parametrize("value", [5, {"detail": "low"}, True, ["0.jpg"]])
def test_an_image_part_that_names_no_image_is_a_bad_row(value):
    parts = [{"type": "image_url", "image_url": value}, {"type": "text", "text": "What?"}]
    with pytest.raises(BadRow, match="An image is"):
        record_of({"messages": [{"role": "user", "content": parts}, *said("x", first="assistant")]})


@pytest.mark.parametrize(
    "image", ["HTTPS://a.org/0.jpg", "s3://bucket/0.jpg", "file:///data/0.jpg", "http://a.org/0.jpg"]
)
def test_an_address_is_no_path(image):
    with pytest.raises(
        BadRow, match="Images are not fetched while training: download them first, and write their paths"
    ):
        images_of({"image": image})


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
        ({"images": ["0.png"], "messages": said("Look\n<image>\nq", "a", "and <image> this", "b")}, ["Look\nq", "a", "and this", "b"]),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "q"}]}, *said("a", first="assistant")]}, ["q", "a"]),
        ({"prompt": "<image>q", "completion": "a", "image": "0.png"}, ["q", "a"]),
        ({"prompt": said("<image>q"), "completion": "a"}, ["q", "a"]),
        ({"texts": [{"user": "<image>q", "assistant": "a"}]}, ["q", "a"]),
        ({"question": "<image>q", "answer": "a", "image": "0.png"}, ["q", "a"]),
    ],
)  # fmt: skip
def test_any_schema_is_read_without_its_images(row, expected):
    assert words_of(row, text_only) == expected and text_only(row).images == []


def test_a_placeholder_in_an_answer_is_bad_without_images_too():
    for row in ({"messages": said("q", "<image> a")}, {"text": "<image> a"}):
        with pytest.raises(BadRow, match="image placeholder"):
            text_only(row)


@pytest.mark.parametrize("asked", ["prompt", "instruction", "question"])
def test_a_text_with_a_prompt_of_another_schema_is_refused(asked):
    """The text was trained, and what it answers left out."""
    row = {asked: "Tell me a story.", "text": "Once upon a time."}
    with pytest.raises(BadRow, match=f"`{asked}` is 'Tell me a story.', which `plain_text` does not ask"):
        record_of(row)
    assert FORMATS["plain_text"].read(row).conversations[0].messages == []
    assert record_of({**row, asked: None}).conversations[0].responses == ["Once upon a time."]


def test_there_are_letters_for_26_choices():
    row = {"question": "Which?", "choices": [f"c{index}" for index in range(26)], "answer": "c25"}
    assert record_of(row).conversations[0].responses == ["Z"]
    with pytest.raises(BadRow, match="27 choices, and there are 26 letters"):
        record_of({**row, "choices": [*row["choices"], "c26"]})


@pytest.mark.parametrize("history", [[["a", "b", "c"]], [["a"]], ["a"], "old", {"a": "b"}])
def test_a_history_is_a_list_of_pairs(history):
    with pytest.raises(BadRow, match=r"`history(\[0\])?` is .*; expected a list"):
        prompt_completion({"instruction": "q", "output": "a", "history": history})


def test_a_placeholder_inside_a_part_is_told_how_to_write_it():
    parts = [{"type": "image"}, {"type": "text", "text": "<image> What?"}]
    row = {"images": ["0.png"], "messages": [{"role": "user", "content": parts}, *said("x", first="assistant")]}
    with pytest.raises(
        BadRow, match=r"`messages\[0\].content\[1\].text` holds .* In a list of parts an image is a part of its own"
    ):
        record_of(row)


def test_everyones_answers_are_not_replaced_by_the_most_frequent():
    row = {"image": "0.png", "question": "q?", "multiple_choice_answer": "yes"}
    assert words_of(row) == ["q?", "yes"]
    with pytest.raises(BadRow, match="The row has no `answers`: `multiple_choice_answer` is only the most frequent"):
        question(row, all_answers=True)
    assert question({**row, "answers": ["yes", "no"]}, all_answers=True).conversations[0].responses == ["yes", "no"]
