"""The models and data of the speed measurements: random weights in true dimensions, words for tokens, noise for pictures."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.rows.encode import Branch
from alignvlm.rows.packing import Packer
from alignvlm.stages.chat_templates import CHATML_TEMPLATE
from modeling_alignvlm import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor


# Published dimensions; `layers` of the language model can be reduced on the command line, which the tables then say.
SHAPES = {
    "b16-224+135m": {
        "vision": {
            "model_type": "siglip_vision_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "vision_use_head": False,
        },
        "text": {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    },
    "so400m-384+0.5b": {
        "vision": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text": {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
}
# Annotations per image, tokens of a prompt, tokens of a response with the one that ends it, as Qwen2.5's tokenizer counts them (measured,
# and kept true, by tests/benchmarks/test_throughput.py): "Write a short caption." of the recipes is 5 tokens; PathVQA's questions are 9.1 on
# average, their answers 3.7. The 20 tokens of a caption are a round number: Flickr30k's are 15 on average.
WORKLOADS = {
    "captions": ((5,), 5, 20),
    "questions": ((7, 7, 7, 6, 6), 9, 4),
}  # 6.6 questions on average, as in PathVQA
# ChatML behind the system message that Qwen2.5's own template writes, token for token: 24 tokens stand before the image (16 of them the
# system message's text), and 5 between a prompt and its response. Words stand for tokens, and so do line breaks.
SYSTEM_MESSAGE = " ".join(["w8"] * 16)
TEMPLATE = "{{ '<|im_start|>system\\n" + SYSTEM_MESSAGE + "<|im_end|>\\n' }}" + CHATML_TEMPLATE
IMAGE_TOKEN_ID = 2
SPECIAL_WORDS = ("<pad>", "<|im_end|>", "<image>", "<|im_start|>", "\n", "system", "user", "assistant")


def configs(shape: str, vision_layers: int | None = None, text_layers: int | None = None) -> tuple[dict, dict]:
    """The shape's vision and text dimensions, with fewer layers if asked."""
    vision, text = dict(SHAPES[shape]["vision"]), dict(SHAPES[shape]["text"])
    vision["num_hidden_layers"] = vision_layers or vision["num_hidden_layers"]
    text["num_hidden_layers"] = text_layers or text["num_hidden_layers"]
    return vision, text


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word `w8` ..., per line break, and per word of ChatML."""
    first = len(SPECIAL_WORDS)
    vocabulary = {
        **{word: i for i, word in enumerate(SPECIAL_WORDS)},
        **{f"w{i}": i for i in range(first, vocab_size)},
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=f"w{first}"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<image>", "<|im_start|>"],
    )


def alignvlm(vision: dict, text: dict, attn_implementation: str = "sdpa"):
    """This package's model and processor."""
    set_seed(0)
    words = tokenizer(text["vocab_size"])
    config = AlignVLMConfig(
        vision_config=vision, text_config={**text, "eos_token_id": 1, "pad_token_id": 0}, image_token_id=IMAGE_TOKEN_ID
    )
    config._attn_implementation = attn_implementation
    model = AlignVLMForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    side = vision["image_size"]
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    processor = AlignVLMProcessor(images, words, image_seq_length=config.image_seq_length, chat_template=TEMPLATE)
    return model, processor


def llava(vision: dict, text: dict, attn_implementation: str = "sdpa"):
    """The peer: transformers' LLaVA class around the same backbones."""
    set_seed(0)
    words = tokenizer(text["vocab_size"])
    config = LlavaConfig(
        vision_config=vision,
        text_config={**text, "eos_token_id": 1, "pad_token_id": 0},
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    config._attn_implementation = attn_implementation
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    side = vision["image_size"]
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": side, "width": side}),
        words,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=0,
    )
    return model, processor


class ImageTrunkPacker(Packer):
    """Rows whose trunk ends with the image, as all rows did before a trunk held what prompts share: each branch repeats its prompt. For
    records of one image."""

    def trunk_length(self, branches: list[Branch]) -> int:
        return self.encoder.up_to_an_image


class ImageTrunkCollator(AlignVLMCollator):
    """The collator with rows of `ImageTrunkPacker`."""

    def __init__(self, processor: AlignVLMProcessor, **options):
        super().__init__(processor, **options)
        self.packer = ImageTrunkPacker(self.encoder, self.packer.max_length, self.packer.row_length)


def records(
    workload: str,
    images: int,
    image_size: int,
    vocab_size: int,
    annotations: int | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> list[dict]:
    """Records of noise pictures and random words; `annotations` per image, `prompt_tokens` and `response_tokens` replace the workload's.
    All captions are asked for with the same words, every question has its own."""
    rng = np.random.default_rng(0)
    counts, usual_prompt, usual_response = WORKLOADS[workload]
    prompt_tokens, response_tokens = prompt_tokens or usual_prompt, response_tokens or usual_response

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL_WORDS), vocab_size, count))

    caption_prompt = words(prompt_tokens) if workload == "captions" else None
    made = []
    for index in range(images):
        pixels = rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        count = annotations or counts[index % len(counts)]
        made.append(
            {
                "images": [Image.fromarray(pixels)],
                "annotations": [
                    {"prompt": caption_prompt or words(prompt_tokens), "response": words(response_tokens - 1)}
                    for _ in range(count)
                ],
            }
        )
    return made
