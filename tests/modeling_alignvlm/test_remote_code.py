"""A saved folder is a repository: child processes that cannot import this package load it by the Auto classes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_alignvlm import AlignVLMForConditionalGeneration


INSTRUCTIONS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
)  # what PyTorch may use of the processor: both sides the same
PROLOGUE = """
import json, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
try:
    import modeling_alignvlm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable; the test would prove nothing")
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, workdir = sys.argv[1:]
picture = Image.open(f"{workdir}/picture.png")
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What colour is it?"}]}]
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("child")
    Image.new("RGB", (20, 12), (200, 30, 60)).save(folder / "picture.png")
    return folder


def run_child(code: str, checkpoint: Path, workdir: Path) -> str:
    environment = {
        "HF_HOME": str(workdir / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(workdir),
        **{name: os.environ[name] for name in INSTRUCTIONS if name in os.environ},
    }
    result = subprocess.run(
        [sys.executable, "-I", "-c", PROLOGUE + code, str(checkpoint), str(workdir)],
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


LOAD_AND_SAVE = """
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
torch.save(dict(inputs), f"{workdir}/inputs.pt")
logits = []
for auto_class in (AutoModel, AutoModelForImageTextToText):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "AlignVLMForConditionalGeneration", type(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        logits.append(model(**inputs).logits)
assert torch.equal(*logits)
torch.save(logits[0], f"{workdir}/logits.pt")
model.save_pretrained(f"{workdir}/again")
processor.save_pretrained(f"{workdir}/again")
again = AutoModel.from_pretrained(f"{workdir}/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**inputs).logits, logits[0])
answer = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
texts = answer(text=messages, max_new_tokens=4, do_sample=False, return_full_text=False)
print(json.dumps([type(config).__name__, texts[0]["generated_text"]]))
"""


@pytest.mark.slow
def test_auto_classes_give_the_same_logits_and_save_the_same_files(checkpoint, workdir, processor):
    name, answer = json.loads(run_child(LOAD_AND_SAVE, checkpoint, workdir).splitlines()[-1])
    assert name == "AlignVLMConfig" and isinstance(answer, str)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint)
    inputs = torch.load(workdir / "inputs.pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, torch.load(workdir / "logits.pt"))

    saved = {path.name: path for path in (workdir / "again").iterdir()}
    for path in checkpoint.iterdir():
        if path.name not in ("LICENSE", "README.md", "alignvlm_run.json"):
            assert saved.pop(path.name).read_bytes() == path.read_bytes(), path.name
    assert not saved  # nothing more


def test_without_trust_no_code_runs(checkpoint, workdir):
    code = """
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print("refused" if "trust_remote_code" in str(error) else error)
"""
    assert run_child(code, checkpoint, workdir).splitlines()[-1] == "refused"


def test_code_that_travels_imports_only_what_a_reader_expects(checkpoint):
    files = sorted(path.name for path in checkpoint.glob("*.py"))
    assert files == [f"{name}_alignvlm.py" for name in ("configuration", "masking", "modeling", "processing")]
    allowed = {
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "collections",
        "dataclasses",
        "functools",
        "math",
        "typing",
        "os",
    }
    for name in files:
        for line in (checkpoint / name).read_text().splitlines():
            words = line.split()
            if line.startswith(("import ", "from ")):
                assert words[1].startswith(".") or words[1].split(".")[0] in allowed, f"{name}: {line}"


def test_the_configuration_waits_for_no_model_code(checkpoint):
    """Its neighbour with the mask types imports torch alone, which transformers has imported by then."""
    imports = {
        name: [
            line
            for line in (checkpoint / f"{name}_alignvlm.py").read_text().splitlines()
            if line.startswith(("import ", "from "))
        ]
        for name in ("configuration", "masking")
    }
    assert [line.split()[1] for line in imports["configuration"]] == ["typing", "transformers", ".masking_alignvlm"]
    assert {line.split()[1] for line in imports["masking"]} == {"collections.abc", "dataclasses", "torch"}


TRAIN = """
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
said = lambda text: [{"role": "assistant", "content": text}]
asked = {"images": [picture], "prompt": [{"role": "user", "content": "What colour is it?"}]}
chosen, rejected = ("red", "A dark red, I think."), ("no", "Blue.")
rows = {
    "sft": [{**asked, "completion": said(text)} for text in chosen],
    "dpo": [{**asked, "chosen": said(good), "rejected": said(bad)} for good, bad in zip(chosen, rejected)],
    "grpo": [asked] * 2,
}
kinds = {
    "sft": (SFTTrainer, SFTConfig, {"max_length": None}, {}),
    "dpo": (DPOTrainer, DPOConfig, {"max_length": None}, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        {"num_generations": 2, "max_completion_length": 4},
        {"reward_funcs": lambda completions, **given: [float(number % 2) for number, _ in enumerate(completions)]},
    ),
}
losses = {}
for kind, (trainer_class, arguments_class, fields, given) in kinds.items():
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    if kind == "dpo":  # which else loads it by the checkpoint's name, without trust in its code
        given = {"ref_model": AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)}
    trainer = trainer_class(
        model=model,
        processing_class=processor,
        train_dataset=Dataset.from_list(rows[kind]),
        args=arguments_class(
            output_dir=f"{workdir}/{kind}",
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **fields,
        ),
        **given,
    )
    if kind == "sft":
        (batch,) = trainer.get_train_dataloader()
        torch.save(dict(batch), f"{workdir}/batch.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    losses[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for part in ("language_model", "vision", "projector"):
        assert any(part in name and not torch.equal(value, before[name]) for name, value in model.state_dict().items()), part
    trainer.save_model()
    again = AutoModel.from_pretrained(f"{workdir}/{kind}", trust_remote_code=True).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
print(json.dumps(losses))
"""


@pytest.mark.slow
def test_trl_trains_it_without_this_package(checkpoint, workdir):
    """By TRL's own collators; the loss is that of each row alone, and what TRL saves loads."""
    losses = json.loads(run_child(TRAIN, checkpoint, workdir).splitlines()[-1])
    assert all(len(found) == 2 for found in losses.values())
    assert losses["dpo"][0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference

    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).double()
    batch, found = torch.load(workdir / "batch.pt"), []
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        labels = batch["labels"][row][real]
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"][row][real][None],
                pixel_values=batch["pixel_values"][row : row + 1].double(),
            ).logits[0]
        found += (-logits.log_softmax(-1)[:-1].gather(1, labels[1:, None].clamp(min=0))[:, 0])[labels[1:] >= 0]
    assert losses["sft"][0] == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)
