"use strict";
// The inside view: what a model computes while it reads a text. It shows the attention of each head, the
// likeliest next tokens after each block, and lets heads, attentions and MLPs be switched off.
const MOST_TOKENS = 256;  // the server shows no more
const NAMES = { head: part => `head ${part.block}.${part.head}`, attention: part => `attention ${part.block}`, mlp: part => `MLP ${part.block}` };
const nameOf = part => NAMES[part.kind](part);
const share = weight => `${(weight / 100).toFixed(weight < 1000 ? 1 : 0)}%`;  // the server sends ten-thousandths
const inside = { text: null, ids: [], token: 0, block: 0, head: 0, off: [], found: null, isAsking: false, wasAsked: false };

function openInside(text) {
  Object.assign(inside, { text, ids: text.ids().slice(0, MOST_TOKENS), block: 0, head: 0, off: [...text.without], found: null });
  inside.token = inside.ids.length - 1;
  const cut = text.ids().length > MOST_TOKENS ? `, its first ${MOST_TOKENS} tokens` : "";
  $("inside-title").textContent = `Inside ${text.name}${cut}`;
  for (const name of ["inside-tokens", "heads", "lines", "layers", "switches", "attention-text", "layers-text", "off"]) $(name).replaceChildren();
  $("matrix").width = 0;
  $("inside").hidden = false;
  ask();
  scrollToward($("inside"), "start");
  $("inside-title").focus({ preventScroll: true });
}

function closeInside() {
  const hadFocus = $("inside").contains(document.activeElement);
  $("inside").hidden = true;
  if (hadFocus) inside.text?.look.focus();
}

// Ask the server for what the chosen token, block and head show, and draw it. One request is under way at a time;
// what is chosen meanwhile is asked for when it is answered, and only the last choice.
async function ask() {
  inside.wasAsked = true;
  if (inside.isAsking) return;
  inside.isAsking = true;
  while (inside.wasAsked && !$("inside").hidden) {
    inside.wasAsked = false;
    const { text, ids, token, block, head, off } = inside;
    $("inside-status").textContent = inside.found ? "" : "reading the text";
    try {
      const answer = await fetch("api/inside", { method: "POST", headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: text.model, prompt: ids, token, block, head, without: off }) });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error.message);
      if (inside.wasAsked) continue;
      inside.found = found;
      $("inside-status").textContent = "";
      drawInside();
    } catch (error) {
      $("inside-status").replaceChildren(make("span", { className: "error", textContent: error.message }));
    }
  }
  inside.isAsking = false;
}

function choose(changes) { Object.assign(inside, changes); ask(); }

function drawInside() {
  // Which group, or which switch, had the focus before its elements are replaced.
  const focused = document.activeElement?.dataset.roving;
  const pressed = [...$("switches").children].indexOf(document.activeElement);
  drawTokens();
  drawHeads();
  drawAttention();
  drawLayers();
  drawSwitches();
  if (pressed >= 0) $("switches").children[pressed].focus({ preventScroll: true });
  if (focused) document.querySelector(`[data-roving=${focused}][tabindex="0"]`).focus({ preventScroll: true });
}

// Each token is shaded by how much the chosen token attends to it, compared with the strongest.
function drawTokens() {
  const { tokens, matrix } = inside.found;
  const row = matrix[inside.token], largest = Math.max(...row);
  const options = tokens.map((label, i) => {
    const option = make("span", { textContent: visible(label), className: "option" });
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", i === inside.token);
    option.style.setProperty("--weight", ((row[i] ?? 0) / largest).toFixed(3));
    option.title = i <= inside.token ? `receives ${share(row[i])}` : "comes later, so it is not seen";
    return option;
  });
  roving("tokens", options, inside.token, 1, i => choose({ token: i }));
  $("inside-tokens").replaceChildren(...options);
}

