// Ask: a row, a prefix, and the answer token by token.

import { breathe } from "./data.js";
import { checkbox, h, onShade, percent, prefixSelect, s, shade, taskSelect, tokens } from "./dom.js";
import { softmax } from "./model.js";
import { isSame } from "./tasks.js";

/** A row that can be typed, or drawn as bars. onChange gets the new row. */
export function rowEditor(lab, onChange) {
  const { length } = lab.data;
  const highest = Math.min(lab.model.vocabSize - 1, Math.max(...Object.values(lab.rows).flatMap((own) => own.inputs.flat())));
  const bars = Array.from({ length }, (_, i) => s("rect", { x: i + 0.06, width: 0.88 }));
  const svg = s("svg", { viewBox: `0 0 ${length} ${highest}`, preserveAspectRatio: "none", "aria-hidden": "true" }, bars);
  const inputs = Array.from({ length }, (_, i) =>
    h("input", {
      type: "number", min: 0, max: lab.model.vocabSize - 1, "aria-label": `number ${i + 1} of the row`,
      onchange: (event) => {
        const value = Math.round(Number(event.target.value));
        set(i, Math.max(0, Math.min(lab.model.vocabSize - 1, value || 0)));
      },
    }),
  );
  const element = h("div", { class: "editor", style: `grid-template-columns: repeat(${length}, 1fr)` }, svg, inputs);
  let row = lab.chosen.row;
  function set(i, value) {
    if (row[i] === value && inputs[i].value === `${value}`) return;
    onChange(row.with(i, value));
  }
  element.show = (newRow) => {
    row = newRow;
    row.forEach((value, i) => {
      inputs[i].value = value;
      bars[i].setAttribute("y", highest - Math.min(value, highest));
      bars[i].setAttribute("height", value);
    });
  };
  const draw = (event) => {
    if (!event.buttons) return;
    const box = svg.getBoundingClientRect();
    const i = Math.floor(((event.clientX - box.left) / box.width) * length);
    const value = Math.round((1 - (event.clientY - box.top) / box.height) * highest);
    if (i >= 0 && i < length) set(i, Math.max(0, Math.min(highest, value)));
  };
  svg.addEventListener("pointerdown", draw);
  svg.addEventListener("pointermove", draw);
  element.show(row);
  return element;
}

/** Buttons that choose one of a task's stored rows: any, or only those that the chosen prefix gets wrong. */
export function rowPicker(lab, onRow) {
  let followed = lab.chosen.prefix;
  let [task, isWrongOnly] = [followed.task ?? lab.taskNames[0], false];
  const status = h("span", { class: "note", role: "status" });
  const next = async () => {
    const { inputs, solutions } = lab.rows[task];
    const start = Math.floor(Math.random() * inputs.length);
    for (let k = 0; k < inputs.length; k += isWrongOnly ? 20 : 1) {
      const some = inputs.map((_, i) => i).slice(k, k + (isWrongOnly ? 20 : 1)).map((i) => (i + start) % inputs.length);
      const answers = isWrongOnly ? lab.answer(some.map((i) => inputs[i]), lab.chosen.prefix).answers : [null];
      const found = some.find((i, n) => !isSame(answers[n], solutions[i]));
      if (found !== undefined) {
        status.textContent = "";
        return onRow(inputs[found]);
      }
      await breathe();
    }
    status.textContent = `All ${inputs.length} stored rows of ${task} are right with ${lab.chosen.prefix.label}.`;
  };
  const tasks = taskSelect(lab, "Rows of", task, (name) => {
    task = name;
    next();
  });
  const wrong = checkbox("only rows it gets wrong", false, (isChecked) => {
    isWrongOnly = isChecked;
    next();
  });
  const element = h("div", { class: "controls" }, tasks, h("button", { onclick: next }, "Another row"), wrong, status);
  /** Offer the rows of the prefix's task, when another prefix is chosen. */
  element.follow = (prefix) => {
    if (prefix !== followed && prefix.task) tasks.show((task = prefix.task));
    followed = prefix;
  };
  return element;
}

