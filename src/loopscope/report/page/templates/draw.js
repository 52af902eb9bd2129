// Draws the figures from the JSON beside them.
(function () {
  "use strict";
  const options = JSON.parse(document.getElementById("plot-options").textContent);

  // A click on a head, for whoever shows its maps.
  function tellOfClicks(place) {
    place.on("plotly_click", ({ points: [point] }) => {
      const [layer, head] = point.customdata;
      const detail = { layer: `${place.dataset.picks}.${layer}`, head, recurrence: point.x };
      place.dispatchEvent(new CustomEvent("pickhead", { bubbles: true, detail }));
    });
  }

  async function draw(place) {
    try {
      const [plot] = await Promise.all([loopscope.content(place.dataset.plot), loopscope.plotly()]);
      for (const trace of plot.data.filter(({ meta }) => meta))
        trace.text = trace.meta.map((row) => trace.meta.map((column) => `${row}<br>${column}`));
      for (const button of place.closest("figure").querySelectorAll(".legend [aria-pressed=false]"))
        for (const trace of plot.data) if (trace.name === button.dataset.trace) trace.visible = false;
      await Plotly.newPlot(place, plot.data, plot.layout, options);
      for (const button of place.querySelectorAll(".modebar-btn")) button.setAttribute("aria-label", button.dataset.title);
      if (place.dataset.picks) tellOfClicks(place);
    } catch (error) {
      // One figure that fails must not take the others with it.
      place.textContent = "This figure could not be drawn: " + error.message;
      console.error(place.dataset.plot, error);
    }
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

  for (const place of document.querySelectorAll("[data-plot]")) loopscope.whenSeen(place, () => draw(place));
  loopscope.afterwards(() => {});
})();
