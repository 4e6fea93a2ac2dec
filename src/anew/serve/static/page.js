"use strict";
// The page shows texts as tokens, each with its likeliest alternatives. Choosing an alternative keeps
// the tokens before it and lets the model continue from their ids.
const $ = id => document.getElementById(id);
const visible = text => text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
const percent = logP => { const p = 100 * Math.exp(logP); return p >= 0.1 ? p.toFixed(1) + "%" : "<0.1%"; };
const brief = name => name.split("/").slice(-2).join("/");
const running = new Set();  // texts that are being generated
const chatModels = new Set();  // names of the models that were trained on conversations
let chatting = false;  // whether the page shows a conversation
let turns = [];  // of the conversation: what the user said, and the answer of each model

function make(kind, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(kind), attributes);
  element.append(...children);
  return element;
}

async function start() {
  const models = await (await fetch("api/models")).json();
  for (const { name, is_chat } of models) {
    $("model").append(new Option(brief(name), name)); $("beside").append(new Option(brief(name), name));
    if (is_chat) chatModels.add(name);
  }
  $("beside").prepend(new Option("none", ""));
  $("beside").value = models.length > 1 ? models[models.length - 1].name : "";
  $("beside-label").hidden = models.length < 2;
  $("n_tokens").max = Math.min(...models.map(m => m.positions));
  if (+$("n_tokens").value > $("n_tokens").max / 2) $("n_tokens").value = Math.floor($("n_tokens").max / 2);
  renew();
}

const isChat = () => chatModels.has($("model").value);

// Begin a new conversation, or an empty page for texts.
function renew() {
  close();
  closeInside();
  for (const text of running) text.leaving?.abort();
  running.clear();
  turns = [];
  chatting = isChat();
  $("texts").replaceChildren();
  $("write").textContent = isChat() ? "Send" : "Write";
  $("renew").hidden = !isChat();
  $("prompt").placeholder = isChat() ? "Your message. Enter sends it." : "Text to continue. If empty, the model begins a document.";
}

// What was said before, as one model knows it.
function conversation(model) {
  return turns.flatMap(turn => {
    const answer = turn.answers.find(text => text.model === model);
    return answer?.written() ? [{ role: "user", content: turn.message }, { role: "assistant", content: answer.written() }] : [];
  });
}

function send(names) {
  const message = $("prompt").value.trim();
  if (!message || running.size) return;
  $("texts").append(make("p", { className: "said", textContent: message }));
  const answers = names.filter(name => chatModels.has(name)).map(name => {
    return new Text(name, "", [...conversation(name), { role: "user", content: message }]);
  });
  turns.push({ message, answers });
  $("prompt").value = "";
  run(answers);
}

class Text {
  // `without`: parts of the model that are switched off, as the inside view makes them.
  constructor(model, promptText, messages = [], without = []) {
    this.model = model;
    this.without = without;
    this.name = brief(model) + (without.length ? ` without ${without.map(nameOf).join(", ")}` : "");
    this.promptText = promptText;
    this.messages = messages;
    this.unseen = "";
    this.promptIds = null;
    this.tokens = [];
    this.note = make("span");
    this.body = make("div", { className: "text" }, make("span", { className: "prompt", textContent: promptText }));
    this.look = make("button", { type: "button", className: "look", textContent: "Look inside", hidden: true });
    this.look.addEventListener("click", () => openInside(this));
    this.article = make("article", {}, make("h2", {}, make("span", { textContent: this.name, title: model }), this.note, this.look), this.body);
    $("texts").append(this.article);
  }

