// The forward pass of mingpt/model.py over typed arrays, with a KV cache.
//
// Legend: B rows, T tokens, P prefix positions, C channels, H heads, D = C / H, L layers, V vocabulary.

const LAYER_NORM_EPSILON = 1e-5;
const MAX_TOKENS = 640; // of all rows of one forward pass together

/** The next multiple of `step`: rows of that many columns are what the kernel computes. */
export const multipleOf = (step, number) => step * Math.ceil(number / step);

/** A GPT in evaluation mode. */
export class Model {
  /**
   * @param config the model's: n_layer, n_head, n_embd, vocab_size, block_size, skip_layer_norm, gelu_approximate.
   * @param tensors by minGPT's names, a Float32Array each, in torch's layout: a linear layer's weight is (out, in).
   * @param kernels the bytes of kernels.wasm.
   */
  static async load(config, tensors, kernels) {
    const model = new Model(config, tensors);
    const memory = new WebAssembly.Memory({ initial: Math.ceil(model.nBytes() / 65536) });
    const { instance } = await WebAssembly.instantiate(kernels, { lab: { memory } });
    model.place(memory.buffer, instance.exports.linear);
    return model;
  }

  constructor(config, tensors) {
    Object.assign(this, { config, tensors });
    this.nLayer = config.n_layer;
    this.nHead = config.n_head;
    this.nEmbd = config.n_embd;
    this.vocabSize = config.vocab_size;
    this.headSize = this.nEmbd / this.nHead;
    const [C, stride] = [this.nEmbd, multipleOf(8, this.nEmbd)];
    this.sizes = { lm_head: [this.vocabSize, C] };
    for (let layer = 0; layer < this.nLayer; layer++) {
      const parts = { "attn.c_attn": [3 * C, C], "attn.c_proj": [C, C], "mlp.c_fc": [4 * C, C], "mlp.c_proj": [C, 4 * C] };
      for (const [part, size] of Object.entries(parts)) this.sizes[`transformer.h.${layer}.${part}`] = size;
    }
    const rows = multipleOf(4, MAX_TOKENS);
    this.bufferSizes = {
      stream: rows * stride, // the residual stream
      normed: rows * stride, // what goes into a linear layer
      added: rows * stride, // what a block adds to the stream
      wide: rows * multipleOf(8, 4 * C),
      logits: rows * multipleOf(8, this.vocabSize),
    };
    this.stride = stride;
  }

  nBytes() {
    const weights = Object.values(this.sizes).map(([nOut, nIn]) => multipleOf(8, nOut) * (nIn + 1));
    return 4 * [...weights, ...Object.values(this.bufferSizes)].reduce((sum, size) => sum + size, 0);
  }

  /** Lay the packed weights and the buffers out in the memory that the kernel sees. */
  place(buffer, kernel) {
    let offset = 0;
    const take = (size) => {
      const view = new Float32Array(buffer, offset, size);
      offset += 4 * size;
      return view;
    };
    this.kernel = kernel;
    this.linears = {};
    for (const [name, [nOut, nIn]] of Object.entries(this.sizes)) {
      const [weight, bias] = [this.tensors[`${name}.weight`], this.tensors[`${name}.bias`]];
      const nColumns = multipleOf(8, nOut);
      const [packed, packedBias] = [take(nColumns * nIn), take(nColumns)];
      for (let out = 0; out < nOut; out++) {
        const start = (out >> 3) * 8 * nIn + (out & 7);
        for (let c = 0; c < nIn; c++) packed[start + 8 * c] = weight[out * nIn + c];
      }
      if (bias) packedBias.set(bias);
      this.linears[name] = { packed, bias: packedBias, nIn, nColumns };
    }
    for (const [name, size] of Object.entries(this.bufferSizes)) this[name] = take(size);
    this.scores = new Float64Array(4096);
  }

  /** out (rows, n columns) = x (rows, n in) @ weight + bias; the rows of x are ldx numbers apart. */
  linear(name, x, ldx, out, nRows) {
    const { packed, bias, nIn, nColumns } = this.linears[name];
    const addresses = [packed, bias, out].map((array) => array.byteOffset);
    this.kernel(x.byteOffset, ldx, ...addresses, multipleOf(4, nRows), nIn, nColumns);
  }

  layerNorm(name, x, out, nRows) {
    const [weight, bias] = [this.tensors[`${name}.weight`], this.tensors[`${name}.bias`]];
    const { nEmbd, stride } = this;
    for (let row = 0; row < nRows; row++) {
      const start = row * stride;
      let [mean, variance] = [0, 0];
      for (let c = 0; c < nEmbd; c++) mean += x[start + c];
      mean /= nEmbd;
      for (let c = 0; c < nEmbd; c++) variance += (x[start + c] - mean) ** 2;
      const scale = 1 / Math.sqrt(variance / nEmbd + LAYER_NORM_EPSILON);
      for (let c = 0; c < nEmbd; c++) out[start + c] = (x[start + c] - mean) * scale * weight[c] + bias[c];
    }
  }

