// Matrix: every prefix on every task, and the rows behind each number.

import { h, onShade, percent, select, shade, tokens } from "./dom.js";
import { isSame } from "./tasks.js";

export function matrix(lab) {
  const { n_rows: nRows, n_right: nRight } = lab.matrix;
  const kinds = Object.keys(nRight);
  if (!kinds.length) return h("p", {}, "This run has no prefixes yet.");
  const table = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "accuracy of every prefix on every task" });
  const details = h("div", {});
  let kind = kinds.includes("key_value") ? "key_value" : kinds[0];

  function showTable() {
    const names = Object.keys(nRight[kind]);
    const head = lab.taskNames.map((task) => h("th", { scope: "col", class: "tall" }, h("span", {}, task)));
    const body = names.map((name) => h("tr", {}, h("th", { scope: "row" }, name === "none" ? "no prefix" : name),
      lab.taskNames.map((task) => {
        const share = nRight[kind][name][task] / nRows;
        const label = `prefix ${name} on ${task}: ${percent(share, 1)}; show its rows`;
        const style = `background: ${shade(share)}; color: ${onShade(share)}`;
        return h("td", {}, h("button", { style, "aria-label": label, onclick: () => showRows(name, task) }, (100 * share).toFixed(0)));
      })));
    table.replaceChildren(h("table", { class: "heat" },
      h("thead", {}, h("tr", {}, h("td", {}), head)), h("tbody", {}, body)));
    details.replaceChildren();
  }

  function showRows(name, task) {
    const prefix = name === "none" ? lab.none : lab.prefixes.find((each) => each.name === name && each.kind === kind);
    const { inputs, solutions } = lab.rows[task];
    const lines = [];
    for (let k = 0; k < nRows; k += 40) {
      lab.answer(inputs.slice(k, k + 40), prefix).answers.forEach((answer, i) => {
        const [input, solution] = [inputs[k + i], solutions[k + i]];
        lines.push({ input, solution, answer, isRight: isSame(answer, solution), tasks: lab.tasksOf(input, answer) });
      });
    }
    const wrong = lines.filter((line) => !line.isRight);
    const counts = new Map();
    for (const line of wrong) for (const other of line.tasks) counts.set(other, (counts.get(other) ?? 0) + 1);
    const others = [...counts].sort((a, b) => b[1] - a[1]).map(([other, n]) => `${other} ${n}`);
    const shown = wrong.length ? wrong : lines;
    const head = ["row", "answer", "right answer", "right for other tasks"];
    const rows = shown.slice(0, 50).map(({ input, solution, answer, tasks }) => {
      const marked = tokens(answer, (i) => (answer[i] === solution[i] ? "right" : "wrong"));
      const cells = [tokens(input), marked, tokens(solution), tasks.filter((other) => other !== task).join(", ")];
      return h("tr", {}, cells.map((cell, i) => h(i ? "td" : "th", { "data-label": head[i], scope: i ? null : "row" }, cell)));
    });
    const what = wrong.length ? `${wrong.length} of ${nRows} rows are wrong` : `All ${nRows} rows are right`;
    const rest = shown.length > 50 ? "; the first 50 are shown" : "";
    const heading = h("h2", { tabindex: -1 }, `${name === "none" ? "No prefix" : name} on ${task}`);
    details.replaceChildren(heading,
      h("p", {}, `${what}${rest}.`, others.length > 0 && ` Of those that are wrong, the answer is right for: ${others.join(", ")}.`),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "rows" }, h("table", { class: "lines stack" },
        h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows))));
    heading.focus();
  }

  const choice = kinds.length > 1 && select("Kind", kinds.map((each) => [each, each]), kind, (value) => {
    kind = value;
    showTable();
  });
  showTable();
  return h("section", {},
    h("p", {}, `Percent of ${nRows} test rows whose every token is right: a line for each prefix, a column for each task. A number opens its rows.`),
    h("div", { class: "controls" }, choice), table, details);
}
