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

  for (const place of document.querySelectorAll("[data-plot]")) {
    try {
      const plot = read(place.dataset.plot);
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