  /** A block's first LayerNorm, which a model may lack. */
  firstLayerNorm(layer, x, out, nRows) {
    if (this.config.skip_layer_norm) out.set(x.subarray(0, nRows * this.stride));
    else this.layerNorm(`transformer.h.${layer}.ln_1`, x, out, nRows);
  }

  /**
   * A cache for rows whose first keys and values are the same in all rows.
   * @param shared for each layer {keys, values, n}: (H, n, D) each; see prefix.js.
   * @param nRows B.
   * @param capacity how many tokens of each row it can take.
   * @param start the first token's position.
   */
  newCache(shared, nRows, capacity, start) {
    const size = nRows * this.nEmbd * capacity;
    const own = shared.map(() => ({ keys: new Float32Array(size), values: new Float32Array(size) }));
    return { shared, own, nRows, capacity, start, length: 0 };
  }

  /**
   * Run T tokens of each row after a cache, which gets their keys and values.
   * @param tokens (B, T) of integers, or embeddings (B, T, C) in a Float32Array.
   * @param cache see newCache.
   * @param nLast how many last tokens of a row get logits.
   * @param record receives for one row "attention", for each layer (H, T, n + length + T), and "stream", the residual
   *   stream (T, C) before the first block and after each.
   * @returns the logits (B, nLast, V).
   */
  forward(tokens, cache, nLast, record = null) {
    const { nEmbd: C, stride, stream, normed, added, wide } = this;
    const isEmbedded = tokens instanceof Float32Array;
    const n = isEmbedded ? tokens.length / C : tokens.length;
    const nTokens = n / cache.nRows;
    const position = cache.start + cache.length;
    if (n > MAX_TOKENS) throw new Error(`${n} tokens at once; at most ${MAX_TOKENS} fit`);
    if (position + nTokens > this.config.block_size) throw new Error(`more than ${this.config.block_size} positions`);
    const [wte, wpe] = [this.tensors["transformer.wte.weight"], this.tensors["transformer.wpe.weight"]];
    for (let i = 0; i < n; i++) {
      const [from, place] = [isEmbedded ? i * C : tokens[i] * C, (position + (i % nTokens)) * C];
      const source = isEmbedded ? tokens : wte;
      for (let c = 0; c < C; c++) stream[i * stride + c] = source[from + c] + wpe[place + c];
    }
    const keep = () => record?.stream.push(stream.slice(0, n * stride));
    keep();
    for (let layer = 0; layer < this.nLayer; layer++) {
      const block = `transformer.h.${layer}`;
      this.firstLayerNorm(layer, stream, normed, n);
      this.linear(`${block}.attn.c_attn`, normed, stride, wide, n);
      this.attend(layer, nTokens, cache, record);
      this.linear(`${block}.attn.c_proj`, normed, stride, added, n);
      for (let i = 0; i < n * stride; i++) stream[i] += added[i];
      this.layerNorm(`${block}.ln_2`, stream, normed, n);
      this.linear(`${block}.mlp.c_fc`, normed, stride, wide, n);
      this.gelu(wide, n * multipleOf(8, 4 * C));
      this.linear(`${block}.mlp.c_proj`, wide, multipleOf(8, 4 * C), added, n);
      for (let i = 0; i < n * stride; i++) stream[i] += added[i];
      keep();
    }
    cache.length += nTokens;
    for (let row = 0; row < cache.nRows; row++) {
      const from = ((row + 1) * nTokens - nLast) * stride;
      added.set(stream.subarray(from, from + nLast * stride), row * nLast * stride);
    }
    return this.unembed(added, cache.nRows * nLast);
  }

  /** The logits (rows, V) of the residual stream x (rows, stride). */
  unembed(x, nRows) {
    const { normed, logits, stride, vocabSize } = this;
    const nColumns = multipleOf(8, vocabSize);
    this.layerNorm("transformer.ln_f", x, normed, nRows);
    this.linear("lm_head", normed, stride, logits, nRows);
    const found = new Float32Array(nRows * vocabSize);
    for (let row = 0; row < nRows; row++) {
      found.set(logits.subarray(row * nColumns, row * nColumns + vocabSize), row * vocabSize);
    }
    return found;
  }

