// Load the model that lies beside this page, and continue the user's text with it.
import { AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, TextStreamer, Tensor, env } from "./runtime/transformers.min.js";

const $ = id => document.getElementById(id);
const here = path => new URL(path, import.meta.url).href;
const runtime = "runtime/ort-wasm-simd-threaded.asyncify";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL("./", import.meta.url).pathname;  // transformers.js takes an address with a host for a remote one
env.useBrowserCache = false;
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = { mjs: here(`${runtime}.mjs`), wasm: here(`${runtime}.wasm`) };

const interrupt = new InterruptableStoppingCriteria();
let settings, tokenizer, model;

async function load() {
  $("status").textContent = "loading the model";
  settings = await (await fetch("settings.json")).json();
  $("name").textContent = document.title = settings.name;
  $("n_tokens").max = settings.positions - 1;
  $("n_tokens").value = Math.min($("n_tokens").value, $("n_tokens").max);
  // ?device=wasm computes on the processor even where the browser has WebGPU.
  const wanted = new URLSearchParams(location.search).get("device");
  const hasGpu = Boolean(await navigator.gpu?.requestAdapter());
  const device = wanted ?? (hasGpu ? "webgpu" : "wasm");
  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", { dtype: settings.dtype, device });
  $("status").textContent = `ready, with ${device === "webgpu" ? "WebGPU" : "WebAssembly"}`;
  $("write").disabled = false;
}

async function write() {
  const prompt = $("prompt").value;
  const ids = tokenizer.encode(prompt, { add_special_tokens: false });
  if (!ids.length) ids.push(settings.end_of_text);
  $("text").replaceChildren();
  const room = settings.positions - ids.length;
  if (room < 1) throw new Error(`The prompt has ${ids.length.toLocaleString("en")} tokens, and the model reads at most ${settings.positions}.`);
  const shape = [1, ids.length];
  const inputs = {
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
    attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
  };
  const before = Object.assign(document.createElement("span"), { className: "prompt", textContent: prompt });
  const written = document.createElement("span");
  $("text").replaceChildren(before, written);
  let count = 0, began = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: text => { written.textContent += text; },
    token_callback_function: () => {
      began ||= performance.now();  // the first token waits for the prompt to be read
      const speed = count++ ? `, ${(1000 * (count - 1) / (performance.now() - began)).toFixed(0)} a second` : "";
      $("status").textContent = `${count} token${count === 1 ? "" : "s"}${speed}`;
    },
  });
  const temperature = Number($("temperature").value);
  interrupt.reset();
  const wanted = Number($("n_tokens").value), n_tokens = Math.min(wanted, room);
  const output = await model.generate({
    ...inputs,
    max_new_tokens: n_tokens,
    do_sample: temperature > 0,
    temperature: temperature || 1,
    top_k: Number($("top_k").value),
    streamer,
    stopping_criteria: interrupt,
  });
  if (n_tokens < wanted && count === n_tokens) $("status").textContent += `; the model reads at most ${settings.positions} tokens`;
  $("text").dataset.ids = output.tolist()[0].slice(ids.length).join(" ");  // for tests
}

async function attempt(work) {
  try { await work(); } catch (error) {
    $("status").replaceChildren(Object.assign(document.createElement("span"), { className: "error", textContent: error.message ?? error }));
  }
}

$("ask").addEventListener("submit", async event => {
  event.preventDefault();
  $("write").disabled = true; $("stop").disabled = false;
  $("status").ariaLive = "off";  // a screen reader would read every count
  await attempt(write);
  $("status").ariaLive = "polite";
  $("status").append(" ");  // read the last one
  $("write").disabled = false; $("stop").disabled = true;
});
$("stop").addEventListener("click", () => interrupt.interrupt());
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); if (!$("write").disabled) $("ask").requestSubmit(); }
});
attempt(load);
