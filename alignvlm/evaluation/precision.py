"""Decides what a run computes in from what the processor or GPU does natively, for training, evaluation and benchmarks alike."""

import os
import time
import warnings
from dataclasses import dataclass

import torch


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
# Values of oneDNN's instruction-set limit without bf16 instructions. AVX2_VNNI_2 converts bf16 but does not multiply it.
_LIMITS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Precision:
    """A decision: `name` is `fp32`, `bf16` or `fp16`; `reason` says why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self, device: str | torch.device = "cpu") -> torch.autocast:
        """Returns the context in which operations of float32 weights run in this precision."""
        return torch.autocast(torch.device(device).type, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_precision(
    asked: str = "auto", device: str | torch.device = "cpu", stored: torch.dtype | None = None
) -> Precision:
    """Decides what a run on `device` computes in.

    Args:
        asked: `auto`, or `fp32`, `bf16`, `fp16` (or `float32`, `bfloat16`, `float16`), which is then taken as it is.
        device: where the run computes; only its type counts.
        stored: the dtype of a stored checkpoint. `auto` keeps it if the device computes in it natively, and otherwise takes float32,
            which holds the same weights.

    Raises:
        ValueError: if `asked` is none of these names.
    """
    name = _NAMES.get(asked, asked)
    if name not in PRECISIONS:
        raise ValueError(f"Unknown precision {asked!r}. Valid values: {', '.join(PRECISIONS)}.")
    if name != "auto":
        return Precision(name, "asked for by name")
    kind = torch.device(device).type
    if stored is not None:
        stored_name = _NAMES.get(str(stored).removeprefix("torch."), "fp32")
        native, reason = is_native(stored_name, kind)
        if native:
            return Precision(stored_name, "as the checkpoint is stored")
        return Precision("fp32", f"the checkpoint is stored in {stored_name}, but {reason}")
    native, reason = is_native("bf16", kind)
    if native:
        return Precision("bf16", reason)
    return Precision("fp16" if kind == "cuda" else "fp32", reason)


def is_native(name: str, device: str | torch.device = "cpu") -> tuple[bool, str]:
    """Tells whether a device multiplies matrices of a precision with instructions of its own, and says it in a sentence."""
    kind = torch.device(device).type
    if name == "fp32":
        return True, "float32 runs everywhere"
    if kind == "cuda" and not torch.cuda.is_available():
        return True, "a GPU that is not here is taken to have it"
    if kind == "cuda":
        native = name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"the GPU {'has' if native else 'has no'} {name} instructions"
    if kind != "cpu":
        return True, f"{kind} devices compute in 16 bits"
    if limit := _instruction_limit():
        return False, f"{limit} keeps PyTorch from 16-bit instructions"
    capabilities = torch.cpu.get_capabilities()
    instructions = {
        "bf16": {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16",), "arm64": ("bf16",)},
        "fp16": {"x86_64": ("avx512_fp16", "amx_fp16"), "aarch64": ("fp16_arith",), "arm64": ("fp16_arith",)},
    }[name]
    found = [flag for flag in instructions.get(capabilities.get("architecture"), ()) if capabilities.get(flag)]
    ask_onednn = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}[name]
    # Ask both: oneDNN also says yes if it emulates (AVX-512 without bf16), and PyTorch may not use what the processor has.
    native = bool(found) and torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, ask_onednn)()
    if native:
        return True, f"the processor has {name} instructions: {', '.join(found)}"
    return False, f"the processor has no {name} instructions that PyTorch uses"


def _instruction_limit() -> str | None:
    """Returns the environment variable that keeps PyTorch from 16-bit instructions, with its value; None if there is none."""
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if os.environ.get(variable, "").upper() in _LIMITS_WITHOUT_BF16:
            return f"{variable}={os.environ[variable]}"
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return f"ATEN_CPU_CAPABILITY={os.environ['ATEN_CPU_CAPABILITY']}"
    return None


def matrix_rate(
    dtype: torch.dtype, device: str | torch.device = "cpu", seconds: float = 0.5, size: int = 512
) -> float:
    """Measures FLOP/s of square matrix products in a dtype for about `seconds`. Returns the fastest, so that other work counts little."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    fastest, began = float("inf"), time.perf_counter()
    while (started := time.perf_counter()) - began < seconds:
        torch.mm(a, b, out=out)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


def _synchronize(device: str | torch.device) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def warn_if_emulated(precision: Precision, device: str | torch.device = "cpu") -> None:
    """Warns, with a measured factor, if the device has to emulate the precision."""
    native, reason = is_native(precision.name, device)
    if native:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several would wait for each other, and the waiting would be measured
    try:
        full, asked = (
            matrix_rate(dtype, device, seconds=0.05, size=256) for dtype in (torch.float32, precision.dtype)
        )
    finally:
        torch.set_num_threads(threads)
    warnings.warn(
        f"{precision.name} was asked for, but {reason}: matrix products run {full / asked:.3g} times slower than in fp32 here "
        f"({asked / 1e9:.3g} GFLOP/s, {full / 1e9:.3g} in fp32). Say `auto` or `fp32` to be faster.",
        stacklevel=2,
    )
