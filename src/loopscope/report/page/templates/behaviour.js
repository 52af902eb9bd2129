// Shows tokens coloured by what they tend to, and draws the one that is picked.
(function () {
  "use strict";
  const { make, unpacked } = loopscope;
  const source = document.getElementById("token-panel");
  if (!source) return;
  const { looks, finest, groups } = JSON.parse(source.textContent);
  const options = JSON.parse(document.getElementById("plot-options").textContent);
  const figure = source.closest("figure");
  const find = (name) => figure.querySelector(`[data-${name}]`);
  const chips = find("chips");
  const picked = find("picked");
  const INK = "#1c1d21";
  const MUTED = "#5b5f66";
  const LAGS = [1, 2, 5, 10, 20, 50, 100, 200, 500]; // named on the axis
  let group = null;
  let chosen = 0; // place among the group's tokens

  const lookOf = (token) => looks[token.kind] ?? { name: "not judged", colour: "#dfe2e6", on: INK, letter: "–" };

  function letterOf(token) {
    const { colour, on, letter } = lookOf(token);
    return make("span", { class: "letter", style: `background: ${colour}; color: ${on}` }, letter);
  }

  // A trajectory of a file has nothing but its number.
  function nameOf(place) {
    const [number, { label }] = [group.first + place, group.tokens[place]];
    return label === String(number) ? label : `${number} “${label}”`;
  }

  // ---- the tokens ----

  function showGroup() {
    find("note").textContent = group.note;
    chips.replaceChildren(
      ...group.tokens.map((token, place) => {
        const name = `${nameOf(place)}: ${lookOf(token).name}`;
        const attributes = { class: "chip", role: "option", id: `token-${place}`, title: name };
        const style = `--kind: ${lookOf(token).colour}`;
        const chip = make("span", { ...attributes, style, "aria-selected": "false" }, token.label, letterOf(token));
        chip.addEventListener("click", () => pick(place));
        return chip;
      }),
    );
    pick(group.start, false);
  }

  function pick(place, show = true) {
    chips.children[chosen]?.setAttribute("aria-selected", "false");
    chosen = Math.max(0, Math.min(group.tokens.length - 1, place));
    const chip = chips.children[chosen];
    if (!chip) return;
    chip.setAttribute("aria-selected", "true");
    chips.setAttribute("aria-activedescendant", chip.id);
    if (show) chips.scrollTop += outside(chip);
    const token = group.tokens[chosen];
    const facts = token.facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    picked.replaceChildren(
      make("h4", {}, letterOf(token), ` ${nameOf(chosen)}: ${lookOf(token).name}`),
      make("p", {}, token.line),
      make("dl", {}, ...facts),
    );
    for (const plot of PLOTS) plot.show(token);
  }

  // By how many pixels a token lies outside the window of the tokens.
  function outside(chip) {
    const [inner, outer] = [chip.getBoundingClientRect(), chips.getBoundingClientRect()];
    return Math.min(0, inner.top - outer.top) + Math.max(0, inner.bottom - outer.bottom);
  }

  chips.addEventListener("keydown", (event) => {
    const to = {
      ArrowLeft: chosen - 1,
      ArrowRight: chosen + 1,
      ArrowUp: chosen - 10,
      ArrowDown: chosen + 10,
      Home: 0,
      End: group.tokens.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pick(to);
  });

  // ---- the small plots of one token: more are added to this list ----

  const axis = (title, more) => ({
    title: { text: title, standoff: 6, font: { size: 12 } },
    gridcolor: "#e6e8eb",
    linecolor: "#b9bdc4",
    zeroline: false,
    automargin: true,
    exponentformat: "power",
    tickfont: { size: 11 },
    ...more,
  });

  // The way in its plane, from dark to light.
  function way(token) {
    if (!token.path) return null;
    const [x, y] = token.path.map((steps) => steps.map((step) => (step / finest) * token.reach));
    const marker = {
      size: 6,
      color: x.map((_, time) => time - x.length + 1),
      colorscale: "Cividis",
      colorbar: { title: { text: "recurrences before the end", side: "right", font: { size: 11 } }, thickness: 9, outlinewidth: 0 },
    };
    const trace = { x, y, mode: "lines+markers", marker, line: { color: "#b9bdc4", width: 1 }, hovertemplate: "%{marker.color}<extra></extra>" };
    const layout = { xaxis: axis("1st component / norm", { nticks: 5 }), yaxis: axis("2nd component / norm", { scaleanchor: "x" }) };
    return { traces: [trace], layout };
  }

  function displacement(token) {
    if (!token.curve) return null;
    const y = token.curve.map((value) => (value === null ? null : Math.exp(value / 1000)));
    const x = y.map((_, lag) => lag + 1);
    const curve = { x, y, mode: "lines+markers", name: "displacement", marker: { size: 4 }, line: { color: lookOf(token).colour, width: 2 }, hovertemplate: "lag %{x}: %{y:.2g}<extra></extra>" };
    const traces = [curve];
    if (token.floor !== null)
      traces.push({ x: [1, x.length], y: [token.floor, token.floor], mode: "lines", name: "noise floor", line: { color: MUTED, width: 1.5, dash: "dot" }, hovertemplate: "noise floor %{y:.2g}<extra></extra>" });
    const layout = {
      xaxis: axis("lag, recurrences", { type: "log", tickvals: LAGS, ticktext: LAGS.map(String) }),
      yaxis: axis("displacement / norm", { type: "log" }),
      showlegend: token.floor !== null,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
    };
    return { traces, layout };
  }

  // Those of one recurrence, with the circle on which stability is lost.
  function eigenvalues(token) {
    if (!token.eigenvalues) return null;
    const [x, y] = token.eigenvalues;
    const turns = Array.from({ length: 121 }, (_, step) => (2 * Math.PI * step) / 120);
    const circle = { x: turns.map(Math.cos), y: turns.map(Math.sin), mode: "lines", line: { color: INK, width: 1 }, hoverinfo: "skip" };
    const modulus = x.map((real, place) => Math.hypot(real, y[place]));
    const marker = { size: 8, color: lookOf(token).colour, opacity: modulus.map((_, place) => (place === 0 ? 1 : 0.5)) };
    const points = { x, y, mode: "markers", marker, customdata: modulus, hovertemplate: "%{x:.3f} %{y:+.3f}i, modulus %{customdata:.3f}<extra></extra>" };
    return { traces: [circle, points], layout: { showlegend: false, xaxis: axis("real part", { nticks: 5 }), yaxis: axis("imaginary part", { scaleanchor: "x", nticks: 5 }) } };
  }

  const PLOTS = [
    ["Path, in the plane of largest motion", way, "Its path was not kept."],
    ["Displacement within a number of recurrences (lag)", displacement, "It does not move, or its displacement was not kept."],
    ...(source.dataset.eigenvalues ? [["Eigenvalues of one recurrence, with the unit circle", eigenvalues, "None were taken of this token."]] : []),
  ].map(([title, drawing, otherwise]) => {
    const place = make("div", { class: "plot", role: "group", "aria-label": title });
    const missing = make("p", { class: "unseen" }, otherwise);
    find("small-plots").append(make("div", { class: "small-plot" }, make("h4", {}, title), place, missing));
    return {
      show(token) {
        const found = drawing(token);
        missing.hidden = found !== null;
        place.hidden = found === null;
        if (found === null) return;
        const font = { family: getComputedStyle(figure).fontFamily, size: 12, color: INK };
        const shared = {
          font,
          margin: { l: 8, r: 8, t: 24, b: 8 },
          height: 260,
          paper_bgcolor: "rgba(0,0,0,0)",
          plot_bgcolor: "rgba(0,0,0,0)",
          hoverlabel: { bgcolor: "#ffffff", bordercolor: "#b9bdc4", font },
          modebar: { bgcolor: "#ffffff", color: MUTED, activecolor: INK },
        };
        Plotly.react(place, found.traces, { ...shared, ...found.layout }, options);
      },
    };
  });

  // ---- the groups ----

  async function showNumber(number) {
    group = groups[number];
    if (typeof group.tokens === "string") group.tokens = await unpacked(group.tokens).json();
    showGroup();
  }

  find("group")?.addEventListener("change", ({ target }) => showNumber(Number(target.value)));
  loopscope.afterwards(async () => {
    try {
      await loopscope.plotly();
      await showNumber(0);
      document.documentElement.dataset.tokens = "drawn";
    } catch (error) {
      picked.textContent = `The tokens could not be drawn: ${error.message}`;
      console.error("tokens", error);
    }
  });
})();
