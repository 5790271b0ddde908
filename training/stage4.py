"""Stage 4, downstream task: `accelerate launch training/stage4.py --config training/recipes/nano/stage4.yaml`."""

from alignvlm.stages.stage import main


if __name__ == "__main__":
    main()
