"""Stage 2, vision alignment: `accelerate launch training/stage2.py --config training/recipes/nano/stage2.yaml`."""

from alignvlm.stages.stage import main
from alignvlm.tools.report.report import report_of_stage


if __name__ == "__main__":
    main(report=report_of_stage)
