"""Whether an export at true size answers as the checkpoint does: tokens, logits and greedy texts about photos, home by home.

    python benchmarks/stock_export.py --language SmolLM2-135M-Instruct.Q4_1.gguf --vision CONFIG_FOLDER --photos FOLDER
    python benchmarks/stock_export.py --checkpoint FOLDER --photos FOLDER       # a trained one

`--language` is a folder or Hub id, or a GGUF file (which needs the package `gguf`); `--vision` a folder with a configuration and an
image processor's, which gets random weights. Every projector is random, scaled so that photos change the text; how many texts differ
from the one about a blank image is in the table. Checkpoint and export are asked by the same code in two processes that cannot import this
package, the checkpoint with `trust_remote_code`, the export without. Logits are compared at the positions that the class counts: PaliGemma
begins with 1, and rotary angles round otherwise there. What is there already is not made again, so a run that was stopped
goes on; remove `--folder` to start anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    set_seed,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/stock_export.py`

from alignvlm.export.export import export
from alignvlm.export.homes import HOMES
from alignvlm.export.stock import WRITERS
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.checkpoint import save_checkpoint
from hub_upload.run_record import library_versions, read_run_record, write_json


# name: (home, language model, fields of the recipe). The second Gemma 3 has a random Gemma 3 of the published 270M's dimensions but
# for the vocabulary; all others the language model that is given.
CASES = {
    "LLaVA": ("LLaVA", "given", {"attention_mask_type": "causal", "vision_feature_layer": -2}),
    "DeepSeek-VL": ("DeepSeek-VL", "given", {"attention_mask_type": "causal"}),
    "Gemma 3": ("Gemma 3", "given", {"projector_type": "pool", "pixel_shuffle_factor": 2}),
    "Gemma 3, gemma3_text": ("Gemma 3", "gemma3_text", {"projector_type": "pool", "pixel_shuffle_factor": 2}),
    "PaliGemma": ("PaliGemma", "given", {"attention_mask_type": "prefix", "projector_type": "linear"}),
}
GEMMA = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "head_dim": 256,
    "sliding_window": 512,
}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "initializer_range": 0.1}
QUESTION = "What is in this picture?"

ASK = """
import json, os, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

given = json.loads(sys.argv[1])
trust = {"trust_remote_code": True} if given["with_code"] else {}
torch.set_num_threads(given["threads"])
processor = AutoProcessor.from_pretrained(given["model"], **trust)
model = AutoModelForImageTextToText.from_pretrained(given["model"], dtype=torch.float32, **trust).eval()
images = [Image.open(path).convert("RGB") for path in given["photos"]]
images.append(Image.new("RGB", images[0].size, (128, 128, 128)))
file = given["output"] + ".json"
before = json.load(open(file)) if os.path.isfile(file) else {}
texts = before["texts"] if before.get("given") == given else []
with torch.inference_mode():
    for begin in range(len(texts), len(images), given["batch"]):
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": given["question"]}]}]
            for image in images[begin : begin + given["batch"]]
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=given["new_tokens"], do_sample=False)
        texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if begin == 0:
            prompt_mask = getattr(model.config, "attention_mask_type", None) == "prefix"
            more = {"prompt_mask": inputs["attention_mask"].bool()} if prompt_mask else {}
            if given["first_position"]:
                more["position_ids"] = given["first_position"] + torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
            few = {name: value[: given["compared"]] for name, value in {**inputs, **more}.items()}
            torch.save({"input_ids": few["input_ids"], "logits": model(**few).logits}, given["output"] + ".pt")
        with open(file + ".new", "w") as written:
            json.dump({"class": type(model).__name__, "texts": texts, "given": given}, written)
        os.replace(file + ".new", file)
