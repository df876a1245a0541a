// The WanFit tab of the sidebar: renders of this session, those that can go on, what was learnt, and
// what is preferred (POST /wanfit/tab). Preferences are also among ComfyUI's settings; the file that
// Python and the command line read too is what counts, and the settings follow it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { BUTTON, COLOURS, ink, make } from "./wanfit_panel.js";
import { duration, loaded, named, say, whenLanguageChanges } from "./wanfit_words.js";

const REFRESH_MS = 3000;
const BOX = "padding:6px 8px;margin:0 0 6px;border-radius:6px;background:var(--comfy-input-bg,#222);overflow-wrap:anywhere";
const FIELD = "font:inherit;width:100%;box-sizing:border-box;padding:2px 4px;border-radius:4px;border:1px solid var(--border-color,#555);background:var(--comfy-menu-bg,#111);color:var(--input-text,#ddd)";
// As they are among ComfyUI's settings, which it translates itself (locales/).
const MEANS = {
  speed: ["Speed", "Built-in: exact. fast may round otherwise, fastest may change the video a little."],
  vram_limit_gb: ["Card memory, at most (GiB)", "Empty: what is free."],
  ram_limit_gb: ["RAM, at most (GiB)", "Empty: what is available."],
  preview: ["Moving preview", "Built-in: on. Off saves up to 5 % of the time."],
  codec: ["Codec of videos", "Built-in: h264. It counts for new nodes and for jobs that name none."],
  journal: ["Keep unfinished renders", "Built-in: on. A render that was cut off goes on where it stopped when the same is queued again. Saving takes at most 1 % of the time."],
};

let root = null; // the tab's element while it is open
let answer = null; // the latest answer of the server
let asking = false;

async function ask(request) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request) };
  try {
    const response = await api.fetchApi("/wanfit/tab", options);
    return await response.json();
  } catch (error) {
    return { ok: false, error: say("server.away", { why: error.message ?? error }) };
  }
}

function toast(severity, text) {
  app.extensionManager.toast.add({ severity, summary: "WanFit", detail: text, life: severity === "error" ? 15000 : 5000 });
}

// Does something and shows what is there then.
async function carryOut(request) {
  const found = await ask(request);
  if (!found.ok) toast("error", found.error);
  else {
    if (found.said) toast("success", found.said);
    if (found.renders) answer = found;
    follow();
  }
  draw();
  return found;
}

// -- pieces -------------------------------------------------------------------------------------
const line = (text, style = "") => make("div", style, text);
const faint = (text) => line(text, "opacity:.7");
const number = (value, digits = 2) => (value == null ? "–" : value.toFixed(digits));
const gib = (value) => (value == null ? "–" : `${value.toFixed(2)} GiB`);
const at = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
const on = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

function button(text, action) {
  const element = make("button", BUTTON, text);
  element.addEventListener("click", action);
  return element;
}

// What cannot be undone takes a second click.
function twice(text, again, action) {
  const element = button(text, () => {
    if (element.textContent === again) return action();
    element.textContent = again;
    setTimeout(() => { element.textContent = text; }, 4000);
  });
  return element;
}

function section(title, explanation, items, ...more) {
  const box = make("section", "margin-bottom:14px");
  box.append(make("h3", "font-size:13px;font-weight:600;margin:0 0 4px", title));
  box.append(...(items.length ? items : [faint(explanation), ...more]));
  return box;
}

function row(...elements) {
  const box = make("div", "display:flex;flex-wrap:wrap;gap:4px;margin-top:4px");
  box.append(...elements);
  return box;
}

const STATES = { running: COLOURS.warn, done: COLOURS.good, failed: COLOURS.bad, interrupted: COLOURS.warn };

const stageOf = (name) => (name.startsWith("load ") ? say("tab.load", { part: named("part", name.slice(5)) }) : named("stage", name));

// -- sections -----------------------------------------------------------------------------------
function stages(one) {
  const table = make("table", "width:100%;border-collapse:collapse;font-size:10px;margin-top:4px");
  const cells = (kind, ...texts) => {
    const tr = make("tr", "");
    tr.append(...texts.map((text, index) => make(kind, `text-align:${index ? "right" : "left"};padding:0 2px;font-weight:${kind === "th" ? 600 : 400}`, text)));
    return tr;
  };
  table.append(cells("th", ...["stage", "seconds", "predicted", "measured"].map((key) => say(`tab.${key}`))));
  for (const stage of one.stages) table.append(cells("td", stageOf(stage.name), number(stage.seconds, 1), gib(stage.predicted_gib), gib(stage.measured_gib)));
  return table;
}

