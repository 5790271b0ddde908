"""The page in demo/browser, in headless Chromium: its answers are those of the checkpoint in Python, its resized images Pillow's. What
it cannot do it says in a sentence.

Needs `chromium` and, in the folder that ALIGNVLM_NODE_MODULES names, what `npm install @huggingface/transformers` made.
"""

import functools
import io
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from alignvlm.export.export import export
from alignvlm.export.onnx import llava_processor, write_javascript_files
from alignvlm.stages.checkpoint import save_checkpoint
from benchmarks.llama_cpp import our_text
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import VISION, skip_or_fail
from tests.stages.shipped_templates import SHIPPED
from tests.stages.test_chat_templates import extended_processor, shipped_tokenizer


PAGE = Path(__file__).resolve().parents[2] / "demo/browser"
CONTEXT = 256  # of the language model
QUESTIONS = ["What is it?", "Describe the image.", "How many shapes are there, and what are their colours?"]
# Does what a person does with the page, and tells the answers.
PERSON = """<iframe src="index.html" id="frame"></iframe>
<script type="module">
const tell = (found) => fetch("/found", { method: "POST", body: JSON.stringify(found) });
const frame = document.getElementById("frame");
await new Promise((resolve) => (frame.onload = resolve));
const part = (id) => frame.contentDocument.getElementById(id);
const until = async (holds) => {
    while (!holds()) await new Promise((resolve) => setTimeout(resolve, 20));
};
const { names, questions } = await (await fetch("asked.json")).json();
const found = [];
for (const name of names) {
    const chosen = new DataTransfer();
    chosen.items.add(new File([await (await fetch(name)).blob()], name));
    part("file").files = chosen.files;
    part("file").dispatchEvent(new Event("change"));
    for (const question of questions) {
        await until(() => !part("ask").disabled || part("status").textContent.includes("did not load"));
        if (part("ask").disabled) await tell(part("status").textContent);
        part("question").value = question;
        part("ask").click();
        await until(() => !part("ask").disabled);
        found.push(part("status").textContent.endsWith(" s") ? part("answer").textContent : part("status").textContent);
    }
}
await tell(found);
</script>"""


@pytest.fixture(scope="module")
def node_modules(node_package) -> Path:
    return node_package("@huggingface/transformers").parents[1]


