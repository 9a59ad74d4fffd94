// Lines and dots over axes, as SVG with text that can be read and selected.

import { h, s } from "./dom.js";

const SIZE = { width: 640, height: 300, left: 52, right: 12, top: 12, bottom: 40 }; // narrower on a narrow screen

/** Round numbers between two, about `n` of them. */
function ticks(low, high, n) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

const colour = (index) => `var(--series-${index % 8})`;
const dashes = ["none", "6 3", "2 3"];

/**
 * A chart. The legend beside several series is in the order of their last values; the pointer on a line or on its name,
 * or the focus, makes the others fade, and a click holds that.
 * @param series [{label, points: [[x, y], ...], isDots}], at most 24 of them are told apart.
 * @param options {title, x, y: axis labels, yRange: [low, high], categories: names of the values 0, 1, ... of x}.
 */
export function chart(series, { title, x, y, yRange, categories }) {
  const { height, left, right, top } = SIZE;
  const width = Math.max(300, Math.min(SIZE.width, window.innerWidth - 24));
  const longest = Math.max(0, ...(categories ?? []).map((name) => name.length));
  const bottom = categories ? Math.min(150, 20 + 5.5 * longest) : SIZE.bottom;
  const points = series.flatMap((each) => each.points);
  if (!points.length) return h("p", { class: "note" }, "There is nothing to draw with these choices.");
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  const [xLow, xHigh] = categories ? [-0.5, categories.length - 0.5] : [Math.min(0, ...xs), Math.max(...xs)];
  const [yLow, yHigh] = yRange ?? [Math.min(0, ...ys), Math.max(...ys)];
  const toX = (value) => left + ((value - xLow) / (xHigh - xLow || 1)) * (width - left - right);
  const toY = (value) => top + (1 - (value - yLow) / (yHigh - yLow || 1)) * (height - top);
  const grid = ticks(yLow, yHigh, 5).map((value) => [
    s("line", { class: "grid", x1: left, x2: width - right, y1: toY(value), y2: toY(value) }),
    s("text", { x: left - 6, y: toY(value) + 4, "text-anchor": "end" }, `${value}`),
  ]);
  const below = categories
    ? categories.map((name, i) =>
        s("text", { "text-anchor": "end", transform: `translate(${toX(i) + 4} ${height + 14}) rotate(-50)` }, name),
      )
    : ticks(xLow, xHigh, width / 100).map((value) =>
        s("text", { x: toX(value), y: height + 18, "text-anchor": "middle" }, value.toLocaleString("en")),
      );
  const marks = series.map(({ label, points: own, isDots }, k) => {
    const events = { onpointerenter: () => mark(k), onpointerleave: () => mark(held) };
    if (isDots) {
      return s("g", events, own.map(([px, py]) => s("circle", { cx: toX(px), cy: toY(py), r: 3.5, fill: colour(k) }, s("title", {}, `${label}: ${py}`))));
    }
    const d = own.map(([px, py], i) => `${i ? "L" : "M"}${toX(px).toFixed(1)} ${toY(py).toFixed(1)}`).join("");
    return s("g", events, s("title", {}, label), s("path", { d, class: "near" }),
      s("path", { d, class: "line", stroke: colour(k), "stroke-dasharray": dashes[(k >> 3) % 3] }));
  });
  const axes = [
    s("line", { class: "axis", x1: left, x2: width - right, y1: height, y2: height }),
    s("text", { x: 14, y: (top + height) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(top + height) / 2})` }, y),
    !categories && s("text", { x: (left + width - right) / 2, y: height + 36, "text-anchor": "middle" }, x),
  ];
  const box = `0 0 ${width} ${height + bottom}`;
  const svg = s("svg", { viewBox: box, role: "img", "aria-label": `${title}: ${y} over ${x}` }, grid, below, marks, axes);
  let held = null;
  /** Let the series of this number stand out; null for none. */
  function mark(chosen) {
    for (const each of [marks, keys]) each.forEach((element, k) => element.classList.toggle("faded", chosen !== null && k !== chosen));
    keys.forEach((key, k) => key.firstChild.setAttribute("aria-pressed", k === held));
  }
  const keys = series.map(({ label, points: own, isDots }, k) => {
    const hold = () => mark((held = held === k ? null : k));
    const events = { onclick: hold, onfocus: () => mark(k), onblur: () => mark(held), onpointerenter: () => mark(k), onpointerleave: () => mark(held) };
    const dash = dashes[(k >> 3) % 3];
    const sample = isDots
      ? s("circle", { cx: 9, cy: 5, r: 3.5, fill: colour(k) })
      : s("line", { class: "line", x1: 0, x2: 18, y1: 5, y2: 5, stroke: colour(k), "stroke-dasharray": dash });
    const last = isDots ? "" : ` ${own.at(-1)[1]?.toFixed(2) ?? ""}`; // a loss that was not finite is null
    return h("li", {}, h("button", { "aria-pressed": false, ...events }, s("svg", { class: "key", viewBox: "0 0 18 10", "aria-hidden": "true" }, sample), label, h("small", {}, last)));
  });
  const order = series.map((each, k) => [each.isDots ? 0 : -each.points.at(-1)[1], k]).sort((a, b) => a[0] - b[0]);
  const legend = series.length > 1 && h("ul", { class: "legend" }, order.map(([, k]) => keys[k]));
  return h("figure", { class: "chart" }, h("figcaption", {}, title), h("div", { class: "plot" }, svg, legend));
}

/** The colour [red, green, blue] of a number from -1 to 1 in an element's colour scheme; that of 0 is almost the page's. */
export function ramp(element) {
  const style = getComputedStyle(element);
  const [low, high, bad] = ["low", "high", "bad"].map((name) => {
    const digits = style.getPropertyValue(`--${name}`).trim(); // #rrggbb
    return [1, 3, 5].map((at) => parseInt(digits.slice(at, at + 2), 16));
  });
  return (value) => {
    const [end, share] = [value < 0 ? bad : high, Math.min(1, Math.abs(value))];
    return low.map((start, i) => start + share * (end[i] - start));
  };
}

/** Draw a matrix of numbers as coloured cells on a canvas. colourOf gives [red, green, blue] of 0 to 255. */
export function paint(canvas, values, nRows, nColumns, colourOf) {
  [canvas.width, canvas.height] = [nColumns, nRows];
  const image = new ImageData(nColumns, nRows);
  for (let i = 0; i < nRows * nColumns; i++) image.data.set([...colourOf(values[i]), 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Choose a cell of a painted canvas by the pointer, or by the arrow keys from the one that is chosen(), [row, column]. */
export function onCell(canvas, chosen, choose) {
  const within = (value, n) => Math.max(0, Math.min(n - 1, Math.floor(value)));
  const go = (row, column) => choose(within(row, canvas.height), within(column, canvas.width));
  const point = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    go(((clientY - top) / height) * canvas.height, ((clientX - left) / width) * canvas.width);
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point); // a finger that taps does not move
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    go(chosen()[0] + step[0], chosen()[1] + step[1]);
  });
}
