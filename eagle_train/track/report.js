"use strict";

// The values under the pointer, for every chart.
for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const data = JSON.parse(figure.dataset.hover);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const tip = figure.querySelector(".tip");
  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const at = Math.min(data.right, Math.max(data.left, (event.clientX - box.left) * scale));
    const step = data.x0 + ((at - data.left) / (data.right - data.left)) * (data.x1 - data.x0);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: `${data.x} ${Math.round(step)}` }));
    const slack = 0.03 * (data.x1 - data.x0); // a line that has no point near the pointer is not listed
    for (const line of data.lines) {
      const [x, y] = nearest(line.points, step);
      if (Math.abs(x - step) > slack) continue;
      const row = document.createElement("div");
      row.className = line.css;
      row.append(document.createElement("i"), `${line.name} ${y}${data.unit}`);
      tip.append(row);
    }
    tip.style.display = "block";
    const outer = figure.getBoundingClientRect();
    const left = box.left - outer.left + at / scale;
    tip.style.left = `${left + 14 + tip.offsetWidth < outer.width ? left + 14 : left - 14 - tip.offsetWidth}px`;
    tip.style.top = `${box.top - outer.top + 34}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    tip.style.display = "none";
  });
}

// The gallery's filters: right or wrong, and the type of question.
const filters = document.querySelector(".filters");
if (filters) {
  const buttons = [...filters.querySelectorAll("button")];
  const type = filters.querySelector("select");
  const apply = () => {
    const shown = buttons.find((button) => button.getAttribute("aria-pressed") === "true").value;
    for (const card of document.querySelectorAll(".sample")) {
      const outcome = card.classList.contains("right") ? "right" : "wrong";
      card.hidden = (shown && shown !== outcome) || (type.value && type.value !== card.dataset.type);
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
  }
  type.addEventListener("change", apply);
  filters.hidden = false;
}
