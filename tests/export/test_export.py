"""What holds for an export to any form."""

import resource

import pytest

from alignvlm.export.export import FORMS, main
from alignvlm.stages.checkpoint import save_checkpoint
from tests.export.test_gguf import processor_for


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_gets_a_sentence_and_leaves_nothing(make_model, tmp_path, form):
    """A limit on the size of a file stands for it: what writes gets an error in the middle of the weights."""
    processor, model = processor_for("mlp"), make_model(mask_type="causal", vision_feature_layer=-2)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_id = processor.image_token_id
    save_checkpoint(model, processor, tmp_path / "given", {"backbones": {}, "stages": []})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"out' cannot be written: .*\. Make room, or name another folder"):
            main([str(tmp_path / "given"), str(tmp_path / "out"), "--to", form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
