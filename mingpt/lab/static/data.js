// What a page shows, and what its views share: the model, the prefixes, and the row and the prefix that are chosen.

import { Model, generate } from "./model.js";
import { concatenate, ofPrefix, ofTokens } from "./prefix.js";
import { isKnown, isSame, solve } from "./tasks.js";

/** Bytes from base64 text. */
export function decodeBase64(text) {
  const characters = atob(text.trim());
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** float32 numbers from `n` float16 ones. */
function fromHalf(buffer, offset, n) {
  const halves = new Uint16Array(buffer, offset, n);
  return Float32Array.from(halves, (half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}

/** The page's data with the model ready to compute. */
export class Lab extends EventTarget {
  /**
   * @param header see mingpt/lab/report.py.
   * @param buffer an ArrayBuffer with the tensors.
   * @param kernels the bytes of kernels.wasm.
   */
  static async load(header, buffer, kernels) {
    const lab = new Lab();
    Object.assign(lab, header);
    lab.hasModel = Boolean(header.config);
    lab.ownTasks = header.own_tasks ?? [];
    if (!lab.hasModel) return lab;
    const tensors = {};
    for (const [name, { shape, offset }] of Object.entries(header.tensors)) {
      const n = shape.reduce((product, size) => product * size, 1);
      tensors[name] = header.dtype === "float16" ? fromHalf(buffer, offset, n) : new Float32Array(buffer, offset, n);
    }
    lab.model = await Model.load(header.config, tensors, kernels);
    lab.taskNames = Object.keys(lab.rows);
    lab.none = { name: "none", task: null, kind: "padding", label: "no prefix", n_placeholders: lab.data.prefix_padding };
    lab.prefixes = header.prefixes.map((prefix) => ({
      ...prefix,
      label: header.prefixes.some((each) => each.kind !== prefix.kind) ? `${prefix.name} (${prefix.kind})` : prefix.name,
      values: tensors[`prefix/${prefix.kind}/${prefix.name}`],
    }));
    lab.caches = new Map();
    const isFirst = (prefix) => lab.ownTasks.includes(prefix.task) || prefix.kind === "key_value";
    const first = lab.prefixes.find(isFirst) ?? lab.prefixes[0] ?? lab.none;
    lab.chosen = { prefix: first, row: lab.rows[first.task ?? lab.taskNames[0]].inputs[0], position: null };
    return lab;
  }

  /** Change what is chosen, and tell the views. */
  choose(change) {
    Object.assign(this.chosen, change);
    this.dispatchEvent(new Event("choice"));
  }

  /** Call a view's update when another choice is made, and when the view is opened again; not while it is hidden. */
  onChoice(element, update) {
    this.addEventListener("choice", () => element.checkVisibility() && update());
  }

  /** The keys and values of a prefix, or of the padding that stands where one is missing. */
  cacheOf(prefix) {
    if (!this.caches.has(prefix)) {
      const padding = (n) => ofTokens(this.model, new Array(n).fill(0));
      const nMissing = this.data.prefix_padding - (prefix.n_placeholders ?? 0);
      let shared = prefix.values ? ofPrefix(this.model, prefix) : padding(this.data.prefix_padding);
      if (prefix.values && nMissing > 0) shared = concatenate(this.model, [padding(nMissing), shared]);
      this.caches.set(prefix, shared);
    }
    return this.caches.get(prefix);
  }

  /** Answer rows with a prefix, or with keys and values, see `generate`. */
  answer(rows, prefixOrCache) {
    const shared = Array.isArray(prefixOrCache) ? prefixOrCache : this.cacheOf(prefixOrCache);
    return generate(this.model, rows, shared, this.data.prefix_padding, this.data.length);
  }

  /** Whether a row is one that the task is posed on. */
  isRowOf(task, row) {
    const { first, rest } = this.rows[task];
    return row.every((value, i) => {
      const [low, high] = i ? rest : first;
      return low <= value && value <= high;
    });
  }

  /** What a task makes of a row: computed, or looked up; null where it is not known, or the row is none of the task. */
  solution(task, row) {
    if (task === null || !this.isRowOf(task, row)) return null;
    if (isKnown(task)) return solve(task, row);
    const stored = this.rows[task];
    return stored?.solutions[stored.inputs.findIndex((input) => isSame(input, row))] ?? null;
  }

  /** The tasks whose solution of the row an answer is. */
  tasksOf(row, answer) {
    return this.taskNames.filter((task) => isSame(this.solution(task, row), answer));
  }
}

/** Let the browser draw and hear before going on. */
export const breathe = () => new Promise((resolve) => setTimeout(resolve));
