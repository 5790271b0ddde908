"""An ONNX export beside its checkpoint: sizes, greedy texts on drawn scenes, and speed, with 32-bit and with 8-bit weights.

    alignvlm quickstart                                               # a trained nano model, whose answers count
    python benchmarks/onnx_export.py --checkpoint out/quickstart/stage4
    python benchmarks/onnx_export.py --shape b16-224+135m             # random weights in true dimensions: only speed and size count

Both programs compute in float32 with the same number of threads. Writing is the time per token behind the first, of one row.
"""

import argparse
import json
import statistics
import sys
import tempfile
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
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def speed(generate, rounds: int) -> dict[str, float]:
    """`generate(tokens)` timed: seconds to the first token, and tokens per second behind it."""
    first, all_of_them = seconds(lambda: generate(1), rounds), seconds(lambda: generate(1 + NEW_TOKENS), rounds)
    return {"first_token_s": first, "tokens_per_s": NEW_TOKENS / (all_of_them - first)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint")
    given.add_argument("--shape", choices=list(models.SHAPES))
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="out/bench/onnx_export.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if arguments.shape:
            checkpoint = f"{folder}/checkpoint"
            save_checkpoint(
                *models.alignvlm(*models.configs(arguments.shape)), Path(checkpoint), {"backbones": {}, "stages": []}
            )
        start = time.perf_counter()
        export(checkpoint, f"{folder}/out", "onnx", int8=True)
        export_seconds = time.perf_counter() - start
        model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # as many tokens as asked for
        processor = AlignVLMProcessor.from_pretrained(checkpoint)
        runs = {suffix: OnnxModel(f"{folder}/out", suffix, sess_options=options) for suffix in ("", "_quantized")}
        stops = runs[""].eos_token_ids
        asked = questions(arguments)
        inputs = prepared(processor, *asked[0][:2])
        arrays = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask", "pixel_values")}
        generators = {"torch": lambda count: model.generate(**inputs, max_new_tokens=count, do_sample=False)}
        sizes = {"torch": sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))}
        for suffix, run in runs.items():
            name = f"onnxruntime{', 8-bit weights' if suffix else ''}"
            run.eos_token_ids = []
            generators[name] = lambda count, run=run: run.generate(**arrays, max_new_tokens=count)
            files = [
                f"{folder}/out/onnx/{part}{suffix}.onnx{data}"
                for part in ("vision_encoder", "embed_tokens", "decoder_model_merged")
                for data in ("", "_data")
            ]
            sizes[name] = sum(Path(file).stat().st_size for file in files if Path(file).exists())
        result = {name: {"bytes": sizes[name], **speed(run, arguments.rounds)} for name, run in generators.items()}
        if arguments.checkpoint:
            model.generation_config.eos_token_id = stops
            texts: dict[str, list[str]] = {name: [] for name in generators}
            for image, question, _ in asked:
                inputs = prepared(processor, image, question)
                arrays = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask", "pixel_values")}
                length = inputs["input_ids"].shape[1]
                tokens = [model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:]]
                for run in runs.values():
                    run.eos_token_ids = stops
                    tokens.append(run.generate(**arrays, max_new_tokens=NEW_TOKENS)[0])
                for name, written in zip(texts, tokens):
                    texts[name].append(processor.decode(np.asarray(written), skip_special_tokens=True).strip())
            for name in texts:
                same = [text == other for text, other in zip(texts[name], texts["torch"])]
                right = [text == answer for text, (_, _, answer) in zip(texts[name], asked)]
                result[name] |= {"same_text": float(np.mean(same)), "right": float(np.mean(right))}
    print(
        f"{arguments.checkpoint or arguments.shape}: {len(asked)} questions, {arguments.threads} thread(s), export {export_seconds:.0f} s"
    )
    print("| program | MB | first token, s | tokens/s | same text | right |\n|---|---|---|---|---|---|")
    for name, row in result.items():
        shares = (f"{row[key]:.1%}" if key in row else "-" for key in ("same_text", "right"))
        print(
            f"| {name} | {row['bytes'] / 1e6:.1f} | {row['first_token_s']:.3f} | {row['tokens_per_s']:.1f} | {' | '.join(shares)} |"
        )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"arguments": vars(arguments), "questions": len(asked), "results": result}, indent=2))


if __name__ == "__main__":
    main()