def images() -> dict[str, bytes]:
    """Files to ask about: of other sizes, turned by a tag, with a colour profile, transparent, and as large as the input."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")  # red is green
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (100_000).to_bytes(4))
    clear = Image.merge("RGBA", [*smooth.split(), smooth.getchannel(0)])
    made = {
        "photo.jpg": (smooth, {"quality": 95}),
        "turned.jpg": (smooth, {"quality": 95, "exif": turned}),
        "small.png": (smooth.resize((16, 16)), {}),
        "profile.png": (smooth, {"icc_profile": swapped}),
        "gamma.png": (smooth, {"pnginfo": gamma}),
        "clear.png": (clear.point(lambda value: 255 * (value > 127)), {}),
    }
    files = {}
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, name.split(".")[1].replace("jpg", "jpeg"), **options)
        files[name] = buffer.getvalue()
    return files


def in_chromium(chromium: str, folder: Path) -> list[str]:
    """What the page in a folder tells."""
    found, told = [], threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self):
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            told.set()

        def log_message(self, *values):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/asks.html"
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'user'}",
        address,
    ]
    browser = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        assert told.wait(120), "the page told nothing in two minutes"
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
    return found[0]


@pytest.fixture(scope="module")
def site(make_model, processor, tmp_path_factory, node_modules) -> Path:
    """The folder that the commands of docs/export.md make, run twice; beside its parent lie the checkpoint and the export."""
    root = tmp_path_factory.mktemp("site")
    model = make_model(
        vision={**VISION, "num_hidden_layers": 1}, text={"num_hidden_layers": 1, "max_position_embeddings": CONTEXT}
    )
    with torch.no_grad():
        for parameter in model.model.projector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_checkpoint(model, processor, root / "stage4", {"backbones": {}, "stages": []})
    export(str(root / "stage4"), root / "out/onnx", "onnx")
    (root / "demo").mkdir()
    shutil.copytree(PAGE, root / "demo/browser")
    docs = (PAGE.parents[1] / "docs/export.md").read_text().split("\n### In a browser\n")[1]
    commands = re.findall(r"^(?:rm|mkdir|cp) .*", docs.partition("\n### ")[0], flags=re.MULTILINE)
    for _ in range(2):
        subprocess.run(" && ".join(commands), shell=True, cwd=root, check=True)
    site = root / "out/page"
    script = (site / "vlm.js").read_text()
    packages = '"https://cdn.jsdelivr.net/npm/"'
    assert script.count(packages) == 1
    (site / "vlm.js").write_text(script.replace(packages, '"./node_modules/"'))
    (site / "node_modules").symlink_to(node_modules)
    for name, content in images().items():
        (site / name).write_bytes(content)
    return site


@torch.no_grad()
def text_of_checkpoint(site: Path, image: str, question: str) -> str:
    model = AlignVLMForConditionalGeneration.from_pretrained(site.parents[1] / "stage4").eval()
    processor = AlignVLMProcessor.from_pretrained(site.parents[1] / "stage4")
    content = [{"type": "image", "image": Image.open(site / image)}, {"type": "text", "text": question}]
    return our_text(model, processor, [{"role": "user", "content": content}], 40).strip()


def test_the_commands_of_the_docs_can_be_run_again(site):
    def files(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    assert files(site / "model") == files(site.parent / "onnx") and not (site / "browser").exists()


@pytest.mark.slow
def test_the_page_answers_as_the_checkpoint_does(site, chromium):
    (site / "asked.json").write_text(json.dumps({"names": list(images()), "questions": QUESTIONS}))
    (site / "asks.html").write_text(PERSON)
    expected = [text_of_checkpoint(site, name, question) for name in images() for question in QUESTIONS]
    assert in_chromium(chromium, site) == expected
    assert len(set(expected)) > len(QUESTIONS)  # images change the answers


@pytest.fixture
def visit(browser, site):
    """A function that opens the page with what stands behind its address, and returns the tab when the model is loaded or refused. The tab
    reaches this machine alone, and a Hub with the repository `user/my-vlm`; it must ask for nothing else, and raise nothing."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, context, wrong = f"http://127.0.0.1:{server.server_port}/", browser.new_context(), []

        def elsewhere(route):
            repository = "https://huggingface.co/user/my-vlm/resolve/main/"
            file = site / "model" / route.request.url.removeprefix(repository)
            if not route.request.url.startswith("https://huggingface.co/user/"):
                wrong.append(route.request.url)
            route.fulfill(path=file) if file.is_file() else route.fulfill(status=404)

        def opened(query: str):
            tab = context.new_page()
            tab.route(lambda url: not url.startswith((address, "blob:")), elsewhere)
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.goto(address + query)
            tab.wait_for_function("!document.getElementById('status').textContent.startsWith('Loading')")
            return tab

        yield opened
        context.close()
        server.shutdown()
    assert not wrong


@pytest.mark.slow
def test_the_page_names_what_is_not_there(visit, site):
    (site / "stage4").symlink_to(site.parents[1] / "stage4")
    for query, sentence in {
        "?model=nothere": 'nothere/config.json is not there. Name a folder of "alignvlm export CHECKPOINT FOLDER --to onnx"',
        "?model=stage4": "stage4/preprocessor_config.json is not there",
        "?dtype=q8": "model/onnx/vision_encoder_quantized.onnx is not there. Name a folder",
        "?model=stage4&dtype=8bit": 'dtype "8bit" is unknown. Known: fp32, q8',
        "?model=user/other": "user/other is no folder beside the page, and the Hub did not give it",
    }.items():
        found = visit(query).text_content("#status")
        assert found.startswith(f"The model did not load: {sentence}") and ("--int8" in found) == ("q8" in query[:9])
    assert visit("?model=user/my-vlm").text_content("#status") == "Choose an image."


