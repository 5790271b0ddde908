"""Row schemas one by one: what is said, by whom, where images stand; and what is said of a row that matches none."""

from functools import partial
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.formats import (
    FORMATS,
    format_of,
    images_of,
    label,
    messages,
    prompt_completion,
    question,
    record_of,
    text_only,
)
from alignvlm.data.reader import STAND_IN, Reader
from alignvlm.data.record import BadRow, Conversation, Record
from tests import examples


WORDS = st.text("abc ", min_size=1).map(str.strip).filter(bool)
IMAGES = [f"{index}.png" for index in range(3)]


def said(*words: str, first: str = "user") -> list[dict]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(words)]


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=8), st.one_of(st.none(), WORDS), st.integers(0, 3))
def test_images_without_a_place_stand_where_trl_puts_them(turns, system, images):
    turns = turns[: len(turns) // 2 * 2]
    given = [*([{"role": "system", "content": system}] if system else []), *said(*turns)]
    record = messages({"messages": given, "images": IMAGES[:images]})
    expected = prepare_multimodal_messages(given, [Image.new("RGB", (2, 2))] * images)
    expected = [
        (message["role"], [part["type"] if part["type"] == "image" else part["text"] for part in message["content"]])
        for message in expected
    ]
    (conversation,) = record.conversations
    answered = [*conversation.messages, {"role": "assistant", "content": conversation.responses[0]}]
    found = [
        (m["role"], [p["type"] if p["type"] == "image" else p["text"] for p in Conversation.parts(m)])
        for m in answered
    ]
    assert found == expected and record.images == IMAGES[:images]
    assert conversation.train_on == ("last" if len(turns) == 2 else "all")


@settings(max_examples=examples(100), deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.one_of(WORDS, st.just(None)), min_size=1, max_size=4), WORDS), min_size=1, max_size=4
    )
)
def test_an_image_stays_where_it_is_shown(turns):
    """`<image>` in a text, typed parts and parts that hold their image are one thing; None stands for an image."""
    count = sum(part is None for asked, _ in turns for part in asked)
    names = iter([f"{index}.png" for index in range(count)] * 2)
    typed, placeholders, own = [], [], []
    for asked, answered in turns:
        answer = {"role": "assistant", "content": answered}
        parts = [{"type": "image"} if part is None else {"type": "text", "text": f"{part}\n"} for part in asked]
        typed += [{"role": "user", "content": parts}, answer]
        text = "\n".join("<image>" if part is None else part for part in asked)
        placeholders += [{"from": "human", "value": text}, {"from": "gpt", "value": answered}]
        own += [
            {"role": "user", "content": [p if p["type"] == "text" else {**p, "path": next(names)} for p in parts]},
            answer,
        ]
    images = [f"{index}.png" for index in range(count)]
    found = [
        record_of({"messages": typed, "images": images}),
        record_of({"conversations": placeholders, "image": images}),
        record_of({"messages": own}),
    ]
    for record in found:
        assert record.images == images and record.conversations[0].image_count == count
    assert shape(found[0]) == shape(found[2])
    assert [images_and_words(record) for record in found] == [images_and_words(found[0])] * 3


def shape(record: Record) -> list:
    return [[(p["type"], p.get("text")) for p in Conversation.parts(m)] for m in record.conversations[0].messages]


