// Draws attention maps from the bytes in the page: those of one head beside each other, and all of one prompt.
(function () {
  "use strict";
  const { make, unpacked } = loopscope;
  const source = document.getElementById("attention-maps");
  if (!source) return;
  const { side, heads, visits, names, palette, highest, unknown, prompts, start } = JSON.parse(source.textContent);
  const figure = source.closest("figure");
  const multiples = figure.querySelector("[data-multiples]");
  const pointed = figure.querySelector("[data-pointed]");
  const plan = document.querySelector("[data-plan]");
  const FONT = "11px system-ui, sans-serif";
  const LINE = 12; // CSS pixels from one name of a token to the next
  const choices = [...document.querySelectorAll("[data-choice]")];
  // Red, green, blue and opacity of each code, as the one number that a pixel is.
  const colours = new Uint32Array(256);
  palette.forEach((colour, code) => new Uint8Array(colours.buffer, 4 * code).set([...colour, 255]));
  const chosen = { prompt: 0, layer: start.layer, head: start.head, recurrence: null, scale: "shared" };
  let cursor = null; // {query, key}
  let longestName = 0; // of a token, in CSS pixels
  let maps = []; // of the chosen head: {visit, codes, image, canvas, value, place}

  const prompt = () => prompts[chosen.prompt];
  const count = () => Math.min(side, prompt().tokens.length);
  const percent = (value) => (value > 0 && value < 0.0005 ? "< 0.05 %" : `${Number((100 * value).toPrecision(2))} %`);

  function codesOf(visit, head) {
    const first = (visit * heads + head) * side * side;
    return prompt().codes.subarray(first, first + side * side);
  }

  // Codes are kept less those of the same layer one visit before, modulo 256.
  function restored(codes) {
    const size = heads * side * side;
    const last = {};
    visits.forEach(({ layer }, visit) => {
      if (layer in last)
        for (let place = 0; place < size; place++) codes[visit * size + place] += codes[last[layer] * size + place];
      last[layer] = visit;
    });
    return codes;
  }

  // The colour of each code of a map. On a scale of its own the largest 2 % of its entries have the last colour: the
  // largest of all is that of the first token, which has nothing but itself to look at.
  function coloursOf(codes) {
    if (chosen.scale === "shared") return colours;
    const known = codes.filter((code) => code !== unknown).sort();
    const top = known[Math.floor(0.98 * (known.length - 1))] || highest;
    return colours.map((colour, code) => (code === unknown ? colour : colours[Math.min(highest, Math.round((code / top) * highest))]));
  }

  // A canvas with maps on it: [left, top, codes] of each.
  function pictureOf(width, height, contents) {
    const canvas = make("canvas", { width, height });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (const [left, top, codes] of contents) {
      const scale = coloursOf(codes);
      for (let row = 0; row < count(); row++)
        for (let column = 0; column < count(); column++)
          pixels[(top + row) * width + left + column] = scale[codes[row * side + column]];
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // ---- the maps of one head ----

  function showHead() {
    const candidates = [...visits.keys()].filter((visit) => visits[visit].layer === chosen.layer);
    const marked = candidates.length > 1 ? nearest(candidates) : null;
    maps = candidates.map((visit) => {
      const codes = codesOf(visit, chosen.head);
      const seen = codes.some((code) => code !== unknown);
      const numbers = inWords(visit);
      const canvas = make("canvas", { role: "img", "aria-label": `${visits[visit].name}: ${numbers.join(", ")}` });
      const value = make("span", { class: "value" });
      const place = make(
        "div",
        { class: visit === marked ? "multiple marked" : "multiple" },
        make("h4", {}, visits[visit].name, value),
        seen ? canvas : make("p", { class: "unseen" }, "Not visible, or not finite."),
        make("ul", { class: "numbers" }, ...numbers.map((words) => make("li", {}, words))),
      );
      return { visit, codes, image: seen ? pictureOf(count(), count(), [[0, 0, codes]]) : null, canvas, value, place };
    });
    multiples.replaceChildren(...maps.map((map) => map.place));
    for (const map of maps) {
      map.canvas.addEventListener("pointermove", (event) => point(entryAt(map.canvas, event)));
      map.canvas.addEventListener("pointerdown", (event) => point(entryAt(map.canvas, event)));
      map.canvas.addEventListener("pointerleave", () => point(null));
      if (map.visit === marked) multiples.scrollLeft = map.place.offsetLeft - multiples.offsetLeft;
    }
    figure.querySelector("[data-note]").textContent = prompt().note;
    point(null);
  }

  // Of the recurrences that were kept, the one nearest to the one that was clicked on.
  function nearest(candidates) {
    if (chosen.recurrence === null) return null;
    const away = (visit) => Math.abs(visits[visit].recurrence - chosen.recurrence);
    return candidates.reduce((best, visit) => (away(visit) < away(best) ? visit : best));
  }

  // The numbers of the chosen head in a visit, those that there are.
  function inWords(visit) {
    const first = (visit * heads + chosen.head) * names.length;
    const values = prompt().numbers.subarray(first, first + names.length);
    const found = Object.fromEntries(names.map((name, place) => [name, values[place]]));
    const words = [];
    const place = found.strongest_sink_position;
    if (Number.isFinite(found.sink_score)) words.push(`sink, first token: ${percent(found.sink_score)}`);
    if (place > 0) words.push(`strongest sink: ${percent(found.strongest_sink)}, “${prompt().tokens[place]}” (${place})`);
    const last = [];
    if (Number.isFinite(found.mixing_score)) last.push(`mixing: ${found.mixing_score.toFixed(2)} nats`);
    if (Number.isFinite(found.change)) last.push(`change: ${Number(found.change.toPrecision(2))}`);
    return last.length ? [...words, last.join(", ")] : words;
  }

  // Puts the cursor on one entry of all the maps, or nowhere.
  function point(entry) {
    cursor = entry;
    for (const map of maps) {
      map.value.textContent = cursor ? valueAt(map.codes) : "";
      if (map.image) draw(map);
    }
    const { tokens } = prompt();
    pointed.textContent = cursor
      ? `Token ${cursor.query} “${tokens[cursor.query]}” looks at token ${cursor.key} “${tokens[cursor.key]}”`
      : "Point at an entry, or move to it with the arrow keys, to read its value in every map.";
  }

  function valueAt(codes) {
    const code = codes[cursor.query * side + cursor.key];
    return code === unknown ? "–" : percent((code / highest) ** 2);
  }

  // Where a map stands on its canvas, in CSS pixels: the names of tokens at its left and below it.
  function frameOf(canvas) {
    const left = Math.min(longestName, 0.3 * canvas.clientWidth);
    const size = canvas.clientWidth - left - 1;
    return { left, size, cell: size / count() };
  }

  function entryAt(canvas, event) {
    const { left, size, cell } = frameOf(canvas);
    const [x, y] = [event.offsetX - left, event.offsetY];
    return x < 0 || x >= size || y < 0 || y >= size ? null : { query: Math.floor(y / cell), key: Math.floor(x / cell) };
  }

  function draw({ canvas, image }) {
    const { left, size, cell } = frameOf(canvas);
    if (size <= 0) return; // not laid out yet
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(canvas.clientWidth * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(image, left, 0, size, size);
    context.strokeStyle = "#b9bdc4";
    context.strokeRect(left - 0.5, 0.5, size + 1, size);
    nameTokens(context, cell, cursor?.query, left - 7, (middle) => context.translate(left - 5, middle));
    nameTokens(context, cell, cursor?.key, left - 7, (middle) => {
      context.translate(left + middle, size + 6);
      context.rotate(-Math.PI / 2);
    });
    if (!cursor) return;
    context.strokeStyle = "#d55e00";
    context.lineWidth = 2;
    context.strokeRect(left + cursor.key * cell - 1, cursor.query * cell - 1, cell + 2, cell + 2);
  }

  // As many names as there is room for, the one under the cursor among them; each ends where `moveTo` says.
  function nameTokens(context, cell, under, longest, moveTo) {
    const every = Math.ceil(LINE / cell);
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let token = 0; token < count(); token++) {
      const close = under !== undefined && Math.abs(token - under) * cell < LINE;
      if (token !== under && (close || token % every)) continue;
      context.save();
      moveTo(Math.max(LINE / 2, (token + 0.5) * cell));
      context.font = token === under ? `700 ${FONT}` : FONT;
      context.fillStyle = token === under ? "#1c1d21" : "#5b5f66";
      context.fillText(prompt().tokens[token], 0, 0, longest);
      context.restore();
    }
  }

  multiples.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const within = (value) => Math.max(0, Math.min(count() - 1, value));
    const { query, key } = cursor ?? { query: 0, key: 0 };
    point(cursor ? { query: within(query + step[0]), key: within(key + step[1]) } : { query, key });
  });

  // ---- all maps of one prompt ----

  function showPlan() {
    plan.replaceChildren(...[...new Set(visits.map((visit) => visit.pass))].map(passOf));
  }

  // One block of the floorplan: layers below each other, heads beside each other.
  function passOf(name) {
    const rows = [...visits.keys()].filter((visit) => visits[visit].pass === name);
    const pitch = count() + Math.max(2, Math.round(count() / 12));
    const contents = rows.flatMap((visit, row) =>
      Array.from({ length: heads }, (_, head) => [head * pitch, row * pitch, codesOf(visit, head)]),
    );
    const canvas = pictureOf(heads * pitch, rows.length * pitch, contents);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Attention maps of ${name}: ${rows.length} layers, ${heads} heads each`);
    const under = ({ offsetX, offsetY }) => {
      const place = (offset, size, parts) => Math.max(0, Math.min(parts - 1, Math.floor((offset / size) * parts)));
      const { layer, number, recurrence } = visits[rows[place(offsetY, canvas.clientHeight, rows.length)]];
      return { layer, number, recurrence, head: place(offsetX, canvas.clientWidth, heads) };
    };
    canvas.addEventListener("pointermove", (event) => {
      const { number, head } = under(event);
      canvas.title = `${name}, layer ${number}, head ${head}`;
    });
    canvas.addEventListener("click", (event) => {
      const { layer, head, recurrence } = under(event);
      choose({ layer, head, recurrence });
      figure.scrollIntoView();
    });
    const mark = make("span", { class: "chosen", "data-layers": rows.map((visit) => visits[visit].layer).join(" ") });
    return make(
      "div",
      { class: "pass", style: `--layers: ${rows.length}` },
      make("h4", {}, name),
      make("div", { class: "heads" }, ...Array.from({ length: heads }, (_, head) => make("span", {}, head))),
      make("div", { class: "layers" }, ...rows.map((visit) => make("span", {}, visits[visit].number))),
      make("div", { class: "tiles" }, canvas, mark),
    );
  }

  // Frames the chosen head wherever it stands.
  function markPlan() {
    for (const mark of plan.querySelectorAll(".chosen")) {
      const layers = mark.dataset.layers.split(" ");
      mark.hidden = !layers.includes(chosen.layer);
      mark.style.left = `${(100 * chosen.head) / heads}%`;
      mark.style.top = `${(100 * layers.indexOf(chosen.layer)) / layers.length}%`;
    }
  }

  // ---- what is chosen ----

  async function choose(changes) {
    Object.assign(chosen, changes);
    for (const choice of choices) choice.value = chosen[choice.dataset.choice];
    if ("prompt" in changes) {
      if (typeof prompt().codes === "string") {
        const [codes, numbers] = await Promise.all([prompt().codes, prompt().numbers].map((text) => unpacked(text).arrayBuffer()));
        Object.assign(prompt(), { codes: restored(new Uint8Array(codes)), numbers: new Float32Array(numbers) });
      }
      const ruler = Object.assign(make("canvas", {}).getContext("2d"), { font: `700 ${FONT}` });
      longestName = 9 + Math.max(...prompt().tokens.slice(0, side).map((token) => ruler.measureText(token).width));
    }
    if ("scale" in changes) {
      for (const ticks of document.querySelectorAll("[data-scale]")) ticks.hidden = ticks.dataset.scale !== chosen.scale;
    }
    if ("prompt" in changes || "scale" in changes) showPlan();
    showHead();
    markPlan();
  }

  for (const choice of choices)
    choice.addEventListener("change", () => {
      const name = choice.dataset.choice;
      if (name === "scale") choose({ scale: choice.value });
      else choose({ [name]: name === "layer" ? choice.value : Number(choice.value), recurrence: null });
    });
  document.addEventListener("pickhead", ({ detail }) => {
    choose(detail);
    figure.scrollIntoView();
  });

  loopscope.afterwards(async () => {
    try {
      await choose({ prompt: 0 });
      new ResizeObserver(() => maps.forEach((map) => map.image && draw(map))).observe(multiples);
      document.documentElement.dataset.maps = "drawn";
    } catch (error) {
      multiples.textContent = plan.textContent = `The maps could not be drawn: ${error.message}`;
      console.error("attention maps", error);
    }
  });
})();
