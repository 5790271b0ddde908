"""The licence of weights: read from their backbones, the strictest one named, and asked for where it is not known."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from alignvlm.quickstart.nano import _write_card
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.stages.stage import main as run_stage
from hub_upload.card import make_card
from hub_upload.checks import check
from hub_upload.licences import ORDER, OWN_TERMS, given_licence, licence_of, read_licence, strictest
from hub_upload.package import package
from hub_upload.push import PushError, push
from tests.running import arguments_for


QWEN = {"license": "other", "license_name": "qwen-research", "license_link": "https://huggingface.co/Qwen/LICENSE"}


def licence(name: str) -> dict[str, str]:
    return {"license": name}


def record_of(vision: dict | None, language: dict | None, **fields) -> dict:
    names = {"vision": "google/vit", "language": "Qwen/lm"}
    return {"backbones": {**names, "vision_licence": vision, "language_licence": language}, "stages": [], **fields}


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("mit", "apache-2.0", "apache-2.0"),
        ("apache-2.0", "lgpl-3.0", "lgpl-3.0"),
        ("mpl-2.0", "cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("agpl-3.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("apache-2.0", "gemma", "gemma"),
        ("gpl-3.0", "llama3.2", "llama3.2"),
        ("gemma", "gemma", "gemma"),
        ("gemma", "llama3.2", None),  # nobody can say which is the stricter one
        ("gemma", "cc-by-nc-4.0", None),
        ("mit", None, None),
        (None, None, None),
    ],
)
def test_the_strictest_of_two_licences(first, second, expected):
    for pair in ((first, second), (second, first)):
        found = strictest([name and licence(name) for name in pair])
        assert found == (expected and licence(expected))


def test_the_order_names_each_licence_once():
    assert len(set(ORDER)) == len(ORDER) and "other" not in ORDER


@pytest.mark.parametrize(
    "text, expected",
    [
        ("---\nlicense: Apache-2.0\n---\nText", licence("apache-2.0")),
        ("---\nlicense: [mit, cc-by-nc-4.0]\n---\n", licence("cc-by-nc-4.0")),
        ("---\nlicense: unknown\n---\n", None),
        ("---\ntags: [x]\n---\nlicense: mit", None),
        ("No metadata. MIT License", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: other\nlicense_name: n\nlicense_link: https://a/b\n---\n", {**licence("other"), "license_name": "n", "license_link": "https://a/b"}),
        ("---\nlicense: other\nlicense_name: n\nlicense_link: LICENSE\n---\n", {**licence("other"), "license_name": "n"}),
    ],
)  # fmt: skip
def test_the_licence_of_a_local_folder(tmp_path, text, expected):
    assert read_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(text)
    assert read_licence(str(tmp_path)) == expected


def test_the_licences_of_the_backbones_go_from_their_folders_to_the_card(make_model, tokenizer, processor, tmp_path):
    model = make_model()
    vision, language = tmp_path / "vision", tmp_path / "language"
    model.model.vision_tower.save_pretrained(vision)
    processor.image_processor.save_pretrained(vision)
    _write_card(vision, "image-feature-extraction", "As the quickstart writes it.")
    from transformers import Qwen2ForCausalLM, set_seed

    model.config.text_config.initializer_range = 0.02  # attention that is not saturated: assembly tries who sees whom
    set_seed(1)
    Qwen2ForCausalLM(model.config.text_config).save_pretrained(language)
    tokenizer.save_pretrained(language)
    front = yaml.safe_dump({**QWEN, "tags": ["x"]})
    (language / "README.md").write_text(f"---\n{front}---\nA language model.")
    assemble(BackboneArguments(vision=str(vision), language=str(language), output_dir=str(tmp_path / "stage0")))
    backbones = json.loads((tmp_path / "stage0/alignvlm_run.json").read_text())["backbones"]
    assert backbones["vision_licence"] == licence("apache-2.0") and backbones["language_licence"] == QWEN
    for card in (tmp_path / "stage0/README.md", package(tmp_path / "stage0", tmp_path / "out") / "README.md"):
        found = yaml.safe_load(card.read_text().split("---")[1])
        assert {name: found.get(name) for name in QWEN} == QWEN
        assert "vision encoder `apache-2.0`, language model [qwen-research](https://huggingface.co" in card.read_text()
    assert check(tmp_path / "out", load=False) == []


@pytest.mark.parametrize(
    "record, message",
    [
        ({"stages": []}, "No licence is on record of the vision encoder 'unknown' and the language model 'unknown'"),
        (record_of(licence("mit"), None), r"No licence is on record of the language model 'Qwen/lm'. .*--license"),
        (record_of(licence("gemma"), licence("llama3")), "`gemma` and `llama3`, each have terms of their own"),
        (record_of(licence("mit"), {"license": "other", "license_name": "n"}), "without license_link.*--license_name"),
    ],
    ids=["old record", "unknown", "incomparable", "other"],
)
def test_a_licence_that_is_not_known_is_asked_for_and_not_claimed(checkpoint, tmp_path, record, message):
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    (mine / "alignvlm_run.json").write_text(json.dumps(record))
    config = json.loads((mine / "config.json").read_text())
    card = make_card(record, config, 10)
    (mine / "README.md").write_text(card)
    assert "license" not in yaml.safe_load(card.split("---")[1]) and "licence of the weights is not known" in card
    for ask in (lambda: licence_of(record), lambda: package(mine, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(PushError, match=message):
        push(mine, "user/unknown")  # before the Hub is asked anything
    text = (package(mine, tmp_path / "out", license="cc-by-4.0") / "README.md").read_text()
    assert "license: cc-by-4.0" in text and "as given by whoever packaged them" in text
    assert json.loads((tmp_path / "out/alignvlm_run.json").read_text())["licence"] == licence("cc-by-4.0")


def test_a_licence_that_is_given_wins_and_is_whole(checkpoint, tmp_path):
    assert "license: mit" in (package(checkpoint, tmp_path / "out", license="mit") / "README.md").read_text()
    with pytest.raises(ValueError, match="--license_name and --license_link"):
        package(checkpoint, tmp_path / "out", license="other", license_name="n")
    with pytest.raises(ValueError, match="belong to a license"):
        given_licence(None, "n")
    package(checkpoint, tmp_path / "out", **QWEN)
    assert check(tmp_path / "out", load=False) == []


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("foo", "--license other"),
        ("Apache-2.0", "apache-2.0"),
        ("apache 2", "apache-2.0"),
        ("llama-3.2", "llama3.2"),
        ("unknown", "--license other"),
        ("", None),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_refused(checkpoint, tmp_path, name, nearest):
    if nearest is None:
        assert given_licence(name) is None
        return
    message = rf"license '{name}' is not on the Hub's list.*{nearest}"
    for refused in (lambda: package(checkpoint, tmp_path / "out", license=name), lambda: given_licence(name)):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(PushError, match=message):
        push(checkpoint, "user/unknown", license=name)
    # In a card edited by hand, too.
    out = package(checkpoint, tmp_path / "out")
    (out / "README.md").write_text((out / "README.md").read_text().replace("license: apache-2.0", f"license: {name}"))
    assert any(
        f"README.md: license '{name}' is not on the Hub's list" in problem for problem in check(out, load=False)
    )


def test_each_licence_of_the_order_may_be_given():
    for name in (*ORDER, *OWN_TERMS):
        assert given_licence(name, *(("n", "https://a/b") if name == "other" else ()))["license"] == name
    assert not set(ORDER) & set(OWN_TERMS) and "unknown" not in OWN_TERMS


def test_a_stage_that_pushes_asks_for_the_licence_before_it_trains(checkpoint, tmp_path):
    mine = Path(shutil.copytree(checkpoint, tmp_path / "mine"))
    (mine / "alignvlm_run.json").write_text(json.dumps({"stages": []}))
    fields = {"projector_learning_rate": 1e-3, "push_to": "user/x"}
    with pytest.raises(ValueError, match=r"No licence is on record.*push_license"):
        run_stage(arguments_for(mine, tmp_path / "out", **fields))
    with pytest.raises(ValueError, match=r"license 'aache-2.0' is not on the Hub's list .*apache-2.0"):
        run_stage(arguments_for(mine, tmp_path / "out", **fields, push_license="aache-2.0"))
