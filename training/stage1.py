"""Stage 1, connector alignment: `accelerate launch training/stage1.py --config training/recipes/nano/stage1.yaml`."""

from alignvlm.stages.stage import main
from alignvlm.tools.report.report import report_of_stage


if __name__ == "__main__":
    main(report=report_of_stage)
