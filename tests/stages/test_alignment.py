"""Alignment metrics against scipy and plain computations, and as a stage records them."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from alignvlm.data import scenes
from alignvlm.evaluation.perplexity import text_perplexity
from alignvlm.rows.collator import AlignVLMCollator
from alignvlm.stages.alignment import alignment_metrics, frechet_distance, modality_integration_rate
from alignvlm.stages.stage import main
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMForConditionalGeneration
from tests.records import responses_of
from tests.running import arguments_for


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


@pytest.mark.parametrize("size, counts", [(3, (50, 80)), (16, (40, 40)), (16, (8, 200))])
def test_the_distance_is_that_of_scipys_matrix_root(size, counts):
    rng = np.random.default_rng(size)
    a, b = (rng.normal(i, 1 + i, (count, size)) @ rng.normal(size=(size, size)) for i, count in enumerate(counts))
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(by_scipy(a, b), rel=1e-5)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)


def test_mir_by_its_definition():
    rng = np.random.default_rng(0)
    images, texts = ([rng.normal(k, 1 + layer, (60, 5)) for layer in range(3)] for k in (0, 1))
    texts[0][7] *= 100  # an outlier
    total = 0.0
    for image, text in zip(images, texts):
        scale = np.linalg.norm(text, axis=1).mean()
        kept = []
        for states in (image / scale, text / scale):
            norms = np.linalg.norm(states, axis=1)
            kept.append(states[abs(norms - norms.mean()) <= 3 * norms.std(ddof=1)])
        assert text is not texts[0] or len(kept[1]) == 59
        total += by_scipy(*kept)
    found = modality_integration_rate(*([torch.tensor(x) for x in states] for states in (images, texts)))
    assert found == pytest.approx(math.log(total), rel=1e-6)


def test_metrics_of_a_model_do_not_depend_on_the_batch(checkpoint, processor):
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).train()
    records = [scenes.make_scenes(6, annotations=("detailed_caption",))[i] for i in range(6)]
    metrics = alignment_metrics(model, AlignVLMCollator(processor), records, batch_size=6)
    assert alignment_metrics(model, AlignVLMCollator(processor), records, batch_size=1) == pytest.approx(
        metrics, rel=1e-3
    )
    assert model.training
    features = [
        model.get_image_features(
            processor.image_processor(r["images"], return_tensors="pt")["pixel_values"]
        ).pooler_output
        for r in records
    ]
    norms = torch.cat([f.reshape(-1, f.shape[-1]) for f in features]).norm(dim=-1)
    assert metrics["image_embedding_norm"] == pytest.approx(norms.mean().item(), rel=1e-4)


def test_perplexity_of_a_text_window_by_window(checkpoint, processor):
    model = AlignVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    text = " ".join(response for record in scenes.make_scenes(5) for response in responses_of(record))
    ids = processor.tokenizer(text)["input_ids"]
    losses = []
    for start in (0, 16, 32):
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            log_probs = model(input_ids=window).logits[0].log_softmax(-1)
        losses += [-log_probs[i, window[0, i + 1]].item() for i in range(15)]
    found = text_perplexity(model, processor.tokenizer, text, window=16, windows=3)
    assert found == pytest.approx(math.exp(sum(losses) / 45), rel=1e-4)
    with pytest.raises(ValueError, match="has 0 tokens"):
        text_perplexity(model, processor.tokenizer, "")


def test_a_stage_records_them_before_and_after(checkpoint, tmp_path):
    fields = {
        "text_sources": [{"name": "scene_texts", "count": 20, "seed": 5}],
        "eval_sources": [{"name": "scenes", "annotations": ["questions"], "count": 6, "split": "test"}],
        "alignment_records": 4,
    }
    main(arguments_for(checkpoint, tmp_path / "a", language_learning_rate=1e-2, **fields))
    main(arguments_for(tmp_path / "a", tmp_path / "b", projector_learning_rate=1e-2, **fields))
    language, projector = read_run_record(tmp_path / "b")["stages"]
    names = ("text_perplexity", "mir", "image_embedding_norm", "text_embedding_norm")
    for name in names:
        assert projector[f"{name}_before"] == pytest.approx(language[f"{name}_after"])
    assert language["text_perplexity_after"] < language["text_perplexity_before"]  # its words are those of the sources
    # A projector changes what images look like, and nothing of text.
    assert projector["text_perplexity_after"] == pytest.approx(projector["text_perplexity_before"])
    assert projector["image_embedding_norm_after"] != pytest.approx(projector["image_embedding_norm_before"])
    texts = {**fields, "eval_sources": [{"name": "scene_texts", "count": 3}]}
    with pytest.raises(ValueError, match=r"alignment_records: eval_sources hold no record with an image"):
        main(arguments_for(checkpoint, tmp_path / "c", projector_learning_rate=1e-2, **texts))
