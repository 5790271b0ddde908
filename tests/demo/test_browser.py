"""The page in demo/browser, in headless Chromium: its answers are those of the checkpoint in Python, its resized images Pillow's.

Needs `chromium` and, in the folder that ALIGNVLM_NODE_MODULES names, what `npm install @huggingface/transformers` made.
"""

import functools
import io
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm.export.export import export
from alignvlm.export.onnx import llava_processor, write_javascript_files
from alignvlm.stages.checkpoint import save_checkpoint
from modeling_alignvlm import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.conftest import VISION, skip_or_fail
from tests.stages.shipped_templates import SHIPPED
from tests.stages.test_chat_templates import extended_processor, shipped_tokenizer


PAGE = Path(__file__).resolve().parents[2] / "demo/browser"
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
    """Files to ask about: of other sizes, turned by a tag, transparent, and as large as the input."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = Image.merge("RGBA", [*smooth.split(), smooth.getchannel(0)])
    made = {
        "photo.jpg": (smooth, {"quality": 95}),
        "turned.jpg": (smooth, {"quality": 95, "exif": turned}),
        "small.png": (smooth.resize((16, 16)), {}),
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


@pytest.mark.slow
@torch.no_grad()
def test_the_page_answers_as_the_checkpoint_does(make_model, processor, tmp_path, node_modules, chromium):
    model = make_model(vision={**VISION, "num_hidden_layers": 1}, text={"num_hidden_layers": 1})
    for parameter in model.model.projector.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    save_checkpoint(model, processor, tmp_path / "stage4", {"backbones": {}, "stages": []})
    site = tmp_path / "site"
    shutil.copytree(PAGE, site)
    script = (site / "vlm.js").read_text()
    packages = '"https://cdn.jsdelivr.net/npm/"'
    assert script.count(packages) == 1
    (site / "vlm.js").write_text(script.replace(packages, '"./node_modules/"'))
    (site / "node_modules").symlink_to(node_modules)
    export(str(tmp_path / "stage4"), site / "model", "onnx")
    for name, content in images().items():
        (site / name).write_bytes(content)
    asked = {"names": list(images()), "questions": QUESTIONS}
    (site / "asked.json").write_text(json.dumps(asked))
    (site / "asks.html").write_text(PERSON)

    model = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "stage4").eval()
    processor, expected = AlignVLMProcessor.from_pretrained(tmp_path / "stage4"), []
    for name in images():
        for question in QUESTIONS:
            content = [{"type": "image", "image": Image.open(site / name)}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.decode(tokens, skip_special_tokens=True))
    assert in_chromium(chromium, site) == expected
    assert len(set(expected)) > len(QUESTIONS)  # images change the answers


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