def images_and_words(record: Record) -> list:
    return [
        word
        for kind, text in chain.from_iterable(shape(record))
        for word in (["<image>"] if kind == "image" else text.split())
    ]


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(WORDS, st.integers(0, 2), WORDS), min_size=1, max_size=4), st.booleans())
def test_exchanges_of_a_conversation_see_their_images_and_no_other_exchange(turns, with_system):
    shown = sum(count for _, count, _ in turns)
    given = [{"role": "system", "content": "Be kind."}] if with_system else []
    for asked, count, answered in turns:
        given += [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": asked}]}]
        given += [{"role": "assistant", "content": answered}]
    record = messages({"messages": given, "images": [f"{index}.png" for index in range(shown)]})
    apart = record.conversations[0].exchanges()
    assert [(c.prompt, *c.responses) for c in apart] == [(asked, answered) for asked, _, answered in turns]
    before = 0
    for conversation, (_, count, _) in zip(apart, turns):
        before += count
        assert conversation.image_count == before and len(conversation.messages) == 1 + with_system
    Record(record.images, apart)  # the k-th part is the k-th image


@pytest.mark.parametrize(
    "row, expected, train_on",
    [
        ({"prompt": "2 + 2?", "completion": "4"}, ["2 + 2?", "4"], "last"),
        ({"prompt": said("2 + 2?"), "completion": said("4", first="assistant")}, ["2 + 2?", "4"], "last"),
        ({"prompt": said("1?", "one", "2?"), "completion": said("two", first="assistant")}, ["1?", "one", "2?", "two"], "last"),
        ({"prompt": said("1?"), "completion": said("one", "2?", "two", first="assistant")}, ["1?", "one", "2?", "two"], "all"),
        ({"instruction": "2 + 2?", "output": "4"}, ["2 + 2?", "4"], "last"),
        ({"prompt": "", "completion": "Once upon a time."}, ["Once upon a time."], "last"),
    ],
)  # fmt: skip
def test_trls_prompt_and_completion_train_the_completion_alone(row, expected, train_on):
    for images in ([], ["a.png"]):
        if row.get("prompt") == "" and images:
            continue
        record = record_of({**row, "images": images})
        (conversation,) = record.conversations
        found = [
            *(text for kind, text in chain.from_iterable(shape(record)) if kind == "text"),
            *conversation.responses,
        ]
        assert (found, conversation.train_on) == (expected, train_on)
        assert conversation.image_count == len(images)


def test_a_completion_that_cannot_be_trained_apart_is_refused():
    row = {"prompt": said("1?", "one", "2?"), "completion": said("two", "3?", "three", first="assistant")}
    with pytest.raises(BadRow, match="Write the row as `messages`"):
        prompt_completion(row)


def test_a_sharegpt_row_has_its_system_message_apart():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    record = record_of({"conversations": turns, "system": "Be kind."})
    assert [message["role"] for message in record.conversations[0].messages] == ["system", "user"]


def test_the_answer_most_people_gave_is_trained():
    def answer(*given) -> str:
        row = {"image": "a.png", "question": "q?", "answers": list(given)}
        return question(row).conversations[0].responses[0]

    assert answer("no", "yes", "yes") == "yes"
    assert answer("no", "yes") == "no"  # the first among equals
    assert answer({"answer": "two", "answer_id": 1}, {"answer": "two", "answer_id": 2}, {"answer": "2"}) == "two"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "a.png", "words": "x"}, r"it has \['image', 'words'\]; `captions` lacks captions or .* or text"),
        ({"image": "a.png", "question": "q?", "anwser": "a"}, "`question` lacks multiple_choice_answer or answer or answers; .*`anwser` may be meant as `answer`"),
        ({"prompt": "p"}, "`prompt_completion` lacks completion or response or answer or output"),
        ({"mesages": []}, "`mesages` may be meant as `messages`"),
        ({"image": "", "caption": None}, r"The row is empty: none of its columns \['caption', 'image'\] has a value"),
        ({"blob": 1}, "none comes near. Schemas: webdataset, annotations, messages"),
        ({}, "The row is empty"),
    ],
)  # fmt: skip
def test_a_row_that_matches_no_schema_is_told_what_the_nearest_miss(row, message):
    with pytest.raises(BadRow, match=message):
        record_of(row)


