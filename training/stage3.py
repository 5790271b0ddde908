"""Stage 3, joint training: `accelerate launch training/stage3.py --config training/recipes/nano/stage3.yaml`."""

from alignvlm.stages.stage import main


if __name__ == "__main__":
    main()
