// Asks a checkpoint that `alignvlm export --to onnx` wrote about an image, in a browser, with transformers.js.

import { resize } from "./resize.js";

const VERSION = "4.3.2"; // of transformers.js, the one this was tried with
// Or "./node_modules/", behind `npm install @huggingface/transformers@4.3.2` in this folder: then nothing comes from elsewhere,
// unless the model is a repository of the Hub.
const PACKAGES = "https://cdn.jsdelivr.net/npm/";

const local = PACKAGES.startsWith(".");
const library = `${PACKAGES}@huggingface/transformers${local ? "" : `@${VERSION}`}/dist/transformers.min.js`;
const { AutoModelForImageTextToText, AutoProcessor, RawImage, TextStreamer, env } = await import(library).catch((error) => {
    throw new Error(`${error.message}. Without internet, take it from node_modules: see PACKAGES in vlm.js.`);
});
if (local) env.backends.onnx.wasm.wasmPaths = new URL(`${PACKAGES}onnxruntime-web/dist/`, location.href).href;
env.localModelPath = new URL(".", location.href).pathname;

const SUFFIXES = { fp32: "", q8: "_quantized" };
const SETTINGS = ["config", "generation_config", "preprocessor_config", "processor_config", "tokenizer_config", "tokenizer"];
const GRAPHS = ["vision_encoder", "embed_tokens", "decoder_model_merged"];
const isThere = async (path) => (await fetch(path, { method: "HEAD", cache: "no-cache" })).ok;

/**
 * Loads an exported checkpoint.
 * @param {string} model a folder beside the page, or, where there is none of this name, a repository `user/name` of the Hub
 * @param {{dtype?: string, device?: string, progress_callback?: function}} options `dtype` "q8" takes the files with 8-bit weights
 */
export async function load(model, { dtype = "fp32", ...options } = {}) {
    if (!(dtype in SUFFIXES)) throw new Error(`dtype "${dtype}" is unknown. Known: ${Object.keys(SUFFIXES).join(", ")}.`);
    const onHub = /^[\w-][\w.-]*\/[\w.-]+$/.test(model) && !(await isThere(`${model}/config.json`));
    env.allowRemoteModels = onHub;
    env.allowLocalModels = !onHub;
    env.useBrowserCache = onHub && "caches" in self; // it would keep what a folder held before
    const graphs = GRAPHS.map((name) => `onnx/${name}${SUFFIXES[dtype]}.onnx`);
    for (const name of onHub ? [] : [...SETTINGS.map((name) => `${name}.json`), ...graphs]) {
        if (await isThere(`${model}/${name}`)) continue;
        const option = dtype === "q8" ? " --int8" : "";
        throw new Error(`${model}/${name} is not there. Name a folder of "alignvlm export CHECKPOINT FOLDER --to onnx${option}".`);
    }
    const [processor, network] = await Promise.all([
        AutoProcessor.from_pretrained(model),
        AutoModelForImageTextToText.from_pretrained(model, { dtype, device: "wasm", ...options }),
    ]).catch((error) => {
        throw onHub ? new Error(`${model} is no folder beside the page, and the Hub did not give it: ${error.message}`) : error;
    });
    return { processor, network };
}

/** A decoded image file as the checkpoint was trained with: upright, on white, and resized as in Python. */
async function pixels(file, imageProcessor) {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
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
 * Answers a question about an image, greedily.
 * @param {{processor, network}} vlm what `load` gave
 * @param {Blob} file an image file
 * @param {string} question
 * @param {{max_new_tokens?: number, onText?: function(string)}} options `onText` gets each new piece of the answer
 */
export async function answer({ processor, network }, file, question, { max_new_tokens = 40, onText } = {}) {
    const { image_token } = processor.config;
    if (question.includes(image_token)) throw new Error(`${image_token} stands for an image. Leave it out of the question.`);
    const content = [{ type: "image" }, { type: "text", text: question }];
    const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const { bos_token } = processor.tokenizer;
    const add_special_tokens = !(bos_token && prompt.startsWith(bos_token));
    const inputs = await processor(await pixels(file, processor.image_processor), prompt, { add_special_tokens });
    const length = inputs.input_ids.dims.at(-1);
    const context = network.config.text_config.max_position_embeddings ?? Infinity;
    if (length + max_new_tokens > context)
        throw new Error(
            `The question is too long: it has ${length} tokens with its image, and the model takes ${context}, ` +
                `${max_new_tokens} of an answer among them.`,
        );
    const streamer =
        onText &&
        new TextStreamer(processor.tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function: onText });
    const tokens = await network.generate({ ...inputs, max_new_tokens, do_sample: false, streamer });
    return processor.batch_decode(tokens.slice(null, [length, null]), { skip_special_tokens: true })[0].trim();
}
