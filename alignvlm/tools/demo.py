"""A page in the browser to try a checkpoint: drop an image, read its caption, ask about it, see where the model looked.

    alignvlm demo out/stage4                                # http://127.0.0.1:7860
    alignvlm demo out/stage4 --compare out/stage3 --port 8080

A Gradio app (`pip install 'alignvlm[demo]'`). What a visitor says stays in their session; the model answers one visitor at a time, and
nothing but uploaded images is opened: no path and no address that a visitor names.
"""

import argparse
import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alignvlm.data.formats import CAPTION_PROMPT
from alignvlm.data.images import MAX_PIXELS, read_image, read_sent_image
from alignvlm.data.scenes import draw, random_scene
from alignvlm.evaluation.load import add_loading_options, device_for, evaluation_tag, load_checkpoint
from alignvlm.tools.demo_model import Decoding, DemoModel, Talk, heat_map
from hub_upload.command_line import ArgumentParser, check_address, port
from modeling_alignvlm import MASK_TYPES


MAX_IMAGES = 8
MAX_FILE_MB = 20
MAX_CHARACTERS = 2000  # of a question
MAX_TURNS = 50
MAX_WAITING = 16  # visitors
MAX_NEW_TOKENS = 512
MAX_BEAMS = 8
EXAMPLES = 3
KEEP_SECONDS = 3600  # sessions and uploaded files
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LAYERS = {"all layers (average)": "mean", "all layers (rollout)": "rollout"}
INTRODUCTION = """# {title}
**1.** Add an image: {say} what it shows. &nbsp; **2.** Ask about it. &nbsp; **3.** Choose a word of an answer to see where \
the model looked.
<div id="notice" role="alert"></div>"""
CSS = """
.gradio-container { max-width: min(1240px, 100vw) !important; margin: auto; overflow-x: clip; }
@media (max-width: 500px) { .gradio-container .app { padding: 8px !important; } }
#notice { color: #b91c1c; font-weight: 600; }
.dark #notice { color: #fca5a5; }
/* Below an image are the ways to add one, which Gradio would push out of the box. */
#uploads { display: flex; flex-direction: column; }
#uploads .upload-wrapper, #uploads > .wrap:not([data-testid]) { flex: 1; height: auto; min-height: 0; }
#uploads .source-selection { flex: none; }
#uploads .source-selection button { width: 44px; color: var(--body-text-color); }
#uploads .source-selection button.selected { color: var(--color-accent); }
#uploads button[aria-label*="video"] { display: none; }
#uploads .or { color: inherit; }
#uploads .gallery-item:only-child .thumbnail-item { aspect-ratio: auto; height: 260px; }
#examples .grid-wrap { height: auto !important; min-height: 0; max-height: 300px; overflow-y: auto; }
#examples .caption-label { display: none; }
.words label { padding: 3px 10px !important; }
.words input { position: absolute; opacity: 0; }
.words label span { margin: 0 !important; }
.words label.selected { background: var(--color-accent-soft) !important; border-color: var(--color-accent) !important; }
.words label:focus-within { outline: 2px solid var(--color-accent); }
footer { display: none !important; }
"""
# Refuses other files with a sentence before they are sent, and names what Gradio leaves without a name, for screen readers.
HEAD = """<meta name="description" content="Try a vision-language model: add an image and ask about it.">
<script>
const refuse = (event, files) => {
    const notice = document.getElementById("notice");
    if (!notice || !files || !event.target.closest("#uploads")) return;
    const strange = [...files].find((file) => !file.type.startsWith("image/"));
    const large = [...files].find((file) => file.size > MOST * 1048576);
    notice.textContent = strange
        ? `${strange.name} is not an image. Add a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file.`
        : large ? `${large.name} has more than MOST MB. Make it smaller.` : "";
    if (strange || large) {
        event.preventDefault();
        event.stopImmediatePropagation();
        if (event.type === "change") event.target.value = "";
    }
};
document.addEventListener("change", (event) => refuse(event, event.target.files), true);
document.addEventListener("drop", (event) => refuse(event, event.dataTransfer?.files), true);
const named = () => {
    document.documentElement.lang ||= "en";
    for (const log of document.querySelectorAll("[role=log]:not([tabindex])")) log.tabIndex = 0;
    for (const button of document.querySelectorAll("#uploads .source-selection button:not([title])")) button.title = button.ariaLabel;
    for (const button of document.querySelectorAll("#uploads [aria-label='common.webcam']")) button.title = button.ariaLabel = "Capture from camera";
    for (const box of document.querySelectorAll("#uploads .upload-container[aria-label]:not(.icon-mode)")) box.removeAttribute("aria-label");
    for (const input of document.querySelectorAll("#uploads input[type=file]:not([accept='image/*'])")) input.accept = "image/*";
    for (const image of document.querySelectorAll("#uploads img:not([alt]), #uploads img[alt='']")) image.alt = "Your image";
};
new MutationObserver(named).observe(document, { childList: true, subtree: true });
</script>""".replace("MOST", str(MAX_FILE_MB))


