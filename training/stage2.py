"""Stage 2, vision alignment: `accelerate launch training/stage2.py --config training/recipes/nano/stage2.yaml`."""

from alignvlm.stages.stage import main
from hub_upload.command_line import run


if __name__ == "__main__":
    run(main)
