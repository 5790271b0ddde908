// Resizes 8-bit images as Pillow does, value by value. A canvas takes other pixels, and the model was trained on Pillow's.

// By the numbers that image processors use (`resample`): half the width of a filter, and its value at a distance.
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
    1: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
    2: [1, (x) => (x < 1 ? 1 - x : 0)], // bilinear
    3: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0)], // bicubic
};
const ONE = 2 ** 22; // weights are integers, as in Pillow

/** For each new position: the first old one that counts, and the weights from there on. */
function weights(before, after, resample) {
    if (!(resample in FILTERS)) throw new Error(`Resampling method ${resample} is unknown. Known: ${Object.keys(FILTERS)}.`);
    const [support, filter] = FILTERS[resample];
    const scale = before / after;
    const stretch = Math.max(scale, 1);
    return Array.from({ length: after }, (_, index) => {
        const centre = (index + 0.5) * scale;
        const first = Math.max(Math.trunc(centre - support * stretch + 0.5), 0);
        const end = Math.min(Math.trunc(centre + support * stretch + 0.5), before);
        const values = [];
        for (let at = first; at < end; ++at) values.push(filter(Math.abs((at - centre + 0.5) / stretch)));
        const sum = values.reduce((a, b) => a + b, 0);
        return [first, values.map((value) => Math.trunc((value / sum) * ONE + (value < 0 ? -0.5 : 0.5)))];
    });
}

/**
 * @param {Uint8ClampedArray|Uint8Array} data `(height, width, channels)`
 * @param {number} resample 1 Lanczos, 2 bilinear, 3 bicubic
 * @returns {Uint8ClampedArray} `(newHeight, newWidth, channels)`
 */
export function resize(data, width, height, channels, newWidth, newHeight, resample) {
    // One axis after the other: `outer` lines of `before` positions with `inner` values each
    const along = (source, outer, before, inner, after) => {
        if (before === after) return source;
        const result = new Uint8ClampedArray(outer * after * inner);
        weights(before, after, resample).forEach(([first, kernel], index) => {
            for (let line = 0; line < outer; ++line) {
                for (let value = 0; value < inner; ++value) {
                    let sum = ONE / 2;
                    kernel.forEach((weight, step) => (sum += weight * source[(line * before + first + step) * inner + value]));
                    result[(line * after + index) * inner + value] = Math.floor(sum / ONE);
                }
            }
        });
        return result;
    };
    const narrower = along(data, height, width, channels, newWidth);
    return along(narrower, 1, height, newWidth * channels, newHeight);
}
