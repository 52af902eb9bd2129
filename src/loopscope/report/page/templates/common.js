// What the scripts of a page share.
const loopscope = {
  // Texts from outside become text nodes; never markup.
  make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  },

  // From base64 of compressed bytes (zlib) to a Response, to be read as JSON or as bytes.
  unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
  },
};
