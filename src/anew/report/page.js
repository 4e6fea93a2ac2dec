// Show the values of all lines at the pointer or finger, one line of text each. A point of
// `data-lines` is [x, y, text of x, text of y], in units of the SVG.
const MOST_DISTANCE = 30;

function nearestPoint(points, x) {
  const distance = (point) => Math.abs(point[0] - x);
  return points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
}

for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const tip = svg.nextElementSibling;
  const cursor = svg.querySelector(".cursor");
  const lines = JSON.parse(svg.dataset.lines).filter((line) => !line.kind.startsWith("faint"));

  const hide = () => {
    tip.style.display = "none";
    cursor.style.visibility = "hidden";
  };

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const found = lines
      .map((line) => ({ name: line.name, point: nearestPoint(line.points, x) }))
      .filter(({ point }) => Math.abs(point[0] - x) < MOST_DISTANCE);
    if (!found.length) {
      hide();
      return;
    }
    const [cursorX, , xText] = found[0].point;
    cursor.setAttribute("x1", cursorX);
    cursor.setAttribute("x2", cursorX);
    cursor.style.visibility = "visible";
    tip.textContent = "";
    for (const text of [xText, ...found.map(({ name, point }) => `${point[3]}  ${name}`)]) {
      const row = document.createElement("div");
      row.textContent = text;
      tip.appendChild(row);
    }
    tip.style.display = "block";
    tip.style.top = "8px";
    const left = Math.min(cursorX / scale + 12, box.width - tip.offsetWidth);
    tip.style.left = Math.max(0, left) + "px";
  };

  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", show);
}
