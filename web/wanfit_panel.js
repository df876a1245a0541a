// What the panels on the nodes share: an element that is a widget of its node, and as high as it is.
import { app } from "../../scripts/app.js";

const PLAIN = "box-sizing:border-box;overflow:auto;overflow-wrap:anywhere;padding:4px 6px;font:11px/1.35 sans-serif;color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);border-radius:4px";
export const COLOURS = { good: "#58a55c", bad: "#dc5046", work: "#78be78", weights: "#4682c8", warn: "#d9a520" };
// Text in a colour, nearer to that of the theme's own text: bare colours are hard to read on light grey.
export const ink = (colour) => `color:color-mix(in srgb, ${colour} 50%, var(--input-text,#ddd))`;
export const BUTTON = "cursor:pointer;font:inherit;padding:2px 8px;border-radius:4px;border:1px solid var(--border-color,#555);background:var(--comfy-input-bg,#222);color:var(--input-text,#ddd)";

export function make(tag, style, text) {
  const element = document.createElement(tag);
  element.style.cssText = style;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Every node of a graph, also within subgraphs.
export function* allNodes(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

export class Panel {
  // `saved` names the property of the node that says how much of its height is this panel.
  constructor(node, name, saved, most) {
    Object.assign(this, { node, saved, most, height: 24 });
    this.element = make("div", PLAIN);
    this.element.className = name.replace("_", "-");
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => this.height, getMaxHeight: () => this.height, getValue: () => "", setValue: () => {} };
    this.widget = node.addDOMWidget(name, name, this.element, options);
    this.widget.serialize = false; // widgets are stored by position: it is no part of the workflow
  }

  // The Nodes 2.0 of front end 1.27 shows widgets of its own kinds alone: there the element is put below
  // them, again whenever they are drawn anew.
  attach() {
    if (this.element.isConnected || !LiteGraph.vueNodesMode) return;
    document.querySelector(`[data-node-id="${this.node.id}"] .lg-node-widgets`)?.append(this.element);
  }

  fit() {
    this.attach();
    if (!this.element.isConnected) return;
    this.element.style.height = "auto";
    const wanted = Math.min(this.most, Math.max(24, this.element.scrollHeight + 2 + 2 * (this.widget.margin ?? 10)));
    this.element.style.height = "100%";
    if (Math.abs(wanted - this.height) < 3) return;
    this.height = wanted;
    // The node becomes taller by the panel, or its texts would be squeezed; how much of its height is
    // the panel is saved with it, so that it does not grow again when the workflow is opened.
    const node = this.node;
    const had = node.properties?.[this.saved] ?? 0;
    if (!LiteGraph.vueNodesMode && wanted > had) {
      node.setProperty?.(this.saved, wanted);
      node.setSize([node.size[0], Math.max(node.computeSize()[1], node.size[1] + wanted - had)]);
    }
    app.graph.setDirtyCanvas(true, true);
  }

  remove() {
    const index = this.node.widgets?.indexOf(this.widget) ?? -1;
    this.widget.onRemove?.();
    this.element.remove();
    if (index >= 0) this.node.widgets.splice(index, 1);
  }
}