  /** Attention of the tokens in `wide` (queries, keys and values of each) to the cache and, causally, to themselves. */
  attend(layer, nTokens, cache, record) {
    const { nHead, headSize: D, nEmbd: C, stride, wide, normed: mixed, scores } = this;
    const { keys: sharedKeys, values: sharedValues, n: nShared } = cache.shared[layer];
    const { keys: ownKeys, values: ownValues } = cache.own[layer];
    const { length, capacity, nRows } = cache;
    const [ldw, scale, width] = [multipleOf(8, 3 * C), 1 / Math.sqrt(D), nShared + length + nTokens];
    const recorded = record ? new Float32Array(nHead * nTokens * width) : null;
    for (let row = 0; row < nRows; row++) {
      for (let head = 0; head < nHead; head++) {
        const [own, shared] = [(row * nHead + head) * capacity * D, head * nShared * D];
        for (let t = 0; t < nTokens; t++) {
          const query = (row * nTokens + t) * ldw + head * D;
          const nKeys = nShared + length + t + 1;
          const end = own + (length + t) * D;
          for (let d = 0; d < D; d++) {
            ownKeys[end + d] = wide[query + C + d];
            ownValues[end + d] = wide[query + 2 * C + d];
          }
          let highest = -Infinity;
          for (let s = 0; s < nKeys; s++) {
            const keys = s < nShared ? sharedKeys : ownKeys;
            const at = s < nShared ? shared + s * D : own + (s - nShared) * D;
            let product = 0;
            for (let d = 0; d < D; d++) product += wide[query + d] * keys[at + d];
            scores[s] = product * scale;
            if (scores[s] > highest) highest = scores[s];
          }
          let total = 0;
          for (let s = 0; s < nKeys; s++) total += scores[s] = Math.exp(scores[s] - highest);
          const out = (row * nTokens + t) * stride + head * D;
          for (let d = 0; d < D; d++) mixed[out + d] = 0;
          for (let s = 0; s < nKeys; s++) {
            const values = s < nShared ? sharedValues : ownValues;
            const at = s < nShared ? shared + s * D : own + (s - nShared) * D;
            const weight = scores[s] / total;
            if (recorded) recorded[(head * nTokens + t) * width + s] = weight;
            for (let d = 0; d < D; d++) mixed[out + d] += weight * values[at + d];
          }
        }
      }
    }
    record?.attention.push(recorded);
  }

  /** In place, on the first n numbers. */
  gelu(x, n) {
    if (this.config.gelu_approximate === "tanh") {
      for (let i = 0; i < n; i++) {
        x[i] *= 0.5 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x[i] + 0.044715 * x[i] ** 3)));
      }
    } else {
      for (let i = 0; i < n; i++) x[i] *= 0.5 * (1 + erf(x[i] * Math.SQRT1_2));
    }
  }
}

/**
 * The error function, to the last bits of a float32: a quotient of polynomials, with the coefficients that Eigen and XLA
 * have for it.
 */
export function erf(x) {
  const z = Math.max(-4, Math.min(4, x));
  const y = z * z;
  let above = -2.72614225801306e-10;
  above = above * y + 2.77068142495902e-8;
  above = above * y - 2.10102402082508e-6;
  above = above * y - 5.69250639462346e-5;
  above = above * y - 7.34990630326855e-4;
  above = above * y - 2.954599809854025e-3;
  above = above * y - 1.60960333262415e-2;
  let below = -1.45660718464996e-5;
  below = below * y - 2.13374055278905e-4;
  below = below * y - 1.68282697438203e-3;
  below = below * y - 7.37332916720468e-3;
  below = below * y - 1.42647390514189e-2;
  return (z * above) / below;
}

/** The index of the largest of the numbers from `start` on, `n` of them; the first of equals. */
export function argmax(numbers, start, n) {
  let best = start;
  for (let i = start + 1; i < start + n; i++) if (numbers[i] > numbers[best]) best = i;
  return best - start;
}

/** The probabilities of logits (V). */
export function softmax(logits) {
  const highest = Math.max(...logits);
  const exponentials = Array.from(logits, (value) => Math.exp(value - highest));
  const total = exponentials.reduce((sum, value) => sum + value, 0);
  return exponentials.map((value) => value / total);
}

/**
 * Answer rows greedily.
 * @param rows B arrays of T tokens.
 * @param shared the keys and values before them, see prefix.js.
 * @param start the position of a row's first token.
 * @param nNew how many tokens an answer has.
 * @returns {answers, logits}: B arrays of nNew tokens, and for each new token the logits (B, V).
 */
export function generate(model, rows, shared, start, nNew) {
  const [B, T, V] = [rows.length, rows[0].length, model.vocabSize];
  const cache = model.newCache(shared, B, T + nNew, start);
  const answers = rows.map(() => []);
  const allLogits = [];
  let tokens = rows.flat();
  for (let step = 0; step < nNew; step++) {
    const logits = model.forward(tokens, cache, 1);
    tokens = answers.map((answer, row) => {
      const token = argmax(logits, row * V, V);
      answer.push(token);
      return token;
    });
    allLogits.push(logits);
  }
  return { answers, logits: allLogits };
}
