"""The demo and the contact sheet with images cut into tiles."""

import pytest

from alignvlm.data.mixture import load_mixture
from alignvlm.evaluation.answer import answer
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.tools.contact_sheet import write_contact_sheet
from alignvlm.tools.demo_model import Decoding, DemoModel, Talk
from alignvlm.tools.show_data import main as show_data
from tests.modeling_alignvlm.test_tiles import picture, tiled
from tests.running import SOURCES, arguments_for


def test_the_demo_answers_about_tiles_and_shows_the_overview(processor, make_model):
    own, model, image = tiled(processor), make_model(image_block="image"), picture((40, 20))
    demo = DemoModel("tiny", model, own, "fp32")
    talk = demo.asked(Talk(("picture.png",)), "What is it?")
    (*_, text) = demo.stream(talk, [image], Decoding("image", max_new_tokens=4))
    assert text == answer(model, own, [image], [["What is it?"]], max_new_tokens=4)[0][0]
    assert demo.look(talk, [image], "a red circle", "image").layers.shape[2:] == (1, 2, 2)


def test_the_contact_sheet_shows_tokens_and_marks_of_tiles(processor, tmp_path):
    collator = AlignVLMCollator(tiled(processor, max_tiles=6))
    mixture = load_mixture([{"name": "scene_signs", "count": 2, "image_size": 40}], collator.token_counts)
    write_contact_sheet(mixture, collator, 2, tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert "&lt;row_1_col_1&gt;" in page and page.count("<article>") == 2 and "<i>[4 image tokens]</i>" in page


def test_what_stage_5_refuses_to_train_on_is_not_shown_for_it(checkpoint, tmp_path):
    fields = {"sources": SOURCES, "stage": 5, "method": "grpo", "language_learning_rate": 1e-3, "max_tiles": 4}
    given = arguments_for(checkpoint, tmp_path / "out", **fields, num_generations=2)
    with pytest.raises(ValueError, match="stage 5 shows complete images, and max_tiles=4 cuts"):
        show_data([*given, "--rewards", "cider", "--show", "1", "--sheet", str(tmp_path / "sheet.html")])
    assert not (tmp_path / "sheet.html").exists()


@pytest.mark.parametrize("option", ["show", "sample"])
def test_fewer_than_no_records_are_not_shown(checkpoint, tmp_path, option):
    given = arguments_for(checkpoint, tmp_path / "out", sources=SOURCES, projector_learning_rate=1e-3)
    with pytest.raises(ValueError, match=f"{option}=-3: expected a number of records, 0 or more"):
        show_data([*given, f"--{option}", "-3"])
