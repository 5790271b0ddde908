"""Stage 5 through TRL's real trainers, on tiny models: what the log-probabilities are of, and that it is a stage like others."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from alignvlm.data.record import Conversation
from alignvlm.evaluation.answer import answer
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.loading import load_model, make_collator, make_mixture, make_rows
from alignvlm.stages.reward_arguments import GRPOArguments, parse_any_stage, parse_rewards
from alignvlm.stages.reward_stage import main, make_trainer
from alignvlm.stages.reward_trainers import DPOStageTrainer, GRPOStageTrainer
from alignvlm.stages.trainer import module_of
from hub_upload.run_record import RUN_RECORD, read_run_record
from modeling_alignvlm import MASK_TYPES, AlignVLMProcessor, TokenLayout, dense_mask
from tests import forked
from tests.running import arguments_for


ROOT = Path(__file__).parents[2]
RATES = {"projector_learning_rate": 1e-2, "language_learning_rate": 1e-2}
SOURCES = [
    {"name": "scenes", "annotations": ["short_caption", "questions"], "count": 3},
    {"name": "scene_texts", "count": 2},
]


def given(checkpoint: Path, folder: Path, method: str, **fields) -> list[str]:
    """The command line of a short stage 5: two prompts with four answers each, or pairs of the file `pairs.jsonl` beside the folder."""
    own = {
        "grpo": {
            "rewards": ["cider", "accuracy"],
            "num_generations": 4,
            "max_completion_length": 6,
            "per_device_train_batch_size": 8,
            "sources": SOURCES,
        },
        "dpo": {"sources": [{"data": "pairs.jsonl"}], "data_dir": folder.parent, "per_device_train_batch_size": 2},
    }[method]
    values = {"stage": 5, "method": method, "max_steps": 2, **RATES, **own, **fields}
    rewards = values.pop("rewards", None)
    return [*arguments_for(checkpoint, folder, **values), *(["--rewards", *rewards] if rewards else [])]


@pytest.fixture(scope="module")
def absolute(make_model, processor, tmp_path_factory) -> Path:
    """A checkpoint whose language model adds a learned vector for each position, and has 64 of them."""
    folder = tmp_path_factory.mktemp("gpt2") / "stage0"
    text = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    text |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    free = {"license": "apache-2.0"}
    backbones = {"vision": "tiny", "vision_licence": free, "language": "tiny", "language_licence": free}
    save_checkpoint(make_model(text=text), processor, folder, {"backbones": backbones, "stages": []})
    return folder


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Prompts of different lengths, with an image, with two and with none, and answers of different lengths."""
    rows = []
    for index in range(2):
        Image.new("RGB", (16, 16), (250 * index, 60, 60)).save(tmp_path / f"{index}.png")
    for number, images in enumerate((["0.png"], ["1.png", "0.png"], [], ["1.png"])):
        rows.append(
            {
                "images": images,
                "prompt": "Is there a red circle?" if number % 2 else "What colour is the shape at the top left?",
                "chosen": "yes" if number % 2 else "a red circle and a blue cross",
                "rejected": "no, there is a green square" if number % 2 else "a",
            }
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.fixture
def asked(tmp_path) -> list[dict]:
    """Sources of two prompts, one with an image and one without."""
    Image.new("RGB", (16, 16), (250, 60, 60)).save(tmp_path / "red.png")
    rows = [{"images": images, "prompt": "What is it?", "completion": "red"} for images in (["red.png"], [])]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [{"data": str(tmp_path / "asked.jsonl")}]


def trainer_for(arguments: list[str]):
    """The trainer of a command line, its model in float64."""
    arguments = parse_rewards(arguments)
    processor = AlignVLMProcessor.from_pretrained(arguments.model)
    model = load_model(arguments).double()
    collator = make_collator(arguments, processor, model.config)
    mixture = make_mixture(arguments, collator, [])
    rows = make_rows(arguments, mixture, collator)
    trainer, _ = make_trainer(arguments, model, collator, mixture, rows, None)
    return trainer, collator


def states_and_log_probs(
    model, input_ids: list[int], prompt_length: int, pixel_values
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model's own forward says of one sequence without padding, under a ready mask: the states that predict the answer's tokens
    `(answer, hidden)`, and the tokens' log-probabilities."""
    config = model.config
    ids = torch.tensor([input_ids])
    before = torch.arange(len(input_ids))[None] < prompt_length
    layout = TokenLayout.from_input_ids(ids, config.image_token_id, config.image_seq_length, prompt_mask=before)
    seen = []
    hook = model.model.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    logits = model(
        input_ids=ids,
        pixel_values=pixel_values,
        attention_mask=dense_mask(layout, config.attention_mask_type),
        prompt_mask=before,
    ).logits[0, prompt_length - 1 : -1]
    hook.remove()
    log_probs = logits.log_softmax(-1).gather(-1, ids[0, prompt_length:, None])[:, 0]
    return seen[0][0, prompt_length - 1 : -1], log_probs


def check(model, rows: list[tuple[list[int], int]], images_of_rows: list, states: list, log_probs: list) -> None:
    """Compares the rows of a trainer with `states_and_log_probs`: states in float64; TRL's head computes in float32."""
    assert states[0].dtype == torch.float64
    for index, (ids, prompt_length) in enumerate(rows):
        with torch.no_grad():
            expected, expected_log_probs = states_and_log_probs(model, ids, prompt_length, images_of_rows[index])
        torch.testing.assert_close(states[index], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(log_probs[index].double(), expected_log_probs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("mask_type", "attention", "language"),
    [*((name, "sdpa", "qwen2") for name in MASK_TYPES), ("image", "eager", "qwen2"), ("image", "sdpa", "gpt2")],
)
def test_grpo_sees_each_answer_as_the_models_own_forward_does(
    checkpoint, absolute, tmp_path, mask_type, attention, language
):
    """Sampled in a padded batch of prompts with images and without, and scored in another one: both under the model's mask."""
    fields = {"attention_mask_type": mask_type, "attn_implementation": attention, "top_k": 1}  # the likeliest token
    start = absolute if language == "gpt2" else checkpoint
    trainer, _ = trainer_for(given(start, tmp_path / "run", "grpo", **fields))
    model = trainer.model
    examples = [trainer.train_dataset[index] for index in (0, 1, len(trainer.train_dataset) - 1, 2)]
    assert [len(example["images"]) for example in examples] == [1, 1, 0, 1]
    model.train()
    batch = trainer._generate_and_score_completions([example for example in examples for _ in range(4)])
    real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    rows = [(ids[k][real[k]].tolist(), int(batch["prompt_mask"][k].sum())) for k in range(0, 16, 4)]
    assert len({length for _, length in rows}) > 2  # so that there is padding

    # Generation: greedy texts equal those of the evaluation, which prefills trunks on its own.
    texts = [trainer.processing_class.decode(ids[length:], skip_special_tokens=True).strip() for ids, length in rows]
    model.eval()
    groups = answer(
        model,
        trainer.processing_class,
        [example["images"] for example in examples],
        [[example["prompt"]] for example in examples],
        max_new_tokens=6,
        suppress_tokens=[model.config.image_token_id],
    )
    assert texts == [text for (text,) in groups]

    # The log-probabilities of the loss: of all answers at once, as `_compute_loss` asks for them.
    seen = []
    hook = model.model.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    keep = batch["completion_ids"].shape[1]
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(
            model,
            ids,
            real.long(),
            keep,
            compute_entropy=True,
            pixel_values=batch["pixel_values"],
            num_images=batch["num_images"],
            mm_token_type_ids=batch["mm_token_type_ids"],
        )
    hook.remove()
    (states,) = seen
    answers = batch["completion_mask"].bool()
    pixel_values = iter(batch["pixel_values"].split([count for count in batch["num_images"] if count]))
    images = [next(pixel_values) if count else None for count in batch["num_images"]]
    chosen = range(0, 16, 4)
    predicting = [states[k, -keep - 1 : -1][answers[k]] for k in chosen]
    check(model, rows, [images[k] for k in chosen], predicting, [found[k][answers[k]] for k in chosen])


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_dpo_sees_both_answers_as_the_models_own_forward_does(checkpoint, pairs, mask_type):
    trainer, collator = trainer_for(given(checkpoint, pairs / "run", "dpo", attention_mask_type=mask_type))
    model, examples = trainer.model, [trainer.train_dataset[index] for index in range(4)]
    model.train()
    batch = trainer.data_collator(examples)
    assert (batch["attention_mask"] == 0).any() and batch["pixel_values"].shape[0] == 8  # of four, for both answers
    rows = []
    for name in ("chosen", "rejected"):
        for example in examples:  # as an evaluation asks, and as other stages train the answer
            said = Conversation(**example["conversation"])
            prompt = collator.encoder.prompt(said.messages).input_ids
            (branch,) = collator.encoder.encode(replace(said, responses=[example[name]]))
            assert branch.input_ids[: len(prompt)] == prompt
            rows.append((list(branch.input_ids), len(prompt)))
    counts = [len(example["images"]) for example in examples] * 2
    assert counts[:4] == [1, 2, 0, 1]
    images = [part if len(part) else None for part in batch["pixel_values"].split(counts)]
    seen = []
    hook = model.model.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
    hook.remove()
    predicting = [seen[0][k, length - 1 : len(ids) - 1] for k, (ids, length) in enumerate(rows)]
    log_probs = [states_and_log_probs(model, *rows[k], images[k])[1] for k in range(8)]
    check(model, rows, images, predicting, log_probs)
    for name, half in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        (logged,) = trainer._metrics["train"][f"logps/{name}"]
        assert logged == pytest.approx(sum(own.sum().item() for own in log_probs[half]) / 4, rel=1e-4)
    # The reference is the model that the stage starts from, under the same mask: nothing is preferred yet.
    assert trainer._metrics["train"]["rewards/margins"][0] == pytest.approx(0, abs=1e-4)


def test_an_answer_may_hold_the_image_token(checkpoint, tmp_path):
    """Nothing keeps a model from writing it; it is text then, and no image is missing."""
    trainer, _ = trainer_for(given(checkpoint, tmp_path / "run", "grpo"))
    model = trainer.model
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    keep, real = batch["completion_ids"].shape[1], torch.ones_like(ids)
    ids[1, -1] = model.config.image_token_id
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(
            model, ids, real, keep, pixel_values=batch["pixel_values"], num_images=batch["num_images"]
        )
    assert found.isfinite().all()
    before = torch.arange(ids.shape[1])[None] < ids.shape[1] - keep
    is_image = (ids[1:2] == model.config.image_token_id) & before
    with torch.no_grad():
        logits = model(
            input_ids=ids[1:2],
            pixel_values=batch["pixel_values"][1:2],
            prompt_mask=before,
            mm_token_type_ids=is_image.long(),
        ).logits[0, -keep - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, ids[1, -keep:, None])[:, 0]
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-5, atol=1e-4)


def test_an_answer_is_cut_where_max_length_is_reached_and_a_prompt_never(checkpoint, pairs):
    trainer, _ = trainer_for(given(checkpoint, pairs / "run", "dpo"))
    examples = [trainer.train_dataset[index] for index in range(2)]
    whole = trainer.data_collator(examples)
    longest = whole["input_ids"].shape[1]
    collate = trainer.data_collator
    collate.max_length = longest - 2
    cut = collate(examples)
    assert cut["input_ids"].shape[1] == longest - 2 and torch.equal(cut["input_ids"], whole["input_ids"][:, :-2])
    collate.max_length = 10
    with pytest.raises(
        ValueError, match=r"pairs.jsonl\[0\] .*: its prompt has \d+ tokens, and max_length=10 leaves no room"
    ):
        collate(examples)


def test_an_answer_that_is_cut_is_counted(checkpoint, pairs):
    """The two with many words, each read once; the prompts and the other answers fit."""
    trainer, _ = trainer_for(given(checkpoint, pairs / "run", "dpo"))
    rows = [trainer.data_collator([trainer.train_dataset[index]])["attention_mask"].sum(1) for index in range(4)]
    lengths = torch.cat(rows).tolist()
    limit = max(lengths) - 1
    fields = {"max_steps": None, "num_train_epochs": 1, "max_length": limit}
    entry = main(given(checkpoint, pairs / "run", "dpo", **fields))
    assert entry["losses_of_data"]["cut_response"] == sum(length > limit for length in lengths) > 0


@pytest.mark.parametrize("tag", ["", "a long tag"])
def test_a_prompt_that_leaves_no_room_is_refused_before_training(checkpoint, pairs, tag):
    """By its file and number, with the length that all prompts fit in; the tag of its source counts."""
    with (pairs / "pairs.jsonl").open("a") as file:
        for prompt in ("red circle " * 20, "red circle " * 30):
            file.write(json.dumps({"images": [], "prompt": prompt, "chosen": "yes", "rejected": "no"}) + "\n")
    sources = [{"data": "pairs.jsonl", **({"tag": tag} if tag else {})}]
    stage = given(checkpoint, pairs / "run", "dpo", sources=sources, max_steps=1)
    trainer, collator = trainer_for(stage)
    said = [Conversation(**trainer.train_dataset[index]["conversation"]) for index in range(6)]
    lengths = [len(collator.encoder.prompt(conversation.messages)) for conversation in said]
    assert max(lengths[:4]) < lengths[4] < lengths[5]
    named = rf"max_length={lengths[4]} .* of 2 record\(s\): pairs.jsonl\[4\], pairs.jsonl\[5\]\."
    with pytest.raises(ValueError, match=rf"{named} Set max_length: {lengths[5] + 1} or more"):
        main([*stage, "--max_length", str(lengths[4])])
    assert not (pairs / "run" / RUN_RECORD).exists()
    assert main([*stage, "--max_length", str(lengths[5] + 1)])["steps"] == 1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.* deprecated:FutureWarning")
@pytest.mark.parametrize("cut", ["gradient_accumulation_steps", "steps_per_generation"])
def test_answers_to_prompts_with_and_without_images_are_cut_into_small_batches(checkpoint, tmp_path, asked, cut):
    """Of one answer each, so that some have no image; the reference scores them too."""
    fields = {"rewards": ["accuracy"], "num_generations": 2, "per_device_train_batch_size": 1, cut: 4, "beta": 0.1}
    entry = main(given(checkpoint, tmp_path / "run", "grpo", sources=asked, max_steps=4, **fields))
    assert entry["steps"] == 4 and torch.tensor(entry["logged_losses"]).isfinite().all()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "alignvlm" not in sys.modules and "modeling_alignvlm" not in sys.modules
print(type(model).__name__, sum(float(p.double().sum()) for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_(en|dis)able.* deprecated:FutureWarning"
)  # TRL's own calls
@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_run_changes_what_it_declares_is_recorded_and_goes_on_where_it_stopped(
    speaking, pairs, tmp_path, method, capfd
):
    held_out = [{"name": "scenes", "annotations": ["short_caption", "questions"], "count": 2, "split": "test"}]
    fields = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "text_sources": [{"name": "scene_texts", "count": 2, "split": "test"}],
        "eval_sources": held_out,
        "beta": 0.1,
        "max_completion_length": 12,
        "activation_checkpointing": method == "grpo",
    }
    if method == "dpo":
        fields |= {"rewards": ["accuracy"], "lora_r": 2}
    folder = tmp_path / "whole"
    entry = main(given(speaking, folder, method, **fields))
    before, after = weights(speaking), weights(folder)
    for name, value in before.items():
        with_lora = module_of(name) == "projector" or ("language_model." in name and name.endswith("_proj.weight"))
        changes = module_of(name) != "vision" if method == "grpo" else with_lora
        assert torch.equal(value, after[name]) != changes, name
    assert read_run_record(folder)["stages"][-1] == json.loads(json.dumps(entry))
    assert (entry["stage"], entry["method"], entry["steps"], len(entry["logged_losses"])) == (5, method, 4, 4)
    assert entry["text_perplexity_before"] > 1 and entry["text_perplexity_after"] != entry["text_perplexity_before"]
    assert 0 <= entry["eval_accuracy_before"] <= 1 and 0 <= entry["eval_accuracy_after"] <= 1
    log = capfd.readouterr().out
    assert "Stage 5: " in log and "stage 5  4/4  loss" in log
    if method == "grpo":
        assert (
            entry["eval_cider_before"] is not None
            and entry["beta"] == 0.1
            and entry["rewards"] == ["cider", "accuracy"]
        )
        assert all({"reward", "rewards/cider/mean", "entropy", "kl"} <= line.keys() for line in entry["log"])
        assert entry["log"][0]["kl"] == pytest.approx(0, abs=1e-5) and entry["log"][-1]["kl"] > 1e-5
        assert "  reward " in log
    else:
        assert entry["log"][-1]["rewards/margins"] > entry["log"][0]["rewards/margins"] and "  margin " in log
        assert entry["logged_losses"][0] == pytest.approx(0.6931, abs=1e-3) and entry["lora"]["r"] == 2

    run = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    name, total = run.stdout.split()
    assert name == "AlignVLMForConditionalGeneration"
    # (what is tied is counted once, there and here)
    assert float(total) == pytest.approx(sum(float(value.double().sum()) for value in after.values()), rel=1e-6)

    other = tmp_path / "other"
    (other / "checkpoint-2").mkdir(parents=True)
    for file in (folder / "checkpoint-2").iterdir():
        (other / "checkpoint-2" / file.name).write_bytes(file.read_bytes())
    again = main([*given(speaking, other, method, **fields), "--resume_from_checkpoint"])
    assert again["resumed_at"] == [2] and again["logged_losses"] == entry["logged_losses"]
    assert all(torch.equal(value, weights(other)[name]) for name, value in after.items())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.* deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_resumed_run_reads_a_later_epoch_as_it_would_have(checkpoint, pairs, tmp_path, method, monkeypatch):
    read = []
    trainer = {"grpo": GRPOStageTrainer, "dpo": DPOStageTrainer}[method]
    prepare = trainer._prepare_inputs

    def noted(self, inputs):
        prepared = prepare(self, inputs)
        if self.model.training:
            read.append(list(self._record_names))
        return prepared

    monkeypatch.setattr(trainer, "_prepare_inputs", noted)
    fields = {"max_steps": None, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    if method == "grpo":
        fields |= {"rewards": ["accuracy"], "sources": [{"name": "scenes", "annotations": ["questions"], "count": 1}]}
    whole = main(given(checkpoint, tmp_path / "whole", method, **fields))
    uninterrupted, steps = read[:], whole["steps"]
    assert len(uninterrupted) == steps >= 6 and steps % 3 == 0 and uninterrupted[-1] not in uninterrupted[: steps // 3]
    last = f"checkpoint-{steps - 1}"
    (tmp_path / "again" / last).mkdir(parents=True)
    for file in (tmp_path / "whole" / last).iterdir():
        (tmp_path / "again" / last / file.name).write_bytes(file.read_bytes())
    read.clear()
    again = main([*given(checkpoint, tmp_path / "again", method, **fields), "--resume_from_checkpoint"])
    assert read == uninterrupted[-1:] and again["logged_losses"] == whole["logged_losses"]


@pytest.mark.parametrize("reuse", ["num_iterations", "steps_per_generation"])
def test_a_run_resumed_between_two_samplings_samples_when_it_would_have(checkpoint, tmp_path, reuse, monkeypatch):
    """Of answers that serve two steps: anew at once, and again where the data go on; between generations it is the uninterrupted run."""
    sampled = []
    sample = GRPOStageTrainer._generate_and_score_completions

    def noted(self, inputs):
        sampled.append((self.state.global_step, sorted({example["id"] for example in inputs})))
        return sample(self, inputs)

    monkeypatch.setattr(GRPOStageTrainer, "_generate_and_score_completions", noted)
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "rewards": ["cider"], reuse: 2}
    fields |= {"sources": [{"name": "scenes", "annotations": ["short_caption"], "count": 8}], "num_generations": 2}
    fields |= {"per_device_train_batch_size": 4, "max_completion_length": 3}
    main(given(checkpoint, tmp_path / "whole", "grpo", **fields))
    uninterrupted = sampled[:]
    assert [step for step, _ in uninterrupted] == [0, 2, 4]
    for step, expected in ((3, [(3, uninterrupted[1][1]), uninterrupted[2]]), (4, uninterrupted[2:])):
        again, name = tmp_path / f"from_{step}", f"checkpoint-{step}"
        (again / name).mkdir(parents=True)
        for file in (tmp_path / "whole" / name).iterdir():
            (again / name / file.name).write_bytes(file.read_bytes())
        sampled.clear()
        main([*given(checkpoint, again, "grpo", **fields), "--resume_from_checkpoint"])
        assert sampled == expected
    after = weights(tmp_path / "whole")
    assert all(torch.equal(value, weights(tmp_path / "from_4")[name]) for name, value in after.items())


def test_a_share_of_the_untouched_language_model_is_kept(checkpoint, pairs):
    folders = {share: pairs / f"kept_{share}" for share in (0, 0.25)}
    for share, folder in folders.items():
        entry = main(given(checkpoint, folder, "dpo", max_steps=1, keep_language=share))
        assert ("keep_language" in entry) == bool(share)
    start, trained, mixed = (weights(folder) for folder in (checkpoint, *folders.values()))
    assert any(not torch.equal(start[name], trained[name]) for name in start if module_of(name) == "language")
    for name, value in mixed.items():
        share = 0.25 if module_of(name) == "language" else 0.0
        torch.testing.assert_close(value, (1 - share) * trained[name] + share * start[name], rtol=1e-5, atol=1e-7)


def test_answers_with_a_reward_above_the_others_become_likelier(checkpoint, tmp_path):
    """One prompt, answers of one token, and a reward for those with one of eight letters."""
    fields = {"max_completion_length": 1, "max_steps": 8, "temperature": 2.0}
    trainer, _ = trainer_for(given(checkpoint, tmp_path / "run", "grpo", **fields))
    model, processor, example = trainer.model.float(), trainer.processing_class, trainer.train_dataset[0]

    def has_a_letter(text: str) -> bool:
        return bool(set(text) & set("aeiostnr"))

    def earned(prompts, completions, **columns) -> list[float]:
        return [float(has_a_letter(completion[0]["content"])) for completion in completions]

    def share() -> float:
        asked = [[example["prompt"]] * 200]
        options = {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0, "batch_size": 200}
        (answers,) = answer(model.eval(), processor, [example["images"]], asked, **options)
        return sum(map(has_a_letter, answers)) / 200

    before = share()
    trainer.reward_funcs = [earned]
    trainer.reward_weights, trainer.reward_func_names = torch.ones(1), ["earned"]
    trainer.reward_processing_classes = [None]
    trainer.train_dataset = Dataset.from_list([{"k": 0}] * 64).with_transform(
        lambda rows: {name: [value] * len(rows["k"]) for name, value in example.items()}
    )
    trainer.train()
    assert 0.1 < before < 0.8 and share() > before + 0.15


def test_the_recipe_is_valid_and_can_be_looked_at_where_there_is_no_gpu():
    path = str(ROOT / "training/recipes/nano/stage5.yaml")
    arguments = parse_rewards(["--config", path])
    assert (arguments.stage, arguments.method, arguments.rewards) == (5, "grpo", ["cider"])
    assert arguments.per_device_train_batch_size % arguments.num_generations == 0 and arguments.use_cpu
    (looked_at,) = parse_any_stage(["--config", path])
    assert isinstance(looked_at, GRPOArguments) and looked_at.sources == arguments.sources


def test_stage_5_without_a_method_is_looked_at_with_the_one_it_will_take(tmp_path):
    text = (ROOT / "training/recipes/nano/stage5.yaml").read_text()
    recipe = tmp_path / "stage5.yaml"
    recipe.write_text("".join(line for line in text.splitlines(True) if not line.startswith("method:")))
    given = ["--config", str(recipe)]
    assert parse_any_stage(given)[0].method == parse_rewards(given).method == "grpo"
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("stage:")))
    (looked_at,) = parse_any_stage([*given, "--stage", "5"])
    assert isinstance(looked_at, GRPOArguments) and looked_at.stage == 5
    supervised = arguments_for(tmp_path / "stage4", tmp_path / "out", **RATES)
    recipe.write_text("stage: 5\n")
    assert isinstance(parse_any_stage([*given, *supervised])[0], StageArguments)  # they say --stage 3


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("grpo", {"rewards": None}, "GRPO needs `rewards`"),
        ("grpo", {"rewards": ["cidre"]}, "Unknown reward 'cidre'. Valid values: cider, accuracy, chair"),
        ("grpo", {"rewards": ["cider"], "sources": [{"name": "scene_texts", "count": 4}]}, "`cider` needs captions"),
        (
            "grpo",
            {"rewards": ["accuracy"], "sources": [{"name": "scenes", "annotations": ["short_caption"], "count": 8}]},
            r"The rewards \(accuracy\) judge no answer of these sources. Name others",
        ),
        (
            "grpo",
            {"sources": [{"name": "scenes", "count": 4, "share": 0.5}]},
            "share=0.5 of a source: stage 5 reads every prompt once",
        ),
        ("grpo", {"row_length": 64}, "row_length is an option of stages 1 to 4"),
        ("grpo", {"token_weighting": "length"}, "token_weighting is an option of stages 1 to 4"),
        ("dpo", {"embedding_loss": 0.1}, "embedding_loss is an option of stages 1 to 4"),
        ("grpo", {"projector_start": "least_squares"}, "projector_start is an option of stages 1 to 4"),
        ("dpo", {"attention_mask_type": '{"image": 0.5, "causal": 0.5}'}, "stage 5 does not mix mask types"),
        (
            "grpo",
            {"use_vllm": True},
            "use_vllm: stage 5 does not have it, because answers are sampled by the model itself",
        ),
        ("grpo", {"num_generations": 3}, "divisible"),
        ("grpo", {"per_device_train_batch_size": 400}, "hold 29 prompts, and a step takes 100. Name more"),
        (
            "dpo",
            {"sources": SOURCES},
            "Source 'scenes' has a response without a rejected answer .*`alignvlm prefer` makes one",
        ),
        ("dpo", {"streaming": True}, "streaming is an option of stages 1 to 4"),
        ("grpo", {"fp16_full_eval": True}, "fp16_full_eval: stage 5 does not have it, because it would round"),
        ("grpo", {"log_multimodal": True}, "log_multimodal: stage 5 does not have it, because .*show_every"),
        ("dpo", {"eval_sources": SOURCES}, "eval_sources: .* DPO .* Name `rewards`"),
        ("dpo", {"rewards": ["accuracy"]}, r"rewards=\['accuracy'\]: .* Name eval_sources, or leave them out"),
    ],
)
def test_what_stage_5_cannot_do_is_refused_with_a_sentence(checkpoint, pairs, method, fields, message):
    with pytest.raises(ValueError, match=message):
        main(given(checkpoint, pairs / "run", method, **fields))
    assert not (pairs / "run" / RUN_RECORD).exists()


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("grpo", {"temperature": 0}, "temperature=0.0 is out of range: give a number above 0."),
        ("grpo", {"temperature": "nan"}, "temperature=nan is out of range: give a number above 0."),
        ("grpo", {"temperature": "inf"}, "temperature=inf is out of range: give a number above 0."),
        ("grpo", {"top_k": -3}, "top_k=-3 is out of range: give a whole number of 1 or more, or 0 for all tokens."),
        ("grpo", {"top_p": 1.5}, "top_p=1.5 is out of range: give a number above 0 and at most 1."),
        ("grpo", {"min_p": 2}, "min_p=2.0 is out of range: give a number from 0 to 1."),
        ("grpo", {"repetition_penalty": 0}, "repetition_penalty=0.0 is out of range: give a number above 0."),
        ("grpo", {"num_generations": 0}, "num_generations=0 is out of range: give a whole number of 2 or more"),
        ("grpo", {"num_iterations": 0}, "num_iterations=0 is out of range: give a whole number of 1 or more."),
        ("grpo", {"steps_per_generation": 0}, "steps_per_generation=0 is out of range: give a whole number of 1"),
        ("grpo", {"max_completion_length": 0}, "max_completion_length=0 is out of range: give a whole number of 1"),
        ("dpo", {"max_completion_length": 0}, "max_completion_length=0 is out of range: give a whole number of 1"),
        ("grpo", {"epsilon_high": "nan"}, "epsilon_high=nan is out of range: give a number of 0 or more."),
        ("grpo", {"beta": -1}, "beta=-1.0 is out of range: give a number of 0 or more."),
        ("dpo", {"beta": 0}, "beta=0.0 leaves DPO nothing to learn: give a number above 0."),
        (
            "grpo",
            {"generation_kwargs": '{"temperature": 0}'},
            "generation_kwargs: temperature=0 is out of range: give a number above 0.",
        ),
        (
            "grpo",
            {"reward_weights": 1},
            "reward_weights=[1.0] must be 2 finite number(s), one for each of rewards (cider, accuracy).",
        ),
        ("grpo", {"loss_type": "grpoo"}, "Unknown loss_type 'grpoo'. Valid values: grpo, "),
        ("grpo", {"scale_rewards": "grup"}, "Unknown scale_rewards 'grup'. Valid values: group, batch, none."),
        (
            "grpo",
            {"importance_sampling_level": "word"},
            "Unknown importance_sampling_level 'word'. Valid values: token, sequence.",
        ),
        (
            "grpo",
            {"multi_objective_aggregation": "sum"},
            "Unknown multi_objective_aggregation 'sum'. Valid values: sum_",
        ),
        ("dpo", {"loss_type": "sigmoidal"}, "Unknown loss_type 'sigmoidal'. Valid values: sigmoid, hinge, "),
        ("dpo", {"f_divergence_type": "kl"}, "Unknown f_divergence_type 'kl'. Valid values: reverse_kl, forward_kl, "),
        (
            "dpo",
            {"f_divergence_type": "forward_kl", "loss_type": "nca_pair"},
            "f_divergence_type='forward_kl': loss_type nca_pair does not have it. Leave it out, or take",
        ),
        ("dpo", {"label_smoothing": 1}, "label_smoothing=1.0 is out of range: give a number from 0 to below 1."),
        (
            "dpo",
            {"label_smoothing": 0.5, "loss_type": "robust"},
            "label_smoothing=0.5: loss_type robust takes a number from 0 to below 0.5.",
        ),
        ("dpo", {"loss_type": "exo_pair"}, "label_smoothing=0.0: loss_type exo_pair takes a number above 0"),
        ("dpo", {"loss_type": "aot", "use_weighting": True}, "use_weighting: loss_type aot does not have it. Leave"),
        ("dpo", {"ld_alpha": 1.5}, "ld_alpha=1.5 is out of range: give a number from 0 to 1."),
        ("dpo", {"discopop_tau": 0}, "discopop_tau=0.0 is out of range: give a number above 0."),
        ("dpo", {"truncation_mode": "keep_end"}, "Unknown truncation_mode 'keep_end'. Valid values: keep_start."),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_trl_has_no_loss_or_sampling_for_is_refused_with_the_arguments(tmp_path, method, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_rewards(given(tmp_path, tmp_path / "run", method, **fields))


def test_the_values_that_trl_names_are_taken(tmp_path):
    for loss in ("grpo", "dr_grpo", "dapo", "bnpo"):
        assert parse_rewards(given(tmp_path, tmp_path / "run", "grpo", loss_type=loss)).loss_type == loss
    both = [*given(tmp_path, tmp_path / "run", "dpo"), "--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"]
    assert parse_rewards(both).loss_type == ["sigmoid", "sft"]
    recipe = tmp_path / "stage5.yaml"
    recipe.write_text("temperature: 2\nscale_rewards: none\ngeneration_kwargs: {repetition_penalty: 2}\n")
    read = parse_rewards(["--config", str(recipe), *given(tmp_path, tmp_path / "run", "grpo")])
    taken = (read.temperature, read.generation_kwargs["repetition_penalty"])
    assert all(type(value) is float and value == 2 for value in taken) and read.scale_rewards == "none"


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A run of one step of each method, in a folder with its checkpoint and, for DPO, its pairs beside it."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"images": [], "prompt": "?", "chosen": "yes", "rejected": "no"}] * 2
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for method in ("grpo", "dpo"):
        main(given(checkpoint, folder / method, method, **ONE_STEP))
    return {method: folder / method for method in ("grpo", "dpo")}


ONE_STEP = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("method", "change", "was"),
    [
        ("grpo", {"max_completion_length": 5}, 6),
        ("grpo", {"top_p": 0.5}, 1.0),
        ("grpo", {"top_k": 5}, 0),
        ("grpo", {"min_p": 0.1}, None),
        ("grpo", {"repetition_penalty": 1.5}, 1.0),
        ("grpo", {"epsilon": 0.1}, 0.2),
        ("grpo", {"epsilon_high": 0.1}, None),
        ("grpo", {"delta": 2.0}, None),
        ("grpo", {"loss_type": "grpo"}, "dapo"),
        ("grpo", {"scale_rewards": "batch"}, "group"),
        ("grpo", {"importance_sampling_level": "sequence"}, "token"),
        ("grpo", {"mask_truncated_completions": True}, False),
        ("dpo", {"loss_type": "ipo"}, "sigmoid"),
        ("dpo", {"label_smoothing": 0.1}, 0.0),
        ("dpo", {"ld_alpha": 0.5}, None),
        ("dpo", {"loss_weights": 0.5}, None),
        ("dpo", {"discopop_tau": 0.1}, 0.05),
        ("dpo", {"f_divergence_type": "forward_kl"}, "reverse_kl"),
        ("dpo", {"f_alpha_divergence_coef": 0.1}, 0.5),
        ("dpo", {"use_weighting": True}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_resuming_with_another_loss_or_sampling_is_refused(checkpoint, finished, tmp_path, method, change, was):
    ((name, _),) = change.items()
    folder = shutil.copytree(finished[method], tmp_path / "run")
    fields = {**ONE_STEP, "max_steps": 2, "data_dir": finished[method].parent, **change}
    with pytest.raises(ValueError, match=rf"with other settings: .*\b{name}\b.* was {re.escape(repr(was))} and is "):
        main([*given(checkpoint, folder, method, **fields), "--resume_from_checkpoint"])


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_run_that_did_not_note_its_loss_goes_on_and_what_only_measures_may_change(
    checkpoint, finished, tmp_path, method
):
    folder = shutil.copytree(finished[method], tmp_path / "run")
    file = folder / "checkpoint-1/alignvlm_progress.json"
    progress = json.loads(file.read_text())
    settings = progress["order"]["settings"]
    change = {"epsilon": 0.1} if method == "grpo" else {"max_completion_length": 5}
    assert settings.pop("epsilon", None) == (0.2 if method == "grpo" else None)
    file.write_text(json.dumps(progress))
    fields = {**ONE_STEP, "max_steps": 2, "data_dir": finished[method].parent, **change}
    assert main([*given(checkpoint, folder, method, **fields), "--resume_from_checkpoint"])["resumed_at"] == [1]


def test_another_method_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown method 'ppo'\. Valid values: grpo, dpo"):
        main([*given(checkpoint, tmp_path / "run", "grpo"), "--method", "ppo"])


def test_a_field_of_the_other_method_is_unknown_and_the_nearest_is_named(checkpoint, pairs):
    with pytest.raises(SystemExit, match="there is no option --num_generations"):
        main([*given(checkpoint, pairs / "run", "dpo"), "--num_generations", "4"])
    recipe = pairs / "stage5.yaml"
    recipe.write_text("stage: 5\nmethod: grpo\nnum_generation: 4\n")
    with pytest.raises(SystemExit, match=r"there is no field .num_generation.\. Did you mean num_generations\?"):
        main(["--config", str(recipe), *given(checkpoint, pairs / "run", "grpo")])


def test_a_prompt_and_its_answer_must_have_positions(absolute, tmp_path):
    with pytest.raises(
        ValueError, match=r"longest prompt has .* more than the language model 'gpt2' has positions, 64"
    ):
        main(given(absolute, tmp_path / "run", "grpo", max_completion_length=60))
    tagged = [{**source, "tag": "red circle " * 6} for source in SOURCES]  # without the tag there is room
    with pytest.raises(ValueError, match=r"longest prompt has .* positions, 64"):
        main(given(absolute, tmp_path / "run", "grpo", sources=tagged))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_two_processes_share_prompts_and_rewards(checkpoint, pairs, method, tmp_path):
    held_out = [{"name": "scenes", "annotations": ["questions"], "count": 3, "split": "test"}]
    fields = {"rewards": ["accuracy"], "eval_sources": held_out, "max_completion_length": 6}
    fields |= {"per_device_train_batch_size": {"grpo": 4, "dpo": 1}[method]}
    stage = given(checkpoint, pairs / "two", method, **fields)
    forked.run("alignvlm.stages.reward_stage:main", stage, log=tmp_path / "log", processes=2)
    entry = read_run_record(pairs / "two")["stages"][-1]
    assert entry["processes"] == 2 and entry["steps"] == 2 and len(entry["logged_losses"]) == 2
    assert entry["eval_accuracy_before"] is not None


@pytest.mark.slow
def test_two_processes_may_have_one_a_prompt_with_an_image_and_one_a_prompt_without(checkpoint, asked, tmp_path):
    fields = {"rewards": ["accuracy"], "num_generations": 2, "per_device_train_batch_size": 2, "sources": asked}
    stage = given(checkpoint, tmp_path / "two", "grpo", **fields)
    forked.run("alignvlm.stages.reward_stage:main", stage, log=tmp_path / "log", processes=2, timeout=60)
    entry = read_run_record(tmp_path / "two")["stages"][-1]
    assert entry["processes"] == 2 and len(entry["logged_losses"]) == 2
