// The page: its views as tabs, each made when it is first opened.

import { about } from "./about.js";
import { ask } from "./ask.js";
import { curves } from "./curves.js";
import { decodeBase64, Lab } from "./data.js";
import { h, newId } from "./dom.js";
import { look } from "./look.js";
import { matrix } from "./matrix.js";
import { mix } from "./mix.js";

export const VIEWS = { Ask: ask, Mix: mix, Look: look, Matrix: matrix, Curves: curves, About: about };
export const WITHOUT_MODEL = ["Curves", "About"];

/** Show a lab in an element. */
export function mount(root, lab) {
  const names = Object.keys(VIEWS).filter((name) => lab.hasModel || WITHOUT_MODEL.includes(name));
  const ids = Object.fromEntries(names.map((name) => [name, newId()]));
  const tabs = names.map((name) => h("button", {
    role: "tab", id: `${ids[name]}-tab`, "aria-controls": ids[name], onclick: () => open(name),
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const other = tabs[(names.indexOf(name) + step + names.length) % names.length];
      other.focus();
      other.click();
    },
  }, name));
  const panels = names.map((name) => h("div", { role: "tabpanel", id: ids[name], "aria-labelledby": `${ids[name]}-tab` }));
  function open(name) {
    names.forEach((each, i) => {
      tabs[i].setAttribute("aria-selected", each === name);
      tabs[i].tabIndex = each === name ? 0 : -1;
      panels[i].hidden = each !== name;
    });
    const panel = panels[names.indexOf(name)];
    if (panel.hasChildNodes()) lab.choose({});
    else panel.append(VIEWS[name](lab));
  }
  const header = h("header", {}, h("h1", {}, `Prefix-tuning lab: ${lab.about.run}`), h("div", { role: "tablist", "aria-label": "views" }, tabs));
  root.classList.add("mingpt-lab");
  root.lab = lab; // for the console
  lab.root = root; // has the page's colours
  root.replaceChildren(header, h("main", {}, panels));
  open(names[0]);
  root.dataset.isReady = "true";
}

/** Start the page with the data that is in it. */
export async function start() {
  const text = (id) => document.getElementById(id).textContent;
  const lab = await Lab.load(JSON.parse(text("header")), decodeBase64(text("tensors")).buffer, decodeBase64(KERNELS));
  mount(document.getElementById("lab"), lab);
}
