"""AlignVLM checkpoints for lmms-eval (`pip install lmms-eval`), which finds this model by its plug-in entry point.

python -m lmms_eval --model alignvlm --model_args pretrained=out/stage4 --tasks ... --batch_size 16
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from transformers import AutoModelForImageTextToText, AutoProcessor

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.precision import choose_precision, warn_if_emulated
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import cuts_images, grids_of, pixel_values_of
from modeling_alignvlm import to_rgb  # importing it registers the classes with the Auto classes


def manifest() -> ModelManifest:
    """Returns what the entry point tells lmms-eval."""
    return ModelManifest(model_id="alignvlm", simple_class_path=f"{__name__}.AlignVLM")


class AlignVLM(lmms):
    """Answers lmms-eval's `generate_until` and `loglikelihood` requests with a checkpoint.

    Args:
        pretrained: a checkpoint's folder or Hub repository.
        revision: of a Hub repository.
        trust_remote_code: run the checkpoint's own code, not this package's.
        batch_size: requests answered at once.
        device: `cpu` for the CPU; by default the current accelerator, or the CPU if there is none.
        dtype: as `--dtype` of `alignvlm/evaluation/evaluate_model.py`.
        attn_implementation: as for `from_pretrained`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
        self.processor = AutoProcessor.from_pretrained(pretrained, **options)
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype="auto", **options)
        precision = choose_precision(dtype, self.accelerator.device, model.dtype)
        warn_if_emulated(precision, self.accelerator.device)
        self.model = model.eval().to(self.accelerator.device, precision.dtype)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates answers, greedily unless a task asks otherwise; an answer ends before the first of the task's `until` strings."""
        answers: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):  # one call of `generate` has one set of options
            by_options.setdefault(repr(request.args[1]), []).append(index)
        for indices in by_options.values():
            options = dict(requests[indices[0]].args[1])
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else until
            options = {"max_new_tokens": 64, **{k: v for k, v in options.items() if v is not None}}
            if not options.get("do_sample"):
                for name in ("temperature", "top_p", "top_k"):
                    options.pop(name, None)
            images = [self._images(*requests[index].args[2:6]) for index in indices]
            prompts = [[requests[index].args[0]] for index in indices]
            found = answer(
                self.model, self.processor, images, prompts, self.batch_size, progress="lmms-eval", **options
            )
            for index, (text,) in zip(indices, found):
                for stop in until:
                    text = text.split(stop)[0] if stop else text
                answers[index] = text.strip()
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns the log probability of each request's continuation in nats, and whether greedy decoding would write it."""
        encoder = Encoder(self.processor)
        results = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            target = doc_to_target(document) if callable(doc_to_target) else doc_to_target
            images = self._images(doc_to_visual, doc_id, task, split)
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": context}]
            pictures = list(map(to_rgb, images))
            prompt = encoder.prompt([{"role": "user", "content": content}], grids_of(self.processor, pictures))
            response = self.tokenizer(target, add_special_tokens=False)["input_ids"]
            length = len(prompt)
            input_ids = torch.tensor([[*prompt.input_ids, *response]])
            inputs = {"input_ids": input_ids, "prompt_mask": torch.arange(input_ids.shape[1])[None] < length}
            if pictures:
                inputs["pixel_values"] = pixel_values_of(self.processor, pictures)
            if cuts_images(self.processor):
                inputs["image_ids"] = torch.tensor([[*prompt.image_ids, *[-1] * len(response)]])
            logits = self.model(**{name: value.to(self.device) for name, value in inputs.items()}).logits
            logits = logits[0, length - 1 : -1].float()
            response = torch.tensor(response, dtype=torch.long, device=logits.device)
            log_probability = logits.log_softmax(-1).gather(1, response[:, None]).sum().item()
            results.append((log_probability, bool((logits.argmax(-1) == response).all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "This adapter answers single questions, not several rounds; choose a task without rounds."
        )

    def _images(self, doc_to_visual: Callable, doc_id: int, task: str, split: str) -> list:
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
