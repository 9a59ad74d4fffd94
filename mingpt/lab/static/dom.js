// Elements in one expression, and the controls that several views have.

/** An HTML element: h("button", {onclick: f, class: "small"}, "text", other). */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** An SVG element. */
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

const idStart = `lab-${Math.random().toString(36).slice(2)}`; // a notebook may show the lab twice
let nIds = 0;

/** An id, or the name of a group of radio buttons, that nothing else in the document has. */
export const newId = () => `${idStart}-${nIds++}`;

/** A labelled choice. options: [[label, value], ...], or {group: [[label, value], ...]}. */
export function select(label, options, value, onChange) {
  const all = [];
  const list = (pairs) =>
    pairs.map(([text, each]) => h("option", { value: all.push(each) - 1, selected: each === value }, text));
  const choices = Array.isArray(options)
    ? list(options)
    : Object.entries(options).map(([group, pairs]) => h("optgroup", { label: group }, list(pairs)));
  const id = newId();
  const element = h("select", { id, onchange: () => onChange(all[element.value]) }, choices);
  const field = h("div", { class: "field" }, h("label", { for: id }, label), element);
  field.show = (each) => (element.value = all.indexOf(each));
  return field;
}

/** A labelled check box. */
export function checkbox(label, isChecked, onChange) {
  const input = h("input", { type: "checkbox", checked: isChecked, onchange: () => onChange(input.checked) });
  return h("label", { class: "check" }, input, label);
}

/** A choice of which all possibilities are seen. options: [[label, value], ...]. */
export function radios(legend, options, value, onChange) {
  const name = newId();
  const items = options.map(([text, each]) => {
    const input = h("input", { type: "radio", name, checked: each === value, onchange: () => onChange(each) });
    return h("label", { class: "check" }, input, text);
  });
  return h("fieldset", {}, h("legend", {}, legend), items);
}

const OWN = "own tasks";

/** A choice among the prefixes of a lab: those of the user's own tasks, then by kind. */
export function prefixSelect(lab, label, value, onChange) {
  const options = { "without one": [["no prefix", lab.none]] };
  for (const prefix of lab.prefixes) {
    (options[lab.ownTasks.includes(prefix.task) ? OWN : prefix.kind] ??= []).push([prefix.label, prefix]);
  }
  return select(label, options, value, onChange);
}

/** A choice among the tasks of a lab, the user's own first. */
export function taskSelect(lab, label, value, onChange) {
  const groups = Object.groupBy(lab.taskNames, (name) => (lab.ownTasks.includes(name) ? OWN : "tasks of the run"));
  const options = Object.entries(groups).map(([group, names]) => [group, names.map((name) => [name, name])]);
  return select(label, options.length > 1 ? Object.fromEntries(options) : options[0][1], value, onChange);
}

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits).replace(/^-(?=[0.]*$)/, "")}%`;

/**
 * A colour of the page's style sheet between that of 0 and that of 1. From the half on it jumps: text can be read on
 * either side, and on nothing between them.
 */
export const shade = (share, end = "high") =>
  `color-mix(in srgb, var(--${end}) ${Math.round(share < 0.5 ? 60 * share : 60 + 40 * share)}%, var(--low))`;

/** What an element's text is on such a shade. */
export const onShade = (share) => (share < 0.5 ? "var(--text)" : "var(--on-high)");

/** Cells of tokens. marks: a class for each, or a function of its index. */
export function tokens(values, classOf = () => "") {
  return h("span", { class: "tokens" }, values.map((value, i) => h("span", { class: `token ${classOf(i)}` }, `${value}`)));
}
