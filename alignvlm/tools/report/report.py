"""Writes what a run did, or two runs beside each other, as one HTML file to look at.

alignvlm report out/quickstart                     # all stages and results below; also a stage's folder or a result's JSON file
alignvlm report out/first out/second               # paired differences, and answers that changed
"""

import os
from pathlib import Path

from datasets import disable_progress_bars
from transformers.utils import logging

from alignvlm.tools.report.one_run import report_of_run
from alignvlm.tools.report.page import write_page
from alignvlm.tools.report.two_runs import report_of_two
from hub_upload.command_line import ArgumentParser


REPORT = "report.html"
logger = logging.get_logger(__name__)


def parser() -> ArgumentParser:
    p = ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "run", help="A folder with a folder for each stage, a stage's folder, or a result of `alignvlm evaluate`."
    )
    p.add_argument("second", nargs="?", help="A second run, to put beside the first.")
    p.add_argument(
        "--output",
        help=f"The HTML file. Default: {REPORT} in the run's folder, or in the working directory for two runs and files.",
    )
    p.add_argument(
        "--data",
        help="The folder or file of the data that were evaluated, for their images. Default: looked for beside the run.",
    )
    p.add_argument(
        "--no_attention", action="store_true", help="Leave out where the model looked, which loads the checkpoint."
    )
    p.add_argument("--seed", type=int, default=0, help="Seed of the answers drawn by chance.")
    return p


def write_report(
    run: str | os.PathLike,
    second: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    data: str | None = None,
    attention: bool = True,
    seed: int = 0,
) -> Path:
    """Writes the report of one run, or of two; returns the file.

    Args:
        run, second: as for `alignvlm.tools.report.read.read_run`.
        output: the file; None: see `--output`.
        data: where the data of the results are; None: looked for beside the run.
        attention: load the checkpoint for heat maps.
        seed: of the answers drawn by chance.

    Raises:
        ValueError: if a path holds no run. FileNotFoundError: if there is nothing.
    """
    run = Path(run)
    if second is None:
        page = report_of_run(run, data, attention, seed)
        default = run / REPORT if run.is_dir() else Path(REPORT)
    else:
        page = report_of_two(run, Path(second), data)
        default = Path("comparison.html")
    target = default if output is None else Path(output)
    write_page(target, page)
    return target


def report_if_possible(run: str | os.PathLike, attention: bool = True) -> Path | None:
    """Writes the report of a finished run. A failure is logged and stops nothing: the run is complete without it."""
    try:
        return write_report(run, attention=attention)
    except Exception as error:  # whatever it is
        logger.error(
            f"The report could not be written: {error}\nThe checkpoint is complete. Try again: alignvlm report {run}"
        )
        return None


def report_of_stage(output_dir: str | os.PathLike) -> None:
    """Writes the report of a stage that has just finished, without heat maps: nobody has asked it anything yet."""
    written = report_if_possible(output_dir, attention=False)
    if written is not None:
        print(f"Report: {written}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Writes the report and prints its path; an error ends the program with one sentence."""
    arguments = parser().parse_args(argv)
    disable_progress_bars()
    try:
        print(
            write_report(
                arguments.run,
                arguments.second,
                arguments.output,
                arguments.data,
                not arguments.no_attention,
                arguments.seed,
            )
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
