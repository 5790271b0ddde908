"""Stage 5, rewards or preferences (optional): `accelerate launch training/stage5.py --config training/recipes/nano/stage5.yaml`."""

from functools import partial

from alignvlm.stages.reward_stage import main
from alignvlm.tools.report.report import report_of_stage
from hub_upload.command_line import run


if __name__ == "__main__":
    run(partial(main, report=report_of_stage))
