"""What a language model keeps inside AlignVLM is tried: what holds is written down, what does not is refused or left out."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    set_seed,
)

from alignvlm.data import scenes
from alignvlm.evaluation.answer import answer
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.language_trial import last_position, try_language_model
from alignvlm.stages.stage import main as run_stage
from alignvlm.tools.plan import plan_stages
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from modeling_alignvlm.masking_alignvlm import MASK_TYPES
from tests.conftest import make_tokenizer
from tests.running import arguments_for, parse
from tests.stages.conftest import SIZES, VISION


ALL = list(MASK_TYPES)
VOCABULARY = 350
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
# kind: (class, config, mask types kept, packing)
LANGUAGES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), ALL, True),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2), ALL, True),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), ALL, True),
    "opt": (
        OPTForCausalLM,
        OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32),
        ALL,
        True,
    ),
    "falcon": (FalconForCausalLM, FalconConfig(**SIZES, alibi=False), ALL, True),
    "gpt_neo": (
        GPTNeoForCausalLM,
        GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
        ["causal"],
        True,
    ),
    "mpt": (MptForCausalLM, MptConfig(d_model=32, n_heads=2, n_layers=2), ALL, False),
    "bloom": (BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=2), ["causal"], False),
    "falcon with alibi": (FalconForCausalLM, FalconConfig(**SIZES, alibi=True), ["causal"], False),
}


def make_language(kind: str, **fields):
    """A language model with weights that are large enough for wrong masks to show."""
    model_class, config, _, _ = LANGUAGES[kind]
    values = config.to_dict() | {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    set_seed(3)
    model = model_class(type(config)(**{**values, **fields}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A function that saves a language model with its tokenizer and returns the folder."""

    def save(kind: str, **fields) -> str:
        folder = tmp_path_factory.mktemp("language")
        make_language(kind, **fields).save_pretrained(folder)
        tokenizer = make_tokenizer(())
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def mpt(vision, language, tmp_path_factory):
    """A checkpoint whose language model cannot pack."""
    folder = tmp_path_factory.mktemp("mpt") / "stage0"
    assemble(BackboneArguments(vision, language("mpt"), str(folder)))
    return folder


@pytest.mark.parametrize("kind", LANGUAGES)
def test_the_trial_sees_what_each_language_model_keeps(kind):
    _, _, mask_types, packing = LANGUAGES[kind]
    config = AlignVLMConfig(vision_config=VISION.to_dict(), text_config=make_language(kind).config)
    model = AlignVLMForConditionalGeneration(config)
    model.model.language_model.load_state_dict(make_language(kind).base_model.state_dict())
    before = config.to_dict()
    trial = try_language_model(model.train())
    assert (trial.mask_types, trial.packing) == (mask_types, packing), trial.reasons
    assert set(trial.reasons) == {*MASK_TYPES, "packing"} - set(mask_types) - ({"packing"} if packing else set())
    assert model.training and config.to_dict() == before


def test_what_cannot_be_kept_is_refused_with_what_can(vision, language, tmp_path):
    folder = language("gpt_neo")
    arguments = BackboneArguments(vision, folder, str(tmp_path / "stage0"))
    with pytest.raises(
        ValueError, match=r"\(gpt_neo\) cannot keep attention_mask_type='image'.*What it keeps: --atten"
    ):
        assemble(arguments)
    assert not (tmp_path / "stage0").exists()
    arguments.attention_mask_type = "causal"
    model, _ = assemble(arguments)
    assert model.config.supported_mask_types == ["causal"] and model.config.packing
    given = arguments_for(tmp_path / "stage0", tmp_path / "run", projector_learning_rate=1e-3)
    message = "'gpt_neo' cannot keep attention_mask_type='image'.*seen to keep: causal"
    with pytest.raises(ValueError, match=message):
        run_stage(given)
    with pytest.raises(ValueError, match=message):
        plan_stages([parse(given)], processes=1)


