"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Light or dark: as the system says, until the button is pressed.
const theme = document.getElementById("theme");
const dark = () => getComputedStyle(document.documentElement).getPropertyValue("color-scheme").trim() === "dark"
    || (!document.documentElement.style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Use ${theme.textContent.toLowerCase()} colours`); };
theme.hidden = false;
theme.onclick = () => { document.documentElement.style.colorScheme = dark() ? "light" : "dark"; name(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
name();

// Filters and order of answers.
for (const form of all(".filters")) {
    const box = form.nextElementSibling;
    const cards = all("article", box);
    const order = {
        down: (a, b) => b.dataset.score - a.dataset.score,
        up: (a, b) => a.dataset.score - b.dataset.score,
        prompt: (a, b) => a.dataset.prompt.localeCompare(b.dataset.prompt),
    };
    const more = form.querySelector(".more");
    const few = 12;
    const show = () => {
        const value = (field) => form.elements[field]?.value ?? "";
        const text = value("text").toLowerCase();
        let count = 0;
        for (const card of cards) {
            const fits = (!value("task") || card.dataset.task === value("task"))
                && (!value("kind") || card.dataset.kind === value("kind"))
                && (!value("group") || card.dataset.groups.split(" ").includes(value("group")))
                && (!text || card.textContent.toLowerCase().includes(text));
            card.fits = fits;
            count += fits;
        }
        const sorted = value("order") ? [...cards].sort(order[value("order")]) : cards;
        const shown = sorted.filter((card) => card.fits).slice(0, more.pressed ? count : few);
        for (const card of cards) card.hidden = !shown.includes(card);
        box.replaceChildren(...sorted);
        more.hidden = count <= few;
        more.textContent = more.pressed ? "Show fewer" : `Show all ${count}`;
        form.querySelector("output").textContent = `Showing ${shown.length} of ${count} answers`;
    };
    more.onclick = () => { more.pressed = !more.pressed; show(); };
    form.hidden = false;
    show();
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
}

// Heat maps: one canvas cell per place of the image.
for (const article of all(".heat")) {
    const values = Uint8Array.from(atob(article.dataset.values), (character) => character.charCodeAt(0));
    const [images, rows, columns] = article.dataset.shape.split(" ").map(Number);
    const words = Number(article.dataset.words);
    const shares = article.dataset.shares.split(";").map((line) => line.split(" "));
    const buttons = all(".words button", article);
    const layer = article.querySelector("select");
    const canvases = all("canvas", article);
    // The word before which most of the attention was on the image.
    let chosen = shares[0].map(Number).reduce((best, share, word, all) => (share > all[best] ? word : best), 0);
    const draw = () => {
        buttons.forEach((button, word) => button.setAttribute("aria-pressed", word === chosen));
        let place = (Number(layer.value) * words + chosen) * images * rows * columns;
        for (const canvas of canvases) {
            const context = canvas.getContext("2d");
            const picture = context.createImageData(columns, rows);
            for (let cell = 0; cell < rows * columns; cell++, place++) {
                const heat = values[place] / 255;
                picture.data.set(heat > 0.5 ? [255, 230, 40] : [10, 10, 40], 4 * cell);
                picture.data[4 * cell + 3] = heat > 0.5 ? 200 * (heat - 0.5) : 330 * (0.5 - heat);
            }
            context.putImageData(picture, 0, 0);
        }
        article.querySelector("[aria-live]").textContent =
            `Before it wrote “${buttons[chosen].textContent}”, ${shares[layer.value][chosen]}% of its attention was on the image, the rest on the text.`;
    };
    buttons.forEach((button, word) => { button.onclick = () => { chosen = word; draw(); }; });
    layer.onchange = draw;
    draw();
}

// Masks: which tokens the chosen one may look at.
const mask = document.querySelector(".mask");
if (mask) {
    const figures = all("figure", mask);
    const tokens = all(".tokens button", mask);
    const said = mask.querySelector("[aria-live]");
    let chosen = null;
    const names = { image: "of the image", prompt: "of the question", response: "of the answer" };
    const show = () => {
        const type = Number(mask.querySelector("input:checked").value);
        figures.forEach((figure, index) => { figure.hidden = index !== type; });
        if (chosen === null) return;
        const row = figures[type].dataset.rows.split(" ")[chosen];
        tokens.forEach((token, index) => {
            token.setAttribute("aria-pressed", index === chosen);
            token.classList.toggle("unseen", row[index] === "0");
        });
        const parts = Object.entries(names).map(([group, name]) => {
            const of = tokens.map((token, index) => [token, index]).filter(([token]) => token.classList.contains(group));
            const seen = of.filter(([, index]) => row[index] === "1").length;
            return seen === of.length ? `all ${seen} tokens ${name}` : `${seen || "none"} of the ${of.length} ${name}`;
        });
        const pick = figures[type].querySelector(".pick");
        pick.setAttribute("y", chosen + Number(pick.getAttribute("x")) + 0.1);
        said.textContent = `This ${tokens[chosen].getAttribute("aria-label")} may look at ${parts.slice(0, 2).join(", ")} and ${parts[2]}.`;
    };
    tokens.forEach((token, index) => { token.onclick = () => { chosen = index; show(); }; });
    mask.addEventListener("change", show);
    chosen = Math.max(tokens.findIndex((token) => token.classList.contains("image")), 0);
    show();
}
