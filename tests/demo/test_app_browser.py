"""The demo in headless Chromium, driven by Playwright: what a first-time visitor does, on a phone and on a desktop.

Needs `gradio`, `playwright`, Debian's `chromium` (on the path, or as ALIGNVLM_CHROMIUM names it), and for the accessibility test, in the
folder that ALIGNVLM_NODE_MODULES names, what `npm install axe-core` made.
"""

import argparse
import importlib.util
import time

import pytest

from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.tools import demo as page
from tests.conftest import skip_or_fail
from tests.demo.test_app import expected, model, photo, png  # noqa: F401 - `model` is a fixture


WAIT = 120_000  # milliseconds
# Gradio's own, inside its upload button and its messages.
NOT_OURS = ("nested-interactive",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):  # noqa: F811
    if importlib.util.find_spec("gradio") is None:
        skip_or_fail("ALIGNVLM_CHROMIUM", "Gradio is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("app")))
        options = page.launch_options(argparse.Namespace(host="127.0.0.1", port=None, share="off"))
        app = page.build(page.Demo([model], page.example_images(None)), "Talk with tiny")
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **options)
        yield url
        app.close()


@pytest.fixture(params=[(390, "dark"), (1280, "light")], ids=["phone", "desk"])
def visit(request, browser, url):
    """The page as a visitor of that width and taste sees it, loaded; fails if the browser's console had an error."""
    width, colours = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours)
    context.grant_permissions(["camera", "clipboard-read", "clipboard-write"], origin=url)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    errors = []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector("#question textarea, #question input")
    yield tab
    assert errors == []
    context.close()


MESSAGES = "#chat0 [data-testid=user], #chat0 [data-testid=bot]"
# The words are those of the last message; without control characters, which a page may not show.
ANSWERED = """(count) => {
    const bare = (nodes) => [...nodes].map((node) => node.innerText).join("").replace(/[\\s\\x00-\\x1f\\x7f-\\x9f]/g, "");
    const messages = document.querySelectorAll("MESSAGES"), words = document.querySelectorAll("#words0 label");
    return messages.length >= count && words.length > 0 && bare(words) === bare([...messages].slice(-1));
}""".replace("MESSAGES", MESSAGES)


def answers(tab, count: int) -> list[str]:
    """The texts of the conversation, when the words of its last answer, not of the one before, can be chosen."""
    tab.wait_for_function(ANSWERED, arg=count)
    return [each.inner_text().strip() for each in tab.query_selector_all(MESSAGES)]


def test_a_visitor_adds_an_image_asks_twice_and_sees_where_the_model_looked(visit, model, tmp_path):  # noqa: F811
    assert visit.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "it scrolls sideways"
    (tmp_path / "notes.txt").write_text("hello")
    visit.set_input_files("#uploads input[type=file]", tmp_path / "notes.txt")
    visit.wait_for_function("document.getElementById('notice').textContent.includes('notes.txt is not an image')")

    (tmp_path / "photo.png").write_bytes(png(photo(1)))
    visit.set_input_files("#uploads input[type=file]", tmp_path / "photo.png")
    caption = expected(model, [photo(1)], f"VQA: {CAPTION_PROMPT}", max_new_tokens=128)
    found = answers(visit, 2)
    assert found[0] == CAPTION_PROMPT and found[1].split() == caption.split()
    assert visit.inner_text("#notice") == ""

    visit.fill("#question textarea, #question input", "Why?")
    visit.click("#ask")
    reply = expected(model, [photo(1)], f"VQA: {CAPTION_PROMPT}", caption, "Why?", max_new_tokens=128)
    assert answers(visit, 4)[3].split() == reply.replace("\0", "").split()  # which no page shows

    visit.click("#words0 label >> nth=0")
    visit.wait_for_selector("#looked0 img")
    assert visit.get_attribute("#looked0 img", "alt").startswith("Heat map of the image for the word")


