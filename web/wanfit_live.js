// Shows on the nodes, while widgets change, what a run would need: POST /wanfit/plan answers.
// Without that route nothing is shown.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allNodes, BUTTON, COLOURS, ink, make, Panel } from "./wanfit_panel.js";
import { duration, explained, loaded, named, say, whenLanguageChanges } from "./wanfit_words.js";

const SAMPLERS = new Set(["WanGenerate", "WanChunkedSampler"]);
const SHOWN = new Set([...SAMPLERS, "WanEstimateMemory", "WanOptimize"]);
const NAME = "wanfit_plan";
const TICK_MS = 300; // widgets are looked at so often; a value must hold still for one tick
const REFRESH_MS = 15000; // free memory changes too
const MOST_HEIGHT = 260;
const MUTED = 2;
const BYPASSED = 4; // modes of a node
const states = new WeakMap(); // node -> {panel, seen, sent, at}
const notes = new WeakMap(); // widget -> the note in its label
let missing = false; // the route is not there

// -- what is wired ------------------------------------------------------------------------------
const linkOf = (graph, id) => graph.links?.get?.(id) ?? graph.links?.[id] ?? graph._links?.get?.(id);

// Returns [node, slot] that gives an input, through reroutes and the edges of subgraphs; {value} for a
// widget of a subgraph; or null.
function sourceOf(node, slot, depth = 0) {
  const id = node?.inputs?.[slot]?.link;
  const graph = node?.graph ?? app.graph;
  return id == null ? null : giverOf(graph, linkOf(graph, id), depth);
}

function giverOf(graph, link, depth) {
  if (!link || depth > 50) return null;
  const from = graph.getNodeById(link.origin_id);
  if (!from) {
    // The edge of a subgraph: what is wired to the node that stands for it, or its widget.
    for (const outer of allNodes(app.graph)) {
      if (outer.subgraph !== graph) continue;
      const input = outer.inputs?.[link.origin_slot];
      const widget = input?.link == null && outer.widgets?.find((one) => one.name === input?.widget?.name);
      return widget ? { value: widget.value } : sourceOf(outer, link.origin_slot, depth + 1);
    }
    return null;
  }
  if (from.mode === MUTED) return null; // its links are left out of what is run
  if (from.type === "Reroute") return sourceOf(from, 0, depth + 1);
  // A bypassed node lets the first input of the same type through.
  if (from.mode === BYPASSED) {
    const type = from.outputs?.[link.origin_slot]?.type;
    const same = from.inputs?.findIndex((input) => input.type === type) ?? -1;
    return same < 0 ? null : sourceOf(from, same, depth + 1);
  }
  if (from.subgraph) {
    const inner = from.subgraph.outputs?.[link.origin_slot]?.linkIds?.[0];
    return inner == null ? null : giverOf(from.subgraph, linkOf(from.subgraph, inner), depth + 1);
  }
  return [from, link.origin_slot];
}

const keyOf = (node) => `${node.graph?.isRootGraph === false ? node.graph.id + ":" : ""}${node.id}`;

function asApi(node) {
  const inputs = {};
  for (const widget of node.widgets ?? []) {
    const value = widget.value;
    if (widget.serialize === false || widget.name === "control_after_generate") continue;
    if (["string", "number", "boolean"].includes(typeof value)) inputs[widget.name] = value;
  }
  // Only whether there is a prompt matters, and not what it says.
  for (const name of ["prompt", "negative_prompt"]) {
    if (inputs[name]) inputs[name] = inputs[name].slice(0, 40);
  }
  (node.inputs ?? []).forEach((input, slot) => {
    if (input.link == null) return;
    const source = sourceOf(node, slot);
    const value = source?.[0]?.type === "PrimitiveNode" ? source[0].widgets?.[0]?.value : source?.value;
    inputs[input.name] = value ?? (source?.[0] ? [keyOf(source[0]), source[1]] : ["gone", 0]);
  });
  return { class_type: node.comfyClass ?? node.type, inputs };
}

function pipelineOf(node) {
  const slot = node.inputs?.findIndex((input) => input.name === "pipeline") ?? -1;
  return slot < 0 ? null : (sourceOf(node, slot)?.[0] ?? null);
}

function chainOf(node) {
  const chain = [];
  for (let at = node; at && !chain.includes(at) && chain.length < 40; at = pipelineOf(at)) chain.push(at);
  return chain;
}

// The first sampler whose pipeline passes this node.
function samplerAfter(node) {
  for (const one of allNodes(app.graph)) {
    if (SAMPLERS.has(one.comfyClass) && one.mode !== MUTED && one.mode !== BYPASSED && chainOf(one).includes(node)) return one;
  }
  return null;
}