function rendered(one) {
  const box = make("div", BOX);
  const head = make("div", "display:flex;justify-content:space-between;gap:6px");
  head.append(make("b", ink(STATES[one.state]), say(`tab.${one.state}`)), make("span", "opacity:.7", at(one.began)));
  box.append(head, line(say("tab.settings", one)));
  if (one.prompt) box.append(line(one.prompt, "font-style:italic;max-height:2.7em;overflow:hidden"));
  const predicted = one.predicted_seconds == null ? "" : say("tab.time predicted", { time: duration(one.predicted_seconds) });
  const took = one.seconds == null ? "" : say("tab.time measured", { time: duration(one.seconds) });
  const times = [predicted, took].filter(Boolean).join(", ");
  if (times) box.append(line(say("tab.time", { times })));
  const sizes = [say("tab.gib predicted", { gib: number(one.predicted_gib) })];
  if (one.measured_gib != null) sizes.push(say("tab.gib measured", { gib: number(one.measured_gib) }));
  box.append(line(say("tab.memory", { where: one.where, sizes: sizes.join(", ") })));
  for (const text of one.errors ?? []) box.append(line(text, ink(COLOURS.bad)));
  const more = make("details", "margin-top:2px");
  const guidance = one.guidance.map((value) => +value.toFixed(3)).join(" / ");
  more.append(make("summary", "cursor:pointer", say("tab.more")), line(one.model), line(say("tab.guidance", { guidance, fps: +one.fps.toFixed(2) })), faint(one.choices.join(", ")));
  if (one.resumed) more.append(line(say("tab.resumed", { how: one.resumed })));
  if (one.stages?.length) more.append(stages(one));
  for (const text of one.warnings ?? []) more.append(line(`⚠ ${text}`, ink(COLOURS.warn)));
  box.append(more);
  if (one.clip) {
    const link = make("a", "color:inherit", say("tab.open clip"));
    Object.assign(link, { href: api.apiURL(`/view?${new URLSearchParams(one.clip)}`), target: "_blank", rel: "noopener" });
    box.append(link);
  }
  return box;
}

// For who has just come: a graph that runs at once.
function first() {
  const open = async () => {
    const found = await ask({ do: "example" });
    if (!found.ok) return toast("error", found.error);
    await app.loadGraphData(found.workflow, true, true, found.name);
  };
  const box = make("div", "margin-top:6px");
  box.append(faint(say("tab.first why")), row(button(say("tab.first"), open)));
  return box;
}

async function goOn(one) {
  const found = await ask({ do: "workflow", id: one.id });
  if (!found.ok) return toast("error", found.error);
  await app.loadGraphData(found.workflow);
  await app.queuePrompt(0);
  toast("success", say("tab.queued"));
}

function saved(one) {
  const box = make("div", BOX);
  box.dataset.id = one.id;
  const { width, height, wanted_frames, num_frames, seed } = one.job;
  box.append(line(say("tab.saved", { width, height, frames: wanted_frames ?? num_frames, seed }), "font-weight:600"));
  if (one.prompt) box.append(line(one.prompt, "font-style:italic;max-height:2.7em;overflow:hidden"));
  const done = one.only_decode ? say("tab.only decode") : one.step == null ? say("tab.no state") : say("tab.at step", one);
  const size = one.gib < 0.1 ? `${(one.gib * 1024).toFixed(1)} MiB` : gib(one.gib);
  box.append(line(`${done} · ${say("tab.on disk", { size })}`), faint(say("tab.written", { model: one.model, time: on(one.touched) })));
  if (one.running) box.append(line(say("tab.at it"), ink(COLOURS.warn)));
  else {
    const away = twice(say("tab.delete"), say("tab.delete again"), () => carryOut({ do: "delete", id: one.id }));
    if (one.workflow) box.append(row(button(say("tab.go on"), () => goOn(one)), away));
    else box.append(faint(say("tab.how to go on")), row(away));
  }
  return box;
}

function learnt(one) {
  const box = make("div", BOX);
  const runs = one.runs === 1 ? say("tab.runs one") : say("tab.runs", { n: one.runs });
  const pace = one.pace == null ? "" : say("tab.pace", { pace: number(one.pace) });
  const extra = one.extra ? say("tab.extra", { percent: `${one.extra > 0 ? "+" : ""}${(100 * one.extra).toFixed(1)}` }) : "";
  box.append(line(runs + pace + extra), faint(one.what));
  return box;
}

// A preference as a form shows it, and back.
const YES_OR_NO = ["preview", "journal"];
const shown = (name, value) => (value == null ? "" : YES_OR_NO.includes(name) ? (value ? "on" : "off") : String(value));
function meant(name, text) {
  if (text == null || text === "" || text === "built-in" || (name.endsWith("_gb") && !+text)) return null;
  if (YES_OR_NO.includes(name)) return text === "on";
  return name.endsWith("_gb") ? +text : text;
}
const choicesOf = (name) => (YES_OR_NO.includes(name) ? ["on", "off"] : answer?.choices?.[name] ?? { speed: ["exact", "fast", "fastest"], codec: ["h264", "h265"] }[name]);

// A choice in words: the names of speeds and codecs are names.
const said = (name, choice) => (!choice ? say("tab.built-in") : YES_OR_NO.includes(name) ? say(`tab.${choice}`) : choice);