@pytest.mark.parametrize(
    "content, message",
    [
        ([{"type": "video"}], r"`messages\[0\].content\[0\].type` is 'video'. Valid types: text, image"),
        ([{"type": "text", "text": 3}], r"`messages\[0\].content\[0\].text` is 3"),
        ([{"type": "image", "url": "https://a.b/c.png"}], "download them first"),
        ([{"type": "image"}, {"type": "image"}], r"2 image part\(s\) or <image>, and the row 0 image"),
        (None, r"`messages\[0\].content` is None"),
    ],
)
def test_parts_nobody_can_read_are_named(content, message):
    with pytest.raises(BadRow, match=message):
        record_of({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]})


def test_images_in_a_column_and_in_parts_are_not_mixed():
    parts = [{"type": "image", "path": "b.png"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    with pytest.raises(BadRow, match=r"1 image\(s\) in a column, and 1 in parts"):
        record_of(
            {"messages": [{"role": "user", "content": parts}, *said("this", first="assistant")], "images": ["a.png"]}
        )


def test_only_the_user_shows_images():
    answer = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "here"}]}
    with pytest.raises(BadRow, match="is an image of the assistant; only the user shows images"):
        record_of({"messages": [*said("Draw."), answer], "images": ["a.png"]})


def test_records_written_as_rows_are_read_as_they_were():
    record = record_of({"messages": said("1?", "one", "2?", "two"), "images": ["a.png", "b.png"]})
    row = record.to_row()
    assert format_of(row) == "record" and record_of(row).to_row() == row


def test_every_schema_of_the_catalogue_has_a_name():
    named = {form.read for form in FORMATS.values()}
    for kind in CATALOGUE.values():
        read = getattr(kind.read, "func", kind.read)
        assert read is None or read in named or read.__name__ in ("record_of", "text_only", "label", "multiple_choice")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which?", "chosen": "the red", "rejected": "the blue"},
        {"question": "Which?", "chosen": "the red", "rejected": "the blue"},
        {
            "prompt": said("Which?"),
            "chosen": said("the red", first="assistant"),
            "rejected": said("the blue", first="assistant"),
        },
        {"chosen": said("Which?", "the red"), "rejected": said("Which?", "the blue")},
    ],
    ids=["texts", "a question", "messages", "whole conversations"],
)
def test_a_preference_has_a_better_and_a_worse_answer(row):
    record = record_of({"images": IMAGES[:1], **row})
    (conversation,) = record.conversations
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
    assert (conversation.prompt, conversation.responses, conversation.rejected) == (
        "Which?",
        ["the red"],
        ["the blue"],
    )
    assert conversation.train_on == "last" and record.images == IMAGES[:1]
    assert Record.from_row(record.to_row()).conversations == [
        Conversation(**{**vars(conversation), "messages": record.to_row()["conversations"][0]["messages"]})
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Which?", "chosen": "red", "rejected": "red"}, "are both 'red'. Remove the row"),
        ({"chosen": said("Which?", "red"), "rejected": said("What?", "blue")}, "answer different prompts"),
        ({"prompt": "Which?", "chosen": "red", "rejected": None}, "`rejected` is None"),
    ],
)
def test_a_bad_preference_is_named(row, message):
    with pytest.raises(BadRow, match=message):
        FORMATS["preference"].read(row)


def test_an_answer_that_is_not_trained_is_no_exchange_of_its_own():
    """`turns: independent` trained the answers inside a prompt."""
    preferred = {"chosen": said("Which?", "red", "Why?", "so"), "rejected": said("Which?", "red", "Why?", "not")}
    completed = {"prompt": said("Which?", "red", "Why?"), "completion": said("so", first="assistant")}
    for row, rejected in ((preferred, ["not"]), (completed, None)):
        (last,) = record_of(row).conversations[0].exchanges()
        assert (last.prompt, last.responses, last.rejected) == ("Why?", ["so"], rejected)


