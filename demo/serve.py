"""`transformers serve` for AlignVLM checkpoints: an OpenAI-compatible server on this machine.

    python demo/serve.py user/my-alignvlm --port 8000      # or a checkpoint folder; all options of `transformers serve`

The command itself (transformers 5.23) serves only classes it has by name, with `--trust-remote-code` too: it looks the architecture up
in `transformers` and its kind in a table. This tells it of both, then is that command. The code is this package's, not the repository's.
"""

import sys
from pathlib import Path

from transformers.cli.serving import model_manager
from transformers.cli.transformers import main as transformers_command
from transformers.models.auto import modeling_auto


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python demo/serve.py`

from modeling_alignvlm import AlignVLMForConditionalGeneration


def main() -> None:
    name = AlignVLMForConditionalGeneration.__name__
    setattr(model_manager.transformers, name, AlignVLMForConditionalGeneration)
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["alignvlm"] = name
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers_command()


if __name__ == "__main__":
    main()
