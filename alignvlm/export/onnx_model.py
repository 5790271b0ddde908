"""Runs what `alignvlm export --to onnx` wrote: greedy answers with onnxruntime and numpy alone.

    model = OnnxModel("out/onnx")
    tokens = model.generate(**processor(images=image, text=prompt, return_tensors="np"), max_new_tokens=40)

It is what a program in another language has to do. Three steps make the logits: the embeddings of the tokens, the features of the images in
the place of the image tokens, and the decoder with its cache, which begins empty.
"""

import json
from pathlib import Path

import numpy as np


GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


class OnnxModel:
    """The three graphs of an exported folder.

    Args:
        folder: the exported folder.
        suffix: which of its files: `""`, or `"_quantized"` for those with 8-bit weights.
        **options: for `onnxruntime.InferenceSession`, such as `providers` and `sess_options`.

    Raises:
        FileNotFoundError: if the folder is none that `alignvlm export --to onnx` wrote, or has no files of this suffix.
    """

    def __init__(self, folder: str | Path, suffix: str = "", **options):
        from onnxruntime import InferenceSession

        folder, options = Path(folder), {"providers": ["CPUExecutionProvider"], **options}
        settings = [folder / "config.json", folder / "generation_config.json"]
        graphs = [folder / "onnx" / f"{name}{suffix}.onnx" for name in GRAPHS]
        for file in settings + graphs:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is not there. Name a folder that `alignvlm export CHECKPOINT FOLDER --to onnx` wrote; "
                    'the suffix is "", or, with --int8, "_quantized".'
                )
        self.encoder, self.embed_tokens, self.decoder = (InferenceSession(file, **options) for file in graphs)
        config, generation = (json.loads(file.read_text(encoding="utf-8")) for file in settings)
        self.image_token_id: int = config["image_token_id"]
        self.context: int | None = config["text_config"].get("max_position_embeddings")
        stops = generation.get("eos_token_id")
        self.eos_token_ids: list[int] = [stops] if isinstance(stops, int) else stops or []
        self.layers = [value for value in self.decoder.get_inputs() if value.name.startswith("past_key_values.")]

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        """A cache of no tokens: `{"past_key_values.0.key": (batch, heads, 0, head_dim), ...}`."""
        return {value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32) for value in self.layers}

    def embed_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Embeddings `(batch, length, hidden)` of tokens `(batch, length)`, all of them text."""
        return self.embed_tokens.run(None, {"input_ids": input_ids})[0]

    def embed(self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None) -> np.ndarray:
        """Embeddings `(batch, length, hidden)` of tokens `(batch, length)`, with the features of the images `(images, channels, height,
        width)` in the place of their tokens."""
        embeddings, is_image = self.embed_text(input_ids), input_ids == self.image_token_id
        if pixel_values is None and is_image.any():
            raise ValueError(f"`input_ids` holds {is_image.sum()} image tokens, but no `pixel_values` were given.")
        if pixel_values is not None:
            features = self.encoder.run(None, {"pixel_values": pixel_values})[0]
            if is_image.sum() != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"`input_ids` holds {is_image.sum()} image tokens, and {features.shape[0]} image(s) of {features.shape[1]} tokens "
                    "were given."
                )
            embeddings[is_image] = features.reshape(-1, features.shape[-1])
        return embeddings

    def step(
        self, embeddings: np.ndarray, attention_mask: np.ndarray, cache: dict[str, np.ndarray], keep: int = 0
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits `(batch, kept, vocabulary)` of the last `keep` of new tokens (0: of all) and the cache behind them.

        Args:
            embeddings: `(batch, length, hidden)`.
            attention_mask: `(batch, cached + length)`, 0 at padding.
        """
        position_ids = (attention_mask.cumsum(-1) - 1).clip(0)[:, -embeddings.shape[1] :]
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "num_logits_to_keep": np.array(keep),
        }
        logits, *present = self.decoder.run(None, {**inputs, **cache})
        return logits, {value.name: new for value, new in zip(self.layers, present)}

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, pixel_values: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits `(batch, length, vocabulary)` of complete rows, all of it prompt."""
        return self.step(self.embed(input_ids, pixel_values), attention_mask, self.empty_cache(len(input_ids)))[0]

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        pixel_values: np.ndarray | None = None,
        max_new_tokens: int = 40,
    ) -> np.ndarray:
        """Writes greedy continuations `(batch, new)` of prompts padded on the left. Behind an end token they repeat it.

        Raises:
            ValueError: for inputs that are no arrays, images that do not fit their tokens, and more tokens than the model's context has.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        for name, value in given.items():
            if not isinstance(value, np.ndarray | None):
                kind = type(value).__name__
                raise ValueError(
                    f'`{name}` is of type {kind}, not a numpy array. Call the processor with return_tensors="np".'
                )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: an answer has at least 1.")
        longest = int(attention_mask.sum(-1).max())
        if self.context is not None and longest + max_new_tokens > self.context:
            raise ValueError(
                f"A prompt of {longest} tokens and an answer of {max_new_tokens} are too long: the language model takes {self.context} "
                "together. Shorten the question, or give a smaller max_new_tokens."
            )
        cache, embeddings = self.empty_cache(len(input_ids)), self.embed(input_ids, pixel_values)
        tokens, ended = [], np.zeros(len(input_ids), bool)
        for _ in range(max_new_tokens):
            logits, cache = self.step(embeddings, attention_mask, cache, keep=1)
            following = logits[:, -1].argmax(-1)
            if tokens:
                following = np.where(ended, tokens[-1], following)
            tokens.append(following)
            ended |= np.isin(following, self.eos_token_ids)
            if ended.all():
                break
            embeddings = self.embed_text(following[:, None])
            attention_mask = np.concatenate([attention_mask, np.ones_like(attention_mask[:, :1])], axis=1)
        return np.stack(tokens, axis=1)
