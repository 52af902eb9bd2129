// What the scripts of a page share: elements, packed contents, plotly, and when things are drawn.
const loopscope = (() => {
  "use strict";
  const waiting = new Map(); // elements that are not drawn yet, each with what draws it
  const last = [];
  let work = Promise.resolve();
  let library = null;

  // Texts from outside become text nodes; never markup.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // From base85 of compressed bytes (zlib) to a Response, to be read as JSON or as bytes.
  const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%:()*+-;,=.?@^_`{|}~";
  const VALUES = new Uint8Array(128);
  for (let place = 0; place < DIGITS.length; place++) VALUES[DIGITS.charCodeAt(place)] = place;

  function unpacked(text) {
    const words = Math.ceil(text.length / 5);
    const whole = new DataView(new ArrayBuffer(4 * words));
    const digit = (at) => (at < text.length ? VALUES[text.charCodeAt(at)] : 84);
    for (let word = 0; word < words; word++) {
      let value = 0;
      for (let at = 5 * word; at < 5 * word + 5; at++) value = 85 * value + digit(at);
      whole.setUint32(4 * word, value);
    }
    const bytes = whole.buffer.slice(0, 4 * words - (5 * words - text.length));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
  }

  // What a script element holds, as JSON or packed.
  function content(id) {
    const text = document.getElementById(id).textContent;
    return text.startsWith("{") ? JSON.parse(text) : unpacked(text).json();
  }

  // Once it is needed. The policy of the page knows its hash, like those of the other scripts.
  function plotly() {
    library ??= unpacked(document.getElementById("plotly").textContent)
      .text()
      .then((code) => document.head.append(make("script", {}, code)));
    return library;
  }

  // One after the other, so that the page can be read and scrolled meanwhile.
  function next(show) {
    work = work.then(show).then(() => new Promise((resolve) => setTimeout(resolve, 0)));
  }

  function begin(element) {
    const show = waiting.get(element);
    if (!waiting.delete(element)) return;
    observer.unobserve(element);
    next(show);
  }

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) if (isIntersecting) begin(target);
      finish();
    },
    { rootMargin: "700px 0px" },
  );

  // What is wanted wherever the reader is comes after what is in view.
  function finish() {
    while (last.length) next(last.shift());
    next(() => (document.documentElement.dataset.figures = "drawn"));
  }

  return {
    make,
    unpacked,
    content,
    plotly,
    // Draws an element once it comes near the window.
    whenSeen(element, show) {
      waiting.set(element, show);
      observer.observe(element);
    },
    afterwards(show) {
      last.push(show);
      if (!waiting.size) finish();
    },
    // All that is not folded away, seen or not.
    async drawAll() {
      for (const element of [...waiting.keys()]) if (element.checkVisibility()) begin(element);
      finish();
      await work;
    },
  };
})();
window.addEventListener("beforeprint", loopscope.drawAll);
