// "Convert to WanFit": puts our nodes in the place of ComfyUI's own for Wan (POST /wanfit/convert).
// What becomes of each node is decided there, on the prompt that Run would send; here the graph is
// changed to match it. Nodes that are not converted stay where they are; out of a subgraph that is
// taken apart they are moved to the graph.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allNodes, BUTTON, make } from "./wanfit_panel.js";
import { loaded, say, whenLanguageChanges } from "./wanfit_words.js";

const GAP = 60;
const LOOK_MS = 500; // how often it is looked whether the graph has what can be converted

const outerOf = (id) => String(id).split(":")[0];
const isLink = (value) => Array.isArray(value) && value.length === 2 && Number.isInteger(value[1]);
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function toast(severity, summary, lines) {
  const detail = lines.join("\n");
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "success" ? 6000 : 20000 });
}

function byRunId(id) {
  let graph = app.graph.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name);

function setWidget(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

const linkOf = (graph, id) => graph?.links?.get?.(id) ?? graph?.links?.[id];
const linksOf = (node) => [...(node.inputs ?? []).map((input) => input.link), ...(node.outputs ?? []).flatMap((output) => output.links ?? [])]
  .map((id) => linkOf(node.graph ?? app.graph, id)).filter(Boolean);

// The PrimitiveNode that gives a sampler its seed, and says what becomes of it after a run.
function primitiveOf(node) {
  const graph = node?.graph ?? app.graph;
  const input = node?.inputs?.find((one) => one.name === "seed" || one.name === "noise_seed");
  const giver = graph.getNodeById(linkOf(graph, input?.link)?.origin_id);
  return giver?.type === "PrimitiveNode" ? giver : null;
}

// A node's inputs as they were typed: what Run would make of {one|another} or %date% is not kept.
function typed(id, inputs) {
  const node = byRunId(id);
  const wired = (name) => node?.inputs?.some((input) => (input.widget?.name ?? input.name) === name && input.link != null);
  return Object.fromEntries(Object.entries(inputs).map(([name, value]) => {
    const raw = widgetOf(node, name)?.value;
    return [name, typeof value === "string" && typeof raw === "string" && raw && !wired(name) ? raw : value];
  }));
}

// What is done with each node of the prompt: kept in place, moved out of its subgraph, or made.
class Change {
  constructor(before, answer) {
    Object.assign(this, { before, answer, after: answer.prompt, graph: app.graph.rootGraph ?? app.graph, left: [...answer.left], nodes: new Map() });
    const gone = new Set(answer.removed);
    this.opened = new Set(answer.removed.filter((id) => id.includes(":")).map(outerOf));
    this.goneHere = [...this.opened, ...[...gone].filter((id) => !id.includes(":"))];
    this.moved = Object.keys(this.after).filter((id) => this.opened.has(outerOf(id)) && id.includes(":"));
  }

  carryOut() {
    const made = [...this.answer.new, ...this.moved];
    for (const id of this.answer.new) this.make(id, this.after[id].class_type, null);
    for (const id of this.moved) this.make(id, this.after[id].class_type, byRunId(id));
    this.place(made);
    for (const id of made) this.connect(id, {});
    for (const id of Object.keys(this.after)) {
      if (!made.includes(id)) this.connect(id, this.before[id].inputs);
    }
    for (const [id, seed] of Object.entries(this.answer.seeds)) {
      const then = widgetOf(primitiveOf(byRunId(seed)) ?? byRunId(seed), "control_after_generate")?.value;
      if (then) setWidget(this.nodes.get(id), "control_after_generate", then);
    }
    this.sayLost();
    this.remove();
  }

  make(id, type, like) {
    const node = LiteGraph.createNode(type);
    if (!node) return void this.left.push(say("convert.no node", { type, id }));
    if (like) node.title = like.title;
    this.graph.add(node);
    for (const [name, value] of Object.entries(this.after[id].inputs)) if (!isLink(value)) setWidget(node, name, value);
    this.nodes.set(id, node);
  }

  // Ours in a row where the old ones were, and what stands to the right further right; below all others
  // where they would cover one.
  place(made) {
    const old = this.goneHere.map((id) => this.graph.getNodeById(Number(id))).filter(Boolean);
    const row = made.map((id) => this.nodes.get(id)).filter(Boolean);
    const others = this.graph._nodes.filter((node) => !row.includes(node) && !old.includes(node));
    const left = Math.min(...old.map((node) => node.pos[0]));
    const right = Math.max(...old.map((node) => node.pos[0] + node.size[0]));
    let top = Math.min(...old.map((node) => node.pos[1]));
    const width = row.reduce((sum, node) => sum + node.size[0] + GAP, 0);
    const bottom = top + Math.max(...row.map((node) => node.size[1]));
    const behind = (node) => node.pos[0] >= right - GAP;
    const covered = (node) => node.pos[0] + node.size[0] > left && node.pos[0] < right && node.pos[1] + node.size[1] > top && node.pos[1] < bottom;
    if (others.some((node) => !behind(node) && covered(node))) {
      top = 2 * GAP + Math.max(...others.map((node) => node.pos[1] + node.size[1]));
    } else {
      const more = Math.max(0, left + width - right);
      for (const node of others) if (behind(node)) node.pos = [node.pos[0] + more, node.pos[1]];
    }
    let x = left;
    for (const node of row) {
      node.pos = [x, top];
      x += node.size[0] + GAP;
    }
  }

  // [node, slot] that stands for a link of the prompt; a subgraph that stays gives by its own outputs.
  giver([id, slot]) {
    if (this.nodes.has(id)) return [this.nodes.get(id), slot];
    const node = byRunId(id);
    const host = id.includes(":") && this.graph.getNodeById(Number(outerOf(id)));
    if (!host) return [node, slot];
    const out = (host.subgraph?.outputs ?? []).findIndex((one) => {
      const link = host.subgraph.links.get?.(one.linkIds?.[0]) ?? host.subgraph.links[one.linkIds?.[0]];
      return link?.origin_id === node?.id && link.origin_slot === slot;
    });
    return out < 0 ? [null, 0] : [host, out];
  }

  // [node, slot] that takes an input of the prompt; a subgraph that stays takes by its own inputs.
  taker(id, name) {
    const node = this.nodes.get(id) ?? byRunId(id);
    const slot = (node?.inputs ?? []).findIndex((input) => input.name === name);
    if (this.nodes.has(id) || !id.includes(":")) return [node, slot];
    const host = this.graph.getNodeById(Number(outerOf(id)));
    const link = node?.inputs?.[slot]?.link;
    return [host, (host?.subgraph?.inputs ?? []).findIndex((input) => input.linkIds?.includes(link))];
  }

  connect(id, before) {
    for (const [name, value] of Object.entries(this.after[id].inputs)) {
      if (!isLink(value) || same(value, before[name])) continue;
      const [from, out] = this.giver([String(value[0]), value[1]]);
      const [to, slot] = this.taker(id, name);
      if (!from || !to || slot < 0 || !from.connect(out, to, slot)) {
        this.left.push(say("convert.connect", { from: from?.title ?? value[0], input: name, to: to?.title ?? id }));
      }
    }
  }

  // What is switched off is not in the prompt, and neither are notes: it loses its links, or goes along.
  sayLost() {
    const off = (node) => node.mode === 2 || node.mode === 4;
    const gone = new Set(this.goneHere.map(Number));
    const linked = (node) => linksOf(node).some((link) => gone.has(Number(link.origin_id)) || gone.has(Number(link.target_id)));
    for (const node of this.graph._nodes) if (off(node) && linked(node)) this.left.push(say("convert.off", { node: node.title }));
    for (const id of this.opened) {
      for (const node of allNodes(this.graph.getNodeById(Number(id))?.subgraph)) {
        if (off(node) || /Note$/.test(node.type)) this.left.push(say("convert.lost", { node: node.title }));
      }
    }
  }

  remove() {
    const old = new Set(this.goneHere.map((id) => this.graph.getNodeById(Number(id))).filter(Boolean));
    const empty = (this.graph._groups ?? []).filter((group) => {
      group.recomputeInsideNodes?.();
      const inside = [...(group._nodes ?? group.nodes ?? [])];
      return inside.length && inside.every((node) => old.has(node));
    });
    // Reroutes, primitives, Set and Get: of the page alone, and of no use once nothing is linked to them.
    const between = this.graph._nodes.filter((node) => node.isVirtualNode && linksOf(node).length);
    for (const node of old) this.graph.remove(node);
    for (let left = between, gone = between; gone.length; left = left.filter((node) => !gone.includes(node))) {
      gone = left.filter((node) => !linksOf(node).length || (node.type === "Reroute" && node.inputs?.[0]?.link == null));
      for (const node of gone) this.graph.remove(node);
    }
    for (const group of empty) this.graph.remove(group);
  }

  note() {
    if (!this.left.length) return;
    const note = LiteGraph.createNode("MarkdownNote");
    if (!note) return;
    note.title = say("convert.note");
    const first = this.nodes.get(this.answer.new[0]);
    this.graph.add(note);
    note.size = [420, 60 + 40 * this.left.length];
    note.pos = [first.pos[0], first.pos[1] - note.size[1] - GAP];
    if (note.widgets?.[0]) note.widgets[0].value = this.left.map((line) => `- ${line}`).join("\n");
  }
}

// Has what Undo goes back to be what is there now.
function remember() {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}

export async function convert() {
  const { output } = await app.graphToPrompt();
  const before = Object.fromEntries(Object.entries(output).map(([id, { class_type, inputs }]) => [id, { class_type, inputs: typed(id, inputs) }]));
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ prompt: before }) };
  const answer = await api.fetchApi("/wanfit/convert", options).then((told) => told.json())
    .catch((error) => ({ ok: false, error: say("server.away", { why: error.message ?? error }) }));
  if (!answer.ok) return toast("error", say("convert.title"), [answer.error]);
  if (!answer.new.length) return toast("warn", say("convert.title"), answer.left);
  const change = new Change(before, answer);
  remember();
  change.graph.beforeChange?.();
  try {
    change.carryOut();
    change.note();
  } finally {
    change.graph.afterChange?.();
    remember();
  }
  change.graph.setDirtyCanvas(true, true);
  const made = answer.new.filter((id) => answer.prompt[id].class_type === "WanGenerate").length;
  const title = made === 1 ? say("convert.done one") : say("convert.done", { n: made });
  toast(change.left.length ? "warn" : "success", title, change.left.length ? change.left : [say("convert.undo")]);
}

