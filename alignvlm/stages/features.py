"""The stage option `cache_features`: encodes each image once with the frozen encoder, and trains from features kept on disk.

Before training, the images that the stage will show are found by their content, those without kept features are encoded, and the collator
then puts features into batches instead of pixel values. A folder of features belongs to one encoder, image processor, precision and
machine (see `KeptFeatures.description`): what changes any of them has a folder of its own. Kernels may round an image's features otherwise
in another batch, so features are used only in batches of sizes at which they were seen to be those of training, bit for bit.
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from alignvlm.data.images import BadImage, image_hash, read_image
from alignvlm.rows.collator import AlignVLMCollator, records_of
from alignvlm.rows.features import FeatureStore
from alignvlm.stages.arguments import StageArguments
from alignvlm.stages.options import StageOption
from alignvlm.stages.tiles import check_not_cut
from alignvlm.stages.trainer import AlignVLMTrainer
from hub_upload.run_record import write_json


DESCRIPTION = "features.json"  # in a folder of features: what they were made by and with
FILE_BYTES = 256e6


def features_folder(arguments: StageArguments) -> Path:
    """Returns the folder below which a stage keeps its features, which need not exist."""
    return Path(arguments.features_dir or Path(arguments.output_dir) / "features")


def check_is_folder(folder: Path) -> None:
    """Raises a `ValueError` if `folder` cannot be made, because a file is where it or one above it would be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"features_dir={str(folder)!r}: {str(there)!r} is a file. Name a folder.")


def check_room(folder: Path, needed: float) -> None:
    """Raises a `ValueError` if features of `needed` bytes have no room on the disk of `folder`, which need not exist, or it is a file."""
    check_is_folder(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"cache_features needs {needed / 1e9:,.3g} GB below {str(folder)!r}, where {free / 1e9:,.3g} GB are free. Name another "
            "features_dir, take fewer images, or leave out cache_features."
        )


