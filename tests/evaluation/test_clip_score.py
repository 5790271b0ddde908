"""CLIPScore equals its formula on a CLIP with random weights."""

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, set_seed

from alignvlm.evaluation.judge import check_answers_suffice, load_metric
from tests.tools.test_recaption import bert_like, clip


CAPTIONS = ["a red circle", "two blue squares and a green triangle at the top", ""]
REFERENCES = [["a circle"], ["blue squares", "a red circle"], ["a photo", "squares", "nothing at all"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    set_seed(7)
    folder = tmp_path_factory.mktemp("clip")
    for part in clip(bert_like()):
        part.save_pretrained(folder)
    return folder


def test_clip_score_is_the_formula(folder, tmp_path):
    model, processor = (part for part in _loaded(folder))
    images = [Image.effect_noise((24, 16 + 8 * index), 90).convert("RGB") for index in range(3)]
    images[1].save(tmp_path / "one.png")
    given = [images[0], str(tmp_path / "one.png"), images[2]]
    found = load_metric("clip_score").compute(
        predictions=CAPTIONS, references=REFERENCES, images=given, model=str(folder), batch_size=2
    )

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return torch.cosine_similarity(one, other, dim=0).item()

    def embedded(caption: str, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one pair, by the model's own forward."""
        options = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
        with torch.no_grad():
            output = model(**processor(images=image, text=f"A photo depicts {caption}", **options))
        return output.text_embeds[0], output.image_embeds[0]

    scores = []
    for caption, references, image, own in zip(CAPTIONS, REFERENCES, images, found["per_item"], strict=True):
        text, seen = embedded(caption, image)
        score = 2.5 * max(cosine(text, seen), 0)
        likeness = max(max(cosine(text, embedded(reference, image)[0]) for reference in references), 0)
        assert own["clip_score"] == pytest.approx(score, rel=1e-4, abs=1e-6)
        expected = 2 / (1 / score + 1 / likeness) if score and likeness else 0
        assert own["ref_clip_score"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        scores.append(score)
    assert found["clip_score"] == pytest.approx(sum(scores) / 3, rel=1e-4) and len(set(scores)) > 1


def _loaded(folder):
    from transformers import AutoModel, AutoProcessor

    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_a_negative_cosine_counts_as_nothing(folder):
    from alignvlm.evaluation.metrics.clip_score.clip_score import _scored

    image, text = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])
    assert _scored(image, text, torch.stack([text, image])) == {"clip_score": 0.0, "ref_clip_score": 0.0}
    assert _scored(text, text, torch.stack([image, -text]))["ref_clip_score"] == 0.0
    one = _scored(text, text, torch.stack([image, text]))
    assert one == {"clip_score": pytest.approx(2.5), "ref_clip_score": pytest.approx(2 * 2.5 / 3.5)}


def test_another_model_and_a_result_without_images_are_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path)
    one = {"predictions": ["a"], "references": [["a"]], "images": [Image.new("RGB", (8, 8))]}
    with pytest.raises(ValueError, match=r"\(BertModel\) does not embed images and texts; name a CLIP"):
        load_metric("clip_score").compute(**one, model=str(tmp_path))
    with pytest.raises(ValueError, match="'clip_score' asks for images, which answers do not have: call it in Python"):
        check_answers_suffice("clip_score")
    check_answers_suffice("choice_accuracy")