// A table of blocks and heads, shaded by the largest weight that the chosen token gives to any token but the first.
function drawHeads() {
  const { rows, tokens } = inside.found;
  const buttons = [];
  const lines = rows.map((heads, block) => {
    const cells = heads.map((weights, head) => {
      const strongest = weights.indexOf(Math.max(...weights));
      const label = `block ${block}, head ${head}: most to ${visible(tokens[strongest])}, ${share(weights[strongest])}`;
      const isOff = inside.off.some(part => part.kind !== "mlp" && part.block === block && (part.kind === "attention" || part.head === head));
      const button = make("button", { type: "button", title: label, className: isOff ? "head off" : "head", textContent: isOff ? "\u00d7" : "" });
      button.setAttribute("aria-label", isOff ? `${label}, switched off` : label);
      button.setAttribute("aria-pressed", block === inside.block && head === inside.head);
      button.style.setProperty("--weight", (Math.max(0, ...weights.slice(1)) / 10000).toFixed(3));
      buttons.push(button);
      return make("td", {}, button);
    });
    return make("tr", {}, make("th", { scope: "row", textContent: block }), ...cells);
  });
  const numbers = rows[0].map((_, head) => make("th", { scope: "col", textContent: head }));
  $("heads").replaceChildren(make("thead", {}, make("tr", {}, make("td"), ...numbers)), make("tbody", {}, ...lines));
  const columns = rows[0].length;
  roving("heads", buttons, inside.block * columns + inside.head, columns, i => choose({ block: Math.floor(i / columns), head: i % columns }));
}

function drawAttention() {
  if (!inside.found) return;
  const { tokens, matrix } = inside.found;
  const isMatrix = document.querySelector("[name=view]:checked").value === "matrix";
  $("matrix").hidden = !isMatrix;
  $("lines").toggleAttribute("hidden", isMatrix);  // SVG has no property of this name
  (isMatrix ? drawMatrix : drawLines)();
  const row = matrix[inside.token].map((weight, i) => ({ weight, label: tokens[i] })).sort((a, b) => b.weight - a.weight);
  const strongest = row.slice(0, 3).map(({ weight, label }) => `\u201c${visible(label)}\u201d ${share(weight)}`).join(", ");
  $("attention-text").textContent = `Head ${inside.block}.${inside.head}: \u201c${visible(tokens[inside.token])}\u201d attends most to ${strongest}.`;
}

// One row for each token, one column for each token that it may attend to.
function drawMatrix() {
  const { matrix } = inside.found;
  const canvas = $("matrix"), n = matrix.length, cell = Math.max(2, Math.floor(840 / n));
  canvas.width = canvas.height = n * cell;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  matrix.forEach((row, i) => row.forEach((weight, j) => {
    pen.fillStyle = `rgba(${style.getPropertyValue("--unsure")}, ${Math.sqrt(weight / 10000)})`;
    pen.fillRect(j * cell, i * cell, cell, cell);
  }));
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 3;
  pen.strokeRect(1.5, inside.token * cell + 1.5, (inside.token + 1) * cell - 3, Math.max(cell - 3, 1));
}

// The tokens twice, with a line from each token to those that it attends to.
function drawLines() {
  const { tokens, matrix } = inside.found;
  const svg = (kind, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };
  const step = 17, width = 420, left = 140, right = 280;
  const shortened = label => { const text = visible(label); return text.length > 14 ? `${text.slice(0, 13)}\u2026` : text; };
  const lines = [], strong = [], labels = [];
  matrix.forEach((row, i) => row.forEach((weight, j) => {
    const isChosen = i === inside.token;
    if (weight < (isChosen ? 100 : 1000)) return;  // 1%, and 10%
    const line = svg("line", { x1: left, x2: right, y1: (i + 0.6) * step, y2: (j + 0.6) * step, "stroke-opacity": isChosen ? Math.max(0.15, weight / 10000) : weight / 40000 });
    line.classList.add(isChosen ? "chosen" : "other");
    (isChosen ? strong : lines).push(line);
  }));
  tokens.forEach((label, i) => {
    const query = svg("text", { x: left - 6, y: (i + 0.85) * step, "text-anchor": "end" }, shortened(label));
    if (i === inside.token) query.classList.add("chosen");
    query.addEventListener("click", () => choose({ token: i }));
    labels.push(query, svg("text", { x: right + 6, y: (i + 0.85) * step }, shortened(label)));
  });
  $("lines").setAttribute("viewBox", `0 0 ${width} ${tokens.length * step + 6}`);
  $("lines").replaceChildren(...lines, ...strong, ...labels);
  const view = $("lines").parentElement;
  view.scrollTop = (inside.token + 1) / tokens.length * view.scrollHeight - view.clientHeight / 2;
}

