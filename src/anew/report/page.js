// The values under the pointer or finger, one line each.
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(svg.dataset.lines), tip = svg.nextElementSibling, cursor = svg.querySelector(".cursor");
  const hide = () => { tip.style.display = "none"; cursor.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width, x = (event.clientX - box.left) * scale;
    const near = lines.filter(line => !line.kind.startsWith("faint")).map(line =>
      [line.name, line.points.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best)]).filter(([, p]) => Math.abs(p[0] - x) < 30);
    if (!near.length) return hide();
    const at = near[0][1];
    cursor.setAttribute("x1", at[0]); cursor.setAttribute("x2", at[0]); cursor.style.visibility = "visible";
    tip.textContent = "";
    for (const text of [at[2], ...near.map(([name, p]) => `${p[3]}  ${name}`)]) tip.appendChild(document.createElement("div")).textContent = text;
    tip.style.display = "block";
    tip.style.top = "8px";
    const left = at[0] / scale + 12;
    tip.style.left = Math.max(0, Math.min(left, box.width - tip.offsetWidth)) + "px";
  });
}