"""


def make_vision(config_folder: str, output: Path) -> Path:
    """Random weights for the vision configuration, with the folder's image processor."""
    if not output.is_dir():
        set_seed(0)
        config = AutoConfig.from_pretrained(config_folder)
        config = getattr(config, "vision_config", config)
        config.vision_use_head = False
        made = output.with_name("vision being made")
        AutoModel.from_config(config).save_pretrained(made)
        AutoImageProcessor.from_pretrained(config_folder).save_pretrained(made)
        made.rename(output)
    return output


def make_language(language: str, output: Path) -> str:
    """The given language model; of a GGUF file a folder with its weights in float32."""
    if not language.endswith(".gguf"):
        return language
    if not output.is_dir():
        file = Path(language).resolve()
        options = {"gguf_file": file.name}
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        values = loaded.config.to_dict()
        values.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(type(loaded.config)(**values))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        made = output.with_name("language being made")
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(made)
        made.rename(output)
    return str(output)


def make_gemma(language: str, output: Path) -> str:
    """A random Gemma 3 with the tokenizer of another language model."""
    if not output.is_dir():
        set_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(language)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = Gemma3TextConfig(vocab_size=len(tokenizer), **ids, **GEMMA)
        made = output.with_name("gemma being made")
        AutoModelForCausalLM.from_config(config).save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(output)
    return str(output)


@torch.no_grad()
def make_checkpoint(vision: Path, language: str, fields: dict, photos: list[Path], output: Path) -> Path:
    """A stage-0 checkpoint whose projector gives image tokens as different from photo to photo as words are from each other."""
    if output.is_dir():
        return output
    made = output.with_name(f"{output.name} being made")
    shutil.rmtree(made, ignore_errors=True)
    model, processor = assemble(BackboneArguments(str(vision), language, str(made), **fields))
    pixels = processor.image_processor([Image.open(path).convert("RGB") for path in photos[:16]], return_tensors="pt")
    tokens = model.get_image_features(**pixels).pooler_output  # (photos, image_seq_length, hidden)
    *_, last = (module for module in model.model.projector.modules() if isinstance(module, torch.nn.Linear))
    spread = (tokens - tokens.mean(0)).std()
    factor = model.get_input_embeddings().weight.std() / spread
    last.weight.mul_(factor)
    if last.bias is not None:
        last.bias.copy_((last.bias - tokens.mean((0, 1))) * factor)
    save_checkpoint(model, processor, made, read_run_record(made))
    made.rename(output)
    return output