@pytest.mark.parametrize(
    "column, value",
    [
        ("path", "photos/0.JPG"),
        ("image_paths", ["photos/0.jpg", "photos/1.jpg"]),
        ("img", Image.new("RGB", (2, 2))),
        ("picture", {"bytes": b"", "path": None}),
        ("image_1", STAND_IN),
        ("photo", b"\x89PNG\r\n"),
        ("photo", b"RIFF\x24\x00\x00\x00WEBPVP8 "),
        ("photo", "0.avif"),
        ("photo", "0.jfif"),
        ("photo", ["0.HEIC"]),
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"text": "A cat."},
        {"question": "What?", "answer": "A cat."},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
    ],
    ids=["plain_text", "question", "messages"],
)
def test_an_image_in_a_column_that_nobody_knows_is_not_left_out_in_silence(row, column, value):
    row = {**row, column: value}
    with pytest.raises(BadRow, match=rf"`{column}` is .*an image that is not seen: name the column `image`"):
        Reader(record_of).of_row(row)
    assert Reader(text_only, texts_alone=True).of_row(row).images == []


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"txt": "A cat."}, r"The sample has no image, only texts: `text` is 'A cat\.'.* or write `name: text`"),
        ({"json": {"text": "A cat.", "key": "0"}}, "The sample has no image, only texts: `text`"),
        ({"json": {"messages": said("What?", "A cat."), "photo": "0.avif"}}, "`photo` is .*that is not seen"),
    ],
)
def test_a_sample_whose_image_is_not_there_is_no_text(sample, message):
    row = {"__key__": "0", "__url__": "0.tar", **sample}
    for read in (record_of, FORMATS["webdataset"].read):
        with pytest.raises(BadRow, match=message):
            Reader(read).of_row(row)
    assert Reader(text_only, texts_alone=True).of_row(row).conversations[0].responses == ["A cat."]


def test_a_sample_may_be_a_conversation_without_an_image():
    row = {"__key__": "0", "json": {"messages": said("Hi", "Hello")}}
    assert Reader(record_of).of_row(row).conversations[0].responses == ["Hello"]


@pytest.mark.parametrize("members", [{"jpg": STAND_IN}, {}])
def test_the_texts_of_a_sample_come_without_the_images_its_json_names(members):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    row = {"__key__": "0", **members, "json": {"image": "0.jpg", "conversations": turns}}
    found = Reader(text_only, texts_alone=True).of_row(row)
    assert found.images == [] and found.conversations[0].image_count == 0 and found.conversations[0].prompt == "What?"


def test_what_is_no_image_is_not_taken_for_one():
    for row in (
        {"source": "wiki", "url": "https://a.org/cat.jpg", "text": "A cat."},
        {"question": "Which file is the photo?", "answer": "cat.jpg", "audio": b"OggS", "meta": {}},
    ):
        assert not Reader(record_of).of_row(row).images


def test_an_empty_column_of_images_does_not_hide_a_filled_one():
    for empty in ([], "", None):
        assert (
            images_of({"images": empty, "image": "0.jpg"})
            == images_of({"image": empty, "images": ["0.jpg"]})
            == ["0.jpg"]
        )
    assert images_of({"images": [], "filename": "scan.pdf"}) == images_of({"image": ""}) == []
    with pytest.raises(BadRow, match="An image is ''"):
        images_of({"images": ["0.jpg", ""]})


def test_texts_that_follow_each_other_in_parts_keep_their_white_space():
    """As a chat template writes them; the last answer was joined by line breaks, and the others lost what stood between their words."""

    def parts(*texts: str) -> list[dict]:
        return [{"type": "text", "text": said} for said in texts]

    row = {
        "image": "0.png",
        "messages": [
            {
                "role": "user",
                "content": [*parts(" Look:\n", "1. red\n"), {"type": "image"}, *parts("What ", "is it? ")],
            },
            {"role": "assistant", "content": parts("A ", "cat.")},
            {"role": "user", "content": parts("Sure", "?")},
            {"role": "assistant", "content": parts("Yes", ", ", "", "I am. ")},
        ],
    }
    (said,) = messages(row).conversations
    assert [[part.get("text") for part in message["content"]] for message in said.messages] == [
        ["Look:\n1. red", None, "What is it?"],
        ["A cat."],
        ["Sure?"],
    ]
    assert said.responses == ["Yes, I am."]


