"""Stage 3, joint training: `accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml`."""

from alignvlm.stages.stage import main
from hub_upload.command_line import run


if __name__ == "__main__":
    run(main)
