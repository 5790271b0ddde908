"""Stage 1, connector alignment: `accelerate launch training/stage1.py --config training/recipes/nano/stage1.yaml`."""

from functools import partial

from alignvlm.stages.stage import main
from alignvlm.tools.report.report import report_of_stage
from hub_upload.command_line import run


if __name__ == "__main__":
    run(partial(main, report=report_of_stage))