ALPACA = {"instruction": "Translate to French.", "input": "The cat", "output": "Le chat", "system": "Be brief."}


@pytest.mark.parametrize(
    "row, expected",
    [
        (ALPACA, ["Be brief.", "Translate to French.\nThe cat", "Le chat"]),
        ({**ALPACA, "input": "", "system": None}, ["Translate to French.", "Le chat"]),
        ({**ALPACA, "instruction": "", "system": ""}, ["The cat", "Le chat"]),
        ({**ALPACA, "history": [["Hi", "Salut"]]}, ["Be brief.", "Hi", "Salut", "Translate to French.\nThe cat", "Le chat"]),
        ({"messages": said("Hi", "Hello"), "system": "Be kind."}, ["Be kind.", "Hi", "Hello"]),
        ({"messages": [{"role": "system", "content": "Own."}, *said("Hi", "Hello")], "system": "Be kind."}, ["Own.", "Hi", "Hello"]),
        ({"prompt": said("Hi"), "completion": "Hello", "system": "Be kind."}, ["Be kind.", "Hi", "Hello"]),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No", "system": "Be kind."}, ["Be kind.", "Hi", "Hello"]),
    ],
)  # fmt: skip
def test_what_stands_in_columns_beside_the_prompt_is_said_too(row, expected):
    """Alpaca's `input` was left out: "Translate to French." was trained to be answered by "Le chat"."""
    (found,) = record_of(row).conversations
    assert [part["text"] for message in found.messages for part in message["content"]] + found.responses == expected
    assert found.train_on == "last"


@pytest.mark.parametrize("answer, letter", [("dog", "B"), ("B", "B"), (0, "A"), ("1", "B")])
@pytest.mark.parametrize("column", ["choices", "options"])
def test_the_choices_of_a_question_are_asked(answer, letter, column):
    """They were left out: "Which?" was trained to be answered by "B"."""
    found = record_of({"image": "0.png", "question": "Which?", column: ["cat", "dog"], "answer": answer})
    (asked,) = found.conversations
    assert asked.prompt.startswith("Which?\nA. cat\nB. dog\n") and asked.responses == [letter]
    assert found.images == ["0.png"] and asked.choices == ["cat", "dog"]


@pytest.mark.parametrize("answer", ["2", "cow"])
def test_an_answer_that_names_no_choice_or_two_is_refused(answer):
    row = {"image": "0.png", "question": "How many?", "choices": ["1", "2", "3"]}
    with pytest.raises(BadRow, match="`answer` is"):
        record_of({**row, "answer": answer})
    assert record_of({**row, "answer": 1}).conversations[0].responses == ["B"]


def test_a_question_whose_choices_are_empty_is_a_question():
    assert record_of({"question": "What?", "options": [], "answer": "A cat."}).conversations[0].responses == ["A cat."]


@pytest.mark.parametrize("label", ["false", "FALSE", " False ", "0", "0.0"])
def test_a_csv_says_in_several_ways_that_an_answer_is_bad(label):
    with pytest.raises(BadRow, match=r"`label` is .*: a bad answer"):
        prompt_completion({"prompt": "q", "completion": "a", "label": label})


@pytest.mark.parametrize(
    "column, value",
    [
        ("caption", "['A dog.', 'Two dogs.']"),
        ("captions", '["A dog."]'),
        ("text", " ['A dog.'\n 'Two dogs.'] "),  # as numpy writes it
        ("sentences", "[{'raw': 'A dog.', 'tokens': ['a', 'dog']}]"),
        ("answer", "['yes', 'yes']"),
        ("multiple_choice_answer", "['yes']"),
    ],
)
def test_a_list_that_is_written_into_a_text_is_no_text(column, value):
    row = {"image": "0.png", column: value} | ({"question": "q?"} if "answer" in column else {})
    with pytest.raises(
        BadRow, match=rf"`{column}` is .*, a list written as a text.* JSON lines with the list in `\w+s`"
    ):
        record_of(row)


