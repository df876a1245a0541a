// Every text of the page that a person reads, in the language that ComfyUI is set to: words/*.json.
// `say("a.key", {n: 3})` gives the text with {n} filled in, English where a language has none.
import { app } from "../../scripts/app.js";

const LANGUAGES = ["en", "zh", "ja", "ko", "de"];
const LOOK_MS = 1000;
const tables = new Map(); // language -> its texts, by key
const readers = new Set(); // called when the language has changed
let current = "en";

// The language that is set, as "de" or "zh"; of those without texts English.
function wanted() {
  const set = app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language;
  const language = String(set).split("-")[0];
  return LANGUAGES.includes(language) ? language : "en";
}

async function read(language) {
  if (tables.has(language)) return;
  const file = new URL(`./words/${language}.json`, import.meta.url);
  const found = await fetch(file, { cache: "no-cache" }).then((answer) => answer.json()).catch(() => null);
  if (found) tables.set(language, found); // else the server is away: asked again
}

async function follow() {
  const language = wanted();
  if (language === current && tables.has(current)) return;
  await Promise.all([read("en"), read(language)]);
  if (!tables.has(language)) return;
  current = language;
  for (const told of readers) told();
}

// Resolves when there are texts; of what is shown before, nothing waits for it.
let first = null;
export const loaded = () => (first ??= follow());

export function say(key, values = {}) {
  const text = tables.get(current)?.[key] ?? tables.get("en")?.[key] ?? "";
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

// What the server says in English, below a line in the language of the page that says of what kind.
export function explained(kind, text) {
  const what = current === "en" ? "" : say(`error.${kind}`);
  return what ? `${what}\n${text}` : text;
}

// A word of the server, as a stage's name: translated where it is among the texts.
export const named = (kind, word) => say(`${kind}.${word}`) || word;

export function duration(seconds) {
  if (seconds < 100) return say("time.seconds", { s: Math.max(0, Math.round(seconds)) });
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? say("time.minutes", { m: minutes }) : say("time.hours", { h: Math.floor(minutes / 60), m: minutes % 60 });
}

// Has `told` called when the texts are there, and whenever the language changes.
export function whenLanguageChanges(told) {
  readers.add(told);
  if (tables.has(current)) told();
}

app.registerExtension({
  name: "wanfit.words",
  async setup() {
    await loaded();
    setInterval(() => void follow(), LOOK_MS);
  },
});
