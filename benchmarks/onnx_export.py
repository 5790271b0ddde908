"""An ONNX export beside its checkpoint: sizes, greedy texts on drawn scenes, and speed, with 32-bit and with 8-bit weights.

    alignvlm quickstart                                               # a trained nano model, whose answers count
    python benchmarks/onnx_export.py --checkpoint out/quickstart/stage4
    python benchmarks/onnx_export.py --shape b16-224+135m             # random weights in true dimensions: only speed and size count

Both programs compute in float32, with one thread. Times are of the processor, so that other work on the machine counts little; tokens per
second are those behind the first, of one row. What is in `--folder` already is not written again.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/onnx_export.py`

from alignvlm.data import scenes
from alignvlm.data.images import read_image
from alignvlm.export.export import export
from alignvlm.export.onnx_model import OnnxModel
from alignvlm.stages.checkpoint import save_checkpoint
from benchmarks import models
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


NEW_TOKENS = 32


def questions(arguments) -> list[tuple]:
    """(image, question, accepted answer) of held-out scenes; of a model of random weights: noise and words."""
    if arguments.shape:
        vision, text = models.configs(arguments.shape)
        made = models.records("questions", 1, vision["image_size"], text["vocab_size"], annotations=1)
        return [(record["images"][0], record["annotations"][0]["prompt"], None) for record in made]
    asked = []
    for row in scenes.make_scenes(arguments.scenes, "test"):
        for conversation in row["conversations"]:
            text = " ".join(part["text"] for part in conversation["messages"][-1]["content"] if part["text"])
            asked.append((read_image(row["images"][0]), text, conversation["responses"][0]))
    return asked


def prepared(processor: AlignVLMProcessor, image, question: str) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template([{"role": "user", "content": content}], **options))


def seconds(run, rounds: int) -> float:
    """The median of `rounds` runs, behind one that does not count."""
    taken = []
    for _ in range(rounds + 1):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def speed(generate, rounds: int) -> dict[str, float]:
    """`generate(tokens)` timed: seconds to the first token, and tokens per second behind it."""
    first, all_of_them = seconds(lambda: generate(1), rounds), seconds(lambda: generate(1 + NEW_TOKENS), rounds)
    return {"first_token_s": first, "tokens_per_s": NEW_TOKENS / (all_of_them - first)}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: inputs[name].numpy() for name in ("input_ids", "attention_mask", "pixel_values")}


def answers(
    model, runs: dict[str, OnnxModel], processor: AlignVLMProcessor, asked: list[tuple]
) -> dict[str, list[str]]:
    """The greedy answers of torch and of each run."""
    texts: dict[str, list[str]] = {name: [] for name in ("torch", *runs)}
    for image, question, _ in asked:
        inputs = prepared(processor, image, question)
        written = {"torch": model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]}
        written["torch"] = written["torch"][inputs["input_ids"].shape[1] :]
        for name, run in runs.items():
            written[name] = torch.from_numpy(run.generate(**arrays(inputs), max_new_tokens=NEW_TOKENS)[0])
        for name, tokens in written.items():
            texts[name].append(processor.decode(tokens, skip_special_tokens=True).strip())
    return texts


@torch.inference_mode()
def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint")
    given.add_argument("--shape", choices=list(models.SHAPES))
    parser.add_argument("--folder", default="out/bench/onnx_export", help="where checkpoint and export are written")
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="out/bench/onnx_export.json")
    arguments = parser.parse_args()
    folder, one_thread = Path(arguments.folder), onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    torch.set_num_threads(1)

    checkpoint = Path(arguments.checkpoint or folder / "checkpoint")
    if not checkpoint.exists():
        made = models.alignvlm(*models.configs(arguments.shape))
        save_checkpoint(*made, checkpoint, {"backbones": {}, "stages": []})
    if not (folder / "out").exists():
        export(str(checkpoint), folder / "out", "onnx", int8=True)
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor, asked = AlignVLMProcessor.from_pretrained(checkpoint), questions(arguments)
    runs, result = {}, {"torch": {"bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))}}
    for name, suffix in (("onnxruntime", ""), ("onnxruntime, 8-bit weights", "_quantized")):
        runs[name] = OnnxModel(folder / "out", suffix, sess_options=one_thread)
        files = [
            file
            for file in folder.glob("out/onnx/*")
            if file.name.partition(".")[0].endswith("_quantized") == bool(suffix)
        ]
        result[name] = {"bytes": sum(file.stat().st_size for file in files)}
    if arguments.checkpoint:
        texts = answers(model, runs, processor, asked)
        for name, written in texts.items():
            same = [text == other for text, other in zip(written, texts["torch"])]
            right = [text == answer for text, (_, _, answer) in zip(written, asked)]
            result[name] |= {"same_text": float(np.mean(same)), "right": float(np.mean(right))}

    inputs = prepared(processor, *asked[0][:2])
    model.generation_config.eos_token_id = None  # as many tokens as asked for
    generators = {"torch": lambda count: model.generate(**inputs, max_new_tokens=count, do_sample=False)}
    for name, run in runs.items():
        run.eos_token_ids = []
        generators[name] = lambda count, run=run: run.generate(**arrays(inputs), max_new_tokens=count)
    for name, run in generators.items():
        result[name] |= speed(run, arguments.rounds)

    print(f"{checkpoint}: {len(asked)} questions, prompts of {inputs['input_ids'].shape[1]} tokens")
    print("| program | MB | first token, s | tokens/s | same text | right |\n|---|---|---|---|---|---|")
    for name, row in result.items():
        shares = " | ".join(f"{row[key]:.1%}" if key in row else "-" for key in ("same_text", "right"))
        print(
            f"| {name} | {row['bytes'] / 1e6:.1f} | {row['first_token_s']:.4f} | {row['tokens_per_s']:.1f} | {shares} |"
        )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"arguments": vars(arguments), "questions": len(asked), "results": result}, indent=2))


if __name__ == "__main__":
    main()
