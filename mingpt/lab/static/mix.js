// Mix: one prefix of several, and what it does to a row and to 200.

import { breathe } from "./data.js";
import { h, percent, radios, select, taskSelect, tokens } from "./dom.js";
import { concatenate, keepPositions, ofPrefix, weightedSum, withKeysOf } from "./prefix.js";
import { isSame } from "./tasks.js";

const ROWS_AT_ONCE = 20; // about 30 ms of computing

export function mix(lab) {
  if (!lab.prefixes.length) return h("p", {}, "This run has no prefixes yet.");
  const { nLayer } = lab.model;
  const kinds = [...new Set(lab.prefixes.map((prefix) => prefix.kind))];
  const ofKind = (kind) => lab.prefixes.filter((prefix) => prefix.kind === kind);
  const state = { kind: lab.chosen.prefix.kind === "padding" ? kinds[0] : lab.chosen.prefix.kind, mode: "sum", keysOf: null };
  let [parts, dropped, rowsOf] = [[], new Set(), lab.taskNames[0]];
  let current = 0;

  const sliders = h("div", {});
  const grid = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "positions and layers" });
  const answerLine = h("p", { role: "status" });
  const accuracy = h("div", { class: "bars" });
  const counted = h("p", { class: "note", role: "status" });
  const keysField = h("div", {});

  function setKind(kind) {
    state.kind = kind;
    state.keysOf = null;
    const own = ofKind(kind);
    parts = [own[0], own[1] ?? own[0]].map((prefix, k) => ({ prefix, weight: 1 - k }));
    dropped = new Set();
    const options = [["the same prefixes", null], ...own.map((prefix) => [prefix.name, prefix])];
    keysField.replaceChildren(select("Keys of", options, null, (prefix) => {
      state.keysOf = prefix;
      update();
    }));
    showSliders();
    update();
  }

  function showSliders() {
    const options = ofKind(state.kind).map((prefix) => [prefix.name, prefix]);
    sliders.replaceChildren(...parts.map((part, k) => {
      const output = h("output", {}, part.weight.toFixed(2));
      const slider = h("input", {
        type: "range", min: -1, max: 2, step: 0.05, value: part.weight, "aria-label": `weight of ${part.prefix.name}`,
        oninput: () => {
          part.weight = Number(slider.value);
          output.textContent = part.weight.toFixed(2);
          update();
        },
      });
      const choice = select(`Prefix ${k + 1}`, options, part.prefix, (prefix) => {
        part.prefix = prefix;
        slider.setAttribute("aria-label", `weight of ${prefix.name}`);
        update();
      });
      const remove = () => {
        parts = parts.filter((each) => each !== part);
        showSliders();
        update();
      };
      const removal = parts.length > 1 && h("button", { onclick: remove, "aria-label": `remove prefix ${k + 1}` }, "×");
      return h("div", { class: "slider" }, choice, slider, output, removal);
    }), h("button", {
      onclick: () => {
        parts.push({ prefix: ofKind(state.kind)[parts.length % options.length], weight: 0 });
        showSliders();
        update();
      },
    }, "Add a prefix"));
  }

  /** The keys and values of the mixture, before positions are dropped. */
  function mixture() {
    const scaled = (part) => weightedSum([part.prefix], [part.weight]);
    const used = parts.filter((part) => part.weight !== 0);
    let shared = state.mode === "sum"
      ? ofPrefix(lab.model, weightedSum(parts.map((part) => part.prefix), parts.map((part) => part.weight)))
      : concatenate(lab.model, (used.length ? used : parts).map((part) => ofPrefix(lab.model, scaled(part))));
    if (state.keysOf && state.mode === "sum") shared = withKeysOf(shared, lab.cacheOf(state.keysOf));
    return shared;
  }

  function showGrid(nPositions) {
    const key = `${state.kind} ${nPositions}`;
    if (grid.dataset.key === key) return;
    grid.dataset.key = key;
    const toggle = (cells, isKept) => {
      for (const place of cells) isKept ? dropped.delete(place) : dropped.add(place);
      for (const box of grid.querySelectorAll("input[data-place]")) box.checked = !dropped.has(box.dataset.place);
      update();
    };
    const positions = Array.from({ length: nPositions }, (_, p) => p);
    const layers = Array.from({ length: nLayer }, (_, l) => l);
    const box = (label, cells, place) => {
      const input = h("input", {
        type: "checkbox", checked: place === undefined || !dropped.has(place), "aria-label": label, "data-place": place,
        onchange: () => toggle(cells, input.checked),
      });
      return input;
    };
    const head = positions.map((p) =>
      h("th", { scope: "col" }, `${p + 1}`, h("br"), box(`position ${p + 1} in every layer`, layers.map((l) => `${l} ${p}`))));
    const body = layers.map((l) => h("tr", {},
      h("th", { scope: "row" }, h("label", { class: "check" }, box(`layer ${l + 1}`, positions.map((p) => `${l} ${p}`)), `layer ${l + 1}`)),
      positions.map((p) => h("td", {}, box(`layer ${l + 1}, position ${p + 1}`, [`${l} ${p}`], `${l} ${p}`)))));
    grid.replaceChildren(h("table", { class: "drops" },
      h("thead", {}, h("tr", {}, h("td", {}), head)), h("tbody", {}, body)));
  }

  async function update() {
    const own = ++current;
    const full = mixture();
    showGrid(full[0].n);
    const shared = dropped.size ? keepPositions(lab.model, full, (l, p) => !dropped.has(`${l} ${p}`)) : full;
    const [answer] = lab.answer([lab.chosen.row], shared).answers;
    const tasks = lab.tasksOf(lab.chosen.row, answer);
    answerLine.replaceChildren(tokens(lab.chosen.row), " becomes ", tokens(answer, () => (tasks.length ? "right" : "")),
      tasks.length ? ` which is right for ${tasks.join(", ")}.` : " which is right for none of the tasks that this page knows.");
    const { inputs, solutions } = lab.rows[rowsOf];
    const counts = Object.fromEntries(lab.taskNames.map((task) => [task, { nRight: 0, nRows: 0 }]));
    for (let k = 0; k < inputs.length; k += ROWS_AT_ONCE) {
      await breathe();
      if (own !== current) return;
      const rows = inputs.slice(k, k + ROWS_AT_ONCE);
      lab.answer(rows, shared).answers.forEach((answer, i) => {
        for (const task of lab.taskNames) {
          const solution = task === rowsOf ? solutions[k + i] : lab.solution(task, rows[i]);
          if (solution) counts[task].nRows++;
          if (isSame(solution, answer)) counts[task].nRight++;
        }
      });
      showAccuracy(counts, k + rows.length, inputs.length);
    }
  }

  function showAccuracy(counts, n, nAll) {
    counted.textContent = `${n} of ${nAll} rows of ${rowsOf}; for another task, those that are also its rows`;
    counted.dataset.isDone = n === nAll;
    accuracy.replaceChildren(...lab.taskNames.flatMap((task) => {
      const { nRight, nRows } = counts[task];
      const share = nRows ? nRight / nRows : 0;
      return [h("span", {}, task), h("span", { class: "bar" }, h("span", { style: `width: ${100 * share}%` })), h("span", {}, nRows ? percent(share, 1) : "no rows")];
    }));
  }

  lab.onChoice(sliders, update);
  const mode = radios("Put together", [["as a weighted sum", "sum"], ["one after the other", "concatenation"]], "sum", (value) => {
    state.mode = value;
    keysField.hidden = value !== "sum";
    dropped = new Set();
    update();
  });
  const kind = kinds.length > 1 && select("Kind", kinds.map((each) => [each, each]), state.kind, setKind);
  const rows = taskSelect(lab, "Rows of", rowsOf, (task) => {
    rowsOf = task;
    lab.choose({ row: lab.rows[task].inputs[0] });
  });
  setKind(state.kind);
  return h("section", {},
    h("p", {}, "A mixture of prefixes stands before the row. The answer and the accuracy follow while a slider moves."),
    h("div", { class: "controls" }, kind, mode, keysField), sliders,
    h("h3", {}, "Positions and layers that are kept"), grid,
    h("h3", {}, "The answer"), answerLine,
    h("h3", {}, "Of how many rows the answer is right for each task"), h("div", { class: "controls" }, rows), counted, accuracy);
}
