"""Writes the model card: `model_card.md`, filled from the run record and nothing else."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hub_upload.card_text import GENERATED, PLACEHOLDER, join_card, split_card
from hub_upload.licences import HALVES, licence_name, licence_of
from hub_upload.serving import is_for_vllm
from hub_upload.shared_files import CARD_TEMPLATE, shared_folder


MINIMUM_TRANSFORMERS = "5.23"
CAPTIONING, ANSWERING = "image-to-text", "visual-question-answering"
# Each metric's number in the front matter, the name it has there, and what kind of task it judges.
HEADLINES = {
    "anls": ("anls", "ANLS", ANSWERING),
    "bleu": ("bleu_4", "BLEU-4", CAPTIONING),
    "chair": ("chair_i", "CHAIRi", CAPTIONING),
    "choice_accuracy": ("choice_accuracy", "Accuracy of multiple choice", ANSWERING),
    "cider": ("cider", "CIDEr", CAPTIONING),
    "clip_score": ("clip_score", "CLIPScore", CAPTIONING),
    "mme": ("mme_perception", "MME perception", ANSWERING),
    "ocrbench": ("ocrbench", "OCRBench", ANSWERING),
    "pathvqa_accuracy": ("accuracy", "Accuracy", ANSWERING),
    "pope": ("pope_f1", "POPE F1", ANSWERING),
    "relaxed_accuracy": ("relaxed_accuracy", "Relaxed accuracy", ANSWERING),
    "rouge_l": ("rouge_l", "ROUGE-L", CAPTIONING),
    "text": ("perplexity", "Perplexity", "text-generation"),
    "vqa_accuracy": ("vqa_accuracy", "VQA accuracy", ANSWERING),
    "wording": ("repetition", "Repeated sequences of four words", CAPTIONING),
}
PROJECTORS = {"mlp": "two-layer", "linear": "linear", "pool": "pooling"}


def template_path() -> Path:
    """The path of `model_card.md`, in the checkout or in the installed package."""
    return shared_folder() / CARD_TEMPLATE


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository id, `user/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def make_card(record: dict, config: dict, parameters: int, repository: str = PLACEHOLDER) -> str:
    """Writes the text of a model's README.md, under the license of `licence_of`; if that is not known, the card claims none.

    Args:
        record: the run record, with measurements under `results` (see `hub_upload.package.results_of`), a license given by hand under
            `licence`, and the releases that loaded the checkpoint under `loaded_with`.
        config: the checkpoint's config.json.
        parameters: number of weights.
        repository: what the examples load.
    """
    try:
        licence = licence_of(record)
    except ValueError:
        licence = {}
    backbones = record.get("backbones", {})
    vision, language = (str(backbones.get(name, "unknown")) for name in ("vision", "language"))
    data = _data(record)
    hub_backbones = [name for name in (vision, language) if is_hub_id(name)]
    results = record.get("results", [])
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        **licence,
        language="en",
        tags=["alignvlm", "vision-language-model", "custom_code"],
        base_model=hub_backbones or None,
        base_model_relation="finetune" if hub_backbones else None,
        datasets=sorted({entry["name"] for entry in data if entry["on_hub"]}) or None,
        model_name=repository.split("/")[-1],
        eval_results=_eval_results(results) or None,
    )
    stages = record["stages"]
    versions = (stages[-1] if stages else record).get("versions", {})
    text = str(
        ModelCard.from_template(
            card_data,
            template_path=str(template_path()),
            title=repository.split("/")[-1] if repository != PLACEHOLDER else "An AlignVLM model",
            repository=repository,
            size=f"{parameters / 1e6:,.1f}M" if parameters < 1e9 else f"{parameters / 1e9:.2f}B",
            vision=_named(vision),
            language=_named(language),
            projector=PROJECTORS[config.get("projector_type", "mlp")],
            mask_type=config.get("attention_mask_type", "image"),
            for_vllm=is_for_vllm(config),
            projector_from=_projector_from(record),
            transformers=MINIMUM_TRANSFORMERS,
            loaded_with=_releases(record.get("loaded_with", {})),
            made_with=_releases(versions),
            written_by=f", written by AlignVLM {versions['alignvlm']}" if versions.get("alignvlm") else "",
            licence=licence_name(licence) if licence else None,
            licence_given=bool(record.get("licence")),
            backbone_licences=[
                f"{words} {licence_name(backbones.get(f'{half}_licence'))}" for half, words in HALVES.items()
            ],
            tag=(stages[-1].get("evaluation_tag") if stages else None) or "",
            stages=[_stage(stage) for stage in stages],
            data=data,
            results=[row for result in results for row in _rows(result)],
            definitions=sorted({item for result in results for item in result["definitions"].items()}),
            image_size=_image_size(config),
            tiles=_tiles(stages, config),
        )
    )
    return join_card(*split_card(text), GENERATED)


def _releases(versions: dict[str, str]) -> str:
    """Names the releases of libraries in words."""
    names = {"transformers": "`transformers`", "torch": "`torch`", "python": "Python"}
    found = [f"{words} {versions[name]}" for name, words in names.items() if versions.get(name)]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def _image_size(config: dict) -> str:
    """Says what becomes of an image or of a tile, between "It sees pictures at" or "tiles of" and "pixels"."""
    vision = config["vision_config"]
    if most := config.get("max_num_patches"):
        side = vision.get("patch_size", 16)
        return f"no more than {most} patches of {side} x {side}"
    size = config.get("image_size") or vision.get("image_size", 224)
    height, width = size if isinstance(size, list) else (size, size)
    return f"{height} x {width}"


def _tiles(stages: list[dict], config: dict) -> str:
    """Says into how many tiles images are cut; how many an untrained model cuts is not on record."""
    if not stages:
        return "tiles" if config.get("image_block") else ""
    most = stages[-1].get("max_tiles", 1)
    return f"up to {most} tiles" if most > 1 else ""


def _projector_from(record: dict) -> str:
    """Says what a model's projector was trained as before its own stages, after "its projector is"; nothing if it is random."""
    start = record.get("projector") or {}
    stages = [str(stage) for stage in start.get("stages", [])]
    if not stages:
        return ""
    after = f"stages {', '.join(stages[:-1])} and {stages[-1]}" if len(stages) > 1 else f"stage {stages[0]}"
    converted = ", followed by a linear map to the embeddings of this language model" if start.get("converted") else ""
    return f"that of {_named(start['from'])} after {after}{converted}"


