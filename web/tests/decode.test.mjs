import assert from "node:assert/strict";
import { test } from "node:test";

import { decode, DEFAULTS, refine, sampleDescriptors, select } from "../src/decode.js";
import { place } from "../src/image.js";

const WIDTH = 40;
const HEIGHT = 32;
const at = (x, y) => y * WIDTH + x;

function scoresWith(points) {
  const scores = new Float32Array(WIDTH * HEIGHT);
  for (const [x, y, score] of points) scores[at(x, y)] = score;
  return scores;
}

const found = (points, options = {}) => select(scoresWith(points), WIDTH, HEIGHT, { ...DEFAULTS, ...options });

test("points come by falling score, equal ones in reading order", () => {
  assert.deepEqual(
    found([[30, 10, 0.2], [10, 20, 0.5], [10, 10, 0.2]]),
    [at(10, 20), at(10, 10), at(30, 10)],
  );
});

test("a score must be above the threshold, as float32", () => {
  assert.deepEqual(found([[10, 10, 0.005], [20, 20, 0.0051]]), [at(20, 20)]);
});

test("a higher point within 4 px suppresses, one 5 px away does not", () => {
  assert.deepEqual(found([[10, 10, 0.5], [14, 14, 0.4]]), [at(10, 10)]);
  assert.deepEqual(found([[10, 10, 0.5], [15, 10, 0.4]]), [at(10, 10), at(15, 10)]);
});

test("equal neighbors both survive", () => {
  assert.deepEqual(found([[10, 10, 0.5], [11, 10, 0.5]]), [at(10, 10), at(11, 10)]);
});

test("a suppressed point suppresses no further: a chain gives its ends, in two rounds after the first", () => {
  const chain = [0, 1, 2, 3, 4, 5].map((k) => [8 + 4 * k, 16, 0.9 - 0.1 * k]);
  assert.deepEqual(found(chain, { removeBordersPx: 0 }), [at(8, 16), at(16, 16), at(24, 16)]);
});

test("the border yields no points, but its points suppress", () => {
  assert.deepEqual(found([[3, 16, 0.9], [4, 16, 0.5], [36, 10, 0.9], [35, 20, 0.1]]), [at(35, 20)]);
});

test("the best so many are kept", () => {
  assert.deepEqual(found([[10, 10, 0.3], [20, 10, 0.4], [30, 10, 0.5]], { maxKeypoints: 2 }), [at(30, 10), at(20, 10)]);
});

test("a point moves to the center of the scores around it", () => {
  const scores = scoresWith([[10, 10, 0.6], [11, 10, 0.3], [10, 12, 0.1], [13, 10, 0.9]]);
  const [x, y] = refine([at(10, 10)], scores, WIDTH, HEIGHT);
  assert.ok(Math.abs(x - 10.3) < 1e-6 && Math.abs(y - 10.2) < 1e-6, `${x}, ${y}`);
});

test("at the corner, pixels outside the picture count 0", () => {
  const [x, y] = refine([at(0, 0)], scoresWith([[0, 0, 0.5], [1, 0, 0.5]]), WIDTH, HEIGHT);
  assert.deepEqual([x, y], [0.5, 0]);
});

test("descriptors are interpolated between cell centers, and have unit length", () => {
  const grid = { values: Float32Array.from([1, 0, 0, 1]), dim: 2, columns: 2, rows: 1 };
  const model = { stridePx: 8, sampling: "half-pixel" };
  const sample = (x) => [...sampleDescriptors(Float32Array.from([x, 3.5]), grid, model)];
  assert.deepEqual(sample(3.5), [1, 0]);
  assert.deepEqual(sample(0), [1, 0]);
  assert.deepEqual(sample(11.5), [0, 1]);
  for (const value of sample(7.5)) assert.ok(Math.abs(value - Math.SQRT1_2) < 1e-6);
});

test("padding finds no points", () => {
  const placement = place(WIDTH - 5, HEIGHT - 3);
  const scores = scoresWith([[WIDTH - 2, 10, 0.9], [10, HEIGHT - 1, 0.9], [20, 16, 0.5]]);
  const outputs = { scores, descriptors: new Float32Array(20).fill(1), dim: 1 };
  const model = { stridePx: 8, sampling: "half-pixel" };
  const { xy, descriptors } = decode(outputs, placement, { ...DEFAULTS, subpixel: false }, model);
  assert.deepEqual([[...xy], [...descriptors]], [[20, 16], [1]]);
});