def parser() -> argparse.ArgumentParser:
    p = ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s CHECKPOINT [options]")
    p.add_argument("checkpoint", help="A checkpoint's folder or Hub repository.")
    p.add_argument("--compare", metavar="OTHER", help="A second checkpoint, which answers beside the first.")
    p.add_argument("--host", help="Address to listen on. Default: 127.0.0.1, this machine only; 0.0.0.0: everybody.")
    p.add_argument("--port", type=port, help="Default: the first free one from 7860.")
    p.add_argument("--share", choices=("on", "off"), default="off", help="A public link through Gradio. Default: off.")
    p.add_argument("--examples", metavar="FOLDER", help="Images to offer as examples. Default: drawn scenes.")
    add_loading_options(p)
    return p


def read_uploads(paths: Sequence[str]) -> tuple[Image.Image, ...]:
    """Decodes the files that a visitor uploaded.

    Raises:
        ValueError: naming a file that is no image, damaged, too large or deleted, and for too many files or pixels.
    """
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"There are {len(paths)} images; the demo takes {MAX_IMAGES} at a time. Remove some.")
    images, pixels = [], 0
    for path in map(Path, paths):
        name = re.sub(r"[^\w. -]", "", path.name)[:60]
        if not path.is_file():
            raise ValueError(f"{name} is no longer here: uploads are deleted after an hour. Add it again.")
        if path.stat().st_size > MAX_FILE_MB << 20:
            raise ValueError(f"{name} has more than {MAX_FILE_MB} MB. Make it smaller.")
        try:
            image = read_sent_image(path.read_bytes())
        except ValueError as error:
            reason = str(error).rpartition(": ")[2].replace("an image without a path", "it")
            raise ValueError(f"{name} cannot be read: {reason}") from error
        pixels += image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"The images have more than {MAX_PIXELS:,} pixels together. Make them smaller.")
        images.append(image)
    return tuple(images)


