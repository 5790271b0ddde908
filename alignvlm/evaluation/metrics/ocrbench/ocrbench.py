"""Answers that hold the text of an image, for the `evaluate` library, as OCRBench judges them."""

from alignvlm.evaluation import text_metric


FORMULAS = "Handwritten Mathematical Expression Recognition"


class OCRBench(text_metric.TextMetric):
    about = """
OCRBench (Liu et al., 2024, arXiv 2305.07895) as its evaluation judges: an answer is right if one of the references stands anywhere in it, both
lower-cased and with line breaks as spaces; for handwritten formulas case counts and spaces do not. Papers print the number of right answers to
its 1,000 questions. lmms-eval also takes full-width characters for their usual forms.
"""
    numbers = """
Args:
    predictions (list of str): one answer per question.
    references (list of list of str): all right answers.
    kinds (list of str): the type of each question; decides how it is compared.

Returns:
    ocrbench (float): the share of right answers; of all 1,000 questions a thousandth of the score that papers print.
    ocrbench_per_item (list of bool): for each answer, whether it is right.
"""
    citation = """
@article{liu2024ocrbench,
  title={{OCRBench}: on the hidden mystery of {OCR} in large multimodal models},
  author={Liu, Yuliang and Li, Zhang and Huang, Mingxin and Yang, Biao and Yu, Wenwen and Li, Chunyuan and Yin, Xu-Cheng and Liu, Cheng-Lin and
    Jin, Lianwen and Bai, Xiang},
  journal={Science China Information Sciences},
  year={2024}
}
"""
    sources = ("https://arxiv.org/abs/2305.07895", "https://github.com/Yuliang-Liu/MultimodalOCR")
    columns = {"predictions": text_metric.TEXT, "references": text_metric.TEXTS, "kinds": text_metric.TEXT}
    means = {"ocrbench": ("ocrbench", {})}
    per_kind = ("ocrbench",)

    def normal_form(self, reference, kind):
        return _comparable(reference, kind == FORMULAS)

    def _compute(self, predictions, references, kinds):
        right = []
        for prediction, group, kind in zip(predictions, references, kinds):
            given, *answers = (self.normal_form(text, kind) for text in (prediction, *group))
            right.append(any(answer in given for answer in answers))
        return {"ocrbench": sum(right) / len(right), "ocrbench_per_item": right}


def _comparable(text: str, is_formula: bool) -> str:
    if is_formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")
