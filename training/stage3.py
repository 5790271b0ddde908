"""Stage 3, joint training: `accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml`."""

from functools import partial

from alignvlm.stages.stage import main
from alignvlm.tools.report.report import report_of_stage
from hub_upload.command_line import run


if __name__ == "__main__":
    run(partial(main, report=report_of_stage))
