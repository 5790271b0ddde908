"""AlignVLM checkpoints for lmms-eval (`pip install lmms-eval`), which finds this model by its plug-in entry point.

    python -m lmms_eval --model alignvlm --model_args pretrained=out/stage4 --tasks ... --batch_size 16

Tasks that lmms-eval lacks stand in `lmms_tasks/`, for `--include_path`.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from alignvlm.evaluation.answer import answer
from alignvlm.evaluation.load import evaluation_tag, load_checkpoint, with_tag
from alignvlm.rows.encode import Encoder
from alignvlm.rows.tiles import grids_of, has_grids, image_inputs_of
from modeling_alignvlm import to_rgb


def manifest() -> ModelManifest:
    """Returns what the entry point tells lmms-eval."""
    return ModelManifest(model_id="alignvlm", simple_class_path=f"{__name__}.AlignVLM")


class AlignVLM(lmms):
    """Answers lmms-eval's `generate_until`, `generate_until_multi_round` and `loglikelihood` requests with a checkpoint.

    Every prompt gets the source tag that the checkpoint's recipe names as `evaluation_tag`, as in `alignvlm evaluate`.

    Args:
        pretrained: a checkpoint's folder or Hub repository.
        revision, trust_remote_code, dtype, attn_implementation: as for `load.load_checkpoint`.
        batch_size: requests answered at once.
        device: `cpu` for the CPU; by default the current accelerator, or the CPU if there is none.
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
        self.model, self.processor, _ = load_checkpoint(
            pretrained, self.accelerator.device, revision, trust_remote_code, dtype, attn_implementation
        )
        self.tag = evaluation_tag(pretrained, revision)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates answers, greedily unless a task asks otherwise; an answer ends before the first of the task's `until` strings."""
        asked = [(context, options, self._images(*place)) for context, options, *place in (r.args for r in requests)]
        return self._answers(asked, "lmms-eval")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers rounds of questions, until the task has no more; returns what the task keeps of the answers to each request.

        After each round the task's `doc_to_text` gets all answers and returns the next question with its images. As with lmms-eval's own models,
        a round's prompt holds what the task puts into it and no more.
        """
        asked = {}
        for index, request in enumerate(requests):
            context, options, doc_to_visual, _, *place = request.args
            asked[index] = (context, options, self._images(doc_to_visual, *place))
        answers: list[list[str]] = [[] for _ in requests]
        notes = [None] * len(requests)  # a task's own, of the last round
        number = 0
        while asked:
            number += 1
            for index, text in zip(asked, self._answers(list(asked.values()), f"lmms-eval, round {number}")):
                answers[index].append(text)
            following = {}
            for index, (_, options, _) in asked.items():
                _, _, _, doc_to_text, doc_id, task, split = requests[index].args
                document = self.task_dict[task][split][doc_id]
                images, context, is_done, kept, notes[index] = doc_to_text(
                    document, previous_output=answers[index], round_idx=number, previous_round_info=notes[index]
                )
                answers[index] = list(kept)
                if not is_done:
                    following[index] = (context, options, list(images or []))
            asked = following
        return answers

    def _answers(self, asked: list[tuple[str, dict, list]], title: str) -> list[str]:
        """Answers prompts, each with its options of generation and its images. A prompt's marks of where images stood are taken out: they go first."""
        answers: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}
        for index, (_, options, _) in enumerate(asked):  # one call of `generate` has one set of options
            by_options.setdefault(repr(options), []).append(index)
        for indices in by_options.values():
            options = dict(asked[indices[0]][1])
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else until
            options = {"max_new_tokens": 64, **{k: v for k, v in options.items() if v is not None}}
            if not options.get("do_sample"):
                for name in ("temperature", "top_p", "top_k"):
                    options.pop(name, None)
            images = [asked[index][2] for index in indices]
            texts = [asked[index][0].replace(self.processor.image_token, "") for index in indices]
            prompts = [[with_tag(self.tag, text)] for text in texts]
            found = answer(
                self.model,
                self.processor,
                images,
                prompts,
                self.batch_size,
                progress=title,
                refuse_long_prompts=False,
                **options,
            )
            for index, (text,) in zip(indices, found):
                for stop in until:
                    text = text.split(stop)[0] if stop else text
                answers[index] = text.strip()
        return [answers[index] for index in range(len(asked))]

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
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": with_tag(self.tag, context)}]
            pictures = list(map(to_rgb, images))
            prompt = encoder.prompt([{"role": "user", "content": content}], grids_of(self.processor, pictures))
            response = self.tokenizer(target, add_special_tokens=False)["input_ids"]
            length = len(prompt)
            input_ids = torch.tensor([[*prompt.input_ids, *response]])
            inputs = {"input_ids": input_ids, "prompt_mask": torch.arange(input_ids.shape[1])[None] < length}
            if pictures:
                inputs |= image_inputs_of(self.processor, pictures)
            if has_grids(self.processor):
                inputs["image_ids"] = torch.tensor([[*prompt.image_ids, *[-1] * len(response)]])
            logits = self.model(**{name: value.to(self.device) for name, value in inputs.items()}).logits
            logits = logits[0, length - 1 : -1].float()
            response = torch.tensor(response, dtype=torch.long, device=logits.device)
            log_probability = logits.log_softmax(-1).gather(1, response[:, None]).sum().item()
            results.append((log_probability, bool((logits.argmax(-1) == response).all())))
        return results

    def _images(self, doc_to_visual: Callable, doc_id: int, task: str, split: str) -> list:
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
