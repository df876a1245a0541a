// Shows on a sampler what its render tells ("wanfit.run"): a moving preview, the step, the time left,
// the expert and memory; and when it has ended, the clip, with the report folded below it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { COLOURS, ink, make, Panel } from "./wanfit_panel.js";
import { duration, named, say } from "./wanfit_words.js";

const SAMPLERS = new Set(["WanGenerate", "WanChunkedSampler"]);
const NAME = "wanfit_run";
const MOST_HEIGHT = 400;
const PICTURE = "display:block;width:100%;max-height:240px;object-fit:contain;border-radius:3px;background:#000";
const runs = new WeakMap(); // node -> {panel, picture, lines, left, at}
let running = null; // the node that is told of now

// Returns the node of an id as ComfyUI runs it: "12", or "12:3" for node 3 in the subgraph of node 12.
function byRunId(id) {
  let graph = app.rootGraph ?? app.graph.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

function runOf(node) {
  let run = runs.get(node);
  if (!run) {
    run = { panel: new Panel(node, NAME, "wanfit_run", MOST_HEIGHT), picture: null, lines: make("div", ""), left: null, at: 0 };
    runs.set(node, run);
  }
  return run;
}

function place(run, ...elements) {
  run.panel.element.replaceChildren(...elements.filter(Boolean));
  run.panel.fit();
}

// -- while it runs ------------------------------------------------------------------------------
function stepLine(told) {
  const parts = [];
  if (told.reading) {
    const [done, total] = told.reading.gib;
    parts.push(say("run.reading", { part: named("part", told.reading.part), done: done.toFixed(1), total: total.toFixed(1) }));
  } else if (told.stage === "decode") {
    parts.push(say("run.decoding", { done: told.frames[0], total: told.frames[1] }));
  } else {
    parts.push(say("run.step", { step: told.step, steps: told.steps, left: told.steps - told.step }));
    if (told.window) parts.push(say("run.part", { done: told.window[0], total: told.window[1] }));
  }
  if (told.expert) parts.push(say("run.expert", { expert: named("stage", told.expert) }));
  if (told.step_seconds) parts.push(say("run.pace", { s: told.step_seconds.toFixed(told.step_seconds < 10 ? 2 : 0) }));
  return parts.join(" · ");
}

function memoryLine({ now_gib, plan_gib, where }) {
  const planned = plan_gib == null ? "" : say("run.planned", { plan: plan_gib.toFixed(2) });
  return say("run.memory", { now: now_gib.toFixed(2), where: named("where", where) }) + planned;
}

function timeLine(run) {
  const since = (Date.now() - run.at) / 1000;
  const spent = say("run.spent", { time: duration(run.spent + since) });
  if (run.left == null) return spent;
  const time = duration(Math.max(0, run.left - since));
  return `${spent} · ${say(run.onlySteps ? "run.steps left" : "run.left", { time })}`;
}

function told(event) {
  const node = byRunId(event.detail.node);
  if (!node || !SAMPLERS.has(node.comfyClass)) return;
  const run = runOf(node);
  const detail = event.detail;
  running = node;
  Object.assign(run, { left: detail.left, spent: detail.spent, at: Date.now() });
  run.onlySteps = detail.only_steps && detail.stage !== "decode";
  if (detail.preview) {
    run.picture ??= make("img", PICTURE);
    run.picture.src = detail.preview;
    run.picture.alt = say("run.picture");
    // Its height is known when it is there.
    run.picture.onload = () => run.panel.fit();
  }
  const share = detail.stage === "decode" ? 1 : detail.step / Math.max(1, detail.steps);
  const bar = make("div", "height:4px;margin:4px 0;background:rgba(128,128,128,.25);border-radius:2px;overflow:hidden");
  bar.append(make("div", `height:100%;width:${100 * share}%;background:${COLOURS.good}`));
  run.time = make("div", "", timeLine(run));
  run.lines.replaceChildren(bar, make("div", "font-weight:bold", stepLine(detail)), run.time, make("div", "opacity:.75", memoryLine(detail.memory)));
  run.panel.element.dataset.stage = detail.stage;
  if (run.picture?.parentNode === run.panel.element && run.lines.parentNode === run.panel.element) run.panel.fit();
  else place(run, run.picture, run.lines);
}

// -- when it has ended --------------------------------------------------------------------------
function clipOf(node, file) {
  const query = new URLSearchParams({ ...file, t: Date.now() });
  const video = make("video", PICTURE);
  Object.assign(video, { src: api.apiURL(`/view?${query}`), controls: true, loop: true, muted: true, autoplay: true, playsInline: true });
  video.onloadedmetadata = () => runs.get(node)?.panel.fit();
  return video;
}

function ended(node, output) {
  const run = runOf(node);
  run.picture = run.time = null;
  const report = make("details", "margin-top:4px");
  report.append(
    make("summary", "cursor:pointer", say("run.report")),
    make("pre", "margin:4px 0 0;white-space:pre-wrap;font:10px/1.3 monospace", [].concat(output.text ?? []).join("\n")),
  );
  report.className = "wanfit-report";
  report.addEventListener("toggle", () => run.panel.fit());
  run.panel.element.dataset.stage = "done";
  place(run, output.wanfit_clip?.[0] && clipOf(node, output.wanfit_clip[0]), report);
}

function cutOff(text) {
  const run = running && runs.get(running);
  running = null;
  if (!run || run.panel.element.dataset.stage === "done") return;
  run.time = null;
  run.panel.element.dataset.stage = "cut";
  run.lines.append(make("div", ink(COLOURS.warn), text));
  run.panel.fit();
}

// -- being told at all ----------------------------------------------------------------------------
let known = null; // the id under which the server knows that this page shows renders

// Has the server know it before anything is run: as soon as the page has an id, and again when the
// connection was lost, as the server may be another one by then.
async function announce() {
  const id = api.clientId;
  if (!id || id === known) return;
  known = id;
  const headers = { "Content-Type": "application/json", "WanFit-Client": id };
  const there = await api.fetchApi("/wanfit/watch", { method: "POST", headers, body: "{}" }).catch(() => null);
  if (!there && known === id) known = null; // the server is away: told again
}

app.registerExtension({
  name: "wanfit.run",
  nodeCreated(node) {
    if (!SAMPLERS.has(node.comfyClass)) return;
    const inherited = node.onExecuted;
    node.onExecuted = function (output) {
      inherited?.apply(this, arguments);
      if (output?.text) ended(this, output);
    };
  },
  loadedGraphNode(node) {
    // A saved node is as tall as it was with the panel; without a run there is none.
    const had = node.properties?.[NAME];
    if (!had || !SAMPLERS.has(node.comfyClass)) return;
    delete node.properties[NAME];
    node.setSize([node.size[0], Math.max(node.computeSize()[1], node.size[1] - had)]);
  },
  setup() {
    api.addEventListener("wanfit.run", told);
    for (const event of ["status", "reconnected"]) {
      api.addEventListener(event, () => { if (event === "reconnected") known = null; void announce(); });
    }
    void announce();
    api.addEventListener("execution_error", () => cutOff(say("run.failed")));
    api.addEventListener("execution_interrupted", () => cutOff(say("run.interrupted")));
    api.addEventListener("execution_start", () => { running = null; });
    setInterval(() => {
      void announce();
      const run = running && runs.get(running);
      if (run?.time) run.time.textContent = timeLine(run);
    }, 1000);
  },
});
