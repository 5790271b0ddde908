"""Stage 1, connector alignment: `accelerate launch training/stage1.py --config training/recipes/nano/stage1.yaml`."""

from training.stage import main


if __name__ == "__main__":
    main()
