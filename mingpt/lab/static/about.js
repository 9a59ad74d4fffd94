// About: where the run comes from, what it found, and how to make it again.

import { h, percent } from "./dom.js";

export function about(lab) {
  const { run, command, versions, config, results } = lab.about;
  const kinds = ["activation", "key_value"];
  const scores = results && h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "the run's table" },
    h("table", { class: "lines" },
      h("thead", {}, h("tr", {}, ["task", "group", "without a prefix", ...kinds.map((kind) => `${kind} prefix`), "as a chain"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, Object.entries(results.tasks).map(([task, own]) => h("tr", {},
        h("th", { scope: "row" }, task), h("td", {}, own.group),
        ["without", ...kinds, "chain"].map((name) => h("td", {}, own[name] ? percent(own[name].accuracy, 2) : "–")))))));
  const seconds = results && Object.entries(results.seconds).map(([stage, value]) => `${stage} ${value.toFixed(0)} s`).join(", ");
  const precision = lab.dtype === "float16"
    ? "The page's weights are float16, rounded from the run's: a few answers differ from the run's."
    : "The page computes in float32 with the run's own weights. The run's table may be of bfloat16, where the machine has it, so a count can differ by a row or two.";
  return h("section", {},
    h("h2", {}, `The run ${run}`),
    h("p", {}, "A small GPT was trained on seven tasks mixed, with no token naming the task. Then it was frozen, and a prefix was trained for each task."),
    h("p", {}, "This command makes the run again:"), h("pre", { tabindex: 0 }, command),
    lab.hasModel && h("p", {}, precision),
    scores && [h("h2", {}, "What it found"), h("p", {}, `Percent of ${results.mixed.n_rows} test rows whose every token is right; one seed. ${seconds}.`), scores],
    h("h2", {}, "Versions that wrote this page"), h("p", {}, Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ")),
    h("h2", {}, "Settings"), h("pre", { tabindex: 0 }, JSON.stringify(config, null, 1)),
    h("p", { class: "note" }, "After “When Do Prompting and Prefix-Tuning Work?”, Petrov, Torr and Bibi, ICLR 2024."));
}
