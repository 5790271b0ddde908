"""The report in headless Chromium: it opens without errors, fits a phone and a desk, can be used with mouse and keyboard, and axe-core
finds no serious fault.

Needs Playwright for Python and `chromium`; for axe also, in the folder that ALIGNVLM_NODE_MODULES names, what `npm install axe-core` made.
"""

import json
import shutil
from pathlib import Path

import pytest

from alignvlm.tools.report.report import write_report
from tests.tools.conftest import evaluate
from tests.tools.test_report import hostile, rewrite


SIZES = {"phone": {"width": 390, "height": 844}, "desk": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def axe(node_package) -> str:
    return (node_package("axe-core") / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def pages(trained_run, tmp_path_factory) -> dict[str, Path]:
    """The report of a run, of one whose texts try to run, and of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    data = str(trained_run / "scenes")
    spoiled = shutil.copytree(trained_run, folder / "spoiled")

    def spoil(result):
        for prediction in result["predictions"]:
            prediction |= {key: hostile(prediction[key]) for key in ("prompt", "prediction", "references")}

    for path in spoiled.glob("stage*/results/*.json"):
        rewrite(path, spoil)
    first = shutil.copytree(trained_run / "stage1", folder / "stage1")
    evaluate(first, trained_run / "scenes")
    return {
        "run": write_report(trained_run, output=folder / "run.html"),
        "hostile": write_report(spoiled, output=folder / "hostile.html"),
        "two": write_report(first, trained_run / "stage2", output=folder / "two.html", data=data),
    }


def each(locator, name: str) -> list:
    """An attribute of each element."""
    return locator.evaluate_all("(elements, name) => elements.map((element) => element.getAttribute(name))", name)


@pytest.fixture
def opened(browser, pages):
    """A function that opens a page; that its console tells no error is checked in the end."""
    contexts, messages = [], []

    def open_page(name: str, size: str = "desk", scheme: str = "light"):
        contexts.append(browser.new_context(viewport=SIZES[size], color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []


SHOWN = [("run", size, scheme) for size in SIZES for scheme in ("light", "dark")]
SHOWN += [("hostile", "phone", "light"), ("two", "phone", "dark"), ("two", "desk", "light")]


@pytest.mark.slow
@pytest.mark.parametrize("name, size, scheme", SHOWN)
def test_it_fits_and_is_accessible(opened, axe, name, size, scheme):
    page = opened(name, size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    assert page.evaluate("window.harmed") is None
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    serious = [
        (fault["id"], [node["html"] for node in fault["nodes"]][:3])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]
    assert serious == [], json.dumps(serious, indent=2)


def test_answers_can_be_filtered_and_sorted(opened):
    page = opened("run")
    cards, form = page.locator("#answers article"), page.locator("#answers form")
    shown = page.locator("#answers article:visible")
    total = cards.count()
    assert shown.count() == 12 < total
    form.get_by_role("button", name=f"Show all {total}").click()
    assert shown.count() == total

    form.get_by_label("Kind").select_option("colour")
    assert set(each(shown, "data-kind")) == {"colour"}
    form.get_by_label("Which").select_option("worst")
    assert all("worst" in groups.split() for groups in each(shown, "data-groups"))
    count = shown.count()
    assert form.locator("output").inner_text() == f"Showing {count} of {count} answers" and 0 < count < total

    form.get_by_label("Kind").select_option("")
    form.get_by_label("Which").select_option("")
    for order, sign in (("down", -1), ("up", 1)):
        form.get_by_label("Order").select_option(order)
        scores = [sign * float(score) for score in each(shown, "data-score")]
        assert scores == sorted(scores)
    form.get_by_label("Containing").fill("How many")
    assert shown.count() and all("How many" in text for text in shown.all_inner_texts())
    form.get_by_label("Containing").fill("nothing holds this")
    assert shown.count() == 0


def pixels(canvas) -> list[int]:
    return canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")


@pytest.mark.parametrize("size", SIZES)
def test_words_of_heat_maps_can_be_chosen(opened, size):
    page = opened("run", size)
    article = max(page.locator(".heat").all(), key=lambda one: one.locator(".words button").count())
    words, canvas, said = (
        article.locator(".words button"),
        article.locator("canvas").first,
        article.locator("[aria-live]"),
    )
    assert words.count() > 1 and (canvas.get_attribute("width"), canvas.get_attribute("height")) == ("2", "2")
    drawn, shares = set(), article.get_attribute("data-shares").split(";")
    for index, word in enumerate(words.all()):
        word.click()
        assert each(words, "aria-pressed") == ["true" if other == index else "false" for other in range(words.count())]
        assert f"{shares[0].split()[index]}% of its attention was on the image" in said.inner_text()
        drawn.add(tuple(pixels(canvas)))
    assert len(drawn) > 1
    article.get_by_label("Layer").select_option(label="layer 2 of 2")
    assert f"{shares[3].split()[words.count() - 1]}%" in said.inner_text() and tuple(pixels(canvas)) not in drawn
    # The brightest cell is that of the largest value: the first of 255.
    values = article.evaluate("a => [...atob(a.dataset.values)].map((c) => c.charCodeAt(0))")
    last = values[(3 * words.count() + words.count() - 1) * 4 :][:4]
    assert pixels(canvas)[4 * last.index(255)] == pytest.approx(255, abs=2)


def test_the_keyboard_is_enough(opened):
    page = opened("run")
    first = page.locator(".heat .words button").first
    first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") in ("true", None)
    first.focus()
    page.keyboard.press("Space")
    assert first.get_attribute("aria-pressed") == "true"
    page.get_by_role("radio", name="image").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("radio", name="causal").is_checked()


def test_a_mask_says_who_sees_whom(opened):
    page = opened("run")
    tokens, said = page.locator(".tokens button"), page.locator(".who [aria-live]")
    figures = page.locator(".mask figure")
    rows = [row.split() for row in each(figures, "data-rows")]
    for type_index, radio in enumerate(page.locator(".mask input").all()):
        radio.check()
        assert [hidden is None for hidden in each(figures, "hidden")].index(True) == type_index
        for token in (0, 3, tokens.count() - 1):
            tokens.nth(token).click()
            unseen = ["unseen" in names.split() for names in each(tokens, "class")]
            assert unseen == [seen == "0" for seen in rows[type_index][token]]
    assert f"all {page.locator('.tokens .image').count()} tokens of the image" in said.inner_text()


@pytest.mark.parametrize("scheme, other", [("light", "dark"), ("dark", "light")])
def test_light_and_dark_can_be_switched(opened, scheme, other):
    page = opened("run", scheme=scheme)
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.get_by_role("button", name=f"Use {other} colours").click()
    after = page.evaluate(colour)
    assert before != after == opened("run", scheme=other).evaluate(colour)
    page.get_by_role("button", name=f"Use {scheme} colours").click()
    assert page.evaluate(colour) == before


def test_two_runs_can_be_filtered_by_what_changed(opened):
    page = opened("two")
    shown = page.locator("article:visible")
    for change in sorted(set(each(page.locator("article"), "data-groups"))):
        page.get_by_label("Which").select_option(change)
        assert set(each(shown, "data-groups")) == {change}
