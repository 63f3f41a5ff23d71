import assert from "node:assert/strict";
import { test } from "node:test";

import { chosenLines } from "../src/draw.js";

const list = (count) => Array.from({ length: count }, (_, i) => i);
const counts = (agreeing, others, most) => {
  const { agree, other } = chosenLines(list(agreeing), list(others), most);
  return [agree.length, other.length];
};

test("no more lines than asked for, a fifth of other matches at most", () => {
  assert.deepEqual(counts(400, 300, 150), [120, 30]);
  assert.deepEqual(counts(400, 10, 150), [140, 10]);
  assert.deepEqual(counts(226, 52, 71), [57, 14]);
});

test("where few agree, other matches take their lines", () => {
  assert.deepEqual(counts(20, 300, 150), [20, 130]);
  assert.deepEqual(counts(0, 300, 150), [0, 150]);
  assert.deepEqual(counts(0, 0, 150), [0, 0]);
});

test("the lines are taken evenly from the whole list", () => {
  assert.deepEqual(chosenLines(list(10), [], 5).agree, [0, 2, 4, 6, 8]);
});