export function ask(lab) {
  const { length } = lab.data;
  const grid = { class: "answer", style: `grid-template-columns: repeat(${length}, 1fr)` };
  const answerRow = h("div", { ...grid, role: "group", "aria-label": "the answer, token by token" });
  const solutionRow = h("div", { ...grid, "aria-label": "the right answer", role: "group" });
  const verdict = h("p", { role: "status" });
  const distribution = h("div", {});
  const others = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "what other prefixes say" });
  const editor = rowEditor(lab, (row) => lab.choose({ row }));
  const picker = rowPicker(lab, (row) => lab.choose({ row }));
  const prefixes = prefixSelect(lab, "Prefix", lab.chosen.prefix, (prefix) => lab.choose({ prefix }));
  let [current, shownToken] = [0, 0];

  function showDistribution(answer, probabilities, step) {
    shownToken = step;
    const order = probabilities[step].map((p, token) => [p, token]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    const bars = order.flatMap(([p, token]) => [
      h("span", {}, `${token}`),
      h("span", { class: "bar" }, h("span", { style: `width: ${100 * p}%` })),
      h("span", {}, percent(p, p > 0.9995 || p < 0.0005 ? 2 : 1)),
    ]);
    const heading = h("h3", {}, `The most likely tokens at position ${step + 1}`);
    distribution.replaceChildren(heading, h("div", { class: "bars" }, bars));
    for (const [i, cell] of [...answerRow.children].entries()) cell.setAttribute("aria-pressed", i === step);
  }

  function showOthers(row, answer) {
    const kind = lab.chosen.prefix === lab.none ? lab.prefixes[0]?.kind : lab.chosen.prefix.kind;
    const lines = [lab.none, ...lab.prefixes.filter((prefix) => prefix.kind === kind)].map((prefix) => {
      const own = lab.answer([row], prefix).answers[0];
      const solution = lab.solution(prefix.task, row);
      const isRow = prefix.task === null || lab.isRowOf(prefix.task, row);
      const verdict = !isRow ? "not a row of this task" : solution === null ? "" : isSame(own, solution) ? "right" : "wrong";
      const also = lab.tasksOf(row, own).filter((task) => task !== prefix.task);
      return h("tr", {},
        h("th", { scope: "row" }, prefix.name === "none" ? "no prefix" : prefix.name),
        h("td", {}, tokens(own, (i) => (solution && own[i] !== solution[i] ? "wrong" : solution ? "right" : ""))),
        h("td", { class: "verdict" }, verdict), h("td", { class: "note", "data-label": "right for other tasks" }, also.join(", ")));
    });
    const head = ["prefix", "its answer", "its task", "what else it would be right for"];
    others.replaceChildren(h("table", { class: "lines stack" },
      h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, lines)));
  }

  /** Why the task's answer to a row is not known. */
  function whyUnknown(task, row) {
    if (task === null) return "";
    if (lab.isRowOf(task, row)) return `Of ${task} the page knows the answers to its stored rows only.`;
    const [first, rest] = ["first", "rest"].map((name) => lab.rows[task][name].join(" to "));
    return `Not a row of ${task}: ${first === rest ? `its numbers are ${rest}` : `the first number is ${first}, the others are ${rest}`}.`;
  }

  async function update() {
    const own = ++current;
    const { row, prefix } = lab.chosen;
    editor.show(row);
    prefixes.show(prefix);
    picker.follow(prefix);
    const { answers: [answer], logits } = lab.answer([row], prefix);
    const probabilities = logits.map(softmax);
    const solution = lab.solution(prefix.task, row);
    const tasks = lab.tasksOf(row, answer).filter((task) => task !== prefix.task);
    const cells = answer.map((token, i) => {
      const p = probabilities[i][token];
      const label = `token ${i + 1} is ${token}, probability ${percent(p, 1)}${solution && token !== solution[i] ? ", wrong" : ""}`;
      const isWrong = solution && token !== solution[i];
      const style = `background: ${shade(p)}; color: ${onShade(p)}; border-color: ${isWrong ? "var(--bad)" : "transparent"}`;
      const choose = () => showDistribution(answer, probabilities, i);
      const properties = { style, "aria-label": label, onclick: choose, onfocus: choose, onpointerenter: choose };
      return h("button", properties, `${token}`, h("small", {}, percent(p)));
    });
    const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
    answerRow.replaceChildren();
    solutionRow.replaceChildren(...(solution ?? []).map((token) => h("span", { class: "token" }, `${token}`)));
    solutionRow.hidden = solutionHeading.hidden = !solution;
    verdict.textContent = "";
    for (const cell of cells) {
      if (!isStill) await new Promise((resolve) => setTimeout(resolve, 45));
      if (own !== current) return;
      answerRow.append(cell);
    }
    const isRight = isSame(answer, solution);
    const ofOwn = solution ? `The answer is ${isRight ? "right" : "wrong"}.` : whyUnknown(prefix.task, row);
    const ofOthers = tasks.length ? `It is ${isRight ? "also " : ""}right for ${tasks.join(", ")}.`
      : isRight ? "" : "It is right for none of the tasks that this page knows.";
    verdict.textContent = `${ofOwn} ${ofOthers}`;
    showDistribution(answer, probabilities, Math.min(shownToken, length - 1));
    showOthers(row, answer);
  }

  const solutionHeading = h("h3", {}, "The right answer");
  lab.onChoice(answerRow, update);
  update();
  return h("section", {},
    h("p", {}, "Type a row, or draw it in the bars. The model answers it with the prefix that is chosen; the stronger a token's colour, the surer it is."),
    h("div", { class: "controls" }, prefixes), picker,
    h("h3", {}, "The row"), editor, h("h3", {}, "The answer"), answerRow, solutionHeading, solutionRow, verdict, distribution,
    h("h3", {}, "What the other prefixes say of this row"), others);
}
