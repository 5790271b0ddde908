"""Stage 1, connector alignment: `accelerate launch training/stage1.py --config training/recipes/nano/stage1.yaml`."""

from alignvlm.stages.stage import main
from hub_upload.command_line import run


if __name__ == "__main__":
    run(main)
