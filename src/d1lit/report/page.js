"use strict";
// Charts: the values under the pointer, or where the arrow keys have gone, as a line of text.
for (const figure of document.querySelectorAll("figure.chart")) {
  const series = JSON.parse(figure.dataset.series), [low, high] = figure.dataset.range.split(",").map(Number);
  const svg = figure.querySelector("svg"), cross = svg.querySelector(".cross"), readout = figure.querySelector(".readout");
  const box = svg.viewBox.baseVal, left = 52, right = 10, blank = readout.textContent;
  const places = [...new Set(series.flatMap(({ points }) => points.map((point) => Number(point[0]))))].sort((a, b) => a - b);
  let here = -1; // among the places; -1: nothing is read
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const read = (x) => {
    here = places.indexOf(places.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a)));
    const words = series.map(({ label, points }) => `${label} ${Number(nearest(points, x)[1]).toPrecision(3)}`);
    const place = left + ((places[here] - low) / (high - low || 1)) * (box.width - left - right);
    cross.setAttribute("x1", place); cross.setAttribute("x2", place); cross.setAttribute("visibility", "visible");
    readout.textContent = `${figure.dataset.x} ${Number(places[here].toPrecision(4))}: ${words.join(" · ")}`;
  };
  const leave = () => { here = -1; cross.setAttribute("visibility", "hidden"); readout.textContent = blank; };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), at = ((event.clientX - frame.left) / frame.width) * box.width;
    read(low + Math.min(1, Math.max(0, (at - left) / (box.width - left - right))) * (high - low));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const last = places.length - 1;
    const next = { ArrowLeft: here < 0 ? last : here - 1, ArrowRight: here + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") leave();
    if (next === undefined) return;
    event.preventDefault();
    read(places[Math.min(last, Math.max(0, next))]);
  });
}
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = d.open || d.querySelectorAll("*").length < 400; });
