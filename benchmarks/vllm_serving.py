"""Whether a running vLLM says what the checkpoint says: the same prompts, tokens and log-probabilities, over its OpenAI interface.

    python -m hub_upload.package out/stage4 out/for_vllm --for vllm
    vllm serve out/for_vllm --trust-remote-code --model-impl transformers --dtype float32
    python benchmarks/vllm_serving.py out/stage4 --url http://127.0.0.1:8000/v1

Drawn scenes with a short question, one image and two, answered greedily by both; the checkpoint computes in float32 on this machine. A
folder of `alignvlm export` is served without --trust-remote-code. On a CPU see `benchmarks/vllm_flex_on_cpu.py`.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from openai import OpenAI
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/vllm_serving.py`

from alignvlm.data import scenes
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor


QUESTIONS = ("Write a short caption.", "How many shapes are there?")
MOST_LIKELY = 5  # log-probabilities that are compared at each position


def draw(count: int, seed: int) -> list[list[Image.Image]]:
    """Draws the images of each prompt: one, and for every fourth two."""
    rng = np.random.default_rng(seed)
    return [
        [scenes.draw(scenes.random_scene(rng, "test"), rng) for _ in range(2 if index % 4 == 3 else 1)]
        for index in range(count)
    ]


def ask(client: OpenAI, images: list[Image.Image], question: str, new_tokens: int) -> dict:
    """Asks the server: prompt tokens, new tokens, and the most likely tokens' log-probabilities at each."""
    parts: list[dict] = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": question})
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": parts}],
        max_tokens=new_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=MOST_LIKELY,
        extra_body={"return_token_ids": True},
    )
    (choice,) = answer.choices
    values = [sorted((top.logprob for top in token.top_logprobs), reverse=True) for token in choice.logprobs.content]
    return {"prompt": answer.model_extra["prompt_token_ids"], "tokens": choice.token_ids, "logprobs": values}


@torch.no_grad()
def answer(model, processor, images: list[Image.Image], question: str, new_tokens: int) -> dict:
    """Asks the checkpoint the same."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    values = [logits[0].log_softmax(-1).topk(MOST_LIKELY).values.tolist() for logits in made.logits]
    return {
        "prompt": inputs["input_ids"][0].tolist(),
        "tokens": made.sequences[0, length:].tolist(),
        "logprobs": values,
    }


def compare(theirs: list[dict], ours: list[dict]) -> dict:
    """Counts equal prompts and equal texts; the largest difference of log-probabilities is that of the first new token, whose
    context is the same on both sides."""
    pairs = list(zip(theirs, ours))
    return {
        "asked": len(pairs),
        "equal prompts": sum(there["prompt"] == here["prompt"] for there, here in pairs),
        "equal texts": sum(there["tokens"] == here["tokens"] for there, here in pairs),
        "tokens": sum(len(here["tokens"]) for here in ours),
        "largest difference": max(
            abs(a - b) for there, here in pairs for a, b in zip(there["logprobs"][0], here["logprobs"][0])
        ),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="The folder as a stage wrote it.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="Of the running server.")
    parser.add_argument("--count", type=int, default=40, help="Prompts.")
    parser.add_argument("--new_tokens", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="A JSON file for the result.")
    options = parser.parse_args(argv)
    model = AlignVLMForConditionalGeneration.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    processor = AlignVLMProcessor.from_pretrained(options.checkpoint)
    client = OpenAI(base_url=options.url, api_key="none")
    prompts = [
        (images, QUESTIONS[index % len(QUESTIONS)]) for index, images in enumerate(draw(options.count, options.seed))
    ]
    result = compare(
        [ask(client, *prompt, options.new_tokens) for prompt in prompts],
        [answer(model, processor, *prompt, options.new_tokens) for prompt in prompts],
    )
    print("\n".join(f"{name:>20}  {value}" for name, value in result.items()))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