class KeptFeatures(StageOption):
    """Encodes what is missing before training; the collator then takes all features from the disk."""

    def __init__(self, arguments: StageArguments, trainer: AlignVLMTrainer, collator: AlignVLMCollator):
        self.arguments, self.trainer, self.collator = arguments, trainer, collator
        self.recorded: dict[str, Any] = {}

    @classmethod
    def of(
        cls, arguments: StageArguments, trainer: AlignVLMTrainer, collator: AlignVLMCollator
    ) -> "list[KeptFeatures]":
        """Makes the option if the arguments ask for it."""
        return [cls(arguments, trainer, collator)] if arguments.cache_features else []

    def check(self, trainer: AlignVLMTrainer) -> None:
        check_not_cut(self.collator.processor, "cache_features keeps one feature map an image")
        check_is_folder(features_folder(self.arguments))
        trainer.check_complete_weights("cache_features")

    def before(self, model: nn.Module) -> None:
        was_training = model.training
        model.train()  # as the encoder is in training
        try:
            self._prepare()
        finally:
            model.train(was_training)

    def after(self, model: nn.Module) -> None:
        self.collator.keep_features(None)

    def record(self) -> dict[str, Any]:
        return {"cache_features": self.recorded}

    @property
    def encoder(self):
        """The model that encodes images: the one without a head."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model).model

    def description(self) -> dict[str, Any]:
        """Collects all that an image's features depend on, down to their last bit."""
        encoder, image_processor = self.encoder, self.collator.processor.image_processor
        digest = hashlib.sha256()
        for name, value in encoder.vision_tower.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        device = encoder.device
        described = {
            "encoder_sha256": digest.hexdigest(),
            "encoder": encoder.config.vision_config.to_diff_dict(),
            "attention": encoder.vision_tower.config._attn_implementation,
            "feature_layer": encoder.config.vision_feature_layer,
            "image_processor": {"class": type(image_processor).__name__, **image_processor.to_dict()},
            "precision": self.arguments.chosen_precision.name,
            "tf32": self.arguments.tf32,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "pillow": PIL.__version__,
                "numpy": numpy.__version__,
            },
        }
        for changing in ("transformers_version", "_name_or_path"):
            described["encoder"].pop(changing, None)
        return json.loads(json.dumps(described, sort_keys=True, default=str))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encodes images as a step of training does."""
        with self.trainer.accelerator.autocast():
            return self.encoder.encode_images(pixel_values.to(self.encoder.device))

    def encode_by(self, count: int, pixel_values: Tensor) -> Tensor:
        """Encodes any number of images, always `count` at once: the last image fills up the last batch."""
        found = []
        for part in pixel_values.split(count):
            filling = part[-1:].expand(count - len(part), *part.shape[1:])
            found.append(self.encode(torch.cat([part, filling]))[: len(part)])
        return torch.cat(found)

    def _prepare(self) -> None:
        began = time.perf_counter()
        described = self.description()
        if any(other != described for other in gather_object([described])):
            raise ValueError(
                "cache_features: the processes run on different devices, whose features would differ. Leave it out."
            )
        name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        store = FeatureStore(features_folder(self.arguments) / name)
        file = store.folder / DESCRIPTION
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

        images, sizes = self._survey()
        if not images:
            raise ValueError("cache_features: no source has an image. Leave it out.")
        at_once = known.get("images_at_once") or sizes.most_common(1)[0][0]
        dtype = self._check_repeatable()
        exact = self._exact_sizes(sizes, at_once, set(known.get("exact_batches", [])))
        missing = sorted(key for key in images if key not in store)
        height, width = self.encoder.config.feature_grid
        size = height * width * self.encoder.config.feature_size * dtype.itemsize
        check_room(store.folder, len(missing) * size)
        self.trainer.accelerator.wait_for_everyone()  # each has read the folder as it was
        if self.trainer.is_world_process_zero():
            store.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, {**described, "images_at_once": at_once, "exact_batches": sorted(exact)})
        self.trainer.accelerator.wait_for_everyone()
        self._fill(store, images, missing, at_once, size)
        self.trainer.accelerator.wait_for_everyone()
        store.refresh()
        self.collator.keep_features(store, frozenset(exact))
        self.recorded = {
            "images": len(images),
            "encoded": len(missing),
            "seconds": round(time.perf_counter() - began, 1),
            "gigabytes": round(len(images) * size / 1e9, 3),
            "dtype": str(dtype).removeprefix("torch."),
            "share_of_batches": sum(sizes[count] for count in exact & sizes.keys()) / sizes.total(),
        }
        if self.trainer.is_world_process_zero():
            print(f"Features of {len(images):,} images in {store.folder}: {self.recorded}", flush=True)

    def _survey(self) -> tuple[dict[str, tuple[int, int, int]], Counter]:
        """Finds the images that training and evaluation will show, and how many come in a batch.

        Returns:
            of each key its first place, `(data set, example, image)`; and how many batches show each number of images, above 0.
        """
        args, process, processes = self.arguments, self.arguments.process_index, self.arguments.world_size
        reads = [(self.trainer.train_dataset, list(self._epochs()), self.trainer._train_batch_size)]
        if (held_out := self.trainer.eval_dataset) is not None:
            reads.append((held_out, [list(range(len(held_out)))], args.eval_batch_size))
        places: dict[str, tuple[int, int, int]] = {}
        sizes: Counter = Counter()
        for number, (dataset, epochs, batch_size) in enumerate(reads):
            indices = sorted({index for epoch in epochs for index in epoch})
            own = indices[process::processes]
            loader = self._loader(Subset(dataset, own), _Survey(self.collator), 16)
            found = dict(zip(own, (entry for batch in loader for entry in batch), strict=True))
            merged = {index: entry for part in gather_object([found]) for index, entry in part.items()}
            for index in indices:
                for image, key in enumerate(merged[index][0]):
                    if key is not None:
                        places.setdefault(key, (number, index, image))
            for epoch in epochs:
                shown = (sum(merged[index][1] for index in batch) for batch in _batches(epoch, batch_size))
                sizes.update(count for count in shown if count)
        return places, sizes

    def _epochs(self) -> Iterator[list[int]]:
        """Yields the examples (records, or filled rows) of each epoch of the complete run, in their order."""
        sampler = self.trainer.sampler
        left = self.trainer.total_steps() * self.arguments.records_per_step()
        for epoch in range(math.ceil(left / len(sampler))):
            sampler.set_epoch(epoch)
            order = list(sampler)[:left]
            left -= len(order)
            yield order
        sampler.set_epoch(0)

    def _loader(self, dataset: Any, collate: Any, batch_size: int) -> DataLoader:
        """Loads without touching the random numbers of training."""
        return DataLoader(
            dataset,
            batch_size,
            collate_fn=collate,
            num_workers=self.arguments.dataloader_num_workers,
            multiprocessing_context=self.arguments.dataloader_multiprocessing_context,
            generator=torch.Generator().manual_seed(0),
        )

    def _noise(self, count: int) -> Tensor:
        config = self.encoder.config
        shape = (count, getattr(config.vision_config, "num_channels", 3), *config.input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def _check_repeatable(self) -> torch.dtype:
        """Returns the dtype of features.

        Raises:
            ValueError: if they are random, or the encoder draws random numbers.
        """
        noise, states = self._noise(1), _random_states(self.encoder.device)
        found = self.encode(noise)
        same = zip(states, _random_states(self.encoder.device))
        if not (torch.equal(found, self.encode(noise)) and all(torch.equal(*pair) for pair in same)):
            raise ValueError(
                f"cache_features: the encoder {self.encoder.config.vision_config.model_type!r} draws random numbers in training (dropout), so "
                "that no features can be kept. Set its dropout to 0 in config.json, or leave out cache_features."
            )
        return found.dtype

    def _exact_sizes(self, sizes: Counter, at_once: int, tried: set[int]) -> set[int]:
        """Tries at which numbers of images a batch's features are, bit for bit, those made `at_once` at once in other places.

        Kernels add in an order that depends on shapes and not on values, so noise tells. `tried` are sizes known to be exact.

        Raises:
            ValueError: if they differ in the most common size of batch.
        """
        untried = sizes.keys() - tried
        exact = tried | untried
        if untried:
            noise = self._noise(max(*sizes, at_once))
            kept = self.encode_by(at_once, noise.flip(0)).flip(0)
            own = {count for count in untried if torch.equal(self.encode(noise[:count]), kept[:count])}
            exact = tried | set.intersection(*gather_object([own]))
        usual = sizes.most_common(1)[0][0]
        if usual not in exact:
            kind = self.encoder.config.vision_config.model_type
            raise ValueError(
                f"cache_features: on this device, in {self.arguments.chosen_precision.name}, the encoder {kind!r} gives an image other last "
                f"bits in a batch of {usual} images than among other {at_once}, so that training from kept features would not be the same. "
                "Leave it out, or take another precision or batch size."
            )
        return exact

    def _fill(self, store: FeatureStore, images: dict, missing: list[str], at_once: int, size: int) -> None:
        """Encodes this process's share of the missing images, and writes them file by file."""
        own = missing[self.arguments.process_index :: self.arguments.world_size]
        datasets = (self.trainer.train_dataset, self.trainer.eval_dataset)
        keys, features = [], []
        loader = self._loader(_Images(datasets, [(key, images[key]) for key in own]), _Pixels(self.collator), at_once)
        for found, pixel_values in loader:
            if found:
                keys += found
                features.append(self.encode_by(at_once, pixel_values).cpu())
            if len(keys) * size >= FILE_BYTES:
                store.write(keys, torch.cat(features))
                keys, features = [], []
        if keys:
            store.write(keys, torch.cat(features))


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