  // Continue the prompt and the tokens that were kept.
  async write() {
    const rules = Object.fromEntries(["n_tokens", "temperature", "top_k", "top_p", "seed"].map(name => [name, Number($(name).value)]));
    rules.n_tokens = Math.max(1, rules.n_tokens - this.tokens.length);
    const beginning = this.promptIds ? { prompt: [...this.promptIds, ...this.tokens.map(t => t.id)] }
      : this.messages.length ? { messages: this.messages } : { prompt: this.promptText };
    const leaving = this.leaving = new AbortController();
    const note = content => { if (this.leaving === leaving) this.note.replaceChildren(content); };  // not those of an older request
    let began = 0, count = 0;  // The clock starts with the first token, since texts are generated one after the other.
    note("waiting for its turn");
    try {
      const answer = await fetch("api/write", { method: "POST", signal: leaving.signal, headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: this.model, ...beginning, ...rules, without: this.without }) });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      for await (const token of events(answer)) {
        if (token.error) throw new Error(token.error.message);
        if (token.prompt_ids) {
          this.promptIds ??= token.prompt_ids;
          if (token.messages_left_out) this.unseen = `, without the ${token.messages_left_out} oldest messages`;
          continue;
        }
        this.add(token);
        began ||= performance.now();
        const speed = count++ ? `, ${(1000 * (count - 1) / (performance.now() - began)).toFixed(0)} a second` : "";
        note(`${count} token${count === 1 ? "" : "s"}${speed}${this.unseen}`);
      }
    } catch (error) {
      leaving.abort();
      note(error.name === "AbortError" ? "stopped" : make("span", { className: "error", role: "alert", textContent: error.message }));
    }
  }

  add(token) {
    this.look.hidden = false;
    const index = this.tokens.length;
    const span = make("span", { className: token.is_end_of_text ? "token end" : "token", tabIndex: 0, textContent: token.is_end_of_text ? "end of text" : token.text });
    span.title = `${percent(token.log_p)}`;
    span.style.setProperty("--doubt", Math.min(1, -token.log_p / 6).toFixed(3));
    span.addEventListener("click", () => offer(this, index, span));
    span.setAttribute("role", "button");
    span.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();  // else the same key would press the first alternative, which gets the focus
      offer(this, index, span);
    });
    this.tokens.push({ ...token, span });
    this.body.append(span);
  }

  // The ids of the prompt and of the text.
  ids() {
    return [...this.promptIds, ...this.tokens.map(token => token.id)];
  }

  // The text that was generated, without the end of text.
  written() {
    return this.tokens.filter(token => !token.is_end_of_text).map(token => token.text).join("");
  }

  async branch(index, choice) {
    this.leaving?.abort();
    const old = this.tokens[index];
    for (const token of this.tokens.splice(index)) token.span.remove();
    const ends = this.messages.length > 0 && choice.label === "<|endoftext|>";  // an answer ends there
    this.add({ id: choice.id, text: choice.label, log_p: choice.log_p, alternatives: old.alternatives, is_end_of_text: ends });
    this.tokens[index].span.classList.add("chosen");
    if (!ends) await run([this]);
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
}

let offered = null;  // the token whose alternatives are shown

function offer(text, index, span) {
  offered = span;
  const token = text.tokens[index], box = $("choices");
  const best = Math.max(...token.alternatives.map(a => a.log_p));
  const rows = token.alternatives.map(choice => {
    const row = make("button", { type: "button", className: choice.id === token.id ? "taken" : "" },
      make("code", { textContent: visible(choice.label) }), make("span", { textContent: percent(choice.log_p) }));
    row.style.setProperty("--share", `${(100 * Math.exp(choice.log_p - best)).toFixed(1)}%`);
    row.addEventListener("click", () => { close(); text.branch(index, choice); });
    return row;
  });
  const said = token.is_end_of_text ? "The text ended here" : `Taken: “${visible(token.text)}”, ${percent(token.log_p)}`;
  box.replaceChildren(make("p", { textContent: `${said}. The ten likeliest; choose one to go on from it:` }), ...rows);
  box.hidden = false;
  place();
  rows[0]?.focus({ preventScroll: true });
}

// Put the alternatives under their token.
function place() {
  const box = $("choices");
  if (box.hidden) return;
  const at = offered.getBoundingClientRect();
  box.style.left = `${Math.max(12, Math.min(at.left, innerWidth - box.offsetWidth - 12)) + scrollX}px`;
  box.style.top = `${at.bottom + scrollY + 6}px`;
}

function close() {
  const hadFocus = $("choices").contains(document.activeElement);
  $("choices").hidden = true;
  if (hadFocus) offered?.focus({ preventScroll: true });
}

async function run(texts) {
  await Promise.all(texts.map(async text => {
    const mine = {};  // a branched text starts again while its old request ends
    text.writing = mine;
    running.add(text);
    $("write").disabled = true; $("stop").disabled = false;
    await text.write();
    if (text.writing === mine) running.delete(text);
  }));
  if (!running.size) { $("write").disabled = false; $("stop").disabled = true; }
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  close();
  const names = [$("model").value, ...($("beside").value ? [$("beside").value] : [])];
  if (isChat()) return send([...new Set(names)]);
  renew();
  run(names.map(name => new Text(name, $("prompt").value)));
});
$("model").addEventListener("change", () => { if (isChat() || chatting) renew(); });
$("renew").addEventListener("click", renew);
$("stop").addEventListener("click", () => { for (const text of running) text.leaving?.abort(); });
$("prompt").addEventListener("keydown", event => {
  const sends = event.ctrlKey || event.metaKey || (isChat() && !event.shiftKey && !event.isComposing);
  if (event.key === "Enter" && sends) { event.preventDefault(); $("ask").requestSubmit(); }
});
document.addEventListener("keydown", event => { if (event.key === "Escape") close(); });
addEventListener("resize", place);
document.addEventListener("click", event => { if (!event.target.closest("#choices, .token")) close(); });
document.addEventListener("DOMContentLoaded", start);  // after inside.js