function preferred(name) {
  const title = say(`prefer.${name}`);
  const explanation = say(`prefer.${name} why`);
  const label = make("label", "display:block;margin-bottom:6px");
  label.title = explanation;
  let field;
  if (name.endsWith("_gb")) {
    field = make("input", FIELD);
    Object.assign(field, { type: "number", min: 0, step: 0.5, placeholder: say("tab.built-in") });
  } else {
    field = make("select", FIELD);
    for (const choice of ["", ...choicesOf(name)]) {
      const option = make("option", "", said(name, choice));
      option.value = choice;
      field.append(option);
    }
  }
  field.name = name;
  field.value = shown(name, answer.preferences[name]);
  field.addEventListener("change", () => prefer(name, meant(name, field.value)));
  label.append(line(title), field);
  return label;
}

const prefer = (name, value) => carryOut({ do: "prefer", values: { ...answer.preferences, [name]: value } });

// -- ComfyUI's settings -------------------------------------------------------------------------
const idOf = (name) => `WanFit.${name}`;
let following = false; // the settings are being set to what the file says

// Has ComfyUI's settings show what the file says.
async function follow() {
  following = true;
  try {
    for (const name of Object.keys(MEANS)) {
      const value = name.endsWith("_gb") ? (answer.preferences[name] ?? 0) : shown(name, answer.preferences[name]) || "built-in";
      if (app.extensionManager.setting.get(idOf(name)) !== value) await app.extensionManager.setting.set(idOf(name), value);
    }
  } finally {
    following = false;
  }
}

function settingOf(name) {
  const [title, explanation] = MEANS[name];
  const numeric = name.endsWith("_gb");
  return {
    id: idOf(name),
    name: title,
    tooltip: explanation,
    category: ["WanFit", "Preferences", title],
    ...(numeric ? { type: "number", defaultValue: 0, attrs: { min: 0, max: 4096, step: 0.5 } } : { type: "combo", defaultValue: "built-in", options: ["built-in", ...choicesOf(name)] }),
    onChange(value) {
      // It is also called while the page is loaded, before it is known what the file says.
      if (!answer || following || meant(name, value) === (answer.preferences[name] ?? null)) return;
      void prefer(name, meant(name, value));
    },
  };
}

// -- the tab ------------------------------------------------------------------------------------
function draw() {
  if (!root) return;
  // What is being typed, read or chosen stays.
  const open = [...root.querySelectorAll("details")].map((one) => one.open);
  if (root.contains(document.activeElement) && ["INPUT", "SELECT"].includes(document.activeElement.tagName)) return;
  if (!answer) return void root.replaceChildren(faint(say("tab.asking")));
  const form = make("div", BOX);
  form.append(...Object.keys(MEANS).map(preferred), faint(say("tab.kept in", { path: answer.path })));
  const all = answer.learnt.length ? [...answer.learnt.map(learnt), twice(say("tab.forget"), say("tab.forget again"), () => carryOut({ do: "forget" }))] : [];
  root.replaceChildren(
    ...answer.warnings.map((text) => line(`⚠ ${text}`, `${ink(COLOURS.warn)};margin-bottom:6px`)),
    section(say("tab.can go on"), say("tab.nothing cut"), answer.saved.map(saved)),
    section(say("tab.session"), say("tab.no render"), answer.renders.map(rendered), first()),
    section(say("tab.preferences"), "", [form]),
    section(say("tab.learnt"), say("tab.nothing learnt"), all),
  );
  const details = root.querySelectorAll("details");
  if (details.length === open.length) details.forEach((one, index) => { one.open = open[index]; });
}

async function refresh() {
  if (asking) return;
  asking = true;
  const found = await ask({ do: "show" });
  asking = false;
  if (found.ok) {
    const news = JSON.stringify(found) !== JSON.stringify(answer);
    answer = found;
    if (news || !root?.querySelector("section")) draw();
  }
  if (!found.ok && root?.isConnected && !answer) root.replaceChildren(line(found.error, ink(COLOURS.bad)));
}

app.registerExtension({
  name: "wanfit.tab",
  settings: Object.keys(MEANS).map(settingOf),
  async setup() {
    await loaded();
    app.extensionManager.registerSidebarTab({
      id: "wanfit",
      icon: "pi pi-video",
      title: "WanFit",
      tooltip: say("tab.tooltip"),
      type: "custom",
      render(element) {
        root = make("div", "padding:10px;font:12px/1.4 sans-serif;color:var(--input-text,#ddd);height:100%;overflow-y:auto;box-sizing:border-box");
        root.className = "wanfit-sidebar";
        element.replaceChildren(root);
        draw();
        void refresh();
      },
    });
    for (const event of ["execution_success", "execution_error", "execution_interrupted", "execution_start"]) {
      api.addEventListener(event, () => root?.isConnected && refresh());
    }
    setInterval(() => root?.isConnected && !document.hidden && refresh(), REFRESH_MS);
    whenLanguageChanges(draw);
    await refresh();
    if (answer) await follow();
  },
});
