// Prefixes as the keys and values that a row attends to, and what can be done with them.
//
// "Shared" keys and values are an array over layers of {keys, values, n}: (H, n, D) each, the same for all rows.

import { multipleOf } from "./model.js";

/** (P, C) to (H, P, D). */
function splitHeads(model, rows, start, nPositions, ld) {
  const { nHead, headSize: D } = model;
  const found = new Float32Array(nPositions * nHead * D);
  for (let head = 0; head < nHead; head++) {
    for (let p = 0; p < nPositions; p++) {
      for (let d = 0; d < D; d++) found[(head * nPositions + p) * D + d] = rows[start + p * ld + head * D + d];
    }
  }
  return found;
}

/** No keys and values before the row. */
export const nothing = (model) =>
  Array.from({ length: model.nLayer }, () => ({ keys: new Float32Array(0), values: new Float32Array(0), n: 0 }));

/** The keys and values of tokens (T), or of embeddings (T, C), at the positions from 0 on. */
export function ofTokens(model, tokens) {
  const n = tokens instanceof Float32Array ? tokens.length / model.nEmbd : tokens.length;
  const cache = model.newCache(nothing(model), 1, n, 0);
  model.forward(tokens, cache, 1);
  return cache.own.map(({ keys, values }) => ({ keys, values, n }));
}

/**
 * The keys and values that a prefix becomes.
 * @param prefix {kind, values}: "key_value" (L, 2, P, C), "activation" (L, P, C) or "prompt" (P, C).
 */
export function ofPrefix(model, { kind, values }) {
  const { nLayer, nEmbd: C, stride } = model;
  if (kind === "prompt") return ofTokens(model, values);
  const size = values.length / nLayer;
  return Array.from({ length: nLayer }, (_, layer) => {
    if (kind === "key_value") {
      const n = size / (2 * C);
      const [keys, own] = [layer * size, layer * size + n * C].map((start) => splitHeads(model, values, start, n, C));
      return { keys, values: own, n };
    }
    const n = size / C;
    for (let p = 0; p < n; p++) {
      const start = layer * size + p * C;
      model.stream.set(values.subarray(start, start + C), p * stride);
    }
    model.firstLayerNorm(layer, model.stream, model.normed, n);
    model.linear(`transformer.h.${layer}.attn.c_attn`, model.normed, stride, model.wide, n);
    const ld = multipleOf(8, 3 * C);
    const [keys, own] = [C, 2 * C].map((start) => splitHeads(model, model.wide, start, n, ld));
    return { keys, values: own, n };
  });
}

/** The weighted sum of prefixes of one kind and size, as a prefix. */
export function weightedSum(prefixes, weights) {
  const values = new Float32Array(prefixes[0].values.length);
  prefixes.forEach((prefix, k) => prefix.values.forEach((value, i) => (values[i] += weights[k] * value)));
  return { kind: prefixes[0].kind, values };
}

/** One after the other, the first one first. */
export function concatenate(model, several) {
  const D = model.headSize;
  return several[0].map((_, layer) => {
    const parts = several.map((shared) => shared[layer]);
    const n = parts.reduce((sum, part) => sum + part.n, 0);
    const join = (name) => {
      const found = new Float32Array(model.nHead * n * D);
      for (let head = 0, at = 0; head < model.nHead; head++) {
        for (const part of parts) {
          const size = part.n * D;
          found.set(part[name].subarray(head * size, (head + 1) * size), at);
          at += size;
        }
      }
      return found;
    };
    return { keys: join("keys"), values: join("values"), n };
  });
}

/** Only the positions for which isKept(layer, position) says so. */
export function keepPositions(model, shared, isKept) {
  const D = model.headSize;
  return shared.map((part, layer) => {
    const kept = Array.from({ length: part.n }, (_, p) => p).filter((p) => isKept(layer, p));
    const pick = (array) => {
      const found = new Float32Array(model.nHead * kept.length * D);
      for (let head = 0; head < model.nHead; head++) {
        kept.forEach((p, k) => {
          const from = (head * part.n + p) * D;
          found.set(array.subarray(from, from + D), (head * kept.length + k) * D);
        });
      }
      return found;
    };
    return { keys: pick(part.keys), values: pick(part.values), n: kept.length };
  });
}

/** The values of one with the keys of another of the same size. */
export const withKeysOf = (shared, other) =>
  shared.map(({ values, n }, layer) => ({ keys: other[layer].keys, values, n }));
