"""Prints what a report of a fault needs: versions, the processor and its instructions, GPUs, and the precision that is chosen here.

    alignvlm env

The output holds no paths, names of users or tokens.
"""

import os
import platform
from pathlib import Path

import torch

from alignvlm.evaluation.precision import choose_precision
from hub_upload.command_line import ArgumentParser
from hub_upload.run_record import library_versions


# What decides speed or precision, or how libraries work; only the values that are set are printed.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_MAX_CPU_ISA",
    "HF_HUB_OFFLINE",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)


def processor_name() -> str:
    """The processor as the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def instructions() -> list[str]:
    """The instruction sets that PyTorch found on the processor."""
    return sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)


def gpus() -> list[str]:
    """Each GPU of PyTorch with its memory."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]


def describe() -> dict[str, str]:
    """The environment, as names and values in words."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    versions = library_versions()
    set_here = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return {
        "alignvlm": versions.pop("alignvlm", "not installed"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        **versions,
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch",
        "instructions": " ".join(instructions()),
        "gpu": "; ".join(gpus()) or "none",
        "precision": f"{choose_precision(device=device)} on {device.type}",
        "variables": " ".join(set_here) or "none of note",
    }


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each."""
    ArgumentParser(description="Prints versions, processor, GPU and precision, for a report of a fault.").parse_args(
        argv
    )
    found = describe()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
