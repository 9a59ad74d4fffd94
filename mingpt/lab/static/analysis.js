// What an adapter does to a model on a text, in all and by layer and head: the page of `mingpt analyze`, and a part of the lab's.

import { onCell, paint, ramp } from "./charts.js";
import { h, percent } from "./dom.js";

const MAPS = ["share", "movement", "distance", "rank", "effective_rank", "direction_share"];

/** Four digits of a number that is not whole; a number that was not finite is null. */
function digits(value) {
  if (value === null || Number.isInteger(value)) return `${value ?? "–"}`;
  return Math.abs(value) < 1e-3 ? value.toExponential(3) : value.toPrecision(4);
}

const words = (name) => name.replaceAll("_", " ");

/** The numbers from 1 along a side of a map, as many as have room. */
function axis(name, n) {
  const step = Math.ceil(n / 12);
  const starts = Array.from({ length: Math.ceil(n / step) }, (_, k) => k * step);
  const place = step > 1 ? "; text-align: start; align-content: start" : "";
  return h("div", { class: name, "aria-hidden": true },
    starts.map((start) => h("span", { style: `flex-grow: ${Math.min(step, n - start)}${place}` }, `${start + 1}`)));
}

/**
 * Maps of numbers (L, H). All show the same head, the one that the pointer or the arrow keys chose on any of them.
 * @param root an element in the page, which has its colours.
 */
function maps(columns, root) {
  let head = [0, 0];
  const all = columns.map(({ name, meaning, values }) => {
    const [nLayer, nHead] = [values.length, values[0].length];
    const numbers = values.flat();
    const largest = Math.max(...numbers);
    const label = `${words(name)} by layer and head; the arrow keys read it, and the table has the same numbers`;
    const style = `height: ${Math.min(1.75 * nLayer, 16)}rem`;
    const canvas = h("canvas", { tabindex: 0, role: "img", "aria-label": label, style });
    const mark = h("span", { class: "mark", style: `width: ${100 / nHead}%; height: ${100 / nLayer}%` });
    const reading = h("p", {});
    const figure = h("figure", {}, h("figcaption", {}, words(name)),
      h("div", { class: "map" }, axis("keys", nHead), axis("queries", nLayer), h("div", { class: "cells" }, canvas, mark)),
      h("p", { class: "scale" }, "0 ", h("span", {}), ` ${digits(largest)}`), reading, h("p", { class: "note" }, meaning));
    const show = (isUsed) => {
      const [row, column] = head;
      Object.assign(mark.style, { top: `${(100 * row) / nLayer}%`, left: `${(100 * column) / nHead}%` });
      reading.setAttribute("aria-live", isUsed ? "polite" : "off");
      reading.textContent = `layer ${row + 1}, head ${column + 1}: ${digits(values[row][column])}`;
    };
    onCell(canvas, () => head, (...cell) => {
      head = cell;
      for (const each of all) each.show(each.figure === figure);
    });
    const draw = () => paint(canvas, numbers.map((value) => value / (largest || 1)), nLayer, nHead, ramp(root));
    return { figure, show, draw };
  });
  const draw = () => all.forEach((each) => each.draw());
  all.forEach((each) => each.show(false));
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw); // a canvas keeps its colours
  return all.map((each) => each.figure);
}

/** A table that can be scrolled within its box. head: names of the columns. body: lines of cells, the first its name. */
function table(label, head, body, isLong = false) {
  const lines = body.map(([name, ...cells]) =>
    h("tr", {}, h("th", { scope: "row" }, name), cells.map((text) => h("td", {}, text))));
  return h("div", { class: isLong ? "scroll long" : "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", { class: "lines" },
    h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, lines)));
}

/** The parts of a view of one analysis, below its title. root: see maps. */
export function showAnalysis({ logits, comparison, columns, checks }, root) {
  const effect = [
    ["loss with the adapter", digits(logits.loss), "nats a token"],
    ["loss without it", digits(logits.base_loss), "nats a token"],
    ["KL", digits(logits.kl), "nats a token; divergence of the predictions with the adapter from those without"],
    ["agreement", percent(logits.agreement, 1), "of tokens, at which both have the same likeliest next token"],
  ];
  const others = columns.filter(({ name }) => !MAPS.includes(name)).map(({ name, meaning }) => h("p", { class: "note" }, `${words(name)}: ${meaning}`));
  const lines = columns[0].values.flatMap((heads, layer) =>
    heads.map((_, head) => [`${layer + 1}, ${head + 1}`, ...columns.map(({ values }) => digits(values[layer][head]))]));
  return [
    h("h2", {}, "What the adapter does to the predictions"), table("predictions", ["measure", "value", "unit"], effect),
    comparison && [h("h2", {}, "What could take its place"),
      comparison.sentences.map((text) => h("p", {}, text)),
      h("p", {}, `Each loss is the mean over the last ${comparison.n_scored} tokens of each row, each share one of the adapter's gain.`),
      table("comparison", comparison.cells[0], comparison.cells.slice(1))],
    h("h2", {}, "What it does to attention"),
    h("p", {}, "In each map a line is a layer and a column is a head. The pointer or the arrow keys choose a head, in all maps at once."),
    h("div", { class: "maps" }, maps(columns.filter(({ name }) => MAPS.includes(name)), root)),
    checks.length > 0 && [h("h2", {}, "How exactly the theory holds"), h("ul", {}, checks.map((text) => h("li", {}, text)))],
    h("h2", {}, "All numbers"), others, table("all numbers", ["layer, head", ...columns.map(({ name }) => words(name))], lines, true)];
}

/** Start the page of an analysis with the data that is in it. */
export function startAnalysis() {
  const root = document.getElementById("lab");
  const data = JSON.parse(document.getElementById("header").textContent);
  root.classList.add("mingpt-lab");
  root.replaceChildren(h("header", {}, h("h1", {}, data.title)), h("main", {}, showAnalysis(data, root),
    h("h2", {}, "How this page was made"), h("pre", { tabindex: 0 }, data.command),
    h("p", {}, Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ")),
    h("p", { class: "note" }, "After “When Do Prompting and Prefix-Tuning Work?”, Petrov, Torr and Bibi, ICLR 2024.")));
  root.dataset.isReady = "true";
}
