"""Files of the project that are no modules: the template of the model card, stage scripts, recipes."""

from pathlib import Path


CARD_TEMPLATE = "model_card.md"


def shared_folder() -> Path:
    """The folder they lie in: the checkout, or where pip has put them, `share/alignvlm` beside site-packages or above it.

    Raises:
        FileNotFoundError: if the installation has lost them.
    """
    root = Path(__file__).resolve().parents[1]
    folders = [root, *(parent / "share/alignvlm" for parent in (root, *root.parents))]
    found = next((folder for folder in folders if (folder / CARD_TEMPLATE).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{root} is an incomplete installation: it has no share/alignvlm. Install alignvlm again."
        )
    return found
