"""Shows what a stage is about to read: its sources in numbers, and a contact sheet of what the model will see.

    alignvlm data --config training/recipes/nano/stage3.yaml --show 16

Trains nothing. Images are decoded to find those that cannot be read, and for the contact sheet.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from alignvlm.evaluation.load import check_checkpoint
from alignvlm.stages.loading import as_the_stage_merges, make_collator, make_mixture
from alignvlm.stages.reward_arguments import WHOLE_IMAGES, RewardArguments, parse_any_stage
from alignvlm.stages.tiles import check_not_cut, cut_images
from alignvlm.tools.contact_sheet import describe_parts, write_contact_sheet
from hub_upload.command_line import run
from hub_upload.run_record import read_run_record
from modeling_alignvlm import AlignVLMConfig, AlignVLMProcessor


@dataclass
class ShowArguments:
    """What `alignvlm data` prints and writes."""

    show: int = field(
        default=0, metadata={"help": "Put this number of records on the contact sheet, from all sources in turn."}
    )
    sample: int = field(default=1000, metadata={"help": "Read at most this number of records of each source; 0: all."})
    sheet: str = field(default="out/data.html", metadata={"help": "Where the contact sheet goes."})

    def __post_init__(self):
        for name in ("show", "sample"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of records, 0 or more.")


def main(argv: list[str] | None = None) -> None:
    """Prints what a stage's sources hold, and writes the contact sheet if `--show` asks for it."""
    arguments, show = parse_any_stage(sys.argv[1:] if argv is None else argv, ShowArguments)
    check_checkpoint(arguments.model, arguments.model_revision)
    processor = AlignVLMProcessor.from_pretrained(arguments.model, revision=arguments.model_revision)
    config = AlignVLMConfig.from_pretrained(arguments.model, revision=arguments.model_revision)
    config, processor = as_the_stage_merges(arguments, config, processor)
    cut_images(arguments, config, processor)
    if isinstance(arguments, RewardArguments):
        check_not_cut(processor, WHOLE_IMAGES)
    collator = make_collator(arguments, processor, config)
    stages = read_run_record(arguments.model, arguments.model_revision)["stages"]
    mixture = make_mixture(arguments, collator, stages)
    print(describe_parts(mixture, collator, show.sample))
    if show.show:
        write_contact_sheet(mixture, collator, show.show, Path(show.sheet))
        print(f"\n{show.sheet}")


if __name__ == "__main__":
    run(main)