def example_images(folder: str | None) -> list[tuple[Image.Image, str]]:
    """Images to try first, with their names: those of a folder, or drawn scenes that no training has seen.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder holds no image, or one that cannot be read.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"No such folder: {folder!r} (looked for in {Path.cwd()}), which --examples names.")
    if folder is None:
        rng = np.random.default_rng(7)
        scenes = [random_scene(rng, "test") for _ in range(EXAMPLES)]
        return [(draw(scene, rng, 256), f"Drawn scene {index}") for index, scene in enumerate(scenes, 1)]
    files = sorted(file for file in Path(folder).glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)[:MAX_IMAGES]
    if not files:
        raise ValueError(f"The folder {folder!r} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return [(read_image(file), file.stem) for file in files]


class Demo:
    """The page: what its events do. Each visitor has a `Talk` and the attention of the last answer per model.

    Args:
        models: one, or two that answer the same questions side by side.
        examples: images with their names.
    """

    def __init__(self, models: list[DemoModel], examples: list[tuple[Image.Image, str]]):
        self.models, self.examples = models, examples

    def begin(self, paths: list[str], *settings) -> Iterator[list[tuple[Talk, object]]]:
        """A new conversation about the given files: yields per model its talk with the caption so far; see `ask`."""
        yield from self.ask(CAPTION_PROMPT, [Talk(tuple(paths))] * len(self.models), *settings)

    def ask(self, text: str, talks: list[Talk], *settings) -> Iterator[list[tuple[Talk, object]]]:
        """Yields per model its talk with the answer so far, and after the last word the attention of the answer (None before).

        Args:
            settings: mask type (one of the model's own for "the checkpoint's own"), way of decoding, temperature, beams, tokens.

        Raises:
            ValueError: for what is out of the demo's limits, and for what `DemoModel.stream` refuses.
        """
        if not text.strip():
            raise ValueError("Type a question first.")
        if not all(talk.files for talk in talks):
            raise ValueError("Add an image first, or choose an example.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"The question has {len(text):,} characters; the demo takes {MAX_CHARACTERS:,}. Shorten it."
            )
        if any(len(talk.messages) > 2 * MAX_TURNS for talk in talks):
            raise ValueError("The conversation is too long. Add the image again to start anew.")
        mask_type, how, temperature, beams, tokens = settings
        temperature, beams, tokens = float(temperature), int(beams), int(tokens)
        if not (0 < temperature <= 2 and 2 <= beams <= MAX_BEAMS and 1 <= tokens <= MAX_NEW_TOKENS):
            raise ValueError("A setting is out of its range.")
        images = read_uploads(talks[0].files)  # of all talks
        results = [(talk, None) for talk in talks]
        for index, model in enumerate(self.models):
            asked = model.asked(talks[index], text.strip())
            chosen = mask_type if mask_type in MASK_TYPES else model.mask_type
            answer = ""
            for answer in model.stream(asked, images, Decoding(chosen, how, temperature, beams, tokens)):
                results[index] = (asked.with_answer(answer), None)
                yield results.copy()
            try:
                looked = model.look(asked, images, answer, chosen)
            except ValueError:  # a language model without attention weights
                looked = None
            results[index] = (asked.with_answer(answer), looked)
            yield results.copy()

    def shown(self, talk: Talk, model: DemoModel) -> list[dict]:
        """A conversation as the page shows it: without the tag that the recipe puts before questions."""

        def text(message: dict) -> str:
            written = message["content"][-1]["text"]
            return written.removeprefix(model.tag).strip() if message["role"] == "user" else written or "(no answer)"

        return [{"role": message["role"], "content": text(message)} for message in talk.messages]


def build(demo: Demo, title: str = "AlignVLM"):
    """Makes the Gradio app of a `Demo`, with a queue."""
    import gradio as gr

    models, several = demo.models, len(demo.models) > 1
    private = {"api_visibility": "private"}
    own = "the checkpoint's own"
    kept = [name for name in MASK_TYPES if all(name in model.mask_types for model in models)]
    layers = min(model.model.config.text_config.num_hidden_layers for model in models)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, KEEP_SECONDS)) as app:
        gr.Markdown(INTRODUCTION.format(title=title, say="both models say" if several else "the model says"))
        panels = []
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                uploads = gr.Gallery(
                    label="Image",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    columns=2,
                    height=300,
                    object_fit="contain",
                    interactive=True,
                    elem_id="uploads",
                )
                gr.Markdown("A new image starts a new conversation. Or begin with one of these:")
                examples = gr.Gallery(
                    value=[(image, name) for image, name in demo.examples],
                    label="Examples",
                    show_label=False,
                    columns=EXAMPLES,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                with gr.Accordion("Settings", open=False):
                    mask = gr.Radio(
                        [(f"{own} ({', '.join(dict.fromkeys(model.mask_type for model in models))})", own)]
                        + [(f"{name}: {MASK_TYPES[name].explanation}".replace("`", ""), name) for name in kept],
                        value=own,
                        label="Attention mask",
                        info="Which later tokens a token may see. A model is at its best under the mask that it was trained with.",
                    )
                    how = gr.Radio(
                        list(Decoding.WAYS),
                        value="greedy",
                        label="Decoding",
                        info="Greedy takes the likeliest word each time; beam search shows its answer all at once.",
                    )
                    temperature = gr.Slider(0.1, 2, 0.7, step=0.1, label="Temperature (sampling)")
                    beams = gr.Slider(2, MAX_BEAMS, 4, step=1, label="Beams (beam search)")
                    tokens = gr.Slider(1, MAX_NEW_TOKENS, 128, step=1, label="Longest answer, in tokens")
            with gr.Column(scale=5 if several else 3, min_width=300):
                with gr.Row():
                    chats = [
                        gr.Chatbot(
                            label=f"{model.name} ({model.precision.split(' (')[0]}, {model.model.device.type})",
                            height=340,
                            placeholder="Add an image, or choose an example.",
                            render_markdown=False,
                            buttons=[],
                            feedback_options=None,
                            min_width=280,
                            elem_id=f"chat{index}",
                        )
                        for index, model in enumerate(models)
                    ]
                with gr.Row(equal_height=True):
                    question = gr.Textbox(
                        label="Your question",
                        placeholder="What colour is it?",
                        max_length=MAX_CHARACTERS,
                        scale=5,
                        min_width=200,
                        elem_id="question",
                    )
                    button = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                layer = gr.Dropdown(
                    [*LAYERS, *(f"layer {number}" for number in range(1, layers + 1))],
                    value=next(iter(LAYERS)),
                    label="Where did it look?",
                    info="Choose a word below. Bright places were read most when the word was written; this does not say why it was.",
                    visible=False,
                    elem_id="layer",
                )
                with gr.Row():
                    for index, (chat, model) in enumerate(zip(chats, models)):
                        with gr.Column(min_width=280):
                            words = gr.Radio(
                                [],
                                label=f"Words of {model.name}'s last answer"
                                if several
                                else "Words of the last answer",
                                visible=False,
                                elem_classes="words",
                                elem_id=f"words{index}",
                            )
                            looked = gr.Image(
                                label="Heat map",
                                visible=False,
                                interactive=False,
                                buttons=["fullscreen"],
                                format="png",
                                elem_id=f"looked{index}",
                            )
                            panels.append((chat, words, looked))
        works = {**private, "concurrency_id": "model", "concurrency_limit": 1}
        works |= {"show_progress": "minimal", "show_progress_on": chats}
        state = gr.State([(Talk(), None)] * len(models), time_to_live=KEEP_SECONDS)
        settings = [mask, how, temperature, beams, tokens]
        outputs = [state, layer, *(part for panel in panels for part in panel)]

        def page(results: list[tuple]) -> list:
            """The updates of `outputs` while an answer is written: its words cannot be chosen yet."""
            updates = [results, gr.update(visible=False)]
            for (talk, _), model in zip(results, models):
                updates += [
                    demo.shown(talk, model),
                    gr.update(choices=[], value=None, visible=False),
                    gr.update(value=None, visible=False),
                ]
            return updates

        # A step of its own: when a generator ends, Gradio sends its last updates once more, and these would put away
        # the heat map of a word that a visitor has chosen meanwhile.
        def on_answered(results):
            updates = [gr.update(visible=any(looked is not None for _, looked in results))]
            for _, looked in results:
                choices = [] if looked is None else [(word.text, place) for place, word in enumerate(looked.words)]
                updates.append(gr.update(choices=choices, visible=bool(choices)))
            return updates

        def on_images(files, before, *given):
            paths = [path for path, _ in files or []]
            if paths == before:  # Gradio tells of an upload twice
                yield [gr.skip()] * (len(outputs) + 1)
                return
            yield [paths, *page([(Talk(), None)] * len(models))]
            try:
                for results in demo.begin(paths, *given) if paths else ():
                    yield [paths, *page(results)]
            except ValueError as error:
                raise gr.Error(
                    html.escape(str(error), quote=False), duration=None, title="Sorry", print_exception=False
                ) from error

        def on_question(text, results, *given):
            try:
                emptied = ""  # once: meanwhile the visitor may write the next question
                for answered in demo.ask(text, [talk for talk, _ in results], *given):
                    yield [emptied, *page(answered)]
                    emptied = gr.skip()
            except ValueError as error:  # a warning, since an error would cover the conversation with the word "Error"
                gr.Warning(html.escape(str(error), quote=False), duration=None, title="Sorry")
                yield [gr.skip()] * (len(outputs) + 1)

        def on_word(place, chosen_layer, results, index):
            talk, looked = results[index]
            if place is None or looked is None:
                return gr.update(visible=False)
            name = LAYERS.get(chosen_layer)
            values = looked.of_word(place, int(chosen_layer.split()[-1]) - 1 if name is None else name)
            word = looked.words[place].text
            try:
                images = read_uploads(talk.files)
            except ValueError as error:
                raise gr.Error(
                    html.escape(str(error), quote=False), duration=None, title="Sorry", print_exception=False
                ) from error
            return gr.update(
                value=heat_map(list(images), values, looked.grids),
                visible=True,
                label=f"Read for “{word}”",
                alt_text=f"Heat map of the image for the word {word}",
            )

        def on_example(event: gr.SelectData):
            return [demo.examples[event.index][0]], []  # of no files before: the same example begins anew

        files = gr.State([], time_to_live=KEEP_SECONDS)
        showing = {"fn": on_images, "inputs": [uploads, files, *settings], "outputs": [files, *outputs], **works}
        # Gradio tells of no change where the app itself sets the images first.
        answered = {
            "fn": on_answered,
            "inputs": state,
            "outputs": [layer, *(words for _, words, _ in panels)],
            **private,
        }
        for shown in (
            uploads.change(**showing),
            examples.select(on_example, None, [uploads, files], **private).then(**showing),
        ):
            shown.success(**answered)
            shown.failure(lambda: (None, []), None, [uploads, files], **private)
        for chat in chats:
            chat.clear(lambda: None, None, uploads, **private).then(**showing)
        asking = {"fn": on_question, "inputs": [question, state, *settings], "outputs": [question, *outputs]}
        gr.on([question.submit, button.click], **asking, **works).success(**answered)
        for index, (_, words, looked) in enumerate(panels):
            gr.on(
                [words.input, layer.input],
                lambda place, chosen, results, index=index: on_word(place, chosen, results, index),
                [words, layer, state],
                looked,
                concurrency_id="heat map",  # one visitor's images are decoded at a time, as for answers
                concurrency_limit=1,
                **private,
            )
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=4, api_open=False)


class NoAddresses:
    """ASGI middleware: refuses paths of Gradio that fetch an address for the visitor, and its tools for developers."""

    REFUSED = re.compile(
        r"/(proxy=|component_server|vibe|undo-vibe|run-history|monitoring|dev/|process_recording)|file=\w+:"
    )

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and self.REFUSED.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"This demo does not fetch addresses."})
        return await self.app(scope, receive, send)


def launch_options(arguments: argparse.Namespace) -> dict:
    """What `launch` takes: nothing of this machine is served but the app itself."""
    import gradio as gr
    from starlette.middleware import Middleware

    return {
        "server_name": arguments.host,
        "server_port": arguments.port,
        "share": arguments.share == "on",
        "allowed_paths": [],
        "max_file_size": f"{MAX_FILE_MB}mb",
        "show_error": False,
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "footer_links": [],
        "state_session_capacity": 64,  # visitors; who came first is forgotten first
        "app_kwargs": {"middleware": [Middleware(NoAddresses)]},
        # No fonts of other servers, and texts with enough contrast.
        "theme": gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ).set(
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            body_text_color_subdued="*neutral_500",
            checkbox_border_color="*neutral_500",
            checkbox_border_color_dark="*neutral_400",
            block_info_text_color="*body_text_color",
            block_info_text_color_dark="*body_text_color",
            input_placeholder_color="*neutral_500",
            input_placeholder_color_dark="*neutral_400",
        ),
        "css": CSS,
        "head": HEAD,
    }


def load_model(checkpoint: str, arguments: argparse.Namespace) -> DemoModel:
    """Loads a checkpoint for the demo; see `load_checkpoint`."""
    model, processor, precision = load_checkpoint(
        checkpoint,
        device_for(arguments.use_cpu),
        arguments.revision,
        arguments.trust_remote_code,
        arguments.dtype,
        arguments.attn_implementation,
    )
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    return DemoModel(name, model, processor, str(precision), evaluation_tag(checkpoint, arguments.revision))


def main(argv: list[str] | None = None) -> None:
    """Loads the checkpoints and serves the page until it is interrupted."""
    arguments = parser().parse_args(argv)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SystemExit("error: the demo needs Gradio: pip install 'alignvlm[demo]'") from error
    try:
        check_address(arguments.host or "127.0.0.1", arguments.port or 0)
        names = [arguments.checkpoint, *([arguments.compare] if arguments.compare else [])]
        models = [load_model(name, arguments) for name in names]
        if several_of_one_name(models):
            for model, name in zip(models, names):
                model.name = name
        app = build(
            Demo(models, example_images(arguments.examples)),
            "Talk with " + " and ".join(model.name for model in models),
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    app.launch(**launch_options(arguments))


def several_of_one_name(models: list[DemoModel]) -> bool:
    """Whether visitors could not tell two models apart."""
    return len({model.name for model in models}) < len(models)


if __name__ == "__main__":
    main()