@pytest.mark.parametrize("answer", ["[3]", "[1, 2]", "[]", "[a dog]", "['a', 3]", "[sic] a dog", "[" * 5000 + "]"])
def test_an_answer_in_brackets_may_be_an_answer(answer):
    for row in ({"question": "q?", "answer": answer}, {"caption": answer}):
        assert record_of({"image": "0.png", **row}).conversations[0].responses == [answer]


@pytest.mark.parametrize("full_row_first", [False, True])
def test_rows_of_one_image_are_merged_with_all_their_images(full_row_first):
    """The last prompt of a row, which nobody answers, shows the second image and leaves it out with itself."""
    images = ["0.png", "1.png"]
    rows = [
        {"images": images, "messages": [*said("<image> What?", "A cat."), *said("<image> And here?")]},
        {"images": images, "messages": said("<image> <image> Both?", "Cats.")},
    ]
    record = Reader(record_of)(rows[::-1] if full_row_first else rows, "0")
    assert [image["path"] for image in record["images"]] == images
    assert {c["responses"][0]: len(c["messages"][0]["content"]) for c in record["conversations"]} == {
        "A cat.": 2,
        "Cats.": 3,
    }


@pytest.mark.parametrize("column", ["prompt", "instruction", "question"])
def test_a_prompt_in_the_metadata_of_an_image_folder_is_not_left_out_in_silence(column):
    row = {"image": "0.png", "text": "A cat.", column: "What?"}
    with pytest.raises(BadRow, match=f"`{column}` is 'What.', which `imagefolder` does not ask: .*leave out `name: i"):
        label(row)
    assert label({**row, column: ""}).conversations[0].responses == ["A cat."]


@pytest.mark.parametrize(
    "read, options, message",
    [
        ("texts", {"min_relevance": "3"}, "min_relevance='3'. Expected a whole number, without quotes"),
        ("texts", {"min_formatting": True}, "min_formatting=True. Expected a whole number"),
        ("captions", {"prompt": 5}, "prompt=5. Expected a text, in quotes"),
        ("captions", {"prompt": "<image> Caption"}, "prompt='<image> Caption' holds the image placeholder <image>"),
        ("question", {"instruction": ["x"]}, r"instruction=\['x'\]. Expected a text, in quotes"),
        ("question", {"all_answers": "no"}, "all_answers='no'. Expected true or false, without quotes"),
        ("question", {"kind_column": 3}, "kind_column=3. Expected a text"),
    ],
)
def test_an_option_of_another_type_is_named(read, options, message):
    with pytest.raises(ValueError, match=message):
        Reader(partial(FORMATS[read].read, **options))


def test_options_of_their_types_are_taken():
    Reader(partial(FORMATS["texts"].read, min_relevance=3, min_formatting=None))
    Reader(partial(CATALOGUE["sharegpt4v"].read, prompt=None))
    Reader(partial(CATALOGUE["imagefolder"].read, names=["cat"], prompt="What?"))


@pytest.mark.parametrize(
    "row",
    [
        {"video": "0.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
        {"videos": ["0"], "messages": said("<video>What?", "A cat.")},
        {"video": {"bytes": b"", "path": None}, "question": "What?", "answer": "A cat."},
        {"video": "clips/0.MP4", "text": "A cat."},
        {"image": "0.png", "video": "0", "messages": said("<image> or <video>?", "A cat.")},
    ],
)  # fmt: skip
def test_a_video_is_not_left_out_in_silence(row):
    with pytest.raises(
        BadRow, match=r"`videos?` is .*, a video, which is not seen.* Remove the row, or give its frames"
    ):
        Reader(record_of).of_row(row)


@pytest.mark.parametrize("row", [{"video": None}, {"video": "yt-123"}, {"videos": []}, {"text": "<video> is a tag."}])
def test_what_is_no_video_is_not_taken_for_one(row):
    Reader(record_of).of_row({"text": "A cat.", **row})
