// Curves: a run's trainings over iterations, which grow while it is trained, and the results of studies.

import { chart } from "./charts.js";
import { checkbox, h, select } from "./dom.js";

const SECONDS_BETWEEN_LOOKS = 2;

/** Check boxes for which of some names are shown; onChange gets them as a Set. */
function choices(legend, names, isOn, onChange) {
  const chosen = new Set(names.filter(isOn));
  const boxes = names.map((name) => checkbox(name, chosen.has(name), (isChecked) => {
    isChecked ? chosen.add(name) : chosen.delete(name);
    onChange(chosen);
  }));
  return h("fieldset", { class: "choices" }, h("legend", {}, legend), boxes);
}

export function curves(lab) {
  const trainings = h("div", {});
  const state = { hidden: new Set(), kind: null };

  function showTrainings() {
    const { pretraining, prefixes } = lab.curves;
    const kinds = Object.keys(prefixes);
    state.kind ??= kinds.includes("key_value") ? "key_value" : kinds[0];
    const isOwn = ([task]) => lab.ownTasks.includes(task);
    const tasks = Object.entries(prefixes[state.kind] ?? {}).toSorted((a, b) => isOwn(b) - isOwn(a));
    const prefixChart = h("div", {});
    const draw = () => {
      const series = tasks.filter(([task]) => !state.hidden.has(task)).map(([label, points]) => ({ label, points }));
      const labels = { title: `Validation accuracy of ${state.kind} prefixes`, x: "iterations", y: "accuracy", yRange: [0, 1] };
      prefixChart.replaceChildren(chart(series, labels));
    };
    const parts = [h("h2", {}, "Pretraining"),
      pretraining.length ? chart([{ label: "training loss", points: pretraining }], { title: "Loss on the training rows", x: "iterations", y: "nats a token" })
        : h("p", { class: "note" }, "There is no log of the pretraining.")];
    if (kinds.length) {
      parts.push(h("h2", {}, "Prefixes"));
      if (kinds.length > 1) parts.push(h("div", { class: "controls" }, select("Kind", kinds.map((kind) => [kind, kind]), state.kind, (kind) => {
        state.kind = kind;
        showTrainings();
      })));
      const names = tasks.map(([task]) => task);
      parts.push(choices("Tasks", names, (task) => !state.hidden.has(task), (chosen) => {
        state.hidden = new Set(names.filter((task) => !chosen.has(task)));
        draw();
      }), prefixChart);
      draw();
    }
    trainings.replaceChildren(...parts);
  }

  function studies() {
    const names = Object.keys(lab.studies);
    if (!names.length) return null;
    const place = h("div", {});
    const show = (name) => {
      const cells = lab.studies[name];
      const values = (column) => [...new Set(cells.map((cell) => cell[column]))];
      const columns = { method: "method", run: "run", size: "positions or rank", max_iters: "iterations", task: "task" };
      const varied = Object.keys(columns).filter((column) => values(column).length > 1);
      let x = varied.includes("method") ? "method" : (varied[0] ?? "method");
      const hidden = { method: new Set(), task: new Set(values("task").slice(1)) };
      if (x === "task") hidden.task.clear();
      const box = h("div", {});
      const filters = h("div", {});
      const draw = () => {
        const shown = cells.filter((cell) => !hidden.method.has(cell.method) && !hidden.task.has(cell.task));
        const categories = [...new Set(shown.map((cell) => cell[x]))];
        if (typeof categories[0] === "number") categories.sort((a, b) => a - b);
        const by = x === "task" ? "method" : "task";
        const others = Object.keys(columns).filter((column) => column !== x && column !== by && values(column).length > 1);
        const groups = Map.groupBy(shown, (cell) => [cell[by], ...others.map((column) => `${column} ${cell[column]}`)].join(", "));
        const series = [...groups].slice(0, 24).map(([label, own], k) => {
          const shift = ((k + 0.5) / Math.min(24, groups.size) - 0.5) * 0.6;
          return { label, isDots: true, points: own.map((cell) => [categories.indexOf(cell[x]) + shift, cell.accuracy]) };
        });
        const rest = groups.size > 24 ? `; 24 of ${groups.size} groups are shown` : "";
        const title = `${name}: a dot for each seed${rest}`;
        box.replaceChildren(chart(series, { title, x: columns[x], y: "accuracy on test rows", yRange: [0, 1], categories: categories.map(String) }));
      };
      const showFilters = () => {
        const filter = (column, legend) => values(column).length > 1 && choices(legend, values(column), (value) => !hidden[column].has(value), (chosen) => {
          hidden[column] = new Set(values(column).filter((value) => !chosen.has(value)));
          draw();
        });
        filters.replaceChildren(...[filter("task", "Tasks"), filter("method", "Methods")].filter(Boolean));
      };
      const axis = varied.length > 1 && select("Across", varied.map((column) => [columns[column], column]), x, (column) => {
        x = column;
        draw();
      });
      showFilters();
      draw();
      place.replaceChildren(h("div", { class: "controls" }, axis), filters, box);
    };
    show(names[0]);
    return [h("h2", {}, "Studies"), h("div", { class: "controls" }, select("Study", names.map((name) => [name, name]), names[0], show)), place];
  }

  showTrainings();
  if (lab.live) {
    setInterval(async () => {
      const response = await fetch(lab.live).catch(() => null);
      if (!response?.ok) return;
      const found = await response.text();
      if (found === lab.lastCurves) return;
      lab.lastCurves = found;
      lab.curves = JSON.parse(found);
      showTrainings();
    }, 1000 * SECONDS_BETWEEN_LOOKS);
  }
  return h("section", {}, lab.live && h("p", { role: "status" }, "The curves grow while the run is trained."), trainings, studies());
}
