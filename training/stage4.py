"""Stage 4, downstream task: `accelerate launch training/stage4.py --config training/recipes/nano/stage4.yaml`."""

from alignvlm.stages.stage import main
from hub_upload.command_line import run


if __name__ == "__main__":
    run(main)