function requestOf(node) {
  const sampler = SAMPLERS.has(node.comfyClass) ? null : samplerAfter(node);
  // What is optimised is the job that is wired; an estimate has sizes of its own.
  const asking = node.comfyClass === "WanOptimize" && sampler ? sampler : node;
  const nodes = {};
  for (const one of [...chainOf(asking), ...(sampler ? [sampler] : [])]) nodes[keyOf(one)] = asApi(one);
  const request = { node: keyOf(asking), nodes };
  if (sampler && asking !== sampler) request.beside = keyOf(sampler);
  return request;
}

// -- what is shown ------------------------------------------------------------------------------
function bars(answer) {
  const box = make("div", "display:grid;grid-template-columns:auto 1fr auto;gap:1px 6px;align-items:center;margin:3px 0");
  const usable = answer.usable_gib ?? 0;
  const scale = 100 / Math.max(...answer.stages.map((stage) => stage.gib), usable, 1e-6);
  for (const stage of answer.stages) {
    const bar = make("div", "position:relative;height:8px;background:rgba(128,128,128,.25);border-radius:2px;overflow:hidden");
    const part = (left, right, colour) =>
      bar.append(make("div", `position:absolute;top:0;bottom:0;left:${left * scale}%;width:${(right - left) * scale}%;background:${colour}`));
    part(0, stage.weights_gib, COLOURS.weights);
    part(stage.weights_gib, stage.gib, COLOURS.work);
    if (stage.over) part(usable, stage.gib, COLOURS.bad);
    if (usable) bar.append(make("div", `position:absolute;top:0;bottom:0;left:calc(${usable * scale}% - 2px);width:2px;background:${COLOURS.warn}`));
    const label = named("stage", stage.label);
    bar.title = say("plan.bar", { stage: label, all: stage.gib.toFixed(2), weights: stage.weights_gib.toFixed(2), ram: stage.ram_gib.toFixed(2) });
    box.append(make("span", "white-space:nowrap", label), bar, make("span", "", stage.gib.toFixed(stage.gib < 10 ? 2 : 1)));
  }
  return box;
}

function buttons(node, answer) {
  const box = make("div", "display:flex;flex-wrap:wrap;gap:4px;margin-top:3px");
  for (const fix of answer.fixes ?? []) {
    const button = make("button", BUTTON, fix.label);
    button.addEventListener("click", () => carryOut(node, fix));
    box.append(button);
  }
  return box;
}

// The headline in the language of the page, from the numbers that the server's English one is made of.
function headline(answer) {
  if (answer.usable_gib == null) return answer.headline;
  const sizes = { all: answer.peak_gib, usable: answer.usable_gib, ram: answer.ram_gib, most: answer.ram_usable_gib };
  const gib = Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, size.toFixed(1)]));
  const text = say(`verdict.${answer.verdict}`, { ...gib, device: answer.device === "RAM" ? say("plan.in RAM") : answer.device });
  if (!text) return answer.headline;
  if (answer.seconds == null || answer.verdict !== "fits") return text;
  const cold = answer.seconds_cold > 1.1 * answer.seconds;
  return text + say("plan.takes", { time: duration(answer.seconds) }) + (cold ? say("plan.first time", { time: duration(answer.seconds_cold) }) : "");
}

function draw(node, state, answer) {
  // The panel comes with the first answer: without one, the node stays as it is.
  state.panel ??= new Panel(node, NAME, "wanfit_panel", MOST_HEIGHT);
  const element = state.panel.element;
  const lines = [];
  if (!answer.ok) lines.push(make("div", `${ink(COLOURS.bad)};font-weight:bold;white-space:pre-wrap`, explained(answer.kind, answer.error)));
  else {
    const warnings = answer.warnings.map((text) => make("div", ink(COLOURS.warn), `⚠ ${text}`));
    const colour = answer.fits === false ? COLOURS.bad : COLOURS.good;
    const about = node.comfyClass === "WanOptimize" ? say("plan.about", { width: answer.size[0], height: answer.size[1], frames: answer.size[2] }) : "";
    const ram = say("plan.ram", { ram: answer.ram_gib.toFixed(1), usable: answer.ram_usable_gib.toFixed(1) });
    lines.push(
      ...warnings,
      make("div", `${ink(colour)};font-weight:bold`, about + headline(answer)),
      buttons(node, answer),
      bars(answer),
      make("div", "opacity:.75", [answer.device === "RAM" ? null : ram, ...answer.resolved].filter(Boolean).join(" · ")),
    );
    element.title = answer.reasons.join("\n");
    if (answer.while_busy) lines.push(make("div", "opacity:.6", say("plan.busy")));
  }
  if (!answer.ok) lines.push(buttons(node, answer));
  element.replaceChildren(...lines);
  element.dataset.fits = answer.ok ? String(answer.fits) : "error";
  grey(node, answer);
  state.panel.fit();
}

