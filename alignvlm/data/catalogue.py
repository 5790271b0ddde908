"""The data sets that have a name: one table for training and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset

from alignvlm.data import formats, scenes, signs
from alignvlm.data.formats import CAPTION_COLUMNS, DETAILED_PROMPT, IMAGE_COLUMNS
from alignvlm.data.record import Conversation, Record


CIDER, ACCURACY, PEOPLE, CHOICE = "cider", "pathvqa_accuracy", "vqa_accuracy", "choice_accuracy"
BY_KIND = "by kind"


@dataclass(frozen=True)
class DataSet:
    """A data set: where it is, how its rows are read, and what judges answers to it.

    Args:
        read: a function of `formats` that makes a record of a row; a recipe may set its keyword arguments.
        columns: the columns that the rows must have; of a tuple of names, any one.
        data: the data set on the Hub; None: the recipe must name `data`.
        config: of a Hub data set.
        file: the file to read, if the Hub's repository holds files rather than a data set of rows.
        group_by: the column whose equal values make one record; `image`: equal images.
        images: for images in a config of their own: the part of the config's name to replace, its replacement, and the two columns that match.
        image_folder: whether it is a folder of images rather than of tables.
        generate: draws the records; such a data set has no rows to read.
        metric: a folder of `alignvlm/evaluation/metrics`; `by kind`: `cider` for captions, else `pathvqa_accuracy`; None: this package has
            no metric that judges it as the field does.
        split: the split that is asked if an evaluation names none.
        asked: arguments and options of `read` that an evaluation sets.
        licence: as its page states it. The images often have terms of their own.
        note: what a user must know.
    """

    read: Callable[..., Record | None] | None = None
    columns: tuple[str | tuple[str, ...], ...] = ()
    data: str | None = None
    config: str | None = None
    file: str | None = None
    group_by: str | None = None
    images: tuple[str, str, str, str] | None = None
    image_folder: bool = False
    generate: Callable[..., Dataset] | None = None
    metric: str | None = BY_KIND
    split: str = "test"
    asked: dict = field(default_factory=dict)
    licence: str = "unknown"
    note: str = ""

    def metric_of(self, conversation: Conversation) -> str | None:
        """Returns the metric that judges answers to a conversation."""
        if self.metric != BY_KIND:
            return self.metric
        return CIDER if "caption" in conversation.kind else ACCURACY


CATALOGUE: dict[str, DataSet] = {
    "llava_pretrain": DataSet(
        formats.llava,
        ("image", "conversations"),
        data="liuhaotian/LLaVA-Pretrain",
        file="blip_laion_cc_sbu_558k.json",
        metric=CIDER,
        licence="other: those of CC-3M and of BLIP",
        note="558k short BLIP captions. Download the repository, unpack images.zip, and name the folder as `image_dir`.",
    ),
    "sharegpt4v": DataSet(
        partial(formats.llava, prompt=DETAILED_PROMPT),
        ("image", "conversations"),
        data="Lin-Chen/ShareGPT4V",
        file="share-captioner_coco_lcs_sam_1246k_1107.json",
        metric=CIDER,
        licence="CC BY-NC 4.0",
        note="1.2M detailed captions by Share-Captioner; images of COCO, LLaVA-Pretrain and SAM below `image_dir`.",
    ),
    "llava_instruct": DataSet(
        formats.llava,
        ("image", "conversations"),
        data="liuhaotian/LLaVA-Instruct-150K",
        file="llava_v1_5_mix665k.json",
        metric=None,
        licence="CC BY 4.0, and OpenAI's terms",
        note="665k conversations of one to many turns; images of five data sets below `image_dir`.",
    ),
    "llava_onevision": DataSet(
        formats.llava,
        ("conversations",),
        data="lmms-lab/LLaVA-OneVision-Data",
        metric=None,
        licence="by subset",
        note="Some ninety subsets of one form; `config` names one, as `sharegpt4v(coco)`.",
    ),
    "cauldron": DataSet(
        formats.texts,
        ("images", "texts"),
        data="HuggingFaceM4/the_cauldron",
        metric=None,
        licence="by subset; prompts CC BY 4.0",
        note="Fifty data sets of one form; `config` names one, as vqav2 or ai2d. `turns: independent` where turns do not build on each "
        "other.",
    ),
    "finevision": DataSet(
        formats.texts,
        ("images", "texts"),
        data="HuggingFaceM4/FineVision",
        metric=None,
        licence="by subset",
        note="185 subsets; `config` names one. `min_relevance: 3` and the like leave out turns that are rated lower.",
    ),
    "coco_captions": DataSet(
        formats.captions,
        ("filename", "sentences"),
        data="yerevann/coco-karpathy",
        metric=CIDER,
        licence="CC BY 4.0",
        note="Captions only; COCO's images below `image_dir`. Karpathy's training split is usually `train+restval`.",
    ),
    "flickr30k_captions": DataSet(
        formats.captions,
        (IMAGE_COLUMNS, CAPTION_COLUMNS),
        data="AnyModal/flickr30k",
        metric=CIDER,
        licence="non-commercial research",
    ),
    "nocaps": DataSet(
        formats.captions,
        ("image", "annotations_captions"),
        data="lmms-lab/NoCaps",
        metric=CIDER,
        split="validation",
        licence="unknown: its page states none; another copy, HuggingFaceM4/NoCaps, CC BY 2.0",
        note="Ten captions each; those of its test split are not public.",
    ),
    "textcaps": DataSet(
        formats.captions,
        ("image", "caption_str"),
        data="lmms-lab/TextCaps",
        metric=CIDER,
        split="val",
        licence="CC BY 4.0",
    ),
    "vqav2": DataSet(
        formats.question,
        (IMAGE_COLUMNS, "question", ("multiple_choice_answer", "answers")),
        data="lmms-lab/VQAv2",
        group_by="image",
        metric=PEOPLE,
        split="validation",
        asked={"all_answers": True},
        licence="CC BY 4.0",
        note="Its labelled split on the Hub is `validation`; the training split is the_cauldron's `vqav2`.",
    ),
    "gqa": DataSet(
        formats.question,
        ("imageId", "question", "answer"),
        data="lmms-lab/GQA",
        config="train_balanced_instructions",
        images=("instructions", "images", "imageId", "id"),
        group_by="imageId",
        metric=ACCURACY,
        split="testdev",
        asked={"config": "testdev_balanced_instructions"},
        licence="MIT",
        note="Images stand in a config of their own, which is read with it; `config: testdev_balanced_instructions` for its test.",
    ),
    "okvqa": DataSet(
        formats.question,
        (IMAGE_COLUMNS, "question", "answers"),
        data="lmms-lab/OK-VQA",
        group_by="image",
        metric=PEOPLE,
        split="val2014",
        asked={"all_answers": True},
        note="The Hub has the split `val2014` only.",
        licence="unknown: its page states none",
    ),
    "textvqa": DataSet(
        formats.question,
        (IMAGE_COLUMNS, "question", "answers"),
        data="lmms-lab/textvqa",
        group_by="image",
        metric=PEOPLE,
        split="validation",
        asked={"all_answers": True},
        licence="CC BY 4.0",
    ),
    "vizwiz": DataSet(
        formats.question,
        (IMAGE_COLUMNS, "question", "answers"),
        data="lmms-lab/VizWiz-VQA",
        group_by="image",
        metric=PEOPLE,
        split="val",
        asked={"all_answers": True},
        licence="CC BY 4.0",
        note="The Hub's labelled split is `val`.",
    ),
    "pathvqa": DataSet(
        formats.question,
        (IMAGE_COLUMNS, "question", "answer"),
        data="flaviagiammarino/path-vqa",
        group_by="image",
        metric=ACCURACY,
        licence="MIT",
        note="19,654 training questions about 2,599 images, without exact duplicates.",
    ),
    "vqa_rad": DataSet(
        formats.question,
        (IMAGE_COLUMNS, "question", "answer"),
        data="flaviagiammarino/vqa-rad",
        group_by="image",
        metric=ACCURACY,
        licence="CC0 1.0",
        note="Its split is by question: images of the test questions are in the training split too.",
    ),
    "slake": DataSet(
        partial(formats.question, language="en"),
        ("img_name", "question", "answer", "q_lang"),
        data="BoKelvin/SLAKE",
        group_by="image",
        metric=ACCURACY,
        licence="CC BY 4.0",
        note="Download the repository and unpack imgs.zip; `image_dir` is its folder `imgs`. `language: zh` for the Chinese half.",
    ),
    "scienceqa": DataSet(
        partial(formats.multiple_choice, kind_column="subject"),
        ("image", "question", "choices", "answer", "hint"),
        data="lmms-lab/ScienceQA",
        config="ScienceQA-IMG",
        metric=CHOICE,
        licence="CC BY-NC-SA 4.0",
        note="The questions with an image; `config: ScienceQA-FULL` for all.",
    ),
    "ai2d": DataSet(
        formats.multiple_choice,
        ("image", "question", "options", "answer"),
        data="lmms-lab/ai2d",
        group_by="image",
        metric=CHOICE,
        licence="unknown: its page states none",
        note="Its test split only.",
    ),
    "mmstar": DataSet(
        partial(formats.multiple_choice, kind_column="category"),
        ("image", "question", "answer", "category"),
        data="Lin-Chen/MMStar",
        group_by="image",
        metric=CHOICE,
        split="val",
        licence="unknown: its page states none",
        note="Choices stand in the question, so likelihoods are those of the letters A to D.",
    ),
    "pope": DataSet(
        partial(formats.question, kind_column="category"),
        ("image", "question", "answer", "category"),
        data="lmms-lab/POPE",
        group_by="image",
        metric="pope",
        asked={"keep_duplicates": True},
        licence="MIT",
        note="9,000 questions about 500 photos of COCO; their `category` says how absent objects were chosen. Random, popular and adversarial "
        "share questions, which are asked once for each.",
    ),
    "mme": DataSet(
        partial(formats.question, kind_column="category"),
        ("image", "question", "answer", "category", "question_id"),
        data="lmms-lab/MME",
        group_by="question_id",
        metric="mme",
        licence="academic research only; no copy or change without Xiamen University's leave",
        note="Two questions about each image.",
    ),
    "chartqa": DataSet(
        formats.question,
        ("image", "question", "answer", "type"),
        data="lmms-lab/ChartQA",
        group_by="image",
        metric="relaxed_accuracy",
        licence="GPL-3.0",
        note="Its test split only; the training split is the_cauldron's `chartqa`.",
    ),
    "docvqa": DataSet(
        formats.question,
        ("image", "question", "answers"),
        data="lmms-lab/DocVQA",
        config="DocVQA",
        group_by="image",
        metric="anls",
        split="validation",
        asked={"all_answers": True},
        licence="Apache-2.0",
        note="Answers of its test split are not public; the training split is the_cauldron's `docvqa`.",
    ),
    "ocrbench": DataSet(
        partial(formats.question, kind_column="question_type", all_answers=True),
        ("image", "question", "answer", "question_type"),
        data="echo840/OCRBench",
        group_by="image",
        metric="ocrbench",
        licence="unknown: its page states none",
        note="1,000 questions, its test split only.",
    ),
    "rlaif_v": DataSet(
        formats.preference,
        ("images", "prompt", "chosen", "rejected"),
        data="HuggingFaceH4/rlaif-v_formatted",
        metric=None,
        licence="CC BY-NC 4.0",
        note="83k pairs of answers, the better one with fewer hallucinations, for DPO in stage 5.",
    ),
    "text": DataSet(
        formats.text_only,
        data="HuggingFaceTB/smol-smoltalk",
        metric=None,
        licence="Apache-2.0",
        note="Whole conversations, also any other instructions or plain text. Images are left aside.",
    ),
    "local": DataSet(
        formats.record_of,
        group_by="image",
        note="Any schema of alignvlm/data/formats.py: files of jsonl, json, csv, parquet or tar, or a data set on the Hub.",
    ),
    "imagefolder": DataSet(
        formats.label,
        ("image",),
        image_folder=True,
        note="A folder of images with a metadata file, or one folder per label.",
    ),
    "webdataset": DataSet(
        formats.webdataset,
        note="Tar files of images with a .txt or .json beside each.",
    ),
    "scenes": DataSet(generate=scenes.make_scenes, licence="Apache-2.0", note="Drawn when they are read."),
    "scene_signs": DataSet(generate=signs.make_signs, licence="Apache-2.0", note="Small signs to read, for tiles."),
    "scene_texts": DataSet(generate=scenes.make_texts, metric=None, licence="Apache-2.0", note="Text about scenes."),
}