def _named(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`"


def _stage(stage: dict) -> dict:
    def loss(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rates = ", ".join(f"{name} ({rate:g})" for name, rate in stage["learning_rates"].items())
    shares = stage.get("attention_mask_type_shares", {})
    masks = [f"`{name}` ({_percent(share)})" for name, share in shares.items()]
    return {
        **stage,
        "trained": "; ".join([rates, *_how(stage)]),
        "masks": ", ".join(masks) or f"`{stage['attention_mask_type']}`",
        "sources": ", ".join(_source(source) for source in stage["sources"]),
        "records": "a stream" if stage.get("records") is None else f"{stage['records']:,}",
        "steps": f"{stage['steps']:,}" + (f" of {stage['of_steps']:,}" if stage.get("unfinished") else ""),
        "before": loss(stage.get("eval_loss_before")),
        "after": loss(stage.get("eval_loss_after")),
    }


def _how(stage: dict) -> list[str]:
    """Says by what else than its learning rates a stage made its weights."""
    found = []
    if method := stage.get("method"):
        rewards = stage.get("rewards", []) if method == "grpo" else []  # under DPO they only judge answers
        by = f" with reward{'s' if len(rewards) > 1 else ''} {', '.join(rewards)}" if rewards else ""
        found.append(f"{method.upper()}{by}")
    if lora := stage.get("lora"):
        found.append(f"LoRA of rank {lora.get('r') or lora['rank']}")  # older records say `rank`
    if len(averaged := stage.get("averaged", [])) > 1:
        found.append(f"mean of the last {len(averaged)} checkpoints")
    if share := stage.get("keep_language", {}).get("share"):
        found.append(f"keeps {_percent(share)} of the untouched language model")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _source(source: dict) -> str:
    """Names a source of a recipe: without a name, by its data set, or by its file without the folders it lies in."""
    data = str(source.get("data"))
    return source.get("name") or (data if is_hub_id(data) else Path(data).name)


def _data(record: dict) -> list[dict]:
    """Lists the data of all stages, each once."""
    found = {}
    for stage in record["stages"]:
        for entry in stage.get("data", []):
            name = data = entry.get("data") or f"{entry['name']} (drawn by the package)"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", entry["name"]) and entry["name"].endswith(f"/{data}"):
                name = entry["name"]  # a file, with its folder as the recipe names it
            found[name, entry.get("revision")] = {
                "name": name,
                "on_hub": is_hub_id(data),
                "revision": entry.get("revision") or "-",
                "licence": entry.get("licence") or ("Apache-2.0" if "generated" in entry else "not stated"),
            }
    return list(found.values())


def _where(result: dict) -> str:
    data = result.get("data", {})
    return " ".join(str(data[name]) for name in ("data", "split") if data.get(name)) or result["task"]


def _name(result: dict) -> str:
    return result.get("name") or result["task"]


def _rows(result: dict) -> list[dict]:
    rows = []
    for metric, numbers in result["metrics"].items():
        for name, value in numbers.items():
            if value is None or isinstance(value, dict):  # `intervals`, `by_prompt`
                continue
            interval = numbers.get("intervals", {}).get(name)
            rows.append(
                {
                    "task": _name(result),
                    "data": _where(result),
                    "metric": f"`{metric}`: {name}",
                    "value": f"{value:,}" if isinstance(value, int) else f"{value:.4f}",
                    "interval": f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                }
            )
    return rows


def _eval_results(results: list[dict]) -> list[EvalResult]:
    found = []
    for result in results:
        for metric, numbers in result["metrics"].items():
            name, title, task_type = HEADLINES.get(metric, (metric, metric, "image-text-to-text"))
            if numbers.get(name) is None:
                continue
            data = result.get("data", {})
            read = str(data.get("data") or result["task"])
            title_of_data = result.get("name") or read
            found.append(
                EvalResult(
                    task_type=task_type,
                    # Results of one type and split become one entry, and files of several data sets may have one name.
                    dataset_type=read if is_hub_id(read) else title_of_data,
                    dataset_name=title_of_data,
                    dataset_split=data.get("split"),
                    dataset_revision=data.get("revision"),
                    metric_type=metric,
                    metric_name=title,
                    metric_value=round(numbers[name], 4),
                )
            )
    return found
