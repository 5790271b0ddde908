"""Finds files of the project that are not modules: the template of the model card, stage scripts, recipes."""

from pathlib import Path


CARD_TEMPLATE = "model_card.md"


def shared_folder() -> Path:
    """Finds their folder: the checkout, or `share/alignvlm` beside or above site-packages, where pip puts it.

    Raises:
        FileNotFoundError: if the installation lacks them.
    """
    root = Path(__file__).resolve().parents[1]
    folders = [root, *(parent / "share/alignvlm" for parent in (root, *root.parents))]
    found = next((folder for folder in folders if (folder / CARD_TEMPLATE).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{root} is an incomplete installation: it has no share/alignvlm. Install alignvlm again."
        )
    return found
