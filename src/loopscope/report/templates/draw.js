// Draws every figure from the JSON beside it, one after the other, so that the page can be read and scrolled meanwhile.
(async function () {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const pause = () => new Promise((resolve) => setTimeout(resolve, 0));
  const options = read("plot-options");

  for (const place of document.querySelectorAll("[data-plot]")) {
    try {
      const plot = read(place.dataset.plot);
      await Plotly.newPlot(place, plot.data, plot.layout, options);
    } catch (error) {
      // One figure that fails must not take the others with it.
      place.textContent = "This figure could not be drawn: " + error.message;
      console.error(place.dataset.plot, error);
    }
    await pause();
  }
  document.documentElement.dataset.figures = "drawn";
})();
