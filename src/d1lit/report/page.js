"use strict";
// Charts: the values under the pointer, as a line of text.
for (const figure of document.querySelectorAll("figure.chart")) {
  const series = JSON.parse(figure.dataset.series), [low, high] = figure.dataset.range.split(",").map(Number);
  const svg = figure.querySelector("svg"), cross = svg.querySelector(".cross"), readout = figure.querySelector(".readout");
  const box = svg.viewBox.baseVal, left = 52, right = 10, blank = readout.textContent;
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), at = ((event.clientX - frame.left) / frame.width) * box.width;
    const x = low + Math.min(1, Math.max(0, (at - left) / (box.width - left - right))) * (high - low);
    let nearest = null;
    const words = series.map(({ label, points }) => {
      const point = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      if (nearest === null || Math.abs(point[0] - x) < Math.abs(nearest - x)) nearest = point[0];
      return `${label} ${Number(point[1]).toPrecision(3)}`;
    });
    const place = left + ((nearest - low) / (high - low || 1)) * (box.width - left - right);
    cross.setAttribute("x1", place); cross.setAttribute("x2", place); cross.setAttribute("visibility", "visible");
    readout.textContent = `${figure.dataset.x} ${Number(nearest).toPrecision(4) * 1}: ${words.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); readout.textContent = blank; });
}
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = d.open || d.querySelectorAll("*").length < 400; });
