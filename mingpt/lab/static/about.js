// About: where the run comes from, what it found, and how to make it again.

import { h, percent } from "./dom.js";

export function about(lab) {
  const { run, command, versions, config, results, own_results: ownResults } = lab.about;
  const ofOwn = Object.entries(ownResults?.tasks ?? {}).map(([name, own]) => [name, { group: "own task", ...own }]);
  const lines = [...ofOwn, ...Object.entries(results?.tasks ?? {})];
  const kinds = ["activation", "key_value", "prompt"].filter((kind) => lines.some(([, own]) => own[kind]));
  const head = ["task", "group", "without a prefix", ...kinds.flatMap((kind) => [`${kind} prefix`, "iterations"]), "as a chain"];
  const score = (own) => h("td", {}, own ? percent(own.accuracy, 2) : "–");
  const scores = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "the run's table" }, h("table", { class: "lines" },
    h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, lines.map(([name, own]) => h("tr", {},
      h("th", { scope: "row" }, name), h("td", {}, own.group), score(own.without),
      kinds.map((kind) => [score(own[kind]), h("td", {}, `${own[kind]?.n_iters ?? results?.n_iters[kind]?.[name] ?? "–"}`)]),
      score(own.chain))))));
  const seconds = Object.entries(results?.seconds ?? {}).map(([stage, value]) => `${stage} ${value.toFixed(0)} s`).join(", ");
  const precision = lab.dtype === "float16"
    ? "The page's weights are float16, rounded from the run's: a few answers differ from the run's."
    : "The page computes in float32 with the run's own weights. The run's table may be of bfloat16, where the machine has it, so a count can differ by a row or two.";
  return h("section", {},
    h("h2", {}, `The run ${run}`),
    h("p", {}, "A small GPT was trained on seven tasks mixed, with no token naming the task. Then it was frozen, and a prefix was trained for each task."),
    h("p", {}, "This command makes the run again:"), h("pre", { tabindex: 0 }, command),
    lab.hasModel && h("p", {}, precision),
    lines.length > 0 && [h("h2", {}, "What it found"),
      h("p", {}, `Percent of ${(results?.mixed ?? ownResults).n_rows} test rows whose every token is right; one seed${seconds && `; ${seconds}`}.`), scores],
    h("h2", {}, "Versions that wrote this page"), h("p", {}, Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ")),
    h("h2", {}, "Settings"), h("details", {}, h("summary", {}, "All settings of the run"), h("pre", { tabindex: 0 }, JSON.stringify(config, null, 1))),
    h("p", { class: "note" }, "After “When Do Prompting and Prefix-Tuning Work?”, Petrov, Torr and Bibi, ICLR 2024."));
}
