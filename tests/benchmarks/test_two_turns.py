"""The conversations of `benchmarks/two_turns.py` ask what it says they ask."""

from alignvlm.data.record import Record
from alignvlm.data.sources import read_source
from alignvlm.rows.collator import AlignVLMCollator
from benchmarks.two_turns import write_conversations


def test_only_the_first_exchange_says_of_which_shape_the_second_question_is(tmp_path, processor):
    data = write_conversations(tmp_path, "test", count=12, seed=0)
    source = read_source({"data": data.name}, tmp_path)
    assert len(source) == 12
    for row in source:
        first, second = Record.from_row(row).conversations
        assert first.responses != second.responses  # two shapes of different colours
        assert first.prompt == second.prompt == "And its colour?" and first.messages != second.messages
        withheld = [conversation.exchanges()[-1] for conversation in (first, second)]
        assert withheld[0].messages == withheld[1].messages and withheld[0].image_count == 1
    batch = AlignVLMCollator(processor)([source[0]])
    assert batch["pixel_values"].shape[0] == 1 and batch["branch_ids"].max() == 2  # the image once, a branch of each