@pytest.mark.slow
def test_the_page_keeps_answer_and_image_together(visit, site):
    tab = visit("")

    def asked(question: str) -> tuple[str, str]:
        tab.fill("#question", question)
        tab.click("#ask")
        tab.wait_for_function("!document.getElementById('ask').disabled")
        return tab.text_content("#answer"), tab.text_content("#status")

    tab.set_input_files("#file", site / "photo.jpg")
    text = text_of_checkpoint(site, "photo.jpg", QUESTIONS[0])
    assert asked(QUESTIONS[0])[0] == text != ""
    tab.set_input_files("#file", site / "small.png")
    assert [tab.text_content(part) for part in ("#answer", "#status")] == ["", ""]
    tab.set_input_files("#file", [])  # a dialog that was cancelled
    assert tab.is_disabled("#ask") and tab.is_hidden("#image") and tab.text_content("#status") == "Choose an image."
    tab.set_input_files("#file", site / "photo.jpg")
    for question, sentence in (
        ("What is <image> it?", "<image> stands for an image. Leave it out"),
        ("a " * CONTEXT, "The question is too long: "),
        (QUESTIONS[0], ""),
    ):
        answer, status = asked(question)
        assert status.startswith(sentence) and answer == (text if not sentence else "")
    tab.fill("#question", " ")
    tab.click("#ask")
    assert tab.text_content("#answer") == text  # an empty question is not asked
    tab.fill("#question", QUESTIONS[0])
    changes = """() => {
        const [file, ask] = ["file", "ask"].map((id) => document.getElementById(id));
        ask.click();
        file.dispatchEvent(new Event("change"));
        return [file.disabled, ask.disabled];
    }"""
    assert tab.evaluate(changes) == [True, True]  # while it answers
    tab.wait_for_function("!document.getElementById('ask').disabled")
    assert tab.text_content("#answer") == text


@pytest.mark.slow
def test_without_internet_the_page_says_where_packages_may_lie(visit, site):
    script = (site / "vlm.js").read_text()
    (site / "vlm.js").write_text(script.replace('"./node_modules/"', '"./nowhere/"'))
    try:
        assert "from node_modules: see PACKAGES in vlm.js" in visit("").text_content("#status")
    finally:
        (site / "vlm.js").write_text(script)


@pytest.mark.slow
def test_the_code_of_the_card_runs_beside_the_folder(site, tmp_path, node_modules):
    if shutil.which("node") is None:
        skip_or_fail("ALIGNVLM_NODE_MODULES", "there is no node")
    (code,) = re.findall(r"```js\n(.*?)```", (site.parent / "onnx/README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "ask.mjs").write_text(code)
    (tmp_path / "photo.jpg").write_bytes((site / "small.png").read_bytes())
    (tmp_path / "onnx").symlink_to(site.parent / "onnx")
    (tmp_path / "node_modules").symlink_to(node_modules)
    command = ["node", "--preserve-symlinks-main", "ask.mjs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == text_of_checkpoint(site, "small.png", "What is it?")


TEMPLATES = """
import { AutoProcessor, env, RawImage } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const image = new RawImage(new Uint8Array(16 * 16 * 3), 16, 16, 3);
const content = [{ type: "image" }, { type: "text", text: "What is it?" }];
const found = {};
for (const name of process.argv.slice(3)) {
    const processor = await AutoProcessor.from_pretrained(name);
    const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const { bos_token } = processor.tokenizer;
    const add_special_tokens = !(bos_token && prompt.startsWith(bos_token));
    const inputs = await processor(image, prompt, { add_special_tokens });
    found[name] = Array.from(inputs.input_ids.data, Number);
}
console.log(JSON.stringify(found));
"""


@pytest.mark.slow
def test_language_models_own_templates_write_the_same_tokens_in_javascript(
    make_model, processor, tmp_path, node_modules
):
    """Zephyr's is not among them: the export refuses it."""
    if shutil.which("node") is None:
        skip_or_fail("ALIGNVLM_NODE_MODULES", "there is no node")
    config, expected = make_model().config, {}
    image_processor = processor.image_processor
    content = [{"type": "image", "image": Image.new("RGB", (16, 16))}, {"type": "text", "text": "What is it?"}]
    for name in set(SHIPPED) - {"zephyr"}:
        ours = extended_processor(shipped_tokenizer(name))
        ours.image_processor = image_processor
        theirs = llava_processor(ours, config)
        theirs.save_pretrained(tmp_path / name)
        write_javascript_files(theirs, config, tmp_path / name, {})
        messages = [{"role": "user", "content": content}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        expected[name] = ours.apply_chat_template(messages, **options)["input_ids"][0]
    (tmp_path / "templates.mjs").write_text(TEMPLATES)
    (tmp_path / "node_modules").symlink_to(node_modules)
    command = ["node", "--preserve-symlinks-main", str(tmp_path / "templates.mjs"), f"{tmp_path}/", *expected]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == expected