// A widget at 0 stands for the official value: its label says which.
function grey(node, answer) {
  if (!answer.ok || !SAMPLERS.has(node.comfyClass)) return;
  for (const [name, value] of Object.entries(answer.official)) {
    const widget = node.widgets?.find((one) => one.name === name);
    if (!widget) continue;
    const unused = answer.unused[name];
    const note = unused ? say("plan.unused", { why: unused }) : value != null && !widget.value ? say("plan.official", { value: +value.toFixed(3) }) : "";
    // What the user or a translation calls the widget stays; only our note comes and goes.
    const ours = notes.get(widget) ?? "";
    const plain = ours && widget.label?.endsWith(ours) ? widget.label.slice(0, -ours.length) : widget.label;
    const label = note ? (plain ?? name) + note : plain === name ? undefined : plain;
    notes.set(widget, note);
    if (widget.label !== label) widget.label = label;
  }
}

function stateOf(node) {
  if (!states.has(node)) states.set(node, { seen: "", sent: "", at: 0 });
  return states.get(node);
}

// -- fixes --------------------------------------------------------------------------------------
function find(key) {
  for (const node of allNodes(app.graph)) if (keyOf(node) === key) return node;
  return null;
}

function set(node, name, value) {
  const widget = node?.widgets?.find((one) => one.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

function carryOut(node, fix) {
  app.graph.beforeChange?.();
  for (const change of fix.set ?? []) set(find(change.node), change.widget, change.value);
  if (fix.insert) insert(find(fix.insert.before) ?? node, fix.insert);
  app.graph.afterChange?.();
  app.graph.setDirtyCanvas(true, true);
}

function insert(before, what) {
  const slot = before.inputs.findIndex((input) => input.name === "pipeline");
  const source = sourceOf(before, slot);
  const made = LiteGraph.createNode(what.class_type);
  if (!made || !source) return;
  made.pos = [before.pos[0] - made.size[0] - 40, before.pos[1] - 40];
  (before.graph ?? app.graph).add(made);
  for (const [name, value] of Object.entries(what.values)) set(made, name, value);
  source[0].connect(source[1], made, made.inputs.findIndex((input) => input.name === "pipeline"));
  made.connect(0, before, slot);
}

// -- asking -------------------------------------------------------------------------------------
async function ask(request) {
  const options = { method: "POST", headers: { "Content-Type": "application/json", "WanFit-Client": api.clientId ?? "" }, body: JSON.stringify(request) };
  const response = await api.fetchApi("/wanfit/plan", options);
  if (response.status === 404 || response.status === 405) missing = true;
  const known = [200, 400, 403, 413, 415, 500].includes(response.status);
  return known ? await response.json() : null; // 429: asked again at the next tick
}

async function refresh(node, state, request, key) {
  state.waiting = true;
  try {
    let answer = await ask(request);
    if (missing) return remove(node, state);
    if (!answer) return void (state.sent = "");
    state.sent = key;
    state.at = Date.now();
    if (!state.shown || answer.fits !== false) draw(node, state, answer);
    if (answer.ok && answer.fits === false) {
      // What would fit takes longer to find.
      answer = (await ask({ ...request, fixes: true })) ?? answer;
      draw(node, state, answer);
    }
    state.shown = true;
  } catch (error) {
    state.sent = ""; // the server is away; asked again
    state.at = Date.now();
  } finally {
    state.waiting = false;
  }
}

function remove(node, state) {
  state.panel?.remove();
  states.delete(node);
}

function tick() {
  if (missing || document.hidden || !app.graph) return;
  for (const node of allNodes(app.graph)) {
    if (!SHOWN.has(node.comfyClass)) continue;
    const state = stateOf(node);
    state.panel?.fit(); // text wraps anew when the node becomes narrower
    if (state.waiting) continue;
    const request = requestOf(node);
    const key = JSON.stringify(request);
    const still = key === state.seen;
    const due = key !== state.sent || Date.now() - state.at > REFRESH_MS;
    state.seen = key;
    if (still && due) void refresh(node, state, request, key);
  }
}

app.registerExtension({
  name: "wanfit.live",
  async setup() {
    await loaded();
    // In another language everything is shown anew.
    whenLanguageChanges(() => { for (const node of allNodes(app.graph)) if (states.has(node)) stateOf(node).sent = ""; });
    setInterval(tick, TICK_MS);
  },
});
