"""Stage 3, joint training: `accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml`."""

from alignvlm.stages.stage import main
from alignvlm.tools.report.report import report_of_stage


if __name__ == "__main__":
    main(report=report_of_stage)
