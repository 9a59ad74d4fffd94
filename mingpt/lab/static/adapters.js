// Adapters: what each does to its model, see `mingpt analyze`. It is in pages that were given analyses.

import { showAnalysis } from "./analysis.js";
import { VIEWS, WITHOUT_MODEL } from "./app.js";
import { h, select } from "./dom.js";

VIEWS.Adapters = (lab) => {
  const place = h("div", {});
  const show = (analysis) => place.replaceChildren(h("div", {}, h("h2", {}, analysis.title), showAnalysis(analysis, lab.root)));
  const pairs = lab.analyses.map((analysis) => [analysis.name, analysis]);
  show(lab.analyses[0]);
  return h("section", {}, pairs.length > 1 && h("div", { class: "controls" }, select("Analysis", pairs, lab.analyses[0], show)), place);
};
WITHOUT_MODEL.push("Adapters");