class _Survey:
    """Collates examples to the keys of their records' images (None for one that cannot be read), and the number of images shown."""

    def __init__(self, collator: AlignVLMCollator):
        self.collator = collator

    def __call__(self, examples: list[dict]) -> list[tuple[list[str | None], int]]:
        return [self._of(example) for example in examples]

    def _of(self, example: dict) -> tuple[list[str | None], int]:
        keys, shown = [], 0
        for record in records_of(example):
            try:
                keys += [image_hash(image) for image in record["images"]]
            except BadImage:  # the collator will say so, in its turn
                keys += [None] * len(record["images"])
                continue
            shown += sum(len(row.images) for row in self.collator.rows(record)) if record["images"] else 0
        return keys, shown


class _Images:
    """The images of `(key, (data set, example, image))`, undecoded, each with its key."""

    def __init__(self, datasets: tuple, places: list[tuple[str, tuple[int, int, int]]]):
        self.datasets, self.places = datasets, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        key, (number, example, image) = self.places[index]
        images = [image for record in records_of(self.datasets[number][example]) for image in record["images"]]
        return key, images[image]


class _Pixels:
    """Collates images to the keys and pixel values of those that can be decoded."""

    def __init__(self, collator: AlignVLMCollator):
        self.collator = collator

    def __call__(self, images: list[tuple[str, Any]]) -> tuple[list[str], Tensor | None]:
        keys, decoded = [], []
        for key, image in images:
            try:
                decoded.append(read_image(image))
            except BadImage:  # the collator will say so, in its turn
                continue
            keys.append(key)
        return keys, self.collator.pixel_values(decoded) if keys else None
