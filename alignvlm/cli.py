"""The command `alignvlm`: names of what a person runs, no logic.

alignvlm plan --config training/recipes/nano/stage*.yaml
"""

import difflib
import importlib
import sys

from hub_upload.command_line import run


# name: (module with a `main(argv)`, what it does)
COMMANDS = {
    "quickstart": ("alignvlm.quickstart.quickstart", "Train, evaluate and reload a complete nano model on a CPU."),
    "assemble": ("alignvlm.stages.backbones", "Make a stage-0 checkpoint of a vision encoder and a language model."),
    "projector": (
        "alignvlm.stages.projector_checkpoint",
        "Write the projector of a checkpoint apart, to share it or to begin with it.",
    ),
    "ask": ("alignvlm.tools.ask", "Ask a checkpoint about an image, or let it describe one."),
    "chat": ("alignvlm.tools.chat", "Talk with a checkpoint about images at a prompt."),
    "demo": ("alignvlm.tools.demo", "Try a checkpoint in the browser: captions, questions, where it looked."),
    "data": ("alignvlm.tools.show_data", "Show what a stage's sources hold and what the model will see."),
    "plan": ("alignvlm.tools.plan", "Say what stages will cost, and what is wrong with their recipes."),
    "recaption": ("alignvlm.tools.recaption", "Caption images with any image-text model, and filter what it writes."),
    "prefer": ("alignvlm.tools.prefer", "Sample answers and pair the best with the worst by a reward, for DPO."),
    "evaluate": ("alignvlm.evaluation.evaluate_model", "Evaluate a checkpoint on a task, or compare two results."),
    "blend": ("alignvlm.tools.blend", "Mix a trained language model with the untouched one, and measure the line."),
    "report": ("alignvlm.tools.report.report", "Show a run, or two beside each other, as one HTML file."),
    "export": ("alignvlm.export.export", "Write a checkpoint for transformers' own classes, llama.cpp or ONNX."),
    "env": ("alignvlm.tools.environment", "Print versions, processor, GPU and precision, for a report of a fault."),
    "push": ("hub_upload.push", "Package, check and push a checkpoint to the Hub."),
    "inspect": ("hub_upload.inspect", "Show what `trust_remote_code` would run in a repository, without running it."),
}


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    usage = "usage: alignvlm COMMAND [options]    (alignvlm COMMAND --help)"
    return "\n".join([usage, "", *lines, "", "--traceback, after any of them, shows where an error comes from."])


def main(argv: list[str] | None = None) -> None:
    """Runs the command that `argv` begins with; a mistake ends it as `hub_upload.command_line.run` says."""
    run(_dispatch, argv)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise SystemExit(f"error: alignvlm has no command {name!r}.{hint}\n\n{usage()}")
    sys.argv = [f"alignvlm {name}", *rest]  # what the command's --help calls itself
    importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    main()
