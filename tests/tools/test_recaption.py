"""`alignvlm recaption` with real tiny models: ours, LLaVA, BLIP-2, GIT, BLIP; what it writes is a source that trains."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl import TrlParser

from alignvlm.data import scenes
from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.data.record import Record
from alignvlm.data.sources import read_source
from alignvlm.evaluation.answer import answer
from alignvlm.export.export import export
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.chat_templates import PLAIN_TEMPLATE
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.stage import run_stage
from alignvlm.tools.caption_filters import Limits, measure, most_agreed, rejection, repetition, similarity
from alignvlm.tools.captioner import Caption, Captioner
from alignvlm.tools.recaption import bad_image, main
from tests import forked
from tests.conftest import TEXT, make_tokenizer
from tests.running import arguments_for


ROOT = Path(__file__).parents[2]
FEW = ("--use_cpu", "--max_new_tokens", "8", "--batch_size", "3", "--keep_unfinished")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {**SIZES, "image_size": 16, "patch_size": 8, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Seven images, some in a folder below, beside files that are none."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    (folder / "below").mkdir(parents=True)
    for index, record in enumerate(scenes.make_scenes(7, seed=4)):
        record["images"][0].save(folder / ("below" if index > 4 else "") / f"{index}.png")
    (folder / "readme.txt").write_text("Not an image.\n")
    (folder / ".hidden.png").write_bytes(b"thumbnail")
    return folder


NAMES = [*(f"{index}.png" for index in range(5)), "below/5.png", "below/6.png"]  # in the order of paths


def shown(photos: Path) -> list[Image.Image]:
    return [Image.open(photos / name).convert("RGB") for name in NAMES]


def bert_like(*special: str):
    """A tokenizer that begins and ends every text, as GIT's and BLIP's."""
    tokenizer = make_tokenizer(("[CLS]", "[SEP]", *special))
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.bos_token = tokenizer.cls_token = "[CLS]"
    tokenizer.eos_token = tokenizer.sep_token = "[SEP]"
    return tokenizer


def tokens_of(tokenizer) -> dict[str, int]:
    """What a text configuration says of a tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
    given = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return {"vocab_size": len(tokenizer), **given, "initializer_range": 0.3, **SIZES}


def git() -> tuple:
    tokenizer = bert_like()
    config = GitConfig(vision_config=EYES, **tokens_of(tokenizer), num_image_with_embedding=None)
    return GitForCausalLM(config), GitProcessor(
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False), tokenizer
    )


def blip() -> tuple:
    tokenizer = bert_like()
    text = {**tokens_of(tokenizer), "encoder_hidden_size": 32}
    config = BlipConfig(vision_config=EYES, text_config=text, initializer_range=0.3)
    return BlipForConditionalGeneration(config), BlipProcessor(pil(), tokenizer)


