"""Answering many questions about an image: `alignvlm.evaluation.answer.answer` and transformers' LLaVA, in one run.

    python benchmarks/generation.py [--device cuda]

The same backbones of random weights, the same pictures and questions (7 of 9 tokens each in Qwen2.5's ChatML, 3-token answers). LLaVA
answers once by its `generate` per question and once with all questions of an image as one batch, the image encoded per question both times, as its
processor has it. Our answers are checked, token for token, against `generate` of each question alone.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/generation.py`

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.precision import PRECISIONS, choose_precision, warn_if_emulated
from benchmarks import models


NEW_TOKENS = 3


@torch.inference_mode()
def llava_answers(model, processor, images, prompts, together: bool) -> list[list[str]]:
    """Greedy answers of the peer, per question or per image."""
    answers = []
    for image, group in zip(images, prompts):
        written = []
        for batch in [group] if together else [[prompt] for prompt in group]:
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                    add_generation_prompt=True,
                )
                for prompt in batch
            ]
            inputs = processor(images=[image] * len(batch), text=texts, padding=True, return_tensors="pt").to(
                model.device
            )
            output = model.generate(**inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
            written += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append([text.strip() for text in written])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=PRECISIONS, help="auto: what the device does natively.")
    parser.add_argument("--shape", default="b16-224+135m", choices=list(models.SHAPES))
    parser.add_argument("--vision_layers", type=int)
    parser.add_argument("--text_layers", type=int)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="out/bench/generation.json")
    arguments = parser.parse_args()
    vision, text = models.configs(arguments.shape, arguments.vision_layers, arguments.text_layers)
    made = models.records("questions", arguments.images, vision["image_size"], text["vocab_size"], annotations=7)
    images = [record["images"][0] for record in made]
    prompts = [[annotation["prompt"] for annotation in record["annotations"]] for record in made]
    questions = sum(map(len, prompts))
    precision = choose_precision(arguments.dtype, arguments.device)
    warn_if_emulated(precision, arguments.device)
    ours, processor = models.alignvlm(vision, text)
    peer, peer_processor = models.llava(vision, text)
    ours, peer = (model.eval().to(arguments.device, precision.dtype) for model in (ours, peer))
    peer_processor.tokenizer.padding_side = "left"
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def alone():
        answers = [
            [answer(ours, processor, [i], [[p]], 1, **options)[0][0] for p in group]
            for i, group in zip(images, prompts)
        ]
        return answers

    systems = {
        "answer": lambda: answer(ours, processor, images, prompts, batch_size=56, **options),
        "answer, one question at a time": alone,
        "LLaVA, an image's questions as a batch": lambda: llava_answers(peer, peer_processor, images, prompts, True),
        "LLaVA, one question at a time": lambda: llava_answers(peer, peer_processor, images, prompts, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    found = {}
    for turn in range(arguments.rounds + 1):  # the first round warms up
        for name, run in systems.items():
            started = time.perf_counter()
            found[name] = run()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    same = sum(
        a == b
        for one, other in zip(found["answer"], found["answer, one question at a time"])
        for a, b in zip(one, other)
    )
    slowest = questions / statistics.median(seconds["LLaVA, one question at a time"])
    rows = []
    print(f"{arguments.shape}, {arguments.images} images, {questions} questions, {precision}")
    print(f"{'system':<42} {'questions/s':>12} {'x LLaVA':>8}")
    for name in systems:
        rate = questions / statistics.median(seconds[name])
        rows.append(
            {
                "shape": arguments.shape,
                "system": name,
                "dtype": precision.name,
                "annotations_per_s": rate,
                "ratio_to_llava": rate / slowest,
                "peak_memory_bytes": None,
                "flops_share": None,
                "equal_answers": same / questions if name == "answer" else None,
            }
        )
        print(f"{name:<42} {rate:>12.2f} {rate / slowest:>8.2f}")
    print(f"{same} of {questions} answers equal those of one question at a time ({precision.name})")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")
    print(output)


if __name__ == "__main__":
    main()
