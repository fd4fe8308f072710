"use strict";

// Whitespace and token borders are shown on demand.
const marks = { " ": "·", "\n": "⏎\n", "\t": "→\t", "\u00a0": "⍽" };
const blanks = document.getElementById("blanks");
blanks.addEventListener("change", () => {
  for (const token of document.querySelectorAll("main .one .text i")) {
    token.dataset.text ??= token.textContent;
    if (!blanks.checked) {
      token.textContent = token.dataset.text;
      continue;
    }
    token.replaceChildren(
      ...token.dataset.text.split(/([ \n\t\u00a0])/).map((piece) => {
        if (!(piece in marks)) return piece;
        return Object.assign(document.createElement("u"), { textContent: marks[piece] });
      })
    );
  }
});
const edges = document.getElementById("edges");
edges.addEventListener("change", () => document.body.classList.toggle("edges", edges.checked));
