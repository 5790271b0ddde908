"""Stage 4, downstream task: `accelerate launch training/stage4.py --config training/recipes/nano/stage4.yaml`."""

from alignvlm.stages.stage import main
from alignvlm.tools.report.report import report_of_stage


if __name__ == "__main__":
    main(report=report_of_stage)