def blip2() -> tuple:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "</s>"  # as OPT's
    text = {"model_type": "opt", **tokens_of(tokenizer), "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}
    qformer = {**SIZES, "encoder_hidden_size": 32, "vocab_size": 50, "initializer_range": 0.3}
    config = Blip2Config(
        vision_config=EYES, qformer_config=qformer, text_config=text, num_query_tokens=4, initializer_range=0.3
    )
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return Blip2ForConditionalGeneration(config), Blip2Processor(pil(), tokenizer, num_query_tokens=4)


def pil():
    return SiglipImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def models(tmp_path_factory, checkpoint, make_model, processor) -> dict[str, Path]:
    """The folders of tiny models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(make_model("causal", vision_feature_layer=-2), processor, folder / "causal", {"stages": []})
    export(str(folder / "causal"), folder / "llava")
    for make in (git, blip, blip2):
        set_seed(5)
        model, own_processor = make()
        model.save_pretrained(folder / make.__name__)
        own_processor.save_pretrained(folder / make.__name__)
    return {"ours": checkpoint, **{name: folder / name for name in ("llava", "git", "blip", "blip2")}}


CASES = [
    ("ours", CAPTION_PROMPT),
    ("llava", CAPTION_PROMPT),
    *((name, p) for name in ("git", "blip", "blip2") for p in ("", "a red")),
]


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_a_batch_gives_the_captions_of_one_by_one(name, prompt, models, photos):
    model = AutoModelForImageTextToText.from_pretrained(models[name]).eval()
    captioner = Captioner(model, AutoProcessor.from_pretrained(models[name]), prompt)
    images = shown(photos)
    decoding = {"max_new_tokens": 8, "do_sample": False}
    batch = captioner(images, **decoding)
    assert batch == [captioner([image], **decoding)[0] for image in images]
    texts = [captions[0].text for captions in batch]
    assert all(texts) and len(set(texts)) > 1 and not any(prompt and prompt in text for text in texts)


def test_prompts_of_unequal_lengths_are_padded_before_them():
    """LLaVA-NeXT shows a wide image in more tokens."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    text = {"model_type": "qwen2", **tokens_of(tokenizer), "num_key_value_heads": 1}
    pinpoints = [[16, 16], [32, 16], [16, 32], [16, 48]]
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **EYES},
        text_config=text,
        image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    set_seed(5)
    model = LlavaNextForConditionalGeneration(config).eval()
    square = {"height": 16, "width": 16}
    images = LlavaNextImageProcessorPil(size=square, crop_size=square, image_grid_pinpoints=pinpoints)
    processor = LlavaNextProcessor(images, tokenizer, 8, "default", PLAIN_TEMPLATE, num_additional_image_tokens=1)
    captioner = Captioner(model, processor, CAPTION_PROMPT)
    photos = [
        Image.linear_gradient("L").convert("RGB").resize(size) for size in ((16, 16), (48, 16), (16, 32), (20, 30))
    ]
    lengths = [captioner._inputs([photo])["input_ids"].shape[1] for photo in photos]
    assert len(set(lengths)) > 1
    decoding = {"max_new_tokens": 8, "do_sample": False}
    assert captioner(photos, **decoding) == [captioner([photo], **decoding)[0] for photo in photos]