def ask(
    model: Path,
    with_code: bool,
    photos: list[Path],
    output: Path,
    arguments: argparse.Namespace,
    first_position: int = 0,
) -> dict:
    """What a folder answers, asked by a process without this package; what was asked in the same way before is read.

    Args:
        first_position: counts the positions from there for the logits, if it is not 0.
    """
    given = {
        "model": str(model.resolve()),
        "with_code": with_code,
        "photos": [str(photo.resolve()) for photo in photos],
        "question": QUESTION,
        "batch": arguments.batch_size,
        "compared": arguments.compared,
        "new_tokens": arguments.new_tokens,
        "first_position": first_position,
        "threads": arguments.threads,
        "output": str(output.resolve()),
    }
    file = output.with_suffix(".json")
    found = json.loads(file.read_text()) if file.is_file() else {"given": None, "texts": []}
    if found["given"] != given or len(found["texts"]) <= len(photos):  # the last is about a blank image
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = {**kept, "HF_HOME": str(output.parent.resolve() / "hf"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-I", "-c", ASK, json.dumps(given)], env=environment, check=True)
    return json.loads(file.read_text())


def make_case(name: str, vision: Path, photos: list[Path], arguments: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint of one of `CASES`."""
    _, kind, fields = CASES[name]
    language = make_language(arguments.language, arguments.folder / "language")
    if kind == "gemma3_text":
        language = make_gemma(language, arguments.folder / "gemma")
    return make_checkpoint(vision, language, fields, photos, folder / "checkpoint")


def measure(
    name: str, home: str | None, checkpoint: Path, photos: list[Path], arguments: argparse.Namespace, folder: Path
) -> dict:
    """One row of the table.

    Args:
        home: which class it is to become; None: whichever it does.
    """
    if not (folder / "exported").is_dir():
        found = export(str(checkpoint), folder / "exported")
        if home not in (None, found.name):
            raise SystemExit(f"error: {checkpoint} became {found}, not {home}.")
    class_name = json.loads((folder / "exported/config.json").read_text())["architectures"][0]
    (writer,) = (WRITERS[each.name] for each in HOMES if each.name in WRITERS and each.class_name == class_name)
    first_position = writer.first_position
    ours = ask(checkpoint, True, photos, folder / "checkpoint_said", arguments, first_position)
    stock = ask(folder / "exported", False, photos, folder / "exported_said", arguments)
    tokens, logits = zip(
        *(torch.load(folder / f"{side}_said.pt").values() for side in ("checkpoint", "exported")), strict=True
    )
    config = json.loads((checkpoint / "config.json").read_text())
    blank = ours["texts"][-1]
    return {
        "case": name,
        "class": stock["class"],
        "mask": config["attention_mask_type"],
        "projector": config["projector_type"],
        "language_model": config["text_config"]["model_type"],
        "image_tokens": int((tokens[0][0] == config["image_token_id"]).sum()),
        "same_tokens": bool(torch.equal(*tokens)),
        "logits_difference": float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()),
        "same_texts": sum(a == b for a, b in zip(ours["texts"], stock["texts"], strict=True))
        - int(blank == stock["texts"][-1]),
        "photos": len(photos),
        "unlike_blank": sum(text != blank for text in ours["texts"][:-1]),
        "different_texts": len(set(ours["texts"])),
        "example": ours["texts"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--language", help="A causal language model: folder, Hub id or GGUF file.")
    parser.add_argument("--vision", help="Folder with the configurations of encoder and image processor.")
    parser.add_argument("--checkpoint", type=Path, help="A trained checkpoint, measured instead of the cases.")
    parser.add_argument("--photos", type=Path, required=True, help="Folder of JPEG files.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--count", type=int, default=100, help="Photos to ask about.")
    parser.add_argument("--compared", type=int, default=4, help="Photos whose logits are compared, all positions.")
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("out/stock_export"))
    arguments = parser.parse_args()
    photos = sorted(arguments.photos.glob("*.jpg"))[: arguments.count]
    if len(photos) < arguments.count:
        raise SystemExit(
            f"error: {arguments.photos} holds {len(photos)} JPEG files, and --count asks for {arguments.count}."
        )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.checkpoint is None and None in (arguments.language, arguments.vision):
        parser.error("--language and --vision name backbones, or --checkpoint a trained checkpoint.")
    names = arguments.cases if arguments.checkpoint is None else [arguments.checkpoint.resolve().name]
    rows = []
    for name in names:
        folder = arguments.folder / name.replace(" ", "_").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.checkpoint is None:
            vision = make_vision(arguments.vision, arguments.folder / "vision")
            home, checkpoint = CASES[name][0], make_case(name, vision, photos, arguments, folder)
        else:
            home, checkpoint = None, arguments.checkpoint
        rows.append(row := measure(name, home, checkpoint, photos, arguments, folder))
        if name == names[0]:
            print(
                f"{'case':<22} {'tokens':>7} {'logits differ':>14} {'same texts':>11} {'unlike blank':>13} {'texts':>6}"
            )
        print(
            f"{name:<22} {'same' if row['same_tokens'] else 'OTHER':>7} {row['logits_difference']:>14.1e} "
            f"{row['same_texts']:>7}/{row['photos']:<3} {row['unlike_blank']:>13} {row['different_texts']:>6}",
            flush=True,
        )
    write_json(arguments.folder / "stock_export.json", {"rows": rows, "versions": library_versions()})
    print(arguments.folder / "stock_export.json")


if __name__ == "__main__":
    main()
