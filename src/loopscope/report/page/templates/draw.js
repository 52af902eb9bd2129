// Draws every figure from the JSON beside it, one after the other, so that the page can be read and scrolled meanwhile.
(async function () {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const pause = () => new Promise((resolve) => setTimeout(resolve, 0));
  const options = read("plot-options");

  // A click on a head, for whoever shows its maps.
  function tellOfClicks(place) {
    place.on("plotly_click", ({ points: [point] }) => {
      const [layer, head] = point.customdata;
      const detail = { layer: `${place.dataset.picks}.${layer}`, head, recurrence: point.x };
      place.dispatchEvent(new CustomEvent("pickhead", { bubbles: true, detail }));
    });
  }

  // A click on a name of a legend that charts share hides what has it in all of them, or shows it again.
  document.addEventListener("click", ({ target }) => {
    const button = target.closest(".legend button");
    if (!button) return;
    const visible = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(visible));
    for (const place of button.closest("figure").querySelectorAll("[data-plot]")) {
      const named = (place.data ?? []).flatMap((trace, index) => (trace.name === button.dataset.trace ? [index] : []));
      if (named.length) Plotly.restyle(place, { visible }, named);
    }
  });

  for (const place of document.querySelectorAll("[data-plot]")) {
    try {
      const plot = read(place.dataset.plot);
      for (const trace of plot.data.filter(({ meta }) => meta))
        trace.text = trace.meta.map((row) => trace.meta.map((column) => `${row}<br>${column}`));
      await Plotly.newPlot(place, plot.data, plot.layout, options);
      if (place.dataset.picks) tellOfClicks(place);
    } catch (error) {
      // One figure that fails must not take the others with it.
      place.textContent = "This figure could not be drawn: " + error.message;
      console.error(place.dataset.plot, error);
    }
    await pause();
  }
  document.documentElement.dataset.figures = "drawn";
})();