@torch.no_grad()
def written_by_hand(name: str, prompt: str, folder: Path, image: Image.Image) -> str:
    """The greedy caption of one image, asked as the model's documentation does."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    if name == "ours":
        return answer(model, processor, [image], [[prompt]], max_new_tokens=8)[0][0]
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    tokens = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if name == "llava":
        written = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        inputs = processor(images=image, text=written, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    elif name == "git":  # [CLS] and the prompt, without [SEP]
        begin = [processor.tokenizer.cls_token_id, *tokens]
        output = model.generate(
            pixel_values=pixel_values, input_ids=torch.tensor([begin]), max_new_tokens=8, do_sample=False
        )[:, len(begin) :]
    elif name == "blip":  # its text decoder begins with the token BOS
        states = model.vision_model(pixel_values)[0]
        begin = [model.config.text_config.bos_token_id, *tokens]
        output = model.text_decoder.generate(
            input_ids=torch.tensor([begin]),
            eos_token_id=model.config.text_config.sep_token_id,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
        )[:, len(begin) :]
    else:  # BLIP-2: its four query tokens, then the text; OPT's begins with BOS if there is no other
        image_ids = [model.config.image_token_id] * 4
        begin = torch.tensor([image_ids + (tokens or [processor.tokenizer.bos_token_id])])
        output = model.generate(pixel_values=pixel_values, input_ids=begin, max_new_tokens=8, do_sample=False)
        output = output[:, begin.shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_a_model_is_asked_as_its_documentation_does(name, prompt, models, photos):
    model = AutoModelForImageTextToText.from_pretrained(models[name]).eval()
    captioner = Captioner(model, AutoProcessor.from_pretrained(models[name]), prompt)
    image = shown(photos)[1]
    ((caption,),) = captioner([image], max_new_tokens=8, do_sample=False)
    assert caption.text == written_by_hand(name, prompt, models[name], image)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def captions_of(file: Path) -> list[str]:
    return [row["annotations"][0]["response"] for row in rows_of(file)]


def source_of(printed: str) -> dict:
    """The source of the YAML that the command ends with."""
    (source,) = yaml.safe_load(printed[printed.index("sources:") :])["sources"]
    return source


def test_the_captions_of_a_folder_are_a_source_that_trains(models, photos, tmp_path, capsys):
    output = tmp_path / "out/captions.jsonl"
    main([str(models["ours"]), str(photos), str(output), *FEW])
    printed = capsys.readouterr().out
    assert "captions.jsonl: 7 captions of 7 images" in printed and "licence is: apache-2.0" in printed
    rows = rows_of(output)
    assert [row["image"] for row in rows] == [row["place"] for row in rows] == NAMES
    model = AutoModelForImageTextToText.from_pretrained(models["ours"]).eval()
    processor = AutoProcessor.from_pretrained(models["ours"])
    expected = answer(model, processor, shown(photos), [[CAPTION_PROMPT]] * 7, max_new_tokens=8)
    assert captions_of(output) == [text for (text,) in expected]
    by = rows[0]["captioned_by"]
    assert by["name"] == models["ours"].name and len(by["weights_sha256"]) == 64 and by["licence"] == "apache-2.0"
    assert by["prompt"] == CAPTION_PROMPT
    assert by["decoding"] == {"num_beams": 1, "max_new_tokens": 8, "do_sample": False}

    given = source_of(printed)
    assert given == {"data": str(output), "image_dir": str(photos)}
    source = read_source(given)
    for index, text in enumerate(captions_of(output)):
        (conversation,) = Record.from_row(source[index]).conversations
        assert (conversation.prompt, conversation.responses, conversation.image_count) == (CAPTION_PROMPT, [text], 1)
        assert source.metric_of(conversation) == "cider"
    fields = {"sources": [given], "max_steps": 2, "projector_learning_rate": 1e-3, "language_learning_rate": 1e-3}
    command = arguments_for(models["ours"], tmp_path / "stage3", **fields)
    (arguments,) = TrlParser(StageArguments).parse_args_and_config(command)
    entry = run_stage(arguments)
    assert entry["steps"] == 2 and len(entry["logged_losses"]) == 2 and not entry["losses_of_data"].get("bad_row")


def test_an_output_above_the_images_needs_no_image_dir(models, photos, capsys):
    output = photos.parent / "captions.jsonl"
    main([str(models["ours"]), str(photos), str(output), *FEW])
    given = source_of(capsys.readouterr().out)
    assert given == {"data": str(output)} and rows_of(output)[5]["image"] == "my photos/below/5.png"
    assert all(Path(image["folder"], image["path"]).is_file() for row in read_source(given) for image in row["images"])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tar"])
def test_rows_of_a_data_set_give_each_image_once(kind, models, photos, tmp_path, capsys):
    """Bytes are written beside the captions as they are; paths stay where they are."""
    files = [photos / name for name in NAMES]
    data = tmp_path / f"given/train.{kind}"
    data.parent.mkdir()
    if kind == "parquet":
        images = [{"bytes": file.read_bytes(), "path": None} for file in (*files, files[0])]
        features = Features({"image": ImageFeature(), "question": Value("string")})
        Dataset.from_dict({"image": images, "question": ["What?"] * 8}, features=features).to_parquet(data)
    elif kind == "tar":
        for index, file in enumerate(files):
            shutil.copy(file, data.parent / f"{index}.png")
            (data.parent / f"{index}.txt").write_text("An old caption.\n")
        names = sorted(file.name for file in data.parent.iterdir())
        subprocess.run(["tar", "-cf", data, "-C", data.parent, *names], check=True)
    else:
        lines = [json.dumps({"image": name, "caption": "An old caption."}) for name in (*NAMES, NAMES[0])]
        csv = ["image,caption", *(f"{name},old" for name in (*NAMES, NAMES[0]))]
        data.write_text("\n".join(lines if kind == "jsonl" else csv) + "\n")
    output = tmp_path / "out/captions.jsonl"
    more = ["--image_dir", str(photos)] if kind in ("jsonl", "csv") else []
    main([str(models["ours"]), str(data), str(output), *FEW, *more])
    given = source_of(capsys.readouterr().out)
    rows = rows_of(output)
    main([str(models["ours"]), str(photos), str(tmp_path / "folder.jsonl"), *FEW])
    assert captions_of(output) == captions_of(tmp_path / "folder.jsonl") and len(rows) == 7
    assert all(row["place"].startswith("train.") for row in rows)
    if more:
        assert given == {"data": str(output), "image_dir": str(photos)} and [row["image"] for row in rows] == NAMES
        assert not (tmp_path / "out/captions_images").exists()
        return
    assert given == {"data": str(output)}
    assert [(output.parent / row["image"]).read_bytes() for row in rows] == [file.read_bytes() for file in files]
    assert len(read_source(given)) == 7


def test_other_filters_choose_anew_without_the_model(models, photos, tmp_path, monkeypatch, capsys):
    command = [str(models["git"]), str(photos), str(tmp_path / "captions.jsonl"), *FEW]
    main(command)
    everything = rows_of(tmp_path / "captions.jsonl")
    words = [row["measures"]["words"] for row in everything]
    limit = sorted(words)[3] + 1
    assert min(words) < limit <= max(words)

    def not_again(*_, **__):
        raise AssertionError("the model is loaded again")

    monkeypatch.setattr("alignvlm.tools.recaption.load_checkpoint", not_again)
    main([*command, "--min_words", str(limit), "--train_prompt", "What is it?"])
    printed = capsys.readouterr().out
    kept, rejected = rows_of(tmp_path / "captions.jsonl"), rows_of(tmp_path / "captions.rejected.jsonl")
    assert [row["image"] for row in kept] == [row["image"] for row in everything if row["measures"]["words"] >= limit]
    assert kept[0]["annotations"][0]["prompt"] == "What is it?" != everything[0]["annotations"][0]["prompt"]
    assert len(kept) + len(rejected) == 7 and f"rejected {len(rejected):>7}  min_words {limit}" in printed
    for row in rejected:
        assert (row["reason"], row["limit"]) == ("min_words", limit) and row["value"] == row["measures"][
            "words"
        ] < limit
    summary = json.loads((tmp_path / "captions.summary.json").read_text())
    assert summary["rejected"] == {f"min_words {limit}": len(rejected)} and summary["kept"] == len(kept)
    assert summary["filters"]["min_words"] == limit and summary["quantiles"]["words"][1] == sorted(words)[3]
    with pytest.raises(AssertionError, match="loaded again"):  # another prompt is another caption
        main([*command, "--prompt", "a red"])

    with pytest.raises(SystemExit, match=r"^error: All 7 captions are rejected, so .*rejected\.jsonl says why"):
        main([*command, "--min_words", "1000"])
    assert "rejected       7  min_words 1000" in capsys.readouterr().out
    assert not (tmp_path / "captions.jsonl").exists() and len(rows_of(tmp_path / "captions.rejected.jsonl")) == 7
    with pytest.raises(ValueError, match="Schemas:"):  # nobody trains on them by accident
        read_source({"data": str(tmp_path / "captions.rejected.jsonl"), "image_dir": str(photos)})


@pytest.mark.parametrize("kind", ["folder", "rows of paths", "tar"])
def test_a_replaced_image_is_captioned_anew_and_a_touched_one_is_not(kind, models, tmp_path, monkeypatch):
    """Uncompressed images of one resolution have one size in bytes."""

    def write(name: str, color: str) -> None:
        Image.new("RGB", (32, 32), color).save(tmp_path / "photos" / name)
        if kind == "tar":
            subprocess.run(["tar", "-cf", data, "-C", tmp_path / "photos", "a.bmp", "a.txt", "b.bmp", "b.txt"])

    (tmp_path / "photos").mkdir()
    data, more = {
        "folder": (tmp_path / "photos", []),
        "rows of paths": (tmp_path / "rows.jsonl", ["--image_dir", str(tmp_path / "photos")]),
        "tar": (tmp_path / "train.tar", []),
    }[kind]
    for name in ("a", "b"):
        (tmp_path / f"photos/{name}.txt").write_text("An old caption.\n")
        Image.new("RGB", (32, 32), "blue").save(tmp_path / f"photos/{name}.bmp")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.bmp"}\n{"image": "b.bmp"}\n')
    write("b.bmp", "red")
    command = [str(models["git"]), str(data), str(tmp_path / "out/captions.jsonl"), *FEW, *more]
    main(command)
    blue, red = captions_of(tmp_path / "out/captions.jsonl")
    assert blue != red
    write("b.bmp", "white")
    main(command)
    first, white = captions_of(tmp_path / "out/captions.jsonl")
    assert first == blue and white not in (blue, red)

    def not_again(*_, **__):
        raise AssertionError("the model is loaded again")

    monkeypatch.setattr("alignvlm.tools.recaption.load_checkpoint", not_again)
    for file in (tmp_path / "photos").iterdir():
        os.utime(file, (1, 1))
    main(command)
    write("b.bmp", "red")  # it is the first again, and so are its captions
    main(command)
    assert captions_of(tmp_path / "out/captions.jsonl") == [blue, red]


def test_samples_are_measured_and_the_most_agreed_is_taken(models, photos, tmp_path):
    outputs = {}
    for name, more in (("a", []), ("again", []), ("seed", ["--seed", "1"]), ("cold", ["--temperature", "0.01"])):
        output = tmp_path / name / "captions.jsonl"
        main([str(models["ours"]), str(photos), str(output), *FEW, "--samples", "3", *more])
        outputs[name] = rows_of(output)
    assert outputs["a"] == outputs["again"] != outputs["seed"]
    for row in outputs["a"]:
        pairs = [similarity(a, b) for i, a in enumerate(row["samples"]) for b in row["samples"][:i]]
        assert len(row["samples"]) == 3 and row["measures"]["agreement"] == pytest.approx(sum(pairs) / 3, abs=1e-4)
        assert row["annotations"][0]["response"] == row["samples"][most_agreed(row["samples"])[0]]
        assert row["captioned_by"]["decoding"]["temperature"] == 1.0
    assert len({text for row in outputs["a"] for text in row["samples"]}) > 7
    warm, cold = (sum(row["measures"]["agreement"] for row in outputs[name]) / 7 for name in ("a", "cold"))
    assert warm < 0.3 and cold > 0.8  # near the greedy one
    values = sorted(row["measures"]["agreement"] for row in outputs["a"])
    command = [str(models["ours"]), str(photos), str(tmp_path / "a/captions.jsonl"), *FEW, "--samples", "3"]
    main([*command, "--min_agreement", str(values[-1])])
    kept = [row["measures"]["agreement"] for row in rows_of(tmp_path / "a/captions.jsonl")]
    assert kept == [values[-1]] * len(kept) and 0 < len(kept) < 7


def clip(tokenizer) -> tuple:
    text = {**tokens_of(tokenizer), "max_position_embeddings": 16, "projection_dim": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**EYES, "projection_dim": 16}, projection_dim=16, initializer_factor=9.0
    )
    return CLIPModel(config), CLIPProcessor(
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False), tokenizer
    )


def siglip(tokenizer) -> tuple:
    text = {**tokens_of(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=EYES)), SiglipProcessor(pil(), tokenizer)


@pytest.mark.parametrize("make", [clip, siglip])
def test_a_scorer_scores_each_caption_with_its_image(make, models, photos, tmp_path, capsys):
    set_seed(7)
    model, processor = make(bert_like())
    model.eval().save_pretrained(tmp_path / "scorer")
    processor.save_pretrained(tmp_path / "scorer")
    output = tmp_path / "captions.jsonl"
    command = [str(models["ours"]), str(photos), str(output), *FEW, "--scorer", str(tmp_path / "scorer")]
    main(command)
    rows = rows_of(output)
    for row in rows:
        image = Image.open(photos / row["image"]).convert("RGB")
        given = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
        inputs = processor(images=image, text=row["annotations"][0]["response"], **given)
        with torch.no_grad():
            found = model(**inputs)
        expected = torch.cosine_similarity(found.image_embeds, found.text_embeds).item()
        assert row["measures"]["score"] == pytest.approx(expected, abs=2e-4)
    scores = sorted(row["measures"]["score"] for row in rows)
    assert scores[0] < scores[4]
    capsys.readouterr()
    main([*command, "--min_score", str(scores[4])])
    kept = [row["measures"]["score"] for row in rows_of(output)]
    assert (
        sorted(kept) == [score for score in scores if score >= scores[4]]
        and "score        median" in capsys.readouterr().out
    )


def test_a_bad_image_stops_or_is_left_out_and_nothing_is_captioned_twice(models, photos, tmp_path, capsys):
    damaged = shutil.copytree(photos, tmp_path / "photos")
    content = (damaged / "4.png").read_bytes()
    (damaged / "4.png").write_bytes(content[: len(content) // 2])
    command = [str(models["ours"]), str(damaged), str(tmp_path / "out/captions.jsonl"), *FEW]
    with pytest.raises(
        SystemExit, match=r"^error: 4\.png: Cannot read the image 4\.png.*--on_bad_image skip, which keeps"
    ):
        main(command)
    assert not list((tmp_path / "out").glob("captions*"))
    capsys.readouterr()
    main([*command, "--on_bad_image", "skip"])
    printed = capsys.readouterr().out
    assert "1 of 3 batches are done" in printed and "rejected       1  bad image" in printed
    (rejected,) = rows_of(tmp_path / "out/captions.rejected.jsonl")
    assert (rejected["place"], rejected["reason"]) == ("4.png", "bad image") and "Cannot read" in rejected["problem"]
    main([str(models["ours"]), str(photos), str(tmp_path / "whole.jsonl"), *FEW])
    expected = {row["image"]: row["annotations"] for row in rows_of(tmp_path / "whole.jsonl")}
    found = {row["image"]: row["annotations"] for row in rows_of(tmp_path / "out/captions.jsonl")}
    assert found == {name: said for name, said in expected.items() if name != "4.png"}
    with pytest.raises(SystemExit, match=r"^error: 4\.png: Cannot read"):  # kept as bad, and still no caption
        main(command)


@pytest.mark.parametrize(
    ("problem", "sentences"),
    [
        ("it is damaged", "a.png: it is damaged. Leave it out"),
        ("It is too large.", "a.png: It is too large. Leave it out"),
    ],
)
def test_a_bad_image_is_told_in_sentences_whatever_its_problem_ends_with(problem, sentences):
    assert str(bad_image("a.png", problem)).startswith(sentences)


def test_a_broken_link_is_a_bad_image_and_a_linked_folder_is_captioned(models, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "far").symlink_to(photos / "below")
    (tmp_path / "photos" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    command = [str(models["ours"]), str(tmp_path / "photos"), str(tmp_path / "captions.jsonl"), *FEW]
    with pytest.raises(
        SystemExit, match=r"^error: gone\.png: Cannot read the image gone\.png.*gone\.png'\. Leave it out"
    ):
        main(command)
    main([*command, "--on_bad_image", "skip"])
    assert [row["image"] for row in rows_of(tmp_path / "captions.jsonl")] == ["photos/far/5.png", "photos/far/6.png"]
    (rejected,) = rows_of(tmp_path / "captions.rejected.jsonl")
    assert (rejected["place"], rejected["reason"]) == ("gone.png", "bad image")


@pytest.mark.slow
def test_a_killed_run_goes_on_in_two_processes_to_the_same_files(models, photos, tmp_path):
    def arguments(output: Path) -> list[str]:
        few = [*FEW, "--samples", "2", "--batch_size", "1"]
        return [str(models["ours"]), str(photos), str(output), *few]

    killed, whole = tmp_path / "killed/captions.jsonl", tmp_path / "whole/captions.jsonl"
    process = forked.start("alignvlm.tools.recaption:main", arguments(killed), log=tmp_path / "log")
    lines, deadline = 0, time.time() + 150
    while lines < 2 and process.is_alive() and time.time() < deadline:
        lines = sum(file.read_text().count("\n") for file in killed.parent.glob(".captions-*/*.jsonl"))
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 2 <= lines < 7 and not killed.exists()
    printed = forked.run("alignvlm.tools.recaption:main", arguments(killed), log=tmp_path / "log", processes=2)
    assert "of 7 batches are done" in printed and printed.count("sources:") == 1
    main(arguments(whole))
    for ending in (".jsonl", ".rejected.jsonl", ".summary.json"):
        assert killed.with_suffix(ending).read_bytes() == whole.with_suffix(ending).read_bytes()


def test_repetition_and_similarity_of_known_texts():
    assert repetition("A dog runs over the grass.") == repetition("dog") == repetition("") == 0
    assert repetition("a dog and a dog") == pytest.approx(1 / 4)  # a-dog comes twice among four pairs
    assert repetition("no no no no no") == pytest.approx(3 / 4)
    assert similarity("A dog.", "a dog") == 1 and similarity("a dog", "two cats") == 0
    assert similarity("a dog runs", "a dog") == pytest.approx(2 * 2 / 5)
    texts = ["two cats", "a dog runs", "a dog"]
    assert most_agreed(texts) == (1, pytest.approx(0.8 / 3)) and most_agreed(["one"]) == (0, 1.0)


def test_each_bound_holds_and_is_part_of_what_is_kept():
    limits = Limits(min_words=2, max_words=5, max_repetition=0.25, min_agreement=0.5, min_score=0.2)

    def reason(text: str, agreement: float = 0.5, score: float = 0.2, finished: bool = True) -> str | None:
        found = rejection(Caption(text, finished), measure(text, agreement, score), limits)
        return found and found["reason"]

    assert reason("a dog") is None and reason("a dog and a dog") is None
    assert reason("dog") == "min_words" and reason("a dog runs over the grass") == "max_words"
    assert reason("a dog a dog") == "max_repetition"
    assert reason("a dog", agreement=0.49) == "min_agreement" and reason("a dog", score=0.19) == "min_score"
    assert reason("a dog", finished=False) == "unfinished" and reason("") == "empty"
    assert reason("a <image> dog") == "holds <image>"
    assert rejection(Caption("a", False), measure("a"), Limits(keep_unfinished=True)) is None
    assert rejection(Caption("...", True), measure("..."), Limits()) == {"reason": "min_words", "value": 0, "limit": 1}


def test_a_caption_is_finished_where_the_model_ended_it(models, photos):
    model = AutoModelForImageTextToText.from_pretrained(models["ours"]).eval()
    captioner = Captioner(model, AutoProcessor.from_pretrained(models["ours"]), CAPTION_PROMPT)
    images = shown(photos)
    cut = captioner(images, max_new_tokens=8, do_sample=False)
    assert not any(caption.finished for (caption,) in cut)
    tokens = model.generate(**captioner._inputs(images), max_new_tokens=8, do_sample=False)
    first = tokens[0, -6].item()
    captioner.ends.add(first)
    ended = captioner(images, max_new_tokens=8, do_sample=False, eos_token_id=first)
    finished = [caption.finished for (caption,) in ended]
    assert finished[0] and not all(finished)  # in one batch, padded to the longest
    assert len(ended[0][0].text) < len(cut[0][0].text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model", "PHOTOS", "OUT"], "No such folder: 'no/such/model'"),
        (["MODEL", "no/such/photos", "OUT"], "No such file or folder: no/such/photos"),
        (["MODEL", "EMPTY", "OUT"], "EMPTY holds no train"),
        (["MODEL", "TEXTS", "OUT"], r"has no column of images. Columns found: \['text'\]"),
        (["MODEL", "URL", "OUT"], r"url.jsonl, line 1: An image is at 'https://x.org/a.jpg'"),
        (["MODEL", "PHOTOS", "out.json"], "'out.json' is no .jsonl file"),
        (["MODEL", "PHOTOS", "TAKEN"], "is there already, and not from this command"),
        (["MODEL", "URL", "URL"], "is the data itself"),
        (["MODEL", "ROWS", "INSIDE"], "would become a part of"),
        (["MODEL", "PHOTOS", "OUT", "--min_agreement", "0.3"], "--min_agreement needs --samples of 2 or more"),
        (["MODEL", "PHOTOS", "OUT", "--min_score", "0.3"], "--min_score needs a --scorer"),
        (
            ["MODEL", "PHOTOS", "OUT", "--max_words", "3", "--min_words", "4"],
            "--max_words 3 is less than --min_words 4",
        ),
        (
            ["MODEL", "PHOTOS", "OUT", "--train_prompt", "<image> What?"],
            "'<image> What\\?' in training, which holds the",
        ),
        (["MODEL", "PHOTOS", "OUT", "--batch_size", "0"], "--batch_size 0 is less than 1"),
        (["NOWHERE", "PHOTOS", "OUT", "--min_words", "-1"], "--min_words -1 is less than 0"),
        *(
            (
                ["NOWHERE", "PHOTOS", "OUT", "--samples", "2", "--scorer", "NOWHERE", option, value],
                f"{option} {value} is out of range: give {given}",
            )
            for option, value, given in (
                ("--temperature", "0", "a number above 0; without --samples the likeliest caption is taken"),
                ("--temperature", "-1", "a number above 0"),
                ("--temperature", "nan", "a number above 0"),
                ("--top_p", "5", "a number above 0 and at most 1"),
                ("--top_p", "0", "a number above 0 and at most 1"),
                ("--max_repetition", "50", "a number from 0 to 1"),
                ("--min_agreement", "70", "a number from 0 to 1"),
                ("--min_agreement", "-0.1", "a number from 0 to 1"),
                ("--min_score", "25", "a number from -1 to 1"),
            )
        ),
        (["MODEL", "PHOTOS", "OUT", "--dtype", "fp8"], "Unknown precision 'fp8'"),
        (["MODEL", "PHOTOS", "OUT", "--image_dir", "x"], "is a folder of images: leave out the image_dir"),
        *(
            (
                ["MODEL", "PHOTOS", "OUT", option, value],
                f"is a folder of images: leave out {option} {value}, which is for",
            )
            for option, value in (("--split", "tset"), ("--data_config", "zzz"), ("--data_revision", "main"))
        ),
        (["NOWHERE", "PHOTOS", "OUT", "--scorer_revision", "main"], "--scorer_revision needs a --scorer"),
        (["NOWHERE", "PHOTOS", "OUT", "--seed", "4"], "--seed needs --samples of 2 or more"),
        (["MODEL", "PHOTOS", "OUT", "--revision", "v1"], "The revision 'v1' would be of a model of the Hub"),
        (["MODEL", "ROWS", "OUT", "--data_revision", "v1"], "The revision 'v1' would be of a data set on the Hub"),
        (["MODEL", "PHOTOS", "OUT", "--scorer", "GIT"], "does not embed images and texts; name a CLIP or SigLIP"),
        (["LANGUAGE", "PHOTOS", "OUT"], "it is no image-text model"),
    ],
)
def test_mistakes_are_named_and_leave_no_captions(arguments, message, models, photos, tokenizer, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "taken.jsonl").write_text("mine\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "A dog."}\n')
    (tmp_path / "url.jsonl").write_text('{"image": "https://x.org/a.jpg"}\n')
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text('{"image": "a.jpg"}\n')
    tokenizer.save_pretrained(tmp_path / "language")
    (tmp_path / "language/config.json").write_text(json.dumps(TEXT))
    paths = {
        "MODEL": models["ours"],
        "GIT": models["git"],
        "LANGUAGE": tmp_path / "language",
        "PHOTOS": photos,
        "OUT": tmp_path / "out/captions.jsonl",
        "TAKEN": tmp_path / "taken.jsonl",
        "EMPTY": tmp_path / "EMPTY",
        "TEXTS": tmp_path / "texts.jsonl",
        "URL": tmp_path / "url.jsonl",
        "ROWS": tmp_path / "rows",
        "INSIDE": tmp_path / "rows/captions.jsonl",
    }
    with pytest.raises(SystemExit, match=rf"^error: (?s:.*){message}"):
        main(
            [
                *(str(paths.get(one, one)) for one in arguments),
                "--use_cpu",
                "--keep_unfinished",
                "--max_new_tokens",
                "2",
            ]
        )
    assert (tmp_path / "taken.jsonl").read_text() == "mine\n" and not (tmp_path / "out/captions.jsonl").exists()


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("/no/such", "--scorer '/no/such' is neither a folder with a config.json nor a model of the Hub"),
        ("no/such", "--scorer 'no/such' is neither a folder with a config.json nor a model of the Hub"),
        ("PHOTOS", "--scorer '.*my photos' is neither a folder with a config.json"),
        ("GIT", "--scorer '.*git' .of type 'git'. does not embed images and texts; name a CLIP or SigLIP"),
        ("BLIP2", "--scorer '.*blip2' .of type 'blip-2'. does not embed images and texts; name a CLIP or SigLIP"),
        ("NO PROCESSOR", "--scorer '.*clip' has no processor of images and texts"),
    ],
)
def test_a_mistaken_scorer_is_told_before_anything_is_captioned(
    scorer, message, models, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or the Hub is asked for half a minute
    CLIPConfig().save_pretrained(tmp_path / "clip")
    paths = {"PHOTOS": photos, "GIT": models["git"], "BLIP2": models["blip2"], "NO PROCESSOR": tmp_path / "clip"}
    command = [str(models["git"]), str(photos), str(tmp_path / "out/captions.jsonl"), *FEW]
    with pytest.raises(SystemExit, match=rf"^error: {message}"):
        main([*command, "--scorer", str(paths.get(scorer, scorer))])
    assert not (tmp_path / "out").exists()
