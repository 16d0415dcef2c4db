"use strict";

// the step under the pointer, and each run's value there
for (const svg of document.querySelectorAll("svg")) {
  const names = JSON.parse(svg.dataset.names);
  const curves = [...svg.querySelectorAll(".curve")].reverse(); // the first run is drawn last
  const points = new Map(curves.map((curve) => [curve, JSON.parse(curve.dataset.points)]));
  const pointer = svg.querySelector(".pointer");
  const output = svg.closest("figure").querySelector("output");
  const nearest = (curve, x) =>
    points.get(curve).reduce((best, point) => (Math.abs(point[2] - x) < Math.abs(best[2] - x) ? point : best));

  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const shown = curves.filter((curve) => !curve.classList.contains("hidden") && points.get(curve).length);
    if (!shown.length) return;
    const found = shown.map((curve) => [names[curve.dataset.run], nearest(curve, x)]);
    const closest = found.reduce((a, b) => (Math.abs(b[1][2] - x) < Math.abs(a[1][2] - x) ? b : a))[1];
    pointer.setAttribute("x1", closest[2]);
    pointer.setAttribute("x2", closest[2]);
    pointer.setAttribute("visibility", "visible");
    const values = found.filter(([, point]) => point[0] === closest[0]);
    const said = values.map(([name, point]) => (names.length > 1 ? name + " " : "") + Number(point[1].toPrecision(5)));
    output.textContent = ["step " + closest[0], ...said].join(" · ");
  });
  svg.addEventListener("pointerleave", () => {
    pointer.setAttribute("visibility", "hidden");
    output.textContent = "";
  });
}

for (const box of document.querySelectorAll("input[data-run]")) {
  box.addEventListener("change", () => {
    for (const curve of document.querySelectorAll(`.curve[data-run="${box.dataset.run}"]`)) {
      curve.classList.toggle("hidden", !box.checked);
    }
  });
}
