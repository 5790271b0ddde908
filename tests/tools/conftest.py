"""A run to report about: two stages really trained, evaluated on drawn scenes, with a control."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from alignvlm.data import scenes
from alignvlm.evaluation.evaluate_model import evaluate_checkpoint, parser
from alignvlm.stages.stage import main
from tests.running import arguments_for


def evaluate(checkpoint: Path, data: Path, *options: str) -> dict:
    command = [
        str(checkpoint),
        "--task",
        "scenes",
        "--data",
        str(data),
        "--use_cpu",
        "--max_new_tokens",
        "8",
        *options,
    ]
    return evaluate_checkpoint(parser().parse_args(command))


@pytest.fixture(scope="session")
def trained_run(checkpoint, tmp_path_factory) -> Path:
    """The folder of a run; tests that change something change a copy."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("run")
    (run / "scenes").mkdir()
    scenes.make_scenes(6, "test", seed=3).to_parquet(run / "scenes/test.parquet")
    evaluation = [{"name": "scenes", "annotations": ["questions"], "count": 4, "split": "test"}]
    text = [{"name": "scene_texts", "count": 8, "split": "test"}]
    measured = {"eval_sources": evaluation, "text_sources": text, "alignment_records": 4, "seed": 1}
    rates = ({"projector_learning_rate": 1e-2}, {"projector_learning_rate": 1e-2, "language_learning_rate": 2e-3})
    previous = checkpoint
    for stage, rate in enumerate(rates, start=1):
        folder = run / f"stage{stage}"
        main(arguments_for(previous, folder, stage=stage, **rate, **measured))
        previous = folder
        evaluate(folder, run / "scenes", *(() if stage == 2 else ("--limit", "3")))
    evaluate(previous, run / "scenes", "--blank_image")
    AcceleratorState._reset_state(reset_partial_state=True)
    return run
