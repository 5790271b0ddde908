"""Does with a packaged folder what vLLM's transformers backend does, call by call and in its order, without vLLM.

    python -I tests/vllm_backend.py REQUESTS FOUND

Follows vLLM 0.32 and 0.33 (`model_executor/models/transformers`: `MultiModalProcessor`, `Base`, `CausalMixin`; `ModelRegistry`). Of vLLM's
own parts, paged attention is a cache per request and layer, and its layers are those of the model. REQUESTS (`torch.save`) are
`{"folder", "prompts": [(text, images)], "new_tokens", "is_mm_prefix_lm"}` each, the last one None for what the folder says; FOUND gets for each
`{"prompts": [{"input_ids", "logits", "tokens"}]}`, or `{"error"}`.
"""

import sys


class NotHere:
    """Hides our packages: a server has only the folder."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alignvlm", "modeling_alignvlm", "hub_upload"):
            raise ModuleNotFoundError(name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotHere())

import torch  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.nn import functional  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedModel  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402


class Request:
    """A prompt with its images: token ids, the ranges `(first, last)` of image tokens without text between them, the pixel values, and keys
    and values of each layer."""

    def __init__(self, text: str, images: list, processor, tokenizer):
        self.input_ids, self.ranges, self.pixel_values, self.cache = tokenizer.encode(text), [], None, {}
        if images:
            self.expand(images, processor, tokenizer)

    def expand(self, images: list, processor, tokenizer) -> None:
        """The processor sees placeholders and images alone, and tells by what each placeholder is replaced."""
        inputs = processor(
            text=processor.image_token * len(images),
            images=images,
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )
        replacements = [
            tokenizer.encode(entry["replacement"], add_special_tokens=False)
            for entry in inputs["text_replacement_offsets"][0]
        ]
        counts = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
        assert counts["num_image_tokens"] == [len(replacement) for replacement in replacements]
        assert sum(counts["num_image_patches"]) == len(inputs["pixel_values"])
        assert len({max(set(ids), key=ids.count) for ids in replacements}) == 1  # the token that holds embeddings
        embeds = max(set(replacements[0]), key=replacements[0].count)
        (target,) = tokenizer.encode(processor.image_token, add_special_tokens=False)
        expanded: list[int] = []
        left = iter(replacements)
        for token in self.input_ids:
            replacement = next(left) if token == target else [token]
            for place, one in enumerate(replacement, len(expanded)) if token == target else ():
                if one == embeds and place > len(expanded) and replacement[place - len(expanded) - 1] == embeds:
                    self.ranges[-1] = (self.ranges[-1][0], place)
                elif one == embeds:
                    self.ranges.append((place, place))
            expanded += replacement
        self.input_ids, self.pixel_values = expanded, inputs["pixel_values"]


class Server:
    def __init__(self, folder: str, is_mm_prefix_lm: bool | None):
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.text_config = self.config.get_text_config()
        assert self.text_config is not self.config  # else a text model
        known = self.config.model_type in ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
        says = getattr(self.config, "is_mm_prefix_lm", known)
        self.is_mm_prefix_lm = says if is_mm_prefix_lm is None else is_mm_prefix_lm
        name = next(target for auto, target in self.config.auto_map.items() if auto.startswith("AutoModel"))
        found = get_class_from_dynamic_module(name, folder)
        assert issubclass(found, PreTrainedModel) and found.is_backend_compatible()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, tokenizer=self.tokenizer)
        assert not hasattr(self.processor, "video_processor")

        self.text_config._attn_implementation = "vllm"
        ALL_ATTENTION_FUNCTIONS.register("vllm", self.attention)
        options = {"config": self.config, "dtype": torch.float64, "trust_remote_code": True}
        with torch.device("meta"):
            throwaway = AutoModel.from_config(**options)
        assert type(throwaway.get_decoder()).__module__.startswith("transformers.models")  # is compiled
        assert throwaway.get_encoder(modality="image") is not throwaway
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(**options).eval()
        self.load(load_file(f"{folder}/model.safetensors"))
        self.run([Request(self.processor.image_token, [Image.new("RGB", (300, 300))], self.processor, self.tokenizer)])

    def load(self, weights: dict) -> None:
        """A checkpoint's names, with or without a leading `model.`, become those of the model; what is no part of it is the head."""
        children = {name for name, _ in self.model.named_children()}
        names = {name: name.removeprefix("model.") for name in weights}
        inside = {short: weights[name].double() for name, short in names.items() if short.split(".")[0] in children}
        self.model.load_state_dict(inside, assign=True)
        tied = self.text_config.tie_word_embeddings or self.config.tie_word_embeddings
        embeddings = self.model.get_input_embeddings().weight
        self.head = embeddings if tied else weights["lm_head.weight"].double()
        assert len(inside) + (not tied) == len(weights)

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Causal within a request and its sliding window, or both ways within an image: `(causal & window) | ranges`."""
        assert attention_mask is None  # vLLM would ignore it
        types = getattr(self.text_config, "layer_types", None)
        slides = types is not None and types[module.layer_idx] == "sliding_attention"
        outputs = []
        for request, *states in zip(self.running, *(part.split(self.lengths, dim=2) for part in (query, key, value))):
            old = request.cache.get(module.layer_idx)
            keys, values = (torch.cat([old[i], states[i + 1]], 2) if old else states[i + 1] for i in range(2))
            request.cache[module.layer_idx] = (keys, values)
            k = torch.arange(keys.shape[2])
            q = k[-states[0].shape[2] :, None]
            allowed = (k <= q) & (q - k < (self.text_config.sliding_window if slides else len(k)))
            for first, last in request.ranges if self.is_mm_prefix_lm else []:
                allowed |= (first <= q) & (q <= last) & (first <= k) & (k <= last)
            outputs.append(
                functional.scaled_dot_product_attention(
                    states[0], keys, values, allowed, scale=scaling, enable_gqa=True
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)[0], None

    def run(self, requests: list[Request]) -> list[torch.Tensor]:
        """One step: the tokens of all requests that are not in their caches, behind each other; returns the logits of each."""
        done = [request.cache[0][0].shape[2] if request.cache else 0 for request in requests]
        self.running, self.lengths = requests, [len(r.input_ids) - n for r, n in zip(requests, done)]
        embeds, positions = [], []
        for request, past in zip(requests, done):
            embedded = self.model.get_input_embeddings()(torch.tensor(request.input_ids[past:]))
            if request.pixel_values is not None and past == 0:
                features = self.model.get_image_features(request.pixel_values, return_dict=True).pooler_output
                lengths = [last + 1 - first for first, last in request.ranges]
                for (first, last), image in zip(request.ranges, features.flatten(0, 1).split(lengths)):
                    embedded[first : last + 1] = image
            embeds.append(embedded)
            positions.append(torch.arange(past, len(request.input_ids)))
        hidden = self.model(
            input_ids=None,
            inputs_embeds=torch.cat(embeds)[None],
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            return_dict=False,
        )[0][0]
        logits = functional.linear(hidden, self.head)
        if cap := getattr(self.text_config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits.split(self.lengths)


@torch.no_grad()
def answer(folder: str, prompts: list, new_tokens: int, is_mm_prefix_lm: bool | None) -> dict:
    try:
        server = Server(folder, is_mm_prefix_lm)
        requests = [Request(text, images, server.processor, server.tokenizer) for text, images in prompts]
        found = [{"input_ids": list(request.input_ids), "tokens": []} for request in requests]
        for step in range(new_tokens):
            for request, result, logits in zip(requests, found, server.run(requests)):
                if step == 0:
                    result["logits"] = logits
                result["tokens"].append(int(logits[-1].argmax()))
                request.input_ids.append(result["tokens"][-1])
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"prompts": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    requests, found = sys.argv[1:]
    torch.save([answer(**request) for request in torch.load(requests, weights_only=False)], found)