// What the attention and the MLP of each block add, and what the model would say after the block.
function drawLayers() {
  const { layers, tokens } = inside.found;
  const next = inside.ids[inside.token + 1];
  const largest = Math.max(...layers.map(layer => Math.max(layer.attention_norm, layer.mlp_norm)), 1e-9);
  const bar = norm => {
    const element = make("span", { className: "norm", textContent: norm.toPrecision(3) });
    element.style.setProperty("--share", `${(100 * norm / largest).toFixed(1)}%`);
    return make("td", {}, element);
  };
  const rows = layers.map((layer, i) => {
    const guesses = layer.likeliest.map(({ id, label, log_p }) => {
      const guess = make("span", { className: id === next ? "guess came" : "guess" }, make("code", { textContent: visible(label) }), ` ${percent(log_p)}`);
      guess.style.setProperty("--weight", Math.exp(log_p).toFixed(3));
      return guess;
    });
    const added = i ? [bar(layer.attention_norm), bar(layer.mlp_norm)] : [make("td"), make("td")];
    return make("tr", {}, make("th", { scope: "row", textContent: i ? `block ${i - 1}` : "start" }), ...added, make("td", {}, ...guesses));
  });
  const head = ["after", "norm: attention", "norm: MLP", "likeliest next tokens"].map(text => make("th", { scope: "col", textContent: text }));
  $("layers").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  const came = next === undefined ? "" : ` The token that came next, \u201c${visible(tokens[inside.token + 1])}\u201d, is framed.`;
  $("layers-text").textContent = `After \u201c${visible(tokens[inside.token])}\u201d: what the final layer norm and the head make of the residual stream at the start and after each block, and the norms of what the attention and the MLP of the block added to it. The last row is the model's own answer.${came}`;
}

function drawSwitches() {
  const { block, head, off } = inside;
  const parts = [{ block, kind: "head", head }, { block, kind: "attention", head: 0 }, { block, kind: "mlp", head: 0 }];
  const isOff = part => off.some(other => nameOf(other) === nameOf(part));
  $("switches").replaceChildren(...parts.map(part => {
    const button = make("button", { type: "button", textContent: `${isOff(part) ? "Switch on" : "Switch off"} ${nameOf(part)}` });
    button.addEventListener("click", () => choose({ off: isOff(part) ? off.filter(other => nameOf(other) !== nameOf(part)) : [...off, part] }));
    return button;
  }));
  $("off").textContent = off.length ? `Switched off: ${off.map(nameOf).join(", ")}.` : "Nothing is switched off.";
  $("rewrite").disabled = !off.length;
}

// Let the arrow keys move between elements of which one is chosen; `columns` of them stand in a row.
function roving(group, elements, chosen, columns, onChoose) {
  elements.forEach((element, i) => {
    element.dataset.roving = group;
    element.tabIndex = i === chosen ? 0 : -1;
    element.addEventListener("click", () => onChoose(i));
    element.addEventListener("keydown", event => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -i, End: elements.length - 1 - i };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const target = i + steps[event.key];
      if (target >= 0 && target < elements.length) { elements[target].focus({ preventScroll: true }); onChoose(target); }
    });
  });
}

function scrollToward(element, block) {
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ behavior: isCalm ? "auto" : "smooth", block });
}

$("inside-close").addEventListener("click", closeInside);
$("rewrite").addEventListener("click", () => {
  const { text, off } = inside;
  const again = new Text(text.model, text.promptText, text.messages, off);
  again.promptIds = text.promptIds;
  scrollToward(again.article, "center");
  run([again]);
});
for (const choice of document.querySelectorAll("[name=view]")) choice.addEventListener("change", drawAttention);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAttention);
$("matrix").addEventListener("click", event => {
  if (!inside.found) return;
  const box = $("matrix").getBoundingClientRect(), n = inside.found.matrix.length;
  choose({ token: Math.min(n - 1, Math.max(0, Math.floor(n * (event.clientY - box.top) / box.height))) });
});
$("matrix").addEventListener("pointermove", event => {
  if (!inside.found) return;
  const box = $("matrix").getBoundingClientRect(), { matrix, tokens } = inside.found, n = matrix.length;
  const [i, j] = [event.clientY - box.top, event.clientX - box.left].map(at => Math.floor(n * at / box.width));
  const weight = matrix[i]?.[j];
  $("matrix").title = weight === undefined ? "" : `${visible(tokens[i])} \u2192 ${visible(tokens[j])}: ${share(weight)}`;
});
