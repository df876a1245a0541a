// Shows the text a WanFit node reports (ui.text) on the node itself.
import { app } from "../../scripts/app.js";

const REPORTING = new Set([
  "WanLoader", "WanLoRA", "WanOptimize", "WanEstimateMemory",
]);
const TABLES = new Set(["WanEstimateMemory"]); // its lines are not wrapped
const LINE_HEIGHT = 12;
const LETTER_WIDTH = 6.2;
const MOST_LINES = 16;

function linesOf(node, text) {
  const columns = TABLES.has(node.comfyClass) ? Infinity : (node.size[0] - 30) / LETTER_WIDTH;
  return text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
}

function textWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === "wanfit_report");
  if (existing) return existing;
  const element = document.createElement("textarea");
  element.readOnly = true;
  element.className = "comfy-multiline-input";
  element.style.fontFamily = "monospace";
  element.style.whiteSpace = TABLES.has(node.comfyClass) ? "pre" : "pre-wrap";
  // Not part of the saved workflow: widgets are stored by position.
  const widget = node.addDOMWidget("wanfit_report", "wanfit_report", element, {
    serialize: false,
    getMinHeight: () => (Math.min(linesOf(node, element.value), MOST_LINES) + 2) * LINE_HEIGHT,
  });
  widget.serialize = false;
  return widget;
}

function show(node, text) {
  textWidget(node).element.value = text;
  const wanted = node.computeSize()[1];
  // Only ever taller: a wider node would cover its neighbours.
  if (node.size[1] < wanted) node.setSize([node.size[0], wanted]);
  app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "wanfit.report",
  nodeCreated(node) {
    if (!REPORTING.has(node.comfyClass)) return;
    const inherited = node.onExecuted;
    node.onExecuted = function (output) {
      inherited?.apply(this, arguments);
      if (output?.text) show(this, [].concat(output.text).join("\n"));
    };
  },
});
