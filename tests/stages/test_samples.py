"""`show_every`: answers while a stage trains, which leave training as it is."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alignvlm.rows.encode import Encoder
from alignvlm.stages.samples import NEW_TOKENS, WIDTH, Sample, choose, undisturbed, with_text
from alignvlm.stages.stage import main
from tests.running import arguments_for


HELD_OUT = [{"name": "scenes", "annotations": ["short_caption", "questions"], "count": 8, "split": "test"}]
RATES = {"language_learning_rate": 1e-2, "projector_learning_rate": 1e-2}
LORA = {"lora_r": 4, "lora_dropout": 0.2, "bf16": True, "frozen_16_bit": True, "activation_checkpointing": True}


@pytest.mark.parametrize(
    "fields", [{"eval_sources": HELD_OUT}, LORA], ids=["held out", "LoRA with dropout in 16 bits"]
)
def test_training_takes_the_same_steps_with_answers_and_without(checkpoint, tmp_path, capsys, fields):
    entries, weights = [], []
    for show_every in (0, 2):
        folder = tmp_path / str(show_every)
        given = arguments_for(checkpoint, folder, **RATES, **fields, max_steps=3, show_every=show_every)
        entries.append(main(given))
        weights.append(load_file(folder / "model.safetensors"))
        printed = capsys.readouterr().out
        assert ("answers:" in printed) is (show_every > 0)
    assert entries[0]["logged_losses"] == entries[1]["logged_losses"] and len(entries[0]["logged_losses"]) == 3
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    lines = printed.splitlines()
    assert [text for text in lines if "answers:" in text] == [f"stage 3  {step}/3  answers:" for step in (0, 2, 3)]
    start = lines.index("stage 3  0/3  answers:") + 1
    first = lines[start : start + 12]  # of three records two prompts, each with its answer
    assert [text[:12] for text in first if text.startswith("  ") and text[2].isdigit()] == [
        f"  {n} scenes  " for n in (1, 2, 3)
    ]
    assert all("(expected: " in text for text in first[1::2]) and not any("(expected: " in text for text in first[::2])
    assert all("tokens/s" in text for text in lines if "  loss " in text)


def test_it_is_refused_where_there_is_nothing_to_show(checkpoint, tmp_path):
    texts = [{"name": "scene_texts", "count": 8}]
    with pytest.raises(ValueError, match="show_every: the sources hold no record with an image and a prompt"):
        main(arguments_for(checkpoint, tmp_path, **RATES, sources=texts, show_every=1))
    with pytest.raises(ValueError, match="show_every=-1 must be a number of steps"):
        main(arguments_for(checkpoint, tmp_path, **RATES, show_every=-1))


def test_records_come_from_all_sources_and_prompts_leave_room(processor):
    from alignvlm.data.mixture import Mixture, read_parts

    sources = [{"name": "scene_texts", "count": 4}, *HELD_OUT, {**HELD_OUT[0], "tag": "Briefly."}]
    mixture = Mixture(read_parts(sources, lambda record: (0, 0)), None)
    chosen = choose(mixture, Encoder(processor), None)
    assert len(chosen) == 3 and all(len(sample.conversations) == 2 for sample in chosen)
    assert [sample.conversations[0].prompt.startswith("Briefly.") for sample in chosen] == [False, True, False]
    length = len(Encoder(processor).prompt(chosen[0].conversations[0].messages).input_ids)
    assert choose(mixture, Encoder(processor), length + NEW_TOKENS)[0].conversations
    with pytest.raises(ValueError, match="no record"):
        choose(mixture, Encoder(processor), NEW_TOKENS)


def test_the_modes_of_modules_and_the_random_numbers_are_as_before(make_model):
    model = make_model().train()
    model.model.vision_tower.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_tensorboard_has_images_with_answers_and_one_folder(checkpoint, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fields = {"eval_sources": HELD_OUT, "max_steps": 2, "show_every": 2, "report_to": "tensorboard"}
    main(arguments_for(checkpoint, tmp_path / "run", **RATES, **fields))
    assert not list((tmp_path / "elsewhere").iterdir())
    (folder,) = (tmp_path / "run/runs").iterdir()
    found = {"images": {}, "scalars": {}, "tensors": {}}
    for file in folder.iterdir():
        events = reader.EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        for tag in events.Tags()["images"]:
            found["images"][tag] = [(event.step, event.width) for event in events.Images(tag)]
        for tag in events.Tags()["tensors"]:
            found["tensors"][tag] = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["scalars"]:
            found["scalars"].setdefault(tag, []).extend(event.step for event in events.Scalars(tag))
    assert found["images"] == {f"answers/{number}": [(0, WIDTH), (2, WIDTH)] for number in (1, 2, 3)}
    assert "(expected: " in found["tensors"]["answers/1/text_summary"]
    for tag in (
        "loss",
        "tokens_per_second",
        "images_per_second",
        "memory_gb",
        "seconds_left",
        "learning_rate/projector",
    ):
        assert found["scalars"][f"train/{tag}"] == [1, 2], tag
    assert sorted(found["scalars"]["eval/loss"]) == [0, 2]  # before and after


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_other_trackers_get_the_same_without_a_network(checkpoint, tmp_path, monkeypatch, tracker):
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    (tmp_path / "tracked").mkdir()
    fields = {"eval_sources": HELD_OUT, "max_steps": 2, "show_every": 2, "report_to": tracker}
    main(arguments_for(checkpoint, tmp_path / "run", **RATES, **fields))
    assert len(list((tmp_path / "tracked").rglob("*.png"))) == 6  # three records, before and after


def test_images_of_any_shape_stand_side_by_side():
    thin, wide = Image.new("RGB", (2, 900)), Image.new("RGB", (900, 3))
    for images in ([thin, wide], [wide, thin], [wide], [thin]):
        width, height = Sample("", images, []).image().size
        assert width == WIDTH and 1 <= height <= 4 * WIDTH


def test_long_lines_are_broken_below_the_image():
    lines = ["What is it?", "A dog " * 60]
    page = with_text(Image.new("RGB", (WIDTH, 40), "red"), lines)
    assert page.width == WIDTH and page.height > 40 + 5 * 14 and page.getpixel((5, 5)) == (255, 0, 0)
