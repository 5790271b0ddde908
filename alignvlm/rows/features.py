"""Keeps the features of images on disk, so that a frozen encoder makes them once: see `alignvlm/stages/features.py`.

A store is a folder of safetensors files. Each holds `features` `(images, positions, vision_hidden)` and, in its metadata, the images'
keys. A file appears when it is complete and never changes, so several processes and runs may write into a folder.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class FeatureStore:
    """The features in a folder, by the keys of their images (`alignvlm.data.images.image_hash`); read from memory-mapped files.

    Args:
        folder: need not exist before something is written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._opened: dict[str, safe_open] = {}
        self._places: dict[str, tuple[str, int]] = {}  # of a key: its file, and its row there
        self.refresh()

    def refresh(self) -> None:
        """Finds what other processes have written since."""
        known = {file for file, _ in self._places.values()}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in known:
                with safe_open(path, framework="pt") as file:
                    keys = json.loads(file.metadata()["keys"])
                self._places |= {key: (path.name, row) for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Tensor:
        """Reads the features `(positions, vision_hidden)` of one image."""
        name, row = self._places[key]
        if name not in self._opened:
            self._opened[name] = safe_open(self.folder / name, framework="pt")
        return self._opened[name].get_slice("features")[row]

    def write(self, keys: Sequence[str], features: Tensor) -> None:
        """Writes the features `(images, positions, vision_hidden)` of images that are not there yet, as one file.

        Raises:
            OSError: if the file cannot be written; nothing of it is left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        unfinished = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            save_file({"features": features.contiguous().cpu()}, unfinished, metadata={"keys": json.dumps(list(keys))})
            unfinished.replace(self.folder / name)
        except Exception as error:  # safetensors has an error of its own
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"Features cannot be written to {self.folder}: {error}. Make room, or name another folder."
            ) from error
        self._places |= {key: (name, row) for row, key in enumerate(keys)}

    def stacked(self, keys: Sequence[str]) -> Tensor:
        """Reads the features `(images, positions, vision_hidden)` of several images."""
        return torch.stack([self[key] for key in keys])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}  # each process opens the files for itself