def test_a_language_model_of_another_form_is_refused(vision, tmp_path):
    tokenizer = make_tokenizer(())
    BertLMHeadModel(BertConfig(**SIZES, vocab_size=len(tokenizer), is_decoder=True)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertModel.* have other weights"):
        assemble(BackboneArguments(vision, str(tmp_path), str(tmp_path / "stage0")))


def test_without_packing_a_row_holds_one_annotation(mpt, tmp_path):
    config = json.loads((mpt / "config.json").read_text())
    assert config["packing"] is False and config["supported_mask_types"] == ALL
    given = arguments_for(mpt, tmp_path / "run", projector_learning_rate=1e-3, attn_implementation="eager")
    (plan,) = plan_stages([parse(given)], processes=1)
    entry = run_stage(given)
    assert entry["steps"] == plan.steps
    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    processor = AlignVLMProcessor.from_pretrained(tmp_path / "run")
    records = scenes.make_scenes(2)
    apart = AlignVLMCollator(processor, shared_image=model.config.packing)([records[0]])
    assert apart["input_ids"].shape[0] == len(records[0]["conversations"]) > 1
    assert model(**apart).loss.isfinite()
    packed = AlignVLMCollator(processor)([records[0]])
    with pytest.raises(ValueError, match=r"packed rows, which the language model 'mpt' cannot keep apart"):
        model(**packed)
    with pytest.raises(ValueError, match="row_length=64 packs rows, which the language model 'mpt' cannot"):
        run_stage([*given, "--row_length", "64", "--max_length", "64", "--output_dir", str(tmp_path / "packed")])


def test_without_packing_answers_are_those_of_one_question_at_a_time(mpt):
    model = AlignVLMForConditionalGeneration.from_pretrained(mpt).eval()
    processor = AlignVLMProcessor.from_pretrained(mpt)
    picture, questions = Image.new("RGB", (20, 20), "red"), ["What?", "Which colour is the large circle on the left?"]
    options = {"max_new_tokens": 6, "eos_token_id": None}
    (together,) = answer(model, processor, [picture], [questions], **options)
    alone = [answer(model, processor, [picture], [[question]], **options)[0][0] for question in questions]
    assert together == alone and len(set(alone)) == 2


def test_positions_that_end_before_an_image_are_found_at_assembly(vision, language, tmp_path):
    assemble(BackboneArguments(vision, language("gpt2", n_positions=20), str(tmp_path / "stage0")))
    with pytest.raises(ValueError, match=r"has 12 positions, but an image of 4 tokens and some text need 1[0-9]"):
        assemble(BackboneArguments(vision, language("gpt2", n_positions=12), str(tmp_path / "stage0")))
    rope = language("llama", max_position_embeddings=12)
    assemble(BackboneArguments(vision, rope, str(tmp_path / "stage0")))


def test_rows_longer_than_the_positions_are_found_before_the_stage(vision, language, tmp_path):
    assemble(BackboneArguments(vision, language("gpt2", n_positions=64), str(tmp_path / "stage0")))
    given = arguments_for(tmp_path / "stage0", tmp_path / "run", projector_learning_rate=1e-3, max_length=65)
    for start in (run_stage, lambda given: plan_stages([parse(given)], processes=1)):
        with pytest.raises(ValueError, match=r"max_length=65 .*'gpt2' has positions, 64. Set max_length: 64 or less"):
            start(given)
    given[given.index("65")] = "64"
    plan_stages([parse(given)], processes=1)


@pytest.mark.parametrize(
    "kind, positions", [("gpt2", 48), ("opt", 48), ("gpt_neo", 48), ("llama", None), ("mpt", None), ("falcon", None)]
)
def test_which_language_models_look_positions_up(kind, positions):
    name = {"gpt2": "n_positions", "mpt": "max_seq_len"}.get(kind, "max_position_embeddings")
    assert last_position(make_language(kind, **{name: 48}).base_model) == positions
