import assert from "node:assert/strict";
import { test } from "node:test";

import { agreeing, apply, fitted, fromFour, fromUnitSquare, inverse } from "../src/homography.js";

const QUAD = [[70, 40], [478, 96], [440, 470], [30, 380]];
const SQUARE = [[0, 0], [1, 0], [1, 1], [0, 1]];

function near(found, expected) {
  for (const [i, value] of expected.entries()) assert.ok(Math.abs(found[i] - value) < 1e-6, `${found} is not ${expected}`);
}

test("a square's corners go to four points, and back", () => {
  const H = fromUnitSquare(QUAD);
  for (const [i, corner] of SQUARE.entries()) {
    near(apply(H, ...corner), QUAD[i]);
    near(apply(inverse(H), ...QUAD[i]), corner);
  }
});

test("four points go to four others", () => {
  const to = [[5, 5], [90, 0], [100, 80], [0, 100]];
  const H = fromFour(QUAD, to);
  for (const i of [0, 1, 2, 3]) near(apply(H, ...QUAD[i]), to[i]);
});

test("matches that a homography made agree, others do not", () => {
  const H = fromFour(SQUARE.map(([x, y]) => [500 * x, 500 * y]), QUAD);
  const count = 60;
  const a = Float32Array.from({ length: 2 * count }, (_, i) => (i * 7919) % 500);
  const b = new Float32Array(2 * count);
  for (let i = 0; i < count; i++) {
    const moved = i % 3 === 0 ? 40 + i : 0; // every third is wrong
    const [x, y] = apply(H, a[2 * i], a[2 * i + 1]);
    [b[2 * i], b[2 * i + 1]] = [x + moved, y - moved];
  }
  const rows = Int32Array.from({ length: 2 * count }, (_, i) => i >> 1);
  assert.deepEqual([...agreeing(a, b, rows)], Array.from({ length: count }, (_, i) => (i % 3 === 0 ? 0 : 1)));
});

/** Matches of points of a homography, each point off by up to some px in x and in y, every third anywhere. */
function inexact(H, count, offPx) {
  let state = 1;
  const random = () => (state = (state * 48271) % 2147483647) / 2147483647;
  const [a, b] = [new Float32Array(2 * count), new Float32Array(2 * count)];
  for (let i = 0; i < count; i++) {
    [a[2 * i], a[2 * i + 1]] = [500 * random(), 500 * random()];
    const place = i % 3 === 0 ? [500 * random(), 500 * random()] : apply(H, a[2 * i], a[2 * i + 1]);
    [b[2 * i], b[2 * i + 1]] = place.map((value) => value + offPx * (2 * random() - 1));
  }
  return [a, b, Int32Array.from({ length: 2 * count }, (_, i) => i >> 1)];
}

test("matches that are all a little off agree", () => {
  const H = fromFour(SQUARE.map(([x, y]) => [500 * x, 500 * y]), QUAD);
  const [a, b, rows] = inexact(H, 300, 2);
  const agree = agreeing(a, b, rows);
  const right = Array.from(agree).filter((one, i) => one && i % 3 !== 0).length;
  assert.ok(right > 0.97 * 200, `${right} of 200`);
});

test("a fitted homography is the one that made the matches", () => {
  const H = fromFour(SQUARE.map(([x, y]) => [500 * x, 500 * y]), QUAD);
  const [a, b, rows] = inexact(H, 60, 0);
  const found = fitted(a, b, rows, Uint8Array.from({ length: 60 }, (_, i) => (i % 3 === 0 ? 0 : 1)));
  for (const [x, y] of QUAD) {
    const [there, expected] = [apply(found, x, y), apply(H, x, y)];
    for (const axis of [0, 1]) assert.ok(Math.abs(there[axis] - expected[axis]) < 1e-3, `${there} is not ${expected}`);
  }
  const one = [new Float32Array(16), new Float32Array(16), Int32Array.from({ length: 16 }, (_, i) => i >> 1)];
  assert.equal(fitted(...one, new Uint8Array(8).fill(1)), null, "eight times the same point");
});

test("too few matches agree with nothing", () => {
  assert.equal(agreeing(new Float32Array(22), new Float32Array(22), Int32Array.from({ length: 22 }, (_, i) => i >> 1)), null);
});