const ENTRY = { id: "WanFit.Convert", label: "Convert to WanFit", icon: "pi pi-sync", function: convert };

// -- the button in the top bar -------------------------------------------------------------------
// It is there while the open graph has a Wan text encoder, or a node of Wan's, and a sampler of ComfyUI's own.
function convertible() {
  let text = false;
  let sampler = false;
  for (const node of allNodes(app.graph?.rootGraph ?? app.graph)) {
    if (node.mode === 2 || node.mode === 4) continue; // muted or bypassed
    // An all-in-one checkpoint has no loader of its text encoder: a node like WanImageToVideo tells.
    text ||= (String(node.comfyClass).startsWith("CLIPLoader") && widgetOf(node, "type")?.value === "wan") || /^Wan.*ToVideo/.test(node.comfyClass);
    sampler ||= String(node.comfyClass).startsWith("KSampler");
  }
  return text && sampler;
}

function addButton() {
  const bar = app.menu?.settingsGroup?.element; // where packs have put theirs since 2024
  if (!bar) return;
  const button = make("button", `${BUTTON};display:none;white-space:nowrap;align-items:center;gap:6px`);
  button.className = "wanfit-convert";
  const text = make("span", "");
  button.append(make("i", ""), text);
  button.firstChild.className = ENTRY.icon;
  button.addEventListener("click", () => void convert());
  bar.append(button);
  whenLanguageChanges(() => {
    text.textContent = say("convert.title");
    button.title = say("convert.tooltip");
  });
  setInterval(() => { if (!document.hidden) button.style.display = convertible() ? "inline-flex" : "none"; }, LOOK_MS);
}

app.registerExtension({
  name: "wanfit.convert",
  commands: [ENTRY],
  menuCommands: [{ path: ["WanFit"], commands: [ENTRY.id] }],
  getCanvasMenuItems: () => [{ content: say("convert.title"), callback: convert }],
  async setup() {
    await loaded();
    addButton();
  },
});
