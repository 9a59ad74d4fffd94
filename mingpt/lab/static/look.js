// Look: where every head looks, what a prefix adds to the logits, and what each layer would answer.

import { rowPicker } from "./ask.js";
import { onCell, paint, ramp } from "./charts.js";
import { h, onShade, percent, prefixSelect, radios, select, shade, tokens } from "./dom.js";
import { argmax, softmax } from "./model.js";

/** A row, its answer, and every attention weight and residual stream on the way. */
function observe(lab, row, prefix) {
  const { data, model } = lab;
  const { answers: [answer], logits } = lab.answer([row], prefix);
  const shared = lab.cacheOf(prefix);
  const cache = model.newCache(shared, 1, row.length + answer.length, data.prefix_padding);
  const record = { attention: [], stream: [] };
  const sequence = [...row, ...answer.slice(0, -1)];
  model.forward(sequence, cache, 1, record);
  return { answer, logits, record, sequence, nShared: shared.map((part) => part.n) };
}

export function look(lab) {
  const { nLayer, nHead, nEmbd, vocabSize } = lab.model;
  const { length } = lab.data;
  const state = { mode: "with", layer: 0, head: 0, query: length, key: 0 };
  const heads = h("div", { class: "heads" });
  const bigCanvas = h("canvas", { class: "big", tabindex: 0, role: "img" });
  const reading = h("p", { role: "status" });
  const bigTitle = h("h3", {});
  const [queryNames, keyNames] = [h("div", { class: "queries", "aria-hidden": "true" }), h("div", { class: "keys", "aria-hidden": "true" })];
  const bias = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "what the prefix adds to the logits" });
  const lens = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "what each layer would answer" });
  const rowLine = h("p", {});
  const picker = rowPicker(lab, (row) => lab.choose({ row }));
  const prefixes = prefixSelect(lab, "Prefix", lab.chosen.prefix, (prefix) => lab.choose({ prefix }));
  let [seen, seenWithout] = [null, null];

  /** The attention of a head as shown, (T, keys), and its sizes. */
  function headValues(layer, head) {
    const pick = (observed) => {
      const nQueries = observed.sequence.length;
      const nKeys = observed.nShared[layer] + nQueries;
      const start = head * nQueries * nKeys;
      return { values: observed.record.attention[layer].subarray(start, start + nQueries * nKeys), nQueries, nKeys, nShared: observed.nShared[layer] };
    };
    const [own, without] = [pick(seen), pick(seenWithout)];
    if (state.mode === "with") return own;
    if (state.mode === "without") return without;
    // With as many prefix positions as padding, the two have the same columns; else only the row's are compared.
    const skip = own.nShared === without.nShared ? 0 : null;
    const nKeys = skip === 0 ? own.nKeys : own.nQueries;
    const values = Float32Array.from({ length: own.nQueries * nKeys }, (_, i) => {
      const [query, key] = [Math.floor(i / nKeys), i % nKeys];
      const at = (each) => each.values[query * each.nKeys + key + (skip ?? each.nShared)];
      return at(own) - at(without);
    });
    return { values, nQueries: own.nQueries, nKeys, nShared: skip === 0 ? own.nShared : 0 };
  }

  /** The mean share of the attention that goes to the prefix, or to the padding, from the tokens that answer. */
  function shareOfPrefix(layer, head) {
    const { values, nQueries, nKeys, nShared } = headValues(layer, head);
    let total = 0;
    for (let query = length - 1; query < nQueries; query++) {
      for (let key = 0; key < nShared; key++) total += values[query * nKeys + key];
    }
    return total / (nQueries - length + 1);
  }

  const word = () => (state.mode === "without" || lab.chosen.prefix === lab.none ? "padding" : "prefix");

  function showHeads() {
    const buttons = [];
    const colourOf = ramp(lab.root);
    for (let layer = 0; layer < nLayer; layer++) {
      for (let head = 0; head < nHead; head++) {
        const { values, nQueries, nKeys } = headValues(layer, head);
        const canvas = h("canvas", { "aria-hidden": "true" });
        paint(canvas, values, nQueries, nKeys, colourOf);
        const share = shareOfPrefix(layer, head);
        const text = `${state.mode === "difference" && share >= 0 ? "+" : ""}${percent(share)} to the ${word()}`;
        const isChosen = layer === state.layer && head === state.head;
        const choose = () => {
          Object.assign(state, { layer, head });
          for (const [i, button] of [...heads.children].entries()) button.setAttribute("aria-pressed", i === layer * nHead + head);
          showBig();
        };
        buttons.push(h("button", { onclick: choose, "aria-pressed": isChosen }, canvas, `layer ${layer + 1}, head ${head + 1}`, h("br"), text));
      }
    }
    heads.replaceChildren(...buttons);
    showBig();
  }

  function showBig() {
    const { values, nQueries, nKeys, nShared } = headValues(state.layer, state.head);
    const names = observedTokens();
    queryNames.replaceChildren(...names.map((token, i) => h("span", { class: i < length ? "" : "answered" }, `${token}`)));
    keyNames.replaceChildren(...Array.from({ length: nShared }, (_, p) => h("span", { class: "before" }, `${p + 1}`)), ...[...queryNames.cloneNode(true).children]);
    bigTitle.textContent = `Layer ${state.layer + 1}, head ${state.head + 1}`;
    paint(bigCanvas, values, nQueries, nKeys, ramp(lab.root));
    bigCanvas.setAttribute("aria-label", `attention of layer ${state.layer + 1}, head ${state.head + 1}; the arrow keys read it cell by cell`);
    state.query = Math.min(state.query, nQueries - 1);
    read();
  }

  const observedTokens = () => (state.mode === "without" ? seenWithout : seen).sequence;

  /** Say what is in one cell. */
  function read() {
    const { values, nQueries, nKeys, nShared } = headValues(state.layer, state.head);
    state.query = Math.max(0, Math.min(nQueries - 1, state.query));
    state.key = Math.max(0, Math.min(nKeys - 1, state.key));
    const sequence = observedTokens();
    const name = (i) => `${sequence[i]} (${i < length ? `row ${i + 1}` : `answer ${i - length + 1}`})`;
    const key = state.key < nShared ? `${word()} position ${state.key + 1}` : name(state.key - nShared);
    const value = values[state.query * nKeys + state.key];
    const number = state.mode === "difference" ? `${value >= 0 ? "+" : ""}${value.toFixed(4)}` : value.toFixed(4);
    reading.textContent = `${name(state.query)} looks at ${key}: ${number}`;
  }

  onCell(bigCanvas, () => [state.query, state.key], (query, key) => {
    Object.assign(state, { query, key });
    read();
  });

  /** Through the output projection and the output head: what a position adds to the logits where all heads look at it. */
  function showBias() {
    const { values, n } = lab.cacheOf(lab.chosen.prefix)[state.biasLayer];
    const D = lab.model.headSize;
    const projection = lab.model.tensors[`transformer.h.${state.biasLayer}.attn.c_proj.weight`];
    const unembedding = lab.model.tensors["lm_head.weight"];
    const scale = lab.model.tensors["transformer.ln_f.weight"];
    const table = Array.from({ length: n }, (_, p) => {
      const added = Float64Array.from({ length: nEmbd }, (_, out) => {
        let sum = 0;
        for (let c = 0; c < nEmbd; c++) sum += projection[out * nEmbd + c] * values[(Math.floor(c / D) * n + p) * D + (c % D)];
        return sum;
      });
      const mean = added.reduce((sum, value) => sum + value, 0) / nEmbd;
      const logits = Array.from({ length: vocabSize }, (_, token) =>
        added.reduce((sum, value, c) => sum + unembedding[token * nEmbd + c] * scale[c] * (value - mean), 0));
      const centre = logits.reduce((sum, value) => sum + value, 0) / vocabSize;
      return logits.map((value) => value - centre);
    });
    const highest = Math.max(...table.flat().map(Math.abs), 1e-9);
    const body = table.map((logits, p) => h("tr", {}, h("th", { scope: "row" }, `${word()} ${p + 1}`), logits.map((value) => {
      const share = Math.abs(value) / highest;
      const style = `background: ${shade(share, value < 0 ? "bad" : "high")}; color: ${onShade(share)}`;
      return h("td", { style }, `${Math.round(value) || 0}`);
    })));
    const head = Array.from({ length: vocabSize }, (_, token) => h("th", { scope: "col" }, `${token}`));
    bias.replaceChildren(h("table", { class: "heat" }, h("thead", {}, h("tr", {}, h("td", {}), head)), h("tbody", {}, body)));
  }

  /** The logit lens (nostalgebraist 2020): the residual stream after each layer, through the last LayerNorm and the head. */
  function showLens() {
    const { model } = lab;
    const body = seen.record.stream.map((stream, layer) => {
      const from = (length - 1) * model.stride;
      const logits = model.unembed(stream.subarray(from), length);
      const cells = seen.answer.map((final, i) => {
        const probabilities = softmax(logits.subarray(i * vocabSize, (i + 1) * vocabSize));
        const token = argmax(probabilities, 0, vocabSize);
        const p = probabilities[token];
        const style = `background: ${shade(p)}; color: ${onShade(p)}${token === final ? "; font-weight: 700" : ""}`;
        return h("td", { style, title: `${percent(p, 1)}` }, `${token}`);
      });
      return h("tr", {}, h("th", { scope: "row" }, layer ? `after layer ${layer}` : "embeddings"), cells);
    });
    const head = seen.answer.map((_, i) => h("th", { scope: "col" }, `${i + 1}`));
    lens.replaceChildren(h("table", { class: "heat" }, h("thead", {}, h("tr", {}, h("td", {}), head)), h("tbody", {}, body)));
  }

  function update() {
    const { row, prefix } = lab.chosen;
    prefixes.show(prefix);
    picker.follow(prefix);
    seen = observe(lab, row, prefix);
    seenWithout = prefix === lab.none ? seen : observe(lab, row, lab.none);
    rowLine.replaceChildren(tokens(row), " becomes ", tokens(seen.answer));
    showHeads();
    showBias();
    showLens();
  }

  state.biasLayer = nLayer - 1;
  const layers = Array.from({ length: nLayer }, (_, layer) => [`${layer + 1}`, layer]);
  const biasLayer = select("Layer", layers, state.biasLayer, (layer) => {
    state.biasLayer = layer;
    showBias();
  });
  const modes = [["with the prefix", "with"], ["without", "without"], ["the difference", "difference"]];
  const mode = radios("Attention", modes, state.mode, (value) => {
    state.mode = value;
    showHeads();
  });
  lab.onChoice(heads, update);
  // A canvas keeps its colours when the style sheet's change.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => heads.isConnected && showHeads());
  update();
  return h("section", {},
    h("p", {}, "Each small map is a head: a line for each token of the row and of the answer, a column for each position that it looks at, the prefix first."),
    h("div", { class: "controls" }, prefixes, mode), picker, rowLine, heads,
    bigTitle, h("div", { class: "map" }, keyNames, queryNames, bigCanvas), reading,
    h("p", { class: "note" }, "A line looks at the columns: first the positions of the prefix, then the row, then the answer, in bold. The pointer or the arrow keys read the map. The share is the mean over the tokens that answer. In the difference, blue is more with the prefix and red is less."),
    h("h2", {}, "What each position adds to the logits"),
    h("p", {}, "Its value through the layer's output projection and the output head, where all heads look at it alone. Less the mean over tokens; the last LayerNorm's division and the later layers are left out."),
    h("div", { class: "controls" }, biasLayer), bias,
    h("h2", {}, "What each layer would answer"),
    h("p", {}, "The residual stream after each layer, read as if it were the last (the logit lens). The stronger the colour, the surer; bold is the final answer."), lens);
}
