// Shows on a sampler what its render tells ("wanfit.run"): a moving preview, the step, the time left,
// the expert and memory; and when it has ended, the clip, with the report folded below it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allNodes, COLOURS, make, Panel } from "./wanfit_panel.js";

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

export function duration(seconds) {
  if (seconds < 100) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
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
    parts.push(`Reading the ${told.reading.part}: ${done.toFixed(1)} of ${total.toFixed(1)} GiB`);
  } else if (told.stage === "decode") {
    parts.push(`Decoding: frame ${told.frames[0]} of ${told.frames[1]}`);
  } else {
    parts.push(`Step ${told.step} of ${told.steps}, ${told.steps - told.step} left`);
    if (told.window) parts.push(`part ${told.window[0]} of ${told.window[1]}`);
  }
  if (told.expert) parts.push(`${told.expert} expert`);
  if (told.step_seconds) parts.push(`${told.step_seconds.toFixed(told.step_seconds < 10 ? 2 : 0)} s a step`);
  return parts.join(" · ");
}

function memoryLine({ now_gib, plan_gib, where }) {
  const planned = plan_gib == null ? "" : `; planned for this stage ${plan_gib.toFixed(2)}`;
  return `Memory now: ${now_gib.toFixed(2)} GiB ${where}${planned}`;
}

function timeLine(run) {
  const since = (Date.now() - run.at) / 1000;
  const what = run.onlySteps ? " of steps" : "";
  const left = run.left == null ? "" : ` · about ${duration(Math.max(0, run.left - since))}${what} left`;
  return `${duration(run.spent + since)} so far${left}`;
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
    run.picture.alt = "what the clip looks like so far";
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
    make("summary", "cursor:pointer", "Report"),
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
  run.lines.append(make("div", `color:${COLOURS.warn}`, text));
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
    api.addEventListener("execution_error", () => cutOff("Ended with an error."));
    api.addEventListener("execution_interrupted", () => cutOff("Interrupted."));
    api.addEventListener("execution_start", () => { running = null; });
    setInterval(() => {
      void announce();
      const run = running && runs.get(running);
      if (run?.time) run.time.textContent = timeLine(run);
    }, 1000);
  },
});
