"""A projector taken from another model: as it is, apart, and converted to another language model's embeddings."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipVisionModel, set_seed

from alignvlm import cli
from alignvlm.stages.arguments import parse_anywhere
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.projector_checkpoint import WEIGHTS, SavedProjector, export_projector, sha256_of_tensors
from alignvlm.stages.stage import main as run_stage
from alignvlm.tools.plan import plan_stages
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import make_tokenizer
from tests.running import arguments_for
from tests.stages.conftest import SIZES
from tests.stages.test_projector_start import solved_by_numpy


def language_of_width(folder, width: int, special_tokens: tuple[str, ...], seed: int) -> str:
    set_seed(seed)
    tokenizer = make_tokenizer(special_tokens)  # which move the ids of all others
    config = LlamaConfig(**{**SIZES, "hidden_size": width}, vocab_size=len(tokenizer), num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> str:
    return language_of_width(tmp_path_factory.mktemp("narrow"), 32, ("<one>", "<two>", "<three>"), seed=1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    return language_of_width(tmp_path_factory.mktemp("wide"), 48, (), seed=2)


@pytest.fixture(scope="module")
def turned(narrow, tmp_path_factory) -> str:
    """As wide as `narrow`, with the same embeddings but for a rotation and some noise, of tokens with other ids."""
    folder = language_of_width(tmp_path_factory.mktemp("turned"), 32, (), seed=4)
    theirs, ours = (LlamaForCausalLM.from_pretrained(each) for each in (narrow, folder))
    tokens, ids = (AutoTokenizer.from_pretrained(each) for each in (narrow, folder))
    shared = sorted(tokens.get_vocab().keys() & ids.get_vocab().keys())
    rotation, _ = torch.linalg.qr(torch.randn(32, 32))
    with torch.no_grad():
        known = theirs.get_input_embeddings().weight[tokens.convert_tokens_to_ids(shared)] @ rotation
        noise = 0.3 * known.std() * torch.randn(known.shape)
        ours.get_input_embeddings().weight[ids.convert_tokens_to_ids(shared)] = known + noise
    ours.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """As wide as `narrow`, and of nothing else in common with it."""
    return language_of_width(tmp_path_factory.mktemp("other"), 32, (), seed=4)


@pytest.fixture(scope="module")
def thin(tmp_path_factory) -> str:
    return language_of_width(tmp_path_factory.mktemp("thin"), 16, (), seed=3)


@pytest.fixture(scope="module")
def trained(vision, narrow, tmp_path_factory):
    """A checkpoint whose projector was trained with the narrow language model, for a step; and its projector apart."""
    folder = tmp_path_factory.mktemp("trained")
    assemble(BackboneArguments(vision, narrow, str(folder / "stage0")))
    run_stage(arguments_for(folder / "stage0", folder / "stage1", projector_learning_rate=1e-2, max_steps=1, stage=1))
    export_projector(folder / "stage1", folder / "projector")
    return folder


def projector_of(folder) -> dict[str, torch.Tensor]:
    prefix = "model.projector."
    return {k.removeprefix(prefix): v for k, v in load_file(folder / "model.safetensors").items() if prefix in k}


@pytest.mark.parametrize("source", ["stage1", "projector"])
def test_a_projector_of_the_same_width_is_taken_as_it_is(vision, narrow, trained, tmp_path, caplog, source):
    assemble(BackboneArguments(vision, narrow, str(tmp_path), projector=str(trained / source), seed=3))
    found, expected = projector_of(tmp_path), projector_of(trained / "stage1")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(found["layers.0.weight"], projector_of(trained / "stage0")["layers.0.weight"])
    recorded = read_run_record(tmp_path)["projector"]
    assert recorded["from"] == source and recorded["stages"] == [1] and recorded["converted"] is None
    assert recorded["backbones"] == read_run_record(trained / "stage0")["backbones"]
    assert "other weights" not in caplog.text


def test_a_projector_apart_is_small_and_tells_where_it_comes_from(trained):
    folder = trained / "projector"
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "config.json", "README.md", RUN_RECORD}
    assert read_run_record(folder) == read_run_record(trained / "stage1")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "alignvlm_projector"
    saved, whole = SavedProjector.read(str(folder)), SavedProjector.read(str(trained / "stage1"))
    assert saved.config.to_dict() == whole.config.to_dict() and saved.encoder_sha256 == whole.encoder_sha256
    model = AlignVLMForConditionalGeneration.from_pretrained(trained / "stage1")
    assert saved.encoder_sha256 == sha256_of_tensors(model.model.vision_tower.state_dict())
    card = (folder / "README.md").read_text()
    assert "- projector\n" in card and "features of\n`" in card


FUSED = {"vision_feature_layer": [-2, -1], "vision_layer_fusion": "weighted_sum"}


@pytest.mark.parametrize("kind", ["mlp", "linear", "pool", "fused", "same width"])
def test_another_language_model_gets_the_word_converter(vision, narrow, wide, turned, trained, tmp_path, caplog, kind):
    """The new projector is the old one followed by the linear map between the embeddings of equal tokens that numpy finds."""
    folders = (trained / "stage1", tmp_path / "converted")
    made_with = {"projector_type": "linear", **FUSED} if kind == "fused" else {"projector_type": kind}
    if kind == "same width":
        made_with, wide = {}, turned
    elif kind != "mlp":
        folders = (tmp_path / "old", folders[1])
        assemble(BackboneArguments(vision, narrow, str(folders[0]), **made_with))
    assemble(BackboneArguments(vision, wide, str(folders[1]), projector=str(folders[0]), **made_with))
    models = [AlignVLMForConditionalGeneration.from_pretrained(folder) for folder in folders]
    tokenizers = [AlignVLMProcessor.from_pretrained(folder).tokenizer for folder in folders]
    vocabularies = [set(each.get_vocab()) - set(each.get_added_vocab()) for each in tokenizers]
    shared = sorted(vocabularies[0] & vocabularies[1])
    ids = [each.convert_tokens_to_ids(shared) for each in tokenizers]
    assert ids[0] != ids[1] and len(shared) > 300
    x, t = (model.get_input_embeddings().weight.detach().double().numpy()[own] for model, own in zip(models, ids))
    converter = solved_by_numpy(x, t, ridge=1e-4, bias=kind != "pool")
    width = 64 if kind == "fused" else 32
    features = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (model.model.projector(features).double().numpy() for model in models)
    expected = before @ converter[:32] + (0 if kind == "pool" else converter[32])
    np.testing.assert_allclose(after, expected, rtol=1e-3, atol=1e-5)
    if kind == "mlp":  # the further hidden values can learn
        first, last = (models[1].model.projector.layers[layer].weight for layer in (0, 2))
        assert first[32:].abs().min(1).values.max() > 0 and not last[:, 32:].any() and last[:, :32].any()
    recorded = read_run_record(folders[1])["projector"]["converted"]
    missed = []
    for token in range(len(shared)):  # what the map of all others misses it by
        others = solved_by_numpy(*(np.delete(each, token, 0) for each in (x, t)), ridge=1e-4, bias=kind != "pool")
        missed.append(t[token] - x[token] @ others[:32] - (0 if kind == "pool" else others[32]))
    explained = 1 - (np.square(missed)).sum() / ((t - t.mean(0)) ** 2).sum()
    assert (explained > 0.8) == (kind == "same width")  # all others were drawn independently
    assert ("may be no better a start than a new one" in caplog.text) == (explained < 0.1)
    assert recorded == {"tokens": len(shared), "explained": pytest.approx(explained, abs=1e-3)}


def test_calibrations_and_weights_of_layers_are_part_of_a_projector(vision, narrow, wide, trained, tmp_path):
    """Merging and tiles have no weights: a projector serves with them and without."""
    made_with = {**FUSED, "modality_calibration": True}
    assemble(BackboneArguments(vision, narrow, str(tmp_path / "stage0"), **made_with))
    rate = {"projector_learning_rate": 1e-2, "max_steps": 2}
    run_stage(arguments_for(tmp_path / "stage0", tmp_path / "stage1", **rate))
    export_projector(tmp_path / "stage1", tmp_path / "apart")
    expected, before = projector_of(tmp_path / "stage1"), projector_of(tmp_path / "stage0")
    for name in ("calibrations.0.scale", "calibrations.0.shift", "fusion.layer_scores", "fusion.norms.0.bias"):
        assert not torch.equal(expected[name], before[name]), name

    def started(name: str, language=narrow, projector="apart", **fields) -> dict[str, torch.Tensor]:
        given = BackboneArguments(
            vision, language, str(tmp_path / name), projector=str(tmp_path / projector), **fields
        )
        assemble(given)
        return projector_of(tmp_path / name)

    found = started("next", merge_image_tokens=3, max_tiles=4, **made_with)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match="is made with --vision_feature_layer -2 -1 --vision_layer_fusion weighted_s"):
        started("no", modality_calibration=True)
    with pytest.raises(ValueError, match="is made with --modality_calibration True, not modality_calibration=False"):
        started("no", **FUSED)
    with pytest.raises(ValueError, match="of a language model with 2 layers of width 32, and this one has 2 of 48"):
        started("no", language=wide, projector="stage1", **made_with)
    with pytest.raises(ValueError, match="is made with --modality_calibration False"):
        started("no", projector=str(trained / "projector"), modality_calibration=True)
    assert not (tmp_path / "no").exists()


def test_the_checkpoint_begins_a_stage_but_not_projector_start(vision, narrow, trained, tmp_path):
    assemble(BackboneArguments(vision, narrow, str(tmp_path / "stage0"), projector=str(trained / "projector")))
    starts = {"projector_learning_rate": 1e-3, "projector_start": "least_squares"}
    given = arguments_for(tmp_path / "stage0", tmp_path / "out", **starts)
    with pytest.raises(ValueError, match="that it was assembled with"):
        run_stage(given)
    language = arguments_for(tmp_path / "stage0", tmp_path / "next", language_learning_rate=1e-3)
    after_it = arguments_for(tmp_path / "next", tmp_path / "out", **starts)
    for stages in ([given], [language, after_it]):
        with pytest.raises(ValueError, match="that it was assembled with"):
            plan_stages([parse_anywhere(stage)[0] for stage in stages], processes=1, sample=2)
    entry = run_stage(
        arguments_for(tmp_path / "stage0", tmp_path / "stage1", projector_learning_rate=1e-3, max_steps=1)
    )
    assert entry["steps"] == 1 and read_run_record(tmp_path / "stage1")["projector"]["from"] == "projector"


def test_other_encoder_weights_are_told(narrow, trained, vision, tmp_path, caplog):
    encoder = SiglipVisionModel.from_pretrained(vision)
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := type(tmp_path)(vision) / name).is_file():
            (tmp_path / "other").mkdir(exist_ok=True)
            (tmp_path / "other" / name).write_text(file.read_text())
    encoder.save_pretrained(tmp_path / "other")
    assemble(
        BackboneArguments(str(tmp_path / "other"), narrow, str(tmp_path / "out"), projector=str(trained / "stage1"))
    )
    assert "has other weights than the one that the projector" in caplog.text


def test_what_does_not_fit_is_refused_before_backbones_are_loaded(
    vision, narrow, wide, thin, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("alignvlm.stages.backbones.load_vision_encoder", lambda *given: pytest.fail("loaded"))

    def message_of(language=narrow, projector="stage1", **fields) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            assemble(
                BackboneArguments(
                    vision, language, str(tmp_path / "out"), projector=str(trained / projector), **fields
                )
            )
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    said = message_of(projector_type="linear", pixel_shuffle_factor=2)
    assert "is made with --projector_type mlp --pixel_shuffle_factor 1, not projector_type=linear, pixel_s" in said
    assert "of width 32, and this one has 48" in message_of(language=wide, projector="projector")
    assert "has a hidden layer of 32 values" in message_of(language=thin)
    assert "No such folder" in message_of(projector="nothing")
    (tmp_path / "not_ours").mkdir()
    (tmp_path / "not_ours/config.json").write_text('{"model_type": "llama"}')
    assert "is of type 'llama', neither" in message_of(projector=str(tmp_path / "not_ours"))
    saved = SavedProjector.read(str(trained / "projector"))
    vision_config = type(saved.config.vision_config)(**{**SIZES, "num_hidden_layers": 3}, patch_size=8)
    with pytest.raises(ValueError, match="belongs to another vision encoder: num_hidden_layers was 2 and is 3"):
        saved.check_fits(vision_config, saved.config.text_config)


def test_a_version_of_the_language_model_takes_the_projector_as_it_is(vision, narrow, trained, tmp_path):
    """As after training: every weight has moved, embeddings by a third of their spread."""
    language = LlamaForCausalLM.from_pretrained(narrow)
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.33 * parameter.std().item())
    language.save_pretrained(tmp_path / "version")
    make_tokenizer(("<one>", "<two>", "<three>")).save_pretrained(tmp_path / "version")
    given = {"projector": str(trained / "stage1"), "output_dir": str(tmp_path / "out")}
    assemble(BackboneArguments(vision, str(tmp_path / "version"), **given))
    found, expected = projector_of(tmp_path / "out"), projector_of(trained / "stage1")
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read_run_record(tmp_path / "out")["projector"]["converted"] is None


def test_embeddings_that_tell_nothing_of_each_other_are_not_converted(vision, other, trained, tmp_path, caplog):
    assemble(BackboneArguments(vision, other, str(tmp_path), projector=str(trained / "stage1")))
    assert torch.equal(projector_of(tmp_path)["layers.2.bias"], projector_of(trained / "stage1")["layers.2.bias"])
    assert "may be no better a start than a new one" in caplog.text
    assert read_run_record(tmp_path)["projector"]["converted"] is None


@pytest.mark.parametrize("language", ["narrow", "other"])
def test_without_embeddings_the_projector_is_taken_as_it_is_and_this_is_told(
    request, vision, trained, tmp_path, caplog, language
):
    folder = request.getfixturevalue(language)
    assemble(BackboneArguments(vision, folder, str(tmp_path), projector=str(trained / "projector")))
    assert torch.equal(projector_of(tmp_path)["layers.2.bias"], projector_of(trained / "stage1")["layers.2.bias"])
    assert ("if not, name the complete checkpoint" in caplog.text) == (language == "other")


def test_too_few_common_tokens_are_refused(vision, wide, trained, tmp_path, monkeypatch):
    few = {f"token{number}": number for number in range(32)}
    monkeypatch.setattr("alignvlm.stages.projector_checkpoint._tokens_of", lambda tokenizer: few)
    with pytest.raises(ValueError, match=r"have 32 tokens in common, and a converter .* needs more than that"):
        assemble(BackboneArguments(vision, wide, str(tmp_path), projector=str(trained / "stage1")))
    assert not (tmp_path / "config.json").exists()


def test_the_command_writes_a_new_folder_only(trained, tmp_path, capsys):
    cli.main(["projector", str(trained / "stage1"), str(tmp_path / "apart")])
    assert "To begin with it: alignvlm assemble" in capsys.readouterr().out
    assert (tmp_path / "apart" / WEIGHTS).read_bytes() == (trained / "projector" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match=r"is there already\. Name a new folder"):
        export_projector(trained / "stage1", tmp_path / "apart")