@pytest.mark.parametrize("visit", [(1280, "light")], indirect=True, ids=["desk"])
def test_what_a_visitor_does_while_an_answer_ends_is_kept(visit, monkeypatch):
    ask = page.Demo.ask

    def slow(*given):
        for results in ask(*given):
            yield results
            time.sleep(0.05)
        time.sleep(1)  # after its last results

    visit.click("#examples button >> nth=0")
    answers(visit, 2)
    monkeypatch.setattr(page.Demo, "ask", slow)
    visit.fill("#question textarea, #question input", "Why?")
    visit.click("#ask")
    visit.wait_for_function(f"document.querySelectorAll(`{MESSAGES}`).length > 3")
    visit.fill("#question textarea, #question input", "And why that?")
    answers(visit, 4)
    visit.click("#words0 label >> nth=0")
    visit.wait_for_selector("#looked0 img")
    visit.wait_for_timeout(1500)
    assert visit.is_visible("#looked0 img") and visit.is_checked("#words0 label >> nth=0")
    assert visit.input_value("#question textarea, #question input") == "And why that?"


def test_an_example_begins_a_conversation_each_time_and_a_cleared_one_is_over(visit):
    visit.click("#examples button >> nth=1")
    begun = answers(visit, 2)
    assert begun[0] == CAPTION_PROMPT
    visit.fill("#question textarea, #question input", "Why?")
    visit.click("#ask")
    assert len(answers(visit, 4)) == 4
    visit.click("#examples button >> nth=1")
    visit.wait_for_function(f"document.querySelectorAll(`{MESSAGES}`).length < 3")
    assert answers(visit, 2) == begun
    visit.click("#words0 label >> nth=0")
    visit.wait_for_selector("#looked0 img")

    visit.click("#chat0 button[aria-label=Clear]")
    visit.wait_for_function("document.querySelectorAll('#words0 label, #looked0 img').length === 0")
    visit.fill("#question textarea, #question input", "Why?")
    visit.click("#ask")
    visit.wait_for_selector("text=Add an image first")
    assert visit.input_value("#question textarea, #question input") == "Why?"  # kept


COPY_AN_IMAGE = """async () => {
    const canvas = document.createElement("canvas");
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
}"""


WAYS = ("Upload file", "Capture from camera", "Paste from clipboard")
SEEN = """(name) => {
    const button = document.querySelector(`#uploads button[aria-label='${name}']`).getBoundingClientRect();
    return button.width > 20 && button.bottom <= document.getElementById("uploads").getBoundingClientRect().bottom;
}"""


def test_all_ways_to_add_an_image_are_seen(visit):
    assert {name: visit.evaluate(SEEN, name) for name in WAYS} == dict.fromkeys(WAYS, True)


def test_an_image_is_pasted_from_the_clipboard(visit):
    visit.evaluate(COPY_AN_IMAGE)
    visit.click("#uploads button[aria-label='Paste from clipboard']")
    assert answers(visit, 2)[0] == CAPTION_PROMPT


def test_the_camera_takes_an_image(visit):
    visit.click("#uploads button[aria-label='Capture from camera']")
    visit.click("#uploads [title='grant webcam access'] button")
    visit.wait_for_selector("#uploads video:not(.hide)")
    visit.wait_for_function("document.querySelector('#uploads video').videoWidth > 0")  # it shows a picture
    visit.click("#uploads button[aria-label='capture photo']")
    assert answers(visit, 2)[0] == CAPTION_PROMPT
    assert visit.is_visible("#uploads button[aria-label='Capture from camera']")  # the next image
    assert not visit.is_visible("#uploads button[aria-label*=video]")


@pytest.mark.parametrize("visit", [(w, c) for w in (390, 1280) for c in ("light", "dark")], indirect=True, ids=str)
def test_axe_finds_no_serious_fault_of_ours(visit, node_package):
    script = (node_package("axe-core") / "axe.min.js").read_text()

    def check():
        visit.evaluate(script)
        found = visit.evaluate("axe.run()")["violations"]
        serious = [
            (each["id"], [node["html"][:200] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical") and each["id"] not in NOT_OURS
        ]
        assert serious == []

    check()
    visit.click("#examples button >> nth=0")
    answers(visit, 2)
    visit.click("button:has-text('Settings')")
    visit.wait_for_selector("text=Beams (beam search)")
    check()
