// Asks a checkpoint that `alignvlm export --to onnx` wrote about an image, in a browser, with transformers.js.

import { resize } from "./resize.js";

const VERSION = "4.3.2"; // of transformers.js, the one this was tried with
// Or "./node_modules/", behind `npm install @huggingface/transformers@4.3.2` in this folder: then nothing comes from elsewhere.
const PACKAGES = "https://cdn.jsdelivr.net/npm/";

const local = PACKAGES.startsWith(".");
const { AutoModelForImageTextToText, AutoProcessor, RawImage, TextStreamer, env } = await import(
    `${PACKAGES}@huggingface/transformers${local ? "" : `@${VERSION}`}/dist/transformers.min.js`
);
if (local) env.backends.onnx.wasm.wasmPaths = new URL(`${PACKAGES}onnxruntime-web/dist/`, location.href).href;
env.allowLocalModels = true;
env.localModelPath = new URL(".", location.href).pathname;

/**
 * Loads an exported checkpoint.
 * @param {string} model a folder beside the page, or a repository of the Hub
 * @param {{dtype?: string, device?: string, progress_callback?: function}} options `dtype` "q8" takes the files with 8-bit weights
 */
export async function load(model, options = {}) {
    const [processor, network] = await Promise.all([
        AutoProcessor.from_pretrained(model),
        AutoModelForImageTextToText.from_pretrained(model, { dtype: "fp32", device: "wasm", ...options }),
    ]);
    return { processor, network };
}

/** A decoded image file as the checkpoint was trained with: upright, on white, and resized as in Python. */
async function pixels(file, imageProcessor) {
    const bitmap = await createImageBitmap(file);
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    const image = new RawImage(context.getImageData(0, 0, width, height).data, width, height, 4).rgb();
    if (!imageProcessor.do_resize) return image;
    const size = imageProcessor.get_resize_output_image_size(image, imageProcessor.size);
    return new RawImage(resize(image.data, width, height, 3, ...size, imageProcessor.resample), ...size, 3);
}

/**
 * The greedy answer to a question about an image.
 * @param {{processor, network}} vlm what `load` gave
 * @param {Blob} file an image file
 * @param {string} question
 * @param {{max_new_tokens?: number, onText?: function(string)}} options `onText` gets each new piece of the answer
 */
export async function answer({ processor, network }, file, question, { max_new_tokens = 40, onText } = {}) {
    const content = [{ type: "image" }, { type: "text", text: question }];
    const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const { bos_token } = processor.tokenizer;
    const add_special_tokens = !(bos_token && prompt.startsWith(bos_token));
    const inputs = await processor(await pixels(file, processor.image_processor), prompt, { add_special_tokens });
    const streamer =
        onText &&
        new TextStreamer(processor.tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function: onText });
    const tokens = await network.generate({ ...inputs, max_new_tokens, do_sample: false, streamer });
    const written = tokens.slice(null, [inputs.input_ids.dims.at(-1), null]);
    return processor.batch_decode(written, { skip_special_tokens: true })[0];
}
